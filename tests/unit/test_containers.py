"""The table of containers: who is counted, named, shown, and when."""

import pytest
from recorder import Recorder

from exporter.contract import Key
from exporter.host.cgroups import Identity, Resources
from exporter.monitors.runtimes import RUNTIMES
from exporter.monitors.runtimes.containers import Containers, Sighting
from exporter.monitors.runtimes.record import Record

A, B, C = "a" * 64, "b" * 64, "c" * 64
UID = "01234567-89ab-cdef-0123-456789abcdef"


class Clock:
    """Time that moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Containers:
    return Containers(RUNTIMES, clock=clock)


def sighting(container_id: str = A, runtime: str = "docker", pod: str = "", pids: float = 1.0) -> Sighting:
    return Sighting(Identity(container_id, runtime, pod), resources=Resources(pids=pids))


def record(container_id: str = A, state: str = "running", name: str = "web", **more: object) -> Record:
    return Record(container_id, "docker", state, container=name, **more)  # type: ignore[arg-type]


def published(table: Containers, family: str = "cni_container_info") -> dict[Key, float]:
    recorder = Recorder()
    table._changed = True
    table.publish(recorder.families)
    return recorder.families.snapshots[family]


def names(table: Containers) -> dict[str, tuple[str, str, str]]:
    return {key[0]: (key[1], key[2], key[3]) for key in published(table)}


def test_known_to_two_sources_is_counted_once(table: Containers) -> None:
    """Docker's container that the scan sees too is one container, under Docker's name."""
    table.up("docker", self_ := object())
    table.put("docker", record())
    table.seen({A: sighting(), B: sighting(B, "podman")})
    assert names(table) == {A: ("", "", "web"), B: ("", "", B[:12])}
    counts = published(table, "cni_containers")
    assert counts["docker", "running"] == 1
    assert counts["podman", "running"] == 1
    table.down("docker", self_)


def test_the_earlier_runtime_wins(table: Containers) -> None:
    """A container that Docker and the CRI both list is Docker's."""
    table.reconcile("containerd", [Record(A, "containerd", "running", container="other")])
    table.reconcile("docker", [record()])
    assert names(table) == {A: ("", "", "web")}


def test_seen_alone_waits_for_its_name(table: Containers, clock: Clock) -> None:
    """While a runtime could know the name, the container is held back for 2 s, then shown under its id."""
    table.up("docker", object())
    table.seen({A: sighting()})
    assert names(table) == {}
    clock.now += 1.9
    assert names(table) == {}
    clock.now += 0.2
    assert names(table) == {A: ("", "", A[:12])}


def test_the_end_of_the_wait_publishes_without_a_change(table: Containers, clock: Clock) -> None:
    """When the grace is over, the next publication shows the container although nothing else changed."""
    recorder = Recorder()
    table.seen({A: sighting()})
    table.publish(recorder.families)
    assert recorder.families.snapshots["cni_container_info"] == {}
    clock.now += 2
    table.publish(recorder.families)
    assert len(recorder.families.snapshots["cni_container_info"]) == 1


@pytest.mark.parametrize("absent", [("docker",), RUNTIMES])
def test_seen_alone_is_shown_at_once_where_nobody_knows_more(absent: tuple[str, ...]) -> None:
    """Without the runtime that could name it there is nothing to wait for."""
    table = Containers(RUNTIMES)
    for runtime in absent:
        table.absent(runtime)
    table.seen({A: sighting(A, "docker")})
    assert names(table) == {A: ("", "", A[:12])}


def test_podman_waits_for_nobody(table: Containers) -> None:
    """A runtime that has no source of its own is shown at once, whoever else is up."""
    table.up("docker", object())
    table.seen({A: sighting(A, "podman")})
    assert names(table) == {A: ("", "", A[:12])}


def test_an_unknown_layout_waits_for_everybody(table: Containers) -> None:
    """A path that does not tell the runtime may belong to any that is up; so may a pod on cgroupfs to Docker."""
    table.absent("containerd")
    table.absent("cri-o")
    table.up("docker", object())
    table.seen({A: sighting(A, "unknown"), B: sighting(B, "containerd", UID), C: sighting(C, "containerd")})
    assert names(table) == {C: ("", "", C[:12])}


def test_published_names_never_change(table: Containers, clock: Clock) -> None:
    """Neither a late runtime nor a rename changes labels; a container that is gone and back may have new ones."""
    table.seen({A: sighting()})
    clock.now += 3
    assert names(table) == {A: ("", "", A[:12])}
    table.put("docker", record())
    assert names(table) == {A: ("", "", A[:12])}
    table.put("docker", record(B, name="old"))
    assert names(table)[B] == ("", "", "old")
    table.put("docker", record(B, name="new"))
    assert names(table)[B] == ("", "", "old")
    table.remove("docker", B)
    assert B not in names(table)
    table.put("docker", record(B, name="new"))
    assert names(table)[B] == ("", "", "new")


def test_removed_is_gone_although_the_last_scan_saw_it(table: Containers) -> None:
    """The runtime's word that a container is removed takes its series away at once, resources too."""
    table.up("docker", object())
    table.put("docker", record())
    table.seen({A: sighting()})
    assert published(table, "cni_container_pids") == {(A,): 1.0}
    table.remove("docker", A)
    assert names(table) == {}
    assert published(table, "cni_container_pids") == {}


def test_reconcile_drops_what_is_not_listed(table: Containers) -> None:
    """A full list is the truth, also about what the scan still remembers."""
    table.up("docker", object())
    table.reconcile("docker", [record(A), record(B, name="b")])
    table.seen({A: sighting(A), B: sighting(B)})
    table.reconcile("docker", [record(B, name="b")])
    assert names(table) == {B: ("", "", "b")}


