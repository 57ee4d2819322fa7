"""The calls of the Container Runtime Interface that are made, each with its timeout, and its stream of events.

Flows in: a runtime's Unix socket (gRPC, service runtime.v1.RuntimeService). Flows out: decoded messages; items of lists
stay encoded, so that the reader can skip a malformed one. gRPC's own exceptions end here.
"""

import queue
import threading
from typing import TYPE_CHECKING, TypeVar

from exporter.contract import Context, Unsupported

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from exporter.monitors.runtimes import cri_pb2

    Answer = TypeVar("Answer", bound=Message)

TIMEOUT = 5.0
"""Seconds that the runtime may take for an answer."""
ANSWER_LIMIT = 16 << 20
"""Bytes of one answer; containerd itself sends at most as much."""
_QUEUE = 2048
_SERVICE = "/runtime.v1.RuntimeService/"


class Client:
    """A connection to a runtime.

    Its calls raise Unsupported for a call that the runtime does not have, LookupError for a container that is gone,
    TimeoutError and ConnectionError where nobody answers, ValueError for an answer that is of no use.
    """

    def __init__(self, path: str) -> None:
        """Prepare; the first call connects. Raises Unsupported where a package is missing."""
        try:
            import grpc  # noqa: PLC0415 - 21 MB that only a machine with a CRI pays

            from exporter.monitors.runtimes import cri_pb2  # noqa: PLC0415 - as above
        except ImportError as error:
            raise Unsupported(
                f"a package for the CRI is missing: {error}", "install cni-exporter anew by pip"
            ) from error
        self._grpc = grpc
        self._pb = cri_pb2
        options = [
            ("grpc.max_receive_message_length", ANSWER_LIMIT),
            ("grpc.default_authority", "localhost"),  # the socket's path is none, says Go's HTTP/2
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),  # no failed connection of an earlier source is taken over
        ]
        self._channel = grpc.insecure_channel(f"unix:{path}", options=options)

    def version(self) -> "cri_pb2.VersionResponse":
        """Ask for the runtime's name and version."""
        return self._call("Version", self._pb.VersionRequest(version="v1"), self._pb.VersionResponse)

    def sandboxes(self) -> list[bytes]:
        """List the pods' sandboxes, each an encoded PodSandbox."""
        answer = self._call("ListPodSandbox", self._pb.ListPodSandboxRequest(), self._pb.ListPodSandboxResponse)
        return list(answer.items)

    def containers(self) -> list[bytes]:
        """List the containers, each an encoded Container."""
        answer = self._call("ListContainers", self._pb.ListContainersRequest(), self._pb.ListContainersResponse)
        return list(answer.containers)

    def sandbox_status(self, sandbox_id: str) -> "cri_pb2.PodSandboxStatus":
        """Ask for a sandbox's network."""
        request = self._pb.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id)
        return self._call("PodSandboxStatus", request, self._pb.PodSandboxStatusResponse).status

    def container_status(self, container_id: str, *, verbose: bool) -> "cri_pb2.ContainerStatusResponse":
        """Ask for a container's details; `verbose` adds the runtime's own description, with the environment in it."""
        request = self._pb.ContainerStatusRequest(container_id=container_id, verbose=verbose)
        return self._call("ContainerStatus", request, self._pb.ContainerStatusResponse)

    def events(self, context: Context) -> "EventStream":
        """Subscribe to the containers' events."""
        begin = self._channel.unary_stream(f"{_SERVICE}GetContainerEvents", None, None)
        call = begin(self._pb.GetEventsRequest().SerializeToString())
        lost = {self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.CANCELLED}
        return EventStream(call, context, self._pb.ContainerEventResponse, self._grpc.RpcError, lost)

    def close(self) -> None:
        """Close the connection; calls under way end."""
        self._channel.close()

    def _call(self, name: str, request: "Message", kind: "type[Answer]") -> "Answer":
        try:
            answer = self._channel.unary_unary(_SERVICE + name, None, None)(
                request.SerializeToString(), timeout=TIMEOUT
            )
        except self._grpc.RpcError as error:
            raise self._translated(name, error) from None
        return decode(answer, kind)

    def _translated(self, name: str, error: "grpc.RpcError") -> Exception:
        code, said = error.code(), str(error.details())[:200]
        kinds: dict[object, type[Exception]] = {
            self._grpc.StatusCode.UNIMPLEMENTED: Unsupported,
            self._grpc.StatusCode.NOT_FOUND: LookupError,
            self._grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
            self._grpc.StatusCode.UNAVAILABLE: ConnectionError,
            self._grpc.StatusCode.CANCELLED: ConnectionError,
        }
        return kinds.get(code, ValueError)(f"the runtime answered {name} with {code.name}: {said}")


class EventStream:
    """The runtime's events, read by a thread of its own into a bounded queue."""

    def __init__(
        self,
        call: "grpc.CallIterator[bytes]",
        context: Context,
        kind: "type[cri_pb2.ContainerEventResponse]",
        failure: type[Exception],
        lost: "set[grpc.StatusCode]",
    ) -> None:
        """Read from the call until it ends or is closed; codes in `lost` say that the runtime is gone."""
        self._call = call
        self._context = context
        self._kind = kind
        self._failure = failure
        self._queue: queue.Queue[cri_pb2.ContainerEventResponse] = queue.Queue(_QUEUE)
        self._overflow = threading.Event()
        self._closing = False
        self.ended = threading.Event()
        self.reason = "the runtime closed it"
        self.refused = False
        """Whether the runtime lives and will not stream events."""
        self._lost = lost
        self._thread = threading.Thread(target=self._run, name="cri-events", daemon=True)
        self._thread.start()

    def take(self) -> "list[cri_pb2.ContainerEventResponse]":
        """Take what has come since the last call."""
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def overflowed(self) -> bool:
        """Tell, once, whether events were shed."""
        overflow = self._overflow.is_set()
        self._overflow.clear()
        return overflow

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._thread.join(TIMEOUT)

    def _run(self) -> None:
        try:
            for item in self._call:
                self._take_in(item)
        except self._failure:
            self.refused = self._call.code() not in self._lost
            self.reason = f"{self._call.code().name}: {str(self._call.details())[:200]}"
        self.ended.set()
        if not self._closing:
            self._context.wake()

    def _take_in(self, item: bytes) -> None:
        try:
            self._queue.put_nowait(decode(item, self._kind))
        except ValueError as error:
            self._context.error("cri_event", f"an event cannot be read: {error}")
            self._overflow.set()
        except queue.Full:
            self._overflow.set()
            self._context.dropped()
        self._context.wake()


def decode(encoded: bytes, kind: "type[Answer]") -> "Answer":
    """Decode a message. Raises ValueError where it is malformed; unknown fields are no error."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - comes with the CRI's packages

    try:
        return kind.FromString(encoded)
    except DecodeError as error:
        raise ValueError(f"no valid {kind.__name__}: {error}") from error
