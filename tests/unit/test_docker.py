"""Docker's source against a small daemon on a Unix socket that speaks the Engine API, well and badly."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker.errors
import pytest
import requests
from engines import ITEM, A, B, Daemon
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.contract import Families
from exporter.monitors.runtimes import docker_stream
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.docker import DockerEvents
from exporter.monitors.runtimes.docker_answers import read_container, read_event
from exporter.monitors.runtimes.record import Metadata


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second for an answer instead of five; the real daemon is given five."""
    monkeypatch.setattr(docker_stream, "TIMEOUT", 1.0)


@pytest.fixture
def table() -> Containers:
    return Containers(["docker"])


Make = Callable[..., DockerEvents]


@pytest.fixture
def make(daemon: Daemon, table: Containers, recorder: Recorder) -> Iterator[Make]:
    """Maker of opened sources, which are closed in the end."""
    sources: list[DockerEvents] = []

    def opened(metadata: Metadata | None = None, cursor: dict[str, int] | None = None) -> DockerEvents:
        source = DockerEvents(table, metadata or Metadata(), [daemon.path], cursor if cursor is not None else {})
        sources.append(source)
        source.open(recorder)
        source.update()
        return source

    yield opened
    for source in sources:
        source.close()
    assert not [one for one in threading.enumerate() if one.name == "docker-events"]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def awake(recorder: Recorder, wakes: int = 1) -> None:
    """Wait until the source asked for updates."""
    deadline = time.monotonic() + 5
    while recorder.wakes < wakes:
        assert time.monotonic() < deadline, "the source did not wake"
        time.sleep(0.001)


def count(recorder: Recorder, event: str) -> float:
    return recorder.families.value("cni_container_events_total", ("docker", event))


def test_an_item_of_the_list_becomes_a_record() -> None:
    """Names, state, networks, published ports and mounts are read; the host's path and other labels are not kept."""
    record = read_container(ITEM, Metadata(labels=("app.*",)), lambda _: None)
    assert (record.container, record.state, record.image, record.created) == ("web", "running", "busybox:1", 1700000000)
    assert record.networks == (("bridge", "bridge", "172.17.0.2"), ("bridge", "bridge", "fd00::2"))
    assert record.ports == (("tcp", "80", "0.0.0.0", "8080"),)
    assert record.mounts == (("/data", "bind", "ro"),)
    assert record.labels == (("app.name", "shop"),)
    assert "private" not in repr(record)
    assert "s3cret" not in repr(record)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("host", "host"), ("container:" + B, "container"), ("none", "none"), ("default", "bridge"), ("shop", "shop")],
)
def test_network_modes(mode: str, expected: str) -> None:
    """A mode without an address of its own is still a row; another container's id is not part of the mode."""
    item = {**ITEM, "HostConfig": {"NetworkMode": mode}, "NetworkSettings": {"Networks": {}}}
    assert read_container(item, Metadata(), lambda _: None).networks == ((expected, "", ""),)


def test_containers_of_the_kubelet_have_its_names() -> None:
    """Under cri-dockerd the labels name namespace, pod and container, and POD is the sandbox."""
    labels = {
        "io.kubernetes.pod.name": "shop-0",
        "io.kubernetes.pod.namespace": "prod",
        "io.kubernetes.container.name": "app",
    }
    record = read_container({**ITEM, "Labels": labels}, Metadata(), lambda _: None)
    assert (record.namespace, record.pod, record.container, record.sandbox) == ("prod", "shop-0", "app", False)
    labels["io.kubernetes.container.name"] = "POD"
    record = read_container({**ITEM, "Labels": labels}, Metadata(), lambda _: None)
    assert (record.namespace, record.pod, record.container, record.sandbox) == ("prod", "shop-0", "", True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(ITEM, JSON)) | JSON)
def test_any_list_item_is_read_or_refused(item: object) -> None:
    """Wrong types and missing fields give a record or one of three errors, which the source counts."""
    try:
        record = read_container(item, Metadata(labels=("*",)), lambda _: None)
    except (TypeError, ValueError, AttributeError):
        return
    assert record.container_id


