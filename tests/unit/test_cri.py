"""The CRI's sources against a real gRPC server on a Unix socket, which answers well and badly."""

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.contract import Unsupported
from exporter.monitors.runtimes import cri, cri_client, cri_pb2
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.cri import Cri, CriEvents, CriList
from exporter.monitors.runtimes.cri_client import decode
from exporter.monitors.runtimes.record import Metadata

POD, APP, JOB = "0" * 64, "a" * 64, "b" * 64


class Runtime:
    """A containerd as far as it is asked; every answer can be replaced by bytes or by a status code."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pods = {POD: cri_pb2.SANDBOX_READY}
        self.states = {APP: cri_pb2.CONTAINER_RUNNING}
        self.labels: dict[str, str] = {"app.name": "shop", "token": "s3cret"}
        self.annotations: dict[str, str] = {"example.com/owner": "net", "example.com/note": "s3cret"}
        self.reason = ""
        self.answers: dict[str, bytes | grpc.StatusCode] = {}
        self.extra: list[bytes] = []
        self.events: queue.Queue[bytes | None] | None = None
        self.asked: list[str] = []
        self.over = threading.Event()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[("grpc.max_send_message_length", 64 << 20)],
            maximum_concurrent_rpcs=8,
        )
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = call.method.rpartition("/")[2]
        self.asked.append(name)
        if name == "GetContainerEvents":
            return grpc.unary_stream_rpc_method_handler(self._stream) if self.events else None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self._answer(name, request, context))

    def stop(self) -> None:
        self.over.set()
        if self.events:
            self.events.put(None)
        self._server.stop(0).wait(5)

    def happen(self, kind: int, container_id: str = APP) -> None:
        assert self.events
        event = cri_pb2.ContainerEventResponse(container_id=container_id, container_event_type=kind)  # type: ignore[arg-type]
        event.pod_sandbox_status.id = POD
        self.events.put(event.SerializeToString())

    def _answer(self, name: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        replaced = self.answers.get(name)
        if isinstance(replaced, grpc.StatusCode):
            context.abort(replaced, "as the test wants it")
        if replaced == b"silence":
            self.over.wait(30)
        if isinstance(replaced, bytes):
            return replaced
        answer: bytes = getattr(self, f"_{name}")(request)
        return answer

    def _stream(self, _: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        assert self.events
        while event := self.events.get():
            if event == b"unavailable":
                context.abort(grpc.StatusCode.UNAVAILABLE, "as the test wants it")
            yield event

    def _Version(self, _: bytes) -> bytes:  # noqa: N802 - the call's name
        return cri_pb2.VersionResponse(runtime_name="containerd", runtime_version="1.7").SerializeToString()

    def _ListPodSandbox(self, _: bytes) -> bytes:  # noqa: N802 - as above
        metadata = cri_pb2.PodSandboxMetadata(name="shop-0", namespace="prod", uid="u")
        pods = [
            cri_pb2.PodSandbox(id=pod, metadata=metadata, state=state, labels=self.labels, annotations=self.annotations)
            for pod, state in self.pods.items()
        ]
        return cri_pb2.ListPodSandboxResponse(items=[pod.SerializeToString() for pod in pods]).SerializeToString()

    def _ListContainers(self, _: bytes) -> bytes:  # noqa: N802 - as above
        containers = [
            cri_pb2.Container(
                id=one,
                pod_sandbox_id=POD,
                metadata=cri_pb2.ContainerMetadata(name=f"app-{one[0]}"),
                image=cri_pb2.ImageSpec(image="sha256:0"),
                state=state,
                created_at=17 * 10**17,
                labels=self.labels,
                annotations=self.annotations,
            )
            for one, state in self.states.items()
        ]
        items = [one.SerializeToString() for one in containers]
        return cri_pb2.ListContainersResponse(containers=items + self.extra).SerializeToString()

    def _PodSandboxStatus(self, _: bytes) -> bytes:  # noqa: N802 - as above
        answer = cri_pb2.PodSandboxStatusResponse()
        answer.status.network.ip = "10.0.0.7"
        answer.status.network.additional_ips.add(ip="fd00::7")
        return answer.SerializeToString()

    def _ContainerStatus(self, request: bytes) -> bytes:  # noqa: N802 - as above
        answer = cri_pb2.ContainerStatusResponse()
        answer.status.image.image = "docker.io/local/shop:1"
        answer.status.reason = self.reason
        answer.status.mounts.add(container_path="/data", readonly=True)
        if cri_pb2.ContainerStatusRequest.FromString(request).verbose:
            process = {"env": ["LANG=C", "TOKEN=hunter2"]}
            answer.info["info"] = json.dumps({"runtimeSpec": {"process": process}})
        return answer.SerializeToString()


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    server = Runtime(str(tmp_path / "c.sock"))
    yield server
    server.stop()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


Make = Callable[..., Cri]


@pytest.fixture
def make(runtime: Runtime, recorder: Recorder) -> Iterator[Make]:
    """Maker of opened and updated sources, which are closed in the end."""
    sources: list[Cri] = []
    table = Containers(["containerd"])

    def opened(kind: type[Cri] = CriList, metadata: Metadata | None = None) -> Cri:
        more = ({},) if kind is CriEvents else ()
        source = kind("containerd", table, metadata or Metadata(labels=("app.*",)), [runtime.path], *more)
        sources.append(source)
        source.open(recorder)
        source.update()
        return source

    yield opened
    for source in sources:
        source.close()
    assert not [one for one in threading.enumerate() if one.name == "cri-events"]


def info(recorder: Recorder) -> set[tuple[str, ...]]:
    return set(recorder.families.snapshots["cni_container_info"])


def counts(recorder: Recorder) -> dict[str, float]:
    """Events that happened at all."""
    series = recorder.families.snapshots["cni_container_events_total"]
    return {key[1]: count for key, count in series.items() if count}


def awake(recorder: Recorder, wakes: int = 1) -> None:
    deadline = time.monotonic() + 5
    while recorder.wakes < wakes:
        assert time.monotonic() < deadline, "the source did not wake"
        time.sleep(0.001)


def test_pods_and_containers_are_listed(make: Make, recorder: Recorder) -> None:
    """A pod is an entry without container, its containers carry its names; details come from the statuses."""
    make()
    assert info(recorder) == {
        (POD, "prod", "shop-0", "", "", "containerd"),
        (APP, "prod", "shop-0", "app-a", "docker.io/local/shop:1", "containerd"),
    }
    families = recorder.families.snapshots
    assert families["cni_container_network_info"] == {(POD, "pod", "", "10.0.0.7"): 1, (POD, "pod", "", "fd00::7"): 1}
    assert families["cni_container_mount_info"] == {(APP, "/data", "bind", "ro"): 1}
    assert families["cni_container_label_info"] == {(POD, "app.name", "shop"): 1, (APP, "app.name", "shop"): 1}
    assert families["cni_containers"]["containerd", "running"] == 1
    assert "s3cret" not in repr(recorder)


def test_details_are_asked_once(make: Make, runtime: Runtime) -> None:
    """A list in which nothing is new costs two calls."""
    source = make()
    runtime.asked.clear()
    source.update()
    assert runtime.asked == ["ListPodSandbox", "ListContainers"]


def test_a_pod_on_the_hosts_network(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """It has a mode and no address of its own."""
    answer = cri_pb2.PodSandboxStatusResponse()
    answer.status.linux.namespaces.options.network = cri_pb2.NODE
    runtime.answers["PodSandboxStatus"] = answer.SerializeToString()
    make()
    assert recorder.families.snapshots["cni_container_network_info"] == {(POD, "host", "", ""): 1}


def test_annotations_are_kept_where_they_are_allowed(make: Make, recorder: Recorder) -> None:
    """Of pods and containers, by name; without the allow-list none is kept."""
    make()
    assert recorder.families.snapshots["cni_container_annotation_info"] == {}
    make(metadata=Metadata(annotations=("*/owner",)))
    kept = recorder.families.snapshots["cni_container_annotation_info"]
    assert {key[1:] for key in kept} == {("example.com/owner", "net")}
    assert POD in {key[0] for key in kept}
    assert len(kept) > 1


def test_names_from_labels_where_the_pod_is_not_listed(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """Between the two lists a pod may have come: the kubelet's labels name it as well."""
    runtime.pods.clear()
    runtime.labels = {"io.kubernetes.pod.name": "late", "io.kubernetes.pod.namespace": "prod"}
    make()
    assert {key[1:4] for key in info(recorder)} == {("prod", "late", "app-a")}


