"""Discovery against a real dockerd and a real containerd, run by the real supervisor."""

import contextlib
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import docker.errors
import pytest
from recorder import RecordedFamilies, Recorder
from runtimes import Containerd, Dockerd, containerd, dockerd, until

from exporter.contract import Paths
from exporter.monitors.runtimes import Metadata, Settings, monitors
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.docker import DockerEvents
from exporter.supervisor import Supervisor

__all__ = ["containerd", "dockerd"]

DOCKER = pytest.mark.real("root", "dockerd", "containerd", "runc", "busybox", "ip")
CRI = pytest.mark.real("root", "containerd", "ctr", "runc", "busybox", "ip", "cni-plugins")
NOWHERE = ("/nonexistent/runtime.sock",)


class Exporter:
    """The monitors of the room under the real supervisor, and what they have written."""

    def __init__(self, settings: Settings) -> None:
        self.families = RecordedFamilies()
        self.own = RecordedFamilies()
        self.supervisor = Supervisor(self.own)
        for monitor in monitors(settings):
            self.supervisor.add(monitor, self.families, Paths())
        self.supervisor.start()

    def scrape(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Refresh as a scrape does, and give what there is."""
        self.supervisor.refresh(2.0)
        return dict(self.families.snapshots)

    def states(self) -> dict[str, str]:
        """Give the state of each container by its full id."""
        return {key[0]: key[1] for key in self.scrape().get("cni_container_state", {})}

    def names(self) -> dict[str, tuple[str, ...]]:
        """Give namespace, pod and container by full id."""
        return {key[0]: key[1:4] for key in self.scrape().get("cni_container_info", {})}

    def names_of(self, ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Give the names of those containers alone: the machine may run others."""
        wanted = set(ids)
        return {one: names for one, names in self.names().items() if one in wanted}

    def scanned(self, ids: Iterable[str]) -> None:
        """Wait until the scan has seen the containers: before that nobody can say that they outlive their runtime."""
        wanted = {(one,) for one in ids}
        until(lambda: self.scrape().get("cni_container_pids", {}).keys() >= wanted)

    def events(self, runtime: str) -> dict[str, float]:
        """Give the counters of a runtime's events."""
        series = self.families.snapshots.get("cni_container_events_total", {})
        return {key[1]: count for key, count in dict(series).items() if key[0] == runtime}

    def mode(self, monitor: str) -> str:
        """Give the rung that a monitor stands on."""
        return next(one.mode for one in self.supervisor.standings() if one.monitor == monitor)


Run = Callable[[Settings], Exporter]


@pytest.fixture
def run() -> Iterator[Run]:
    """Runner of exporters, which are stopped in the end."""
    running: list[Exporter] = []

    def started(settings: Settings) -> Exporter:
        running.append(Exporter(settings))
        return running[-1]

    yield started
    assert [hung for one in running for hung in one.supervisor.stop(15)] == []


def of_docker(daemon: Dockerd, metadata: Metadata | None = None) -> Settings:
    return Settings(("docker",), metadata=metadata or Metadata(), docker_sockets=(daemon.socket,))


def of_containerd(daemon: Containerd, metadata: Metadata | None = None) -> Settings:
    paths = {"containerd": (daemon.socket,)}
    return Settings(("containerd",), metadata=metadata or Metadata(), cri_sockets=paths)


def seen_after(exporter: Exporter, container_id: str) -> float:
    """Wait until a scrape shows the container as running; the answer is how long that took, in seconds."""
    started = time.monotonic()
    until(lambda: exporter.states().get(container_id) == "running", 10, 0.002)
    return time.monotonic() - started


@DOCKER
@pytest.mark.timeout(180)
def test_twenty_containers_in_docker(dockerd: Dockerd, run: Run) -> None:
    """Twenty containers have their names, states and resources; a new one is shown within 200 ms of its start."""
    ids = {dockerd.run(f"web-{index}"): f"web-{index}" for index in range(10)}
    exporter = run(of_docker(dockerd))
    until(lambda: exporter.mode("docker") == "events")
    waits = []
    for index in range(10, 20):
        container_id = dockerd.run(f"web-{index}")
        waits.append(seen_after(exporter, container_id))
        ids[container_id] = f"web-{index}"
    assert statistics.median(waits) < 0.2
    names = exporter.names()
    assert {one: names[one][2] for one in ids} == ids
    figures = exporter.scrape()
    assert figures["cni_containers"]["docker", "running"] >= 20  # the machine may run some of its own
    assert {key[0] for key in figures["cni_container_network_info"]} >= ids.keys()
    until(lambda: {key[0] for key in exporter.scrape()["cni_container_memory_working_set_bytes"]} >= ids.keys())
    assert exporter.events("docker")["start"] == 10
    assert exporter.events("docker")["create"] == 10


@DOCKER
@pytest.mark.timeout(180)
def test_the_lives_of_docker_containers_are_counted(dockerd: Dockerd, run: Run) -> None:
    """Create, start, pause, stop, die, OOM and removal are counted as the daemon tells them, and the states follow."""
    begun = time.time()
    exporter = run(of_docker(dockerd))
    until(lambda: exporter.mode("docker") == "events")
    one = dockerd.run("one", volumes={"/var/tmp": {"bind": "/data", "mode": "ro"}})
    seen_after(exporter, one)
    mounts = exporter.scrape()["cni_container_mount_info"]
    assert [key[1:] for key in mounts if key[0] == one] == [("/data", "bind", "ro")]
    dockerd.client.api.pause(one)
    until(lambda: exporter.states()[one] == "paused")
    dockerd.client.api.unpause(one)
    until(lambda: exporter.states()[one] == "running")
    dockerd.client.api.stop(one, timeout=0)
    until(lambda: exporter.states()[one] == "exited")
    dockerd.remove(one)
    until(lambda: one not in exporter.names(), 1)
    hog = dockerd.run("hog", "/bin/sh", "-c", "tail /dev/zero", mem_limit="8m", memswap_limit="8m")
    until(lambda: exporter.states().get(hog) == "exited", 20)
    until(lambda: exporter.events("docker")["oom"] >= 1)
    # A busy dockerd hears of a pause from containerd when it is over, and tells of pause and its end once more.
    told = dockerd.client.api.events(since=begun, until=time.time(), decode=True, filters={"type": "container"})
    names = [event["Action"].replace("destroy", "remove") for event in told]
    least = {"create": 2, "start": 2, "pause": 1, "unpause": 1, "stop": 1, "remove": 1, "die": 2}
    expected = {name: names.count(name) for name in least}
    assert all(expected[name] == least[name] or name in {"pause", "unpause"} for name in least)
    assert expected["pause"] >= 1
    assert expected["unpause"] >= 1
    events = exporter.events("docker")
    assert {name: events[name] for name in expected} == expected


@DOCKER
@pytest.mark.timeout(180)
def test_a_killed_dockerd_costs_nothing(dockerd: Dockerd, run: Run) -> None:
    """While dockerd is dead its containers keep their names and figures; afterwards the monitor is back by itself."""
    ids = {dockerd.run(f"web-{index}") for index in range(5)}
    exporter = run(of_docker(dockerd))
    until(lambda: exporter.states().keys() >= ids)
    exporter.scanned(ids)
    before, events = exporter.names_of(ids), exporter.events("docker")
    dockerd.kill()
    until(lambda: exporter.mode("docker") == "down")
    for _ in range(5):
        assert exporter.names_of(ids) == before
        assert {key[0] for key in exporter.scrape()["cni_container_pids"]} >= ids
        time.sleep(0.3)
    dockerd.restart()
    until(lambda: exporter.mode("docker") == "events", 60)
    assert exporter.names_of(ids) == before
    late = dockerd.run("late")
    seen_after(exporter, late)
    assert exporter.names()[late] == ("", "", "late")
    after = exporter.events("docker")
    assert all(after[name] >= count for name, count in events.items())


@DOCKER
@pytest.mark.timeout(180)
def test_a_hung_dockerd_stops_nobody(dockerd: Dockerd, run: Run) -> None:
    """A stopped dockerd is noticed at the next look; scrapes are answered from the scan meanwhile."""
    one = dockerd.run("one")
    exporter = run(of_docker(dockerd))
    seen_after(exporter, one)
    exporter.scanned([one])
    dockerd.pause_daemon()
    try:
        started = time.monotonic()
        until(lambda: exporter.mode("docker") == "down", 30, 0.2)
        assert time.monotonic() - started < 17  # ten seconds between looks, five for an answer
        assert exporter.names()[one] == ("", "", "one")
    finally:
        dockerd.resume_daemon()
    until(lambda: exporter.mode("docker") == "events", 60)


@DOCKER
@pytest.mark.timeout(120)
def test_variables_of_a_real_container(dockerd: Dockerd, run: Run) -> None:
    """Allowed values and other names are shown, other values nowhere; labels by their list."""
    policy = Metadata(labels=("app.*",), environment=("LANG",), environment_names=True)
    exporter = run(of_docker(dockerd, policy))
    until(lambda: exporter.mode("docker") == "events")
    labels = {"app.name": "shop", "secret": "hunter3"}
    one = dockerd.run("one", environment={"LANG": "C", "TOKEN": "hunter2"}, labels=labels)
    seen_after(exporter, one)
    until(lambda: exporter.scrape()["cni_container_environment_info"])
    rows = {key[1:] for key in exporter.scrape()["cni_container_environment_info"]}
    assert rows >= {("LANG", "C"), ("TOKEN", "")}
    assert {key[1:] for key in exporter.scrape()["cni_container_label_info"]} == {("app.name", "shop")}
    assert "hunter" not in repr(exporter.families)


@DOCKER
@pytest.mark.timeout(120)
def test_the_scan_alone_knows_dockers_containers(dockerd: Dockerd, run: Run) -> None:
    """Without the socket a container is shown at once under its short id, and gone in the scrape after its end."""
    exporter = run(Settings(("docker",), docker_sockets=NOWHERE))
    until(lambda: exporter.mode("docker") == "absent")
    one = dockerd.run("one")
    until(lambda: exporter.names().get(one) == ("", "", one[:12]), 3)
    assert exporter.scrape()["cni_containers"]["docker", "running"] >= 1
    dockerd.remove(one)
    until(lambda: one not in exporter.names(), 3)
    assert {"start", "die"} <= exporter.events("docker").keys()


@CRI
@pytest.mark.timeout(180)
def test_pods_in_containerd(containerd: Containerd, run: Run) -> None:
    """Pods and containers have their Kubernetes names and addresses; a new one is shown within 200 ms of its start."""
    sandbox, app = containerd.run("shop-0", "app", "prod")
    exporter = run(of_containerd(containerd))
    until(lambda: app in exporter.names())
    assert exporter.names()[app] == ("prod", "shop-0", "app")
    assert exporter.names()[sandbox] == ("prod", "shop-0", "")
    assert exporter.mode("containerd") in {"events", "list"}
    networks = exporter.scrape()["cni_container_network_info"]
    assert [key[3].rpartition(".")[0] for key in networks if key[0] == sandbox] == ["10.251.0"]
    waits = []
    for index in range(10):
        pod = containerd.run_pod(f"job-{index}", "batch")
        job = containerd.create(pod, "job", pod=f"job-{index}", namespace="batch")
        containerd.start_container(job)
        waits.append(seen_after(exporter, job))
        assert exporter.names()[job] == ("batch", f"job-{index}", "job")
    assert statistics.median(waits) < 0.2
    assert exporter.scrape()["cni_containers"]["containerd", "running"] >= 11


@CRI
@pytest.mark.timeout(180)
def test_the_lives_of_pods_are_counted(containerd: Containerd, run: Run) -> None:
    """Create, start, die, OOM and removal are counted, mounts and states shown; what is removed is gone."""
    exporter = run(of_containerd(containerd))
    until(lambda: exporter.mode("containerd") in {"events", "list"})
    pod = containerd.run_pod("shop")
    mounts = [{"container_path": "/data", "host_path": "/var/tmp", "readonly": True}]
    app = containerd.create(pod, "app", pod="shop", mounts=mounts)
    until(lambda: exporter.states().get(app) == "created", 2)
    containerd.start_container(app)
    seen_after(exporter, app)
    shown = exporter.scrape()["cni_container_mount_info"]
    assert ("/data", "bind", "ro") in {key[1:] for key in shown if key[0] == app}
    hog = containerd.create(pod, "hog", "/bin/sh", "-c", "tail /dev/zero", pod="shop", memory=8 << 20)
    containerd.start_container(hog)
    until(lambda: exporter.states().get(hog) == "exited", 20)
    until(lambda: exporter.events("containerd")["oom"] == 1)
    containerd.stop_container(app)
    until(lambda: exporter.states().get(app) == "exited", 3)
    containerd.remove_pod(pod)
    until(lambda: not exporter.names().keys() & {pod, app, hog}, 1)
    assert exporter.events("containerd") == {"create": 2, "start": 2, "die": 2, "oom": 1, "remove": 2}


@CRI
@pytest.mark.timeout(180)
def test_a_killed_containerd_costs_nothing(containerd: Containerd, run: Run) -> None:
    """While containerd is dead its containers keep their names; afterwards the monitor is back by itself."""
    sandbox, app = containerd.run("shop-0", "app", "prod")
    exporter = run(of_containerd(containerd))
    until(lambda: app in exporter.names())
    exporter.scanned([app])
    before = exporter.names_of([sandbox, app])
    containerd.kill()
    until(lambda: exporter.mode("containerd") == "down")
    for _ in range(5):
        assert exporter.names_of([sandbox, app]) == before
        time.sleep(0.3)
    containerd.restart()
    until(lambda: exporter.mode("containerd") in {"events", "list"}, 60)
    assert exporter.names_of([sandbox, app]) == before
    containerd.remove_pod(sandbox)
    until(lambda: app not in exporter.names(), 2)


@CRI
@pytest.mark.timeout(120)
def test_a_containerd_without_its_cri(run: Run) -> None:
    """As Docker's package installs it, containerd answers without a CRI: absent, with a remedy, and no failure."""
    with tempfile.TemporaryDirectory(prefix="cni-", ignore_cleanup_errors=True) as directory:
        daemon = Containerd(Path(directory), cri=False)
        try:
            daemon.start()
            exporter = run(of_containerd(daemon))
            until(lambda: exporter.mode("containerd") == "absent")
            standing = next(one for one in exporter.supervisor.standings() if one.monitor == "containerd")
            assert "plugin is off" in standing.reason
            assert "disabled_plugins" in standing.remedy
        finally:
            daemon.stop()


@DOCKER
@CRI
@pytest.mark.timeout(240)
def test_two_runtimes_at_once(dockerd: Dockerd, containerd: Containerd, run: Run) -> None:
    """Docker and containerd side by side: each container once, under its own runtime."""
    web = dockerd.run("web")
    sandbox, app = containerd.run("shop-0", "app", "prod")
    paths = {"containerd": (containerd.socket,), "cri-o": NOWHERE}
    exporter = run(Settings(docker_sockets=(dockerd.socket,), cri_sockets=paths))
    until(lambda: {web, app} <= exporter.names().keys())
    time.sleep(2.5)  # whoever was held back would be shown by now
    info = [key for key in exporter.scrape()["cni_container_info"] if key[0] in {web, sandbox, app}]
    assert sorted((key[1], key[2], key[3], key[5]) for key in info) == [
        ("", "", "web", "docker"),
        ("prod", "shop-0", "", "containerd"),
        ("prod", "shop-0", "app", "containerd"),
    ]
    assert exporter.mode("cri-o") == "absent"


def test_a_daemon_that_never_answers() -> None:
    """A socket that accepts and is silent: the failure is there within five seconds."""
    with tempfile.TemporaryDirectory(prefix="cni-") as directory, socket.socket(socket.AF_UNIX) as silent:
        path = f"{directory}/d.sock"
        silent.bind(path)
        silent.listen()
        source = DockerEvents(Containers(["docker"]), Metadata(), [path], {})
        started = time.monotonic()
        with pytest.raises((docker.errors.DockerException, OSError)):
            source.open(Recorder())
        assert time.monotonic() - started < 5.5
        with contextlib.suppress(OSError):
            source.close()
    assert not [one for one in threading.enumerate() if one.name == "docker-events"]