def test_records_outlive_their_runtime_while_they_run(table: Containers) -> None:
    """With the runtime gone, running containers keep their names while they have processes; the others go."""
    table.up("docker", token := object())
    table.reconcile("docker", [record(A), record(B, "exited", "b"), record(C, name="c")])
    table.seen({A: sighting(A), C: sighting(C)})
    table.down("docker", token)
    assert names(table) == {A: ("", "", "web"), C: ("", "", "c")}
    table.seen({A: sighting(A)})
    assert names(table) == {A: ("", "", "web")}
    table.up("docker", object())
    table.reconcile("docker", [record(A), record(B, "exited", "b")])
    assert names(table) == {A: ("", "", "web"), B: ("", "", "b")}


def test_without_a_scan_nothing_outlives_its_runtime(table: Containers) -> None:
    """Where nobody can tell who still runs, nothing is claimed."""
    table.up("docker", token := object())
    table.put("docker", record())
    table.down("docker", token)
    assert names(table) == {}
    table.up("docker", token)
    table.put("docker", record())
    table.seen({A: sighting()})
    table.down("docker", token)
    table.unseen()
    assert names(table) == {}


def test_only_the_source_in_charge_can_leave(table: Containers) -> None:
    """A better rung that takes over is not put down by the end of the one before."""
    old, new = object(), object()
    table.up("docker", old)
    table.up("docker", new)
    table.put("docker", record())
    table.down("docker", old)
    table.absent("docker")
    assert names(table) == {A: ("", "", "web")}
    assert published(table, "cni_containers")["docker", "exited"] == 0


def test_what_has_series(table: Containers) -> None:
    """Live containers have everything, exited ones info and state, and all of them are counted."""
    details = {"networks": (("bridge", "net", "10.0.0.1"),), "mounts": (("/m", "bind", "ro"),)}
    table.up("docker", object())
    table.put("docker", record(A, "paused", "a", **details))
    table.put("docker", record(B, "exited", "b", **details))
    table.put("docker", record(C, "unknown", "c", **details))
    assert set(names(table)) == {A, B, C}
    assert published(table, "cni_container_state") == {(A, "paused"): 1, (B, "exited"): 1, (C, "unknown"): 1}
    assert published(table, "cni_container_network_info") == {(A, "bridge", "net", "10.0.0.1"): 1}
    assert published(table, "cni_container_mount_info") == {(A, "/m", "bind", "ro"): 1}
    counts = published(table, "cni_containers")
    assert {key[1]: count for key, count in counts.items() if count} == {"paused": 1, "exited": 1, "unknown": 1}


def test_predecessors_of_one_name_have_no_series(table: Containers) -> None:
    """Of a container that was restarted in place only the live one is shown; of exited ones the newest."""
    table.put("docker", record(A, "exited", "web", created=1.0))
    table.put("docker", record(B, "exited", "web", created=2.0))
    assert set(names(table)) == {B}
    table.put("docker", record(C, "running", "web", created=3.0))
    assert set(names(table)) == {C}
    assert published(table, "cni_containers")["docker", "exited"] == 2


def test_exited_containers_are_bounded(table: Containers) -> None:
    """A host with thousands of exited containers shows the newest 500 and counts all."""
    for index in range(700):
        table.put("docker", record(f"{index:064x}", "exited", f"job-{index}", created=float(index)))
    shown = names(table)
    assert len(shown) == 500
    assert f"{199:064x}" not in shown
    assert published(table, "cni_containers")["docker", "exited"] == 700


def test_sandboxes_are_pods_and_no_containers(table: Containers) -> None:
    """A sandbox has info and network, is not counted, and its own process's usage is nobody's."""
    pod = Record(A, "containerd", "running", "ns", "pod", sandbox=True, networks=(("pod", "", "10.0.0.1"),))
    table.up("containerd", object())
    table.reconcile("containerd", [pod])
    table.seen({A: sighting(A, "containerd", UID)})
    assert names(table) == {A: ("ns", "pod", "")}
    assert published(table, "cni_containers")["containerd", "running"] == 0
    assert published(table, "cni_container_state") == {}
    assert published(table, "cni_container_pids") == {}
    assert published(table, "cni_container_network_info") == {(A, "pod", "", "10.0.0.1"): 1}


def test_capacity_is_kept_and_loss_counted() -> None:
    """Records and sightings over the bound find no room and are reported; known ones are still renewed."""
    table = Containers(["docker"], capacity=2)
    assert table.put("docker", record(A))
    assert table.put("docker", record(B))
    assert not table.put("docker", record(C))
    assert table.put("docker", record(B, "exited"))
    assert table.reconcile("docker", [record(f"{index:064x}") for index in range(5)]) == 3
    assert table.seen({f"{index:064x}": sighting(f"{index:064x}") for index in range(5)})[0] == 3


def test_starts_and_ends_that_nobody_else_tells(table: Containers) -> None:
    """The scan counts starts and ends of containers whose runtime does not tell them itself, and none at its start."""
    table.up("docker", object())
    assert table.seen({A: sighting(A, "podman")}) == (0, [])
    _, events = table.seen({B: sighting(B, "podman"), C: sighting(C, "docker")})
    assert sorted(events) == [("podman", "die"), ("podman", "start")]


def test_nothing_new_writes_nothing(table: Containers) -> None:
    """A publication without a change does not touch the families."""
    recorder = Recorder()
    table.put("docker", record())
    table.publish(recorder.families)
    recorder.families.snapshots.clear()
    table.put("docker", record())
    table.publish(recorder.families)
    assert recorder.families.snapshots == {}
