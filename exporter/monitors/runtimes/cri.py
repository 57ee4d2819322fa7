"""containerd and CRI-O through the Container Runtime Interface: pods and their containers.

Flows in: lists and statuses, at each event where the runtime streams them, else as often as somebody wants to know.
Flows out: records into the table of containers, counts of lifecycle events, and these events.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeVar

from exporter.contract import Context, Source, Unsupported
from exporter.monitors.runtimes import sockets
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.cri_client import Client, EventStream, decode
from exporter.monitors.runtimes.record import LIVE, Metadata, Record, Rows, kept, lifecycle, tell, text

if TYPE_CHECKING:
    from exporter.load.admission import KeptEvent
    from exporter.monitors.runtimes import cri_pb2

    Item = TypeVar("Item", cri_pb2.PodSandbox, cri_pb2.Container)

_RELIST = 60.0
_PING = 10.0
_ASKING = 1.0
"""Seconds of one update that go into the details of single containers."""
_REFUSAL = 0.5
"""Seconds in which a runtime without events says so."""
_PROBE_AGAIN = 300.0
"""Seconds after which a runtime that had no events is asked again: it may have been upgraded."""

_STATES = ("created", "running", "exited", "unknown")
"""By number of ContainerState."""
_EVENTS = ("create", "start", "die", "remove")
"""By number of ContainerEventType."""
_COUNTER = "cni_container_events_total"
_OOM = "OOMKilled"
"""ContainerStatus.reason, the word that the kubelet relies on."""
_NODE = 2
"""NamespaceMode of the host's own namespace."""
_POD, _NAMESPACE, _CONTAINER = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace", "io.kubernetes.container.name"


@dataclass(frozen=True, slots=True)
class _Details:
    """What only a status tells, asked once."""

    image: str = ""
    networks: Rows = ()
    mounts: Rows = ()
    environment: Rows = ()


