"""The reading half of the lifecycle program without a kernel: layouts, families, what is looked for and when."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter.catalog import FAMILIES, LIFECYCLE_FAMILIES, NETNS_LIFETIME
from exporter.host import bpf
from exporter.monitors.kernel import events, handover, lifecycle, programs
from exporter.monitors.kernel.lifecycle import Lifecycle
from exporter.monitors.kernel.reader import Tables

SOURCE = (Path(__file__).parents[2] / "bpf/lifecycle.c").read_text(encoding="utf-8")


class FakeMap:
    """A map of u64s."""

    capacity = 64

    def __init__(self, entries: dict[bytes, tuple[int, ...]]) -> None:
        self.entries = entries

    def sums(self) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        yield from self.entries.items()

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        yield from ((key, b"") for key in self.entries)


def _tables(*probes: tuple[str, str]) -> Tables:
    standings = [handover.Standing(name, rung=rung, attached=True) for name, rung in probes]
    manifest = handover.Manifest(standings=standings, programs={"netns": [7, 8, 9, 10]})
    counts = {struct.pack("=I", number): (count,) for number, count in enumerate((23, 19, 17, 13, 11, 0, 0, 0))}
    maps = {
        "lifecycles": FakeMap(counts),
        "netns_lifetime": FakeMap({bytes(4): (1, 2, 3, 4, 5, 6, 7, 8, 9, 2_500_000_000)}),
        "netns_alive": FakeMap({struct.pack("=QIxxxx", 41, 17): (), struct.pack("=QIxxxx", 42, 18): ()}),
    }
    return Tables(manifest, maps)  # type: ignore[arg-type] - the fakes have what is used


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What is run in the kernel, and with what; the first two walks say that there is more."""
    asked: list[tuple[int, ...]] = []

    def run(fd: int, *arguments: int) -> int:
        asked.append((fd, *arguments))
        return int(fd == 10 and [one[0] for one in asked].count(10) < 3)

    monkeypatch.setattr(bpf, "run", run)
    return asked


def test_numbers_of_counts_and_kinds_are_those_of_the_program() -> None:
    """What is written twice, in C and in Python, means the same."""
    counts = re.search(r"enum lifecycle_count \{(.*?)\}", SOURCE)
    kinds = re.search(r"enum lifecycle_kind \{(.*?)\}", SOURCE)
    assert counts
    assert kinds
    numbers = {name.strip().lower(): number for number, name in enumerate(counts[1].split(","))}
    families = {number: family for by_probe in lifecycle._COUNTS.values() for number, family in by_probe.items()}
    assert {f"cni_{name}_total": number for name, number in numbers.items()} == {v: k for k, v in families.items()}
    names = [name.strip().partition(" ")[0].removeprefix("KIND_").lower() for name in kinds[1].split(",")]
    assert ("", *names) == lifecycle._KINDS


def test_every_family_exists_and_is_written() -> None:
    """Counters and the histogram are those that the link monitor leaves to the kernel, by their names."""
    reader = Lifecycle(_tables(("netns", "fentry"), ("veth", "kprobe")))
    written = reader.snapshot() | reader.histograms()
    assert set(written) == set(LIFECYCLE_FAMILIES) <= FAMILIES.keys()
    assert reader.snapshot()["cni_netns_created_total"] == {(): 23.0}
    assert reader.snapshot()["cni_veth_moved_total"] == {(): 11.0}
    assert reader.histograms()[NETNS_LIFETIME] == {(): (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 2.5)}


def test_what_is_not_attached_is_not_written(runs: list[tuple[int, ...]]) -> None:
    """Where only namespaces are served, the device families stay the link monitor's, and the other way round."""
    assert set(Lifecycle(_tables(("netns", "tp_btf"))).snapshot()) == {
        "cni_netns_created_total",
        "cni_netns_destroyed_total",
    }
    runs.clear()
    devices = Lifecycle(_tables(("veth", "fentry")))
    assert set(devices.snapshot()) == {"cni_veth_created_total", "cni_veth_deleted_total", "cni_veth_moved_total"}
    assert devices.histograms() == {}
    assert runs == []