@given(
    st.fixed_dictionaries({}, optional={"Type": JSON, "Action": st.sampled_from(["start", "x"]), "Actor": JSON}) | JSON
)
def test_any_event_is_read_or_refused(item: object) -> None:
    """The same for events."""
    try:
        event = read_event(item)
    except (TypeError, ValueError, AttributeError):
        return
    assert event is None or event.container_id


def test_the_list_is_published(make: Make, recorder: Recorder) -> None:
    """After the first update the container is there, and each kind of event stands at 0."""
    make()
    assert (A, "", "", "web", "busybox:1", "docker") in recorder.families.snapshots["cni_container_info"]
    events = {key[1] for key in recorder.families.snapshots["cni_container_events_total"]}
    assert events == {"create", "start", "stop", "die", "oom", "pause", "unpause", "remove"}


def test_an_event_alone_makes_a_container_visible(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """Name and state come with the event, before any request is answered."""
    source = make()
    daemon.happen("create", B, name="job", image="img")
    daemon.happen("start", B, name="job", image="img")
    awake(recorder, 2)
    daemon.silent.set()
    source.context.families = recorder.families
    seen: list[Any] = []
    publish = source._table.publish

    def watched(families: Families) -> None:
        publish(families)
        seen.append(dict(recorder.families.snapshots["cni_container_state"]))

    source._table.publish = watched  # type: ignore[method-assign]
    started = time.monotonic()
    with pytest.raises(requests.RequestException):
        source.update()
    assert seen[0][B, "running"] == 1
    assert time.monotonic() - started < docker_stream.TIMEOUT + 1


def test_the_life_of_a_container_is_counted(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """Each event moves the state and its counter; after the removal nothing is left."""
    source = make()
    states = []
    for action, listed in [
        ("create", "created"),
        ("start", "running"),
        ("pause", "paused"),
        ("unpause", "running"),
        ("oom", "running"),
        ("die", "exited"),
        ("stop", "exited"),
        ("destroy", ""),
    ]:
        daemon.containers = [{**ITEM, "State": listed}] if listed else []
        before = recorder.wakes
        daemon.happen(action, name="web", image="busybox:1")
        awake(recorder, before + 1)
        source.update()
        states += [key[1] for key in recorder.families.snapshots["cni_container_state"]]
    assert states == ["created", "running", "paused", "running", "running", "exited", "exited"]
    for event in ("create", "start", "stop", "die", "oom", "pause", "unpause", "remove"):
        assert count(recorder, event) == 1, event
    told = ["create", "start", "pause", "unpause", "oom", "die", "stop", "remove"]
    assert [(event.kind, event.container_id) for event in recorder.events.kept] == [(kind, A) for kind in told]
    assert recorder.families.snapshots["cni_container_info"] == {}


def test_a_list_older_than_the_event(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """Docker announces some changes before its list shows them: the event's state stands, and a second look follows."""
    source = make()
    daemon.containers = [{**ITEM, "State": "paused"}]
    daemon.happen("unpause", name="web")
    awake(recorder)
    source.update()
    assert recorder.families.snapshots["cni_container_state"] == {(A, "running"): 1}
    daemon.containers = [{**ITEM, "State": "running", "Image": "new"}]
    source.update()
    assert {key[4] for key in recorder.families.snapshots["cni_container_info"]} == {"new"}
    daemon.asked.clear()
    source.update()
    assert daemon.asked == []


def test_a_container_gone_before_it_was_looked_at(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """One that the daemon no longer lists when it is asked is forgotten."""
    source = make()
    daemon.containers = []
    daemon.happen("connect", "network-id", "network", container=A, name="bridge", type="bridge")
    awake(recorder)
    source.update()
    assert recorder.families.snapshots["cni_container_info"] == {}


def test_variables_by_policy(make: Make, recorder: Recorder) -> None:
    """An allowed value is shown, another variable by name alone, and its value is nowhere."""
    make(Metadata(environment=("LANG",), environment_names=True))
    assert recorder.families.snapshots["cni_container_environment_info"] == {(A, "LANG", "C"): 1, (A, "TOKEN", ""): 1}
    assert "hunter2" not in repr(recorder)


def test_nothing_is_inspected_without_a_policy(make: Make, daemon: Daemon) -> None:
    """Where no variable may be kept none is asked for."""
    make()
    assert not [path for path in daemon.asked if path.endswith(f"/{A}/json")]


def test_malformed_items_are_counted_and_skipped(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """A list with rubbish in it still serves its good items; one that is no list serves none."""
    daemon.containers = [ITEM, {"Id": 5.5}, None, "x", {"Names": ["/y"]}, {**ITEM, "Id": B, "Ports": 7}]
    source = make()
    assert {key[0] for key in recorder.families.snapshots["cni_container_info"]} == {A}
    assert recorder.error_kinds() == ["docker_answer"] * 5
    daemon.containers = {"message": "no"}
    source._next_list = 0
    source.update()
    assert recorder.error_kinds() == ["docker_answer"] * 6


def test_malformed_events_are_counted_and_skipped(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """Rubbish, an event of a megabyte and a wrong type are counted; the next good event is read."""
    source = make()
    daemon.events.put(b"{rubbish\n")
    daemon.events.put(b"[" * 100_000 + b"\n")
    daemon.events.put(b'{"Type":"container","Action":"start","Actor":7}\n')
    daemon.events.put(b'"' + b"x" * (3 << 20) + b'"\n')
    daemon.happen("stop", name="web")
    deadline = time.monotonic() + 5
    while not recorder.wakes and time.monotonic() < deadline:
        time.sleep(0.001)
    source.update()
    assert recorder.error_kinds() == ["docker_event"] * 4
    assert count(recorder, "stop") == 1


def test_a_full_queue_is_counted_and_mended(
    make: Make, daemon: Daemon, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events over the bound are counted as shed, and a full list makes up for them."""
    monkeypatch.setattr(docker_stream, "_QUEUE", 10)
    source = make()
    for _ in range(25):
        daemon.happen("stop", name="web")
    awake(recorder, 25)
    daemon.containers = [ITEM, {**ITEM, "Id": B, "Names": ["/new"]}]
    source.update()
    assert recorder.shed == 15
    assert count(recorder, "stop") == 10
    assert len(recorder.families.snapshots["cni_container_info"]) == 2


def test_a_daemon_that_never_answers_times_out(make: Make, daemon: Daemon) -> None:
    """It accepts and is silent: the failure is there within the timeout, and nothing of it is left."""
    daemon.silent.set()
    started = time.monotonic()
    with pytest.raises((docker.errors.DockerException, OSError)):
        make()
    assert time.monotonic() - started < docker_stream.TIMEOUT + 0.5


def test_the_end_of_the_stream_is_a_failure(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """When the daemon closes its stream the source wakes and fails."""
    source = make()
    daemon.events.put(None)
    awake(recorder)
    with pytest.raises(ConnectionError):
        source.update()


def test_closing_does_not_wait_for_an_event(make: Make) -> None:
    """The thread that waits for events ends at once."""
    source = make()
    started = time.monotonic()
    source.close()
    assert time.monotonic() - started < 0.5


def test_the_next_source_goes_on_where_the_last_one_was(make: Make, daemon: Daemon, recorder: Recorder) -> None:
    """A new source asks for the events since the last that its predecessor saw."""
    cursor: dict[str, int] = {}
    source = make(cursor=cursor)
    daemon.happen("stop", name="web")
    awake(recorder)
    source.update()
    source.close()
    make(cursor=cursor)
    since = f"{(cursor['nanoseconds'] + 1) / 1e9:.3f}"
    assert [path for path in daemon.asked if "/events" in path][-1].partition("since=")[2].startswith(since[:-2])


def test_a_socket_without_a_daemon_is_a_failure(tmp_path: Path, table: Containers, recorder: Recorder) -> None:
    """A socket that a killed daemon left behind is no absence: the failure is reported."""
    path = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    source = DockerEvents(table, Metadata(), [path], {})
    with pytest.raises((docker.errors.DockerException, OSError)):
        source.open(recorder)
    source.close()