class Cri(Source):
    """What both rungs share: the connection, and a full list."""

    floor: ClassVar[bool]
    """Whether no rung is below this one."""

    def __init__(self, runtime: str, table: Containers, metadata: Metadata, paths: Iterable[str]) -> None:
        """Look for the runtime (containerd or cri-o) at `paths`."""
        self._runtime = runtime
        self._table = table
        self._metadata = metadata
        self._paths = tuple(paths)
        self._client: Client | None = None
        self._pods: dict[str, tuple[str, str]] = {}
        self._details: dict[str, _Details] = {}
        self._states: dict[str, str] | None = None
        self._complete = False
        self._untold: list[KeptEvent] = []
        """Events of this update, for those who watch: the names are published first."""

    def open(self, context: Context) -> None:
        """Connect. Raises Unsupported where there is no CRI, ConnectionError or TimeoutError where it is silent."""
        super().open(context)
        try:
            self._client = Client(sockets.find(self._paths, self._runtime))
            self._greet(self._client)
        except Unsupported:
            if self.floor:
                self._table.absent(self._runtime)
            raise
        for name in (*_EVENTS, "oom"):
            self.context.families.add(_COUNTER, (self._runtime, name), 0)

    def close(self) -> None:
        """Close the connection."""
        self._table.down(self._runtime, self)
        if self._client:
            self._client.close()

    def _greet(self, client: Client) -> None:
        try:
            client.version()
        except Unsupported as error:
            raise Unsupported(
                f"{self._runtime} answers, but its CRI plugin is off",
                'take "cri" out of disabled_plugins in its configuration (Docker\'s package puts it there)',
            ) from error

    def _list(self) -> None:
        """Bring the table up to date. Raises what the client's calls raise."""
        client = self._open_client()
        sandboxes = list(self._sandboxes(client.sandboxes()))
        self._pods = {record.container_id: (record.namespace, record.pod) for record in sandboxes}
        containers = list(self._containers(client.containers()))
        records = sandboxes + containers
        self._details = {
            one.container_id: self._details[one.container_id] for one in records if one.container_id in self._details
        }
        self._ask(client, records)
        shed = self._table.reconcile(self._runtime, [self._completed(record) for record in records])
        self._shed(shed)
        self._table.up(self._runtime, self)
        self._compare(client, {record.container_id: record.state for record in containers})

    def _open_client(self) -> Client:
        if self._client is None:
            raise ConnectionError(f"the {self._runtime} source is not open")
        return self._client

    def _sandboxes(self, items: Iterable[bytes]) -> Iterator[Record]:
        from exporter.monitors.runtimes import cri_pb2  # noqa: PLC0415 - needs protobuf, which the client has found

        for item in self._decoded(items, cri_pb2.PodSandbox):
            yield Record(
                text(item.id),
                self._runtime,
                "running" if item.state == cri_pb2.SANDBOX_READY else "exited",
                namespace=text(item.metadata.namespace),
                pod=text(item.metadata.name),
                sandbox=True,
                created=item.created_at / 1e9,
                labels=self._metadata.keep_labels(item.labels, self._shed),
                annotations=self._metadata.keep_annotations(item.annotations, self._shed),
            )

    def _containers(self, items: Iterable[bytes]) -> Iterator[Record]:
        from exporter.monitors.runtimes import cri_pb2  # noqa: PLC0415 - as above

        for item in self._decoded(items, cri_pb2.Container):
            labels = item.labels
            pod = self._pods.get(item.pod_sandbox_id) or (text(labels.get(_NAMESPACE)), text(labels.get(_POD)))
            yield Record(
                text(item.id),
                self._runtime,
                _STATES[item.state] if 0 <= item.state < len(_STATES) else "unknown",
                namespace=pod[0],
                pod=pod[1],
                container=text(item.metadata.name) or text(labels.get(_CONTAINER)) or text(item.id)[:12],
                image=text(item.image.image),
                created=item.created_at / 1e9,
                labels=self._metadata.keep_labels(labels, self._shed),
                annotations=self._metadata.keep_annotations(item.annotations, self._shed),
            )

    def _decoded(self, items: Iterable[bytes], kind: "type[Item]") -> "Iterator[Item]":
        """Decode a list's items; one that is malformed or has no id is counted and skipped."""
        for encoded in items:
            try:
                item = decode(encoded, kind)
            except ValueError as error:
                self.context.error("cri_answer", f"an item of a list cannot be read: {error}")
                continue
            if item.id:
                yield item
            else:
                self.context.error("cri_answer", f"a {kind.__name__} in a list has no id")

    def _ask(self, client: Client, records: Iterable[Record]) -> None:
        """Ask for what only a status tells, once per container, for a bounded time; the rest at the next update."""
        until = time.monotonic() + _ASKING
        new = [record for record in records if record.container_id not in self._details and record.state in LIVE]
        self._complete = True
        for record in new:
            if time.monotonic() >= until:
                self._complete = False
                self.context.wake()
                return
            try:
                details = self._sandbox(client, record) if record.sandbox else self._container(client, record)
            except LookupError:
                continue  # it is gone; the next list says so
            except ValueError as error:
                self.context.error("cri_answer", f"container {record.container_id[:12]}: {error}")
                details = _Details()
            self._details[record.container_id] = details

    def _sandbox(self, client: Client, record: Record) -> _Details:
        status = client.sandbox_status(record.container_id)
        mode = "host" if status.linux.namespaces.options.network == _NODE else "pod"
        addresses = [status.network.ip, *(more.ip for more in status.network.additional_ips)]
        rows = [(mode, "", address) for address in addresses if address] or [(mode, "", "")]
        return _Details(networks=kept(rows, self._shed) if self._metadata.enabled else ())

    def _container(self, client: Client, record: Record) -> _Details:
        verbose = self._metadata.wants_environment
        answer = client.container_status(record.container_id, verbose=verbose)
        image = text(answer.status.image.image)
        if not self._metadata.enabled:
            return _Details(image)
        # The CRI tells where a mount comes from (never kept) and where it goes, but not its type: all are bind mounts.
        mounts = ((mount.container_path, "bind", "ro" if mount.readonly else "rw") for mount in answer.status.mounts)
        environment = self._metadata.keep_environment(_environment(answer.info.get("info", "")), self._shed)
        return _Details(image, (), kept(mounts, self._shed), environment)

    def _completed(self, record: Record) -> Record:
        details = self._details.get(record.container_id)
        if not details:
            return record
        return replace(
            record,
            image=details.image or record.image,
            networks=details.networks,
            mounts=details.mounts,
            environment=details.environment,
        )

    def _compare(self, client: Client, states: dict[str, str]) -> None:
        """Count what happened since the last list."""
        before, self._states = self._states, states
        if before is None:
            return
        for container_id in before.keys() | states.keys():
            old, new = before.get(container_id, ""), states.get(container_id, "")
            if old != new:
                self._passed(container_id, old, new)
            if new == "exited" != old and self._was_killed_for_memory(client, container_id):
                self._count("oom", container_id)

    def _passed(self, container_id: str, old: str, new: str) -> None:
        """Count the steps between two states; the empty one is before the creation and after the removal."""
        if not old:
            self._count("create", container_id)
        if new == "running" or (new == "exited" and old in {"", "created"}):
            self._count("start", container_id)
        if old == "running" or (new == "exited" and old in {"", "created"}):
            self._count("die", container_id)
        if not new:
            self._count("remove", container_id)

    def _was_killed_for_memory(self, client: Client, container_id: str) -> bool:
        try:
            return client.container_status(container_id, verbose=False).status.reason == _OOM
        except (LookupError, ValueError):
            return False

    def _count(self, event: str, container_id: str) -> None:
        self.context.families.add(_COUNTER, (self._runtime, event))
        self._untold.append(lifecycle(self._runtime, event, container_id, time.time()))

    def _publish(self) -> None:
        self._table.publish(self.context.families)
        for event in self._untold:
            tell(self.context.events, event)
        self._untold.clear()

    def _shed(self, count: int) -> None:
        if count:
            self.context.dropped(count)