def test_variables_by_policy(make: Make, recorder: Recorder) -> None:
    """An allowed value is shown, another variable by name alone, and its value is nowhere."""
    make(metadata=Metadata(environment=("LANG",), environment_names=True))
    assert recorder.families.snapshots["cni_container_environment_info"] == {
        (APP, "LANG", "C"): 1,
        (APP, "TOKEN", ""): 1,
    }
    assert "hunter2" not in repr(recorder)


def test_a_life_is_counted_from_lists(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """What lies between two lists is counted, also what was skipped over; the first list counts nothing."""
    source = make()
    assert counts(recorder) == {}
    runtime.states[JOB] = cri_pb2.CONTAINER_CREATED
    source.update()
    assert counts(recorder) == {"create": 1}
    runtime.states[JOB] = cri_pb2.CONTAINER_RUNNING
    source.update()
    assert counts(recorder) == {"create": 1, "start": 1}
    runtime.states[JOB] = cri_pb2.CONTAINER_EXITED
    runtime.reason = "OOMKilled"
    source.update()
    assert counts(recorder) == {"create": 1, "start": 1, "die": 1, "oom": 1}
    runtime.states = {POD: cri_pb2.CONTAINER_EXITED}  # one that came and ended, and two that were removed
    runtime.reason = "Completed"
    source.update()
    assert counts(recorder) == {"create": 2, "start": 2, "die": 3, "oom": 1, "remove": 2}
    assert Counter(event.kind for event in recorder.events.kept) == counts(recorder)


def test_events_lead_to_lists(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """With a stream nothing is asked in between; an event is counted and shows the container at once."""
    runtime.events = queue.Queue()
    source = make(CriEvents)
    runtime.asked.clear()
    source.update()
    assert runtime.asked == []
    runtime.states[JOB] = cri_pb2.CONTAINER_RUNNING
    runtime.happen(cri_pb2.CONTAINER_CREATED_EVENT, JOB)
    runtime.happen(cri_pb2.CONTAINER_STARTED_EVENT, JOB)
    runtime.happen(cri_pb2.CONTAINER_STARTED_EVENT, POD)
    awake(recorder, 3)
    source.update()
    assert JOB in {key[0] for key in info(recorder)}
    assert counts(recorder) == {"create": 1, "start": 1}
    del runtime.states[JOB]
    runtime.happen(cri_pb2.CONTAINER_DELETED_EVENT, JOB)
    awake(recorder, 4)
    source.update()
    assert JOB not in {key[0] for key in info(recorder)}
    assert counts(recorder) == {"create": 1, "start": 1, "remove": 1}
    told = [(event.kind, event.container_id) for event in recorder.events.kept]
    assert told == [("create", JOB), ("start", JOB), ("remove", JOB)]


def test_malformed_events_are_counted(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """An event that cannot be read is an error, and a list makes up for it."""
    runtime.events = queue.Queue()
    source = make(CriEvents)
    runtime.asked.clear()
    runtime.events.put(b"\xff\xff")
    awake(recorder)
    source.update()
    assert recorder.error_kinds() == ["cri_event"]
    assert "ListContainers" in runtime.asked


def test_a_full_queue_is_counted_and_mended(
    make: Make, runtime: Runtime, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events over the bound are counted as shed; the list that follows has everything."""
    monkeypatch.setattr(cri_client, "_QUEUE", 5)
    runtime.events = queue.Queue()
    source = make(CriEvents)
    for _ in range(12):
        runtime.happen(cri_pb2.CONTAINER_STOPPED_EVENT)
    awake(recorder, 12)
    source.update()
    assert recorder.shed == 7
    assert counts(recorder) == {"die": 5}


def test_the_end_of_the_stream_is_a_failure(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """A runtime that stops wakes the source, which fails."""
    runtime.events = queue.Queue()
    source = make(CriEvents)
    runtime.events.put(None)
    awake(recorder)
    with pytest.raises(ConnectionError):
        source.update()


def test_a_runtime_that_dies_is_not_one_without_events(runtime: Runtime) -> None:
    """A stream that ends at once because the runtime went away is a failure, and the next try asks for events again."""
    runtime.events = queue.Queue()
    runtime.events.put(b"unavailable")
    probed: dict[str, float] = {}
    source = CriEvents("containerd", Containers(["containerd"]), Metadata(), [runtime.path], probed)
    source.open(Recorder())
    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
        source.update()
    source.close()
    assert probed == {}


def test_a_runtime_without_events(make: Make, runtime: Runtime) -> None:
    """UNIMPLEMENTED is the next rung's turn, and is not asked again at each try."""
    probed: dict[str, float] = {}
    for _ in range(2):
        source = CriEvents("containerd", Containers(["containerd"]), Metadata(), [runtime.path], probed)
        with pytest.raises(Unsupported, match="no container events"):
            source.open(Recorder())
        source.close()
    assert runtime.asked.count("GetContainerEvents") == 1
    make(CriList)


def test_a_disabled_plugin_is_unsupported(make: Make, runtime: Runtime) -> None:
    """A containerd whose CRI is off says so; the remedy names the setting."""
    runtime.answers["Version"] = grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(Unsupported, match="plugin is off") as refused:
        make()
    assert "disabled_plugins" in refused.value.remedy


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, ConnectionError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimeoutError),
        (grpc.StatusCode.UNKNOWN, ValueError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ValueError),
    ],
)
def test_failures_of_lists_are_built_in_errors(
    make: Make, runtime: Runtime, code: grpc.StatusCode, expected: type[Exception]
) -> None:
    """What gRPC reports becomes an error of the house, which names call and code."""
    runtime.answers["ListContainers"] = code
    with pytest.raises(expected, match=f"ListContainers.*{code.name}"):
        make()


def test_a_silent_runtime_times_out(make: Make, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that accepts and never answers is a failure within the timeout."""
    monkeypatch.setattr(cri_client, "TIMEOUT", 0.5)
    runtime.answers["ListPodSandbox"] = b"silence"
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        make()
    assert time.monotonic() - started < 1.0


def test_malformed_items_are_counted_and_skipped(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """Rubbish, invalid UTF-8, a missing id and a wrong wire type cost themselves alone; unknown states are unknown."""
    odd = cri_pb2.Container(id=JOB, pod_sandbox_id=POD, metadata=cri_pb2.ContainerMetadata(name="odd"))
    odd.state = 77  # type: ignore[assignment]
    runtime.extra = [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"", b"\x08\x05", odd.SerializeToString()]
    make()
    assert {key[0] for key in info(recorder)} == {POD, APP, JOB}
    assert recorder.error_kinds() == ["cri_answer"] * 4
    assert recorder.families.value("cni_container_state", (JOB, "unknown")) == 1


def test_ten_megabytes_of_labels(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """They are bounded, counted, and no reason to fail."""
    runtime.pods.clear()
    runtime.labels = {f"app.{index}": "v" * 2000 for index in range(5_000)}
    started = time.process_time()
    make()
    assert time.process_time() - started < 2
    rows = recorder.families.snapshots["cni_container_label_info"]
    assert len(rows) == 64
    assert all(0 < len(key[2]) <= 1024 for key in rows)
    assert recorder.shed == 5_000 - 64


def test_an_answer_over_the_limit(make: Make, runtime: Runtime, recorder: Recorder) -> None:
    """A status over 16 MB is counted and its container shown without details, and is not asked for again."""
    runtime.answers["ContainerStatus"] = b"\x0a" + b"x" * (17 << 20)
    source = make()
    assert (APP, "prod", "shop-0", "app-a", "sha256:0", "containerd") in info(recorder)
    assert recorder.error_kinds() == ["cri_answer"]
    source.update()
    assert recorder.error_kinds() == ["cri_answer"]
    runtime.answers["ListContainers"] = b"\x0a" + b"x" * (17 << 20)
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
        source.update()


def test_details_take_a_bounded_time(
    make: Make, runtime: Runtime, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is too much to ask, names come first and the rest with the next updates."""
    monkeypatch.setattr(cri, "_ASKING", 0.0)
    source = make()
    assert (APP, "prod", "shop-0", "app-a", "sha256:0", "containerd") in info(recorder)
    assert recorder.wakes == 1
    monkeypatch.setattr(cri, "_ASKING", 1.0)
    source.update()
    assert (APP, "prod", "shop-0", "app-a", "docker.io/local/shop:1", "containerd") in info(recorder)


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(encoded: bytes) -> None:
    """Every message is read or a ValueError."""
    for kind in (cri_pb2.Container, cri_pb2.PodSandbox, cri_pb2.ContainerStatusResponse, cri_pb2.VersionResponse):
        try:
            decode(encoded, kind)
        except ValueError:
            continue


@given(
    st.text()
    | st.recursive(st.none() | st.integers() | st.text(), lambda one: st.lists(one, max_size=3)).map(json.dumps)
)
def test_any_description_has_variables_or_none(description: str) -> None:
    """The runtime's own description may be anything."""
    Metadata(environment_names=True).keep_environment(cri._environment(description), lambda _: None)