def test_ends_are_looked_for_only_where_no_function_tells(runs: list[tuple[int, ...]]) -> None:
    """On the rung of tracepoints each living namespace is asked for, and the list is walked to its end."""
    Lifecycle(_tables(("netns", "kprobe"))).snapshot()
    assert runs == []
    reader = Lifecycle(_tables(("netns", "tp_btf")))
    assert runs == [(9, 41, 17), (9, 42, 18), (10,), (10,), (10,)]
    runs.clear()
    reader.snapshot()
    assert runs[:2] == [(9, 41, 17), (9, 42, 18)]
    assert 10 in [run[0] for run in runs]


def test_a_walk_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that seems endless (namespaces come faster than they are walked) does not hold the update."""
    asked: list[int] = []
    monkeypatch.setattr(bpf, "run", lambda fd, *_: asked.append(fd) or 1)
    Lifecycle(_tables(("netns", "tp_btf")))
    assert asked.count(10) == FakeMap.capacity


def _event(class_: str, kind: int, body: bytes, netns: str = "4026532001:41") -> events.Event:
    return events.Event(0, netns, class_, kind, 1.0, 77, "ip", body)


def test_events_say_what_happened_in_words() -> None:
    """Lifetimes are seconds and only there where known; a device has name, kind, index and where it went."""
    reader = Lifecycle(_tables(("netns", "fentry"), ("veth", "fentry")))
    assert reader.details(_event("netns", 1, struct.pack("=Q", 0))) == {"what": "created"}
    gone = reader.details(_event("netns", 2, struct.pack("=Q", 1_500_000_000)))
    assert gone == {"what": "destroyed", "lifetime": 1.5}
    body = struct.pack("=16s16sQIIQ", b"veth0", b"veth", 42, 4026532002, 0, 9)
    expected = {"what": "moved", "device": "veth0", "kind": "veth", "ifindex": 9, "into": "4026532002:42"}
    assert reader.details(_event("veth", 4, body)) == expected
    there = reader.details(_event("veth", 1, struct.pack("=16s16sQIIQ", b"nk1", b"netkit", 0, 0, 0, 3)))
    assert there == {"what": "created", "device": "nk1", "kind": "netkit", "ifindex": 3}
    assert reader.details(_event("netns", 99, struct.pack("=Q", 0))) == {"what": "99"}


@pytest.mark.parametrize("class_", ["netns", "veth"])
def test_a_short_body_is_an_error(class_: str) -> None:
    """A malformed record raises what `details` promises."""
    with pytest.raises(struct.error):
        Lifecycle(_tables(("netns", "fentry"))).details(_event(class_, 1, b"\0" * 7))


def test_a_namespace_that_is_gone_is_forgotten_everywhere() -> None:
    """Its end, and nothing else, has its entries taken out of all maps after the next snapshot."""
    tables = _tables(("netns", "fentry"), ("veth", "fentry"))
    reader = Lifecycle(tables)
    reader.handle(_event("netns", 1, bytes(8)))
    reader.handle(_event("veth", 2, bytes(56)))
    reader.handle(_event("netns", 2, bytes(8), ""))
    assert tables.gone == set()
    reader.handle(_event("netns", 2, bytes(8)))
    assert tables.gone == {struct.pack("=QIxxxx", 41, 4026532001)}


def test_every_ladder_ends_where_it_can_be_told_why() -> None:
    """Devices have no rung on tracepoints: there is none for them, and netlink tells the same."""
    ladders = {probe.name: [rung.name for rung in probe.rungs] for probe in programs.LIFECYCLE.probes}
    assert ladders == {"netns": ["fentry", "kprobe", "tp_btf", "tp_btf"], "veth": ["fentry", "kprobe"]}