class CriEvents(Cri):
    """Lists at each event that the runtime streams (containerd 1.7, CRI-O with enable_pod_events), and every minute."""

    mode = "events"
    floor = False

    def __init__(
        self, runtime: str, table: Containers, metadata: Metadata, paths: Iterable[str], probed: dict[str, float]
    ) -> None:
        """As for every source of the CRI; `probed` keeps when the runtime last had no events, for the next source."""
        super().__init__(runtime, table, metadata, paths)
        self._probed = probed
        self._stream: EventStream | None = None
        self._next_list = self._next_ping = 0.0

    def open(self, context: Context) -> None:
        """Connect and subscribe. Raises Unsupported also where the runtime streams no events."""
        if time.monotonic() < self._probed.get(self._runtime, float("-inf")) + _PROBE_AGAIN:
            raise _no_events(self._runtime, "as when it was last asked")
        super().open(context)
        self._stream = stream = self._open_client().events(context)
        if stream.ended.wait(_REFUSAL) and stream.refused:
            self._probed[self._runtime] = time.monotonic()
            raise _no_events(self._runtime, stream.reason)

    def update(self) -> None:
        """List if something happened, or once a minute. Raises ConnectionError where the stream ended."""
        client, stream = self._open_client(), self._stream
        if stream is None:
            raise ConnectionError(f"the {self._runtime} source is not open")
        events, now = stream.take(), time.monotonic()
        for event in events:
            sandbox = event.container_id in self._pods or event.container_id == event.pod_sandbox_status.id
            if not sandbox and 0 <= event.container_event_type < len(_EVENTS):
                self._count(_EVENTS[event.container_event_type], event.container_id)
        if stream.ended.is_set():
            raise ConnectionError(f"{self._runtime} ended its event stream: {stream.reason}")
        if events or stream.overflowed() or not self._complete or now >= self._next_list:
            self._next_list, self._next_ping = now + _RELIST, now + _PING
            self._list()
        elif now >= self._next_ping:
            self._next_ping = now + _PING
            client.version()
        self._publish()

    def close(self) -> None:
        """End the stream and its thread."""
        if self._stream:
            self._stream.close()
        super().close()

    def _passed(self, container_id: str, old: str, new: str) -> None:
        """Leave the counting to the stream, which misses nothing."""


class CriList(Cri):
    """Lists at every update. A container that lives shorter than the time between two is not seen."""

    mode = "list"
    floor = True

    def update(self) -> None:
        """List. Raises what the client's calls raise."""
        self._list()
        self._publish()


def _no_events(runtime: str, reason: str) -> Unsupported:
    return Unsupported(
        f"{runtime} streams no container events ({reason})", "containerd 1.7 does, and CRI-O with enable_pod_events"
    )


def _environment(info: str) -> object:
    """Find the variables in the runtime's own description, the same in containerd and CRI-O: an OCI runtime spec."""
    try:
        return json.loads(info)["runtimeSpec"]["process"]["env"] if info else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
