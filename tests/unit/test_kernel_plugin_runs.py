"""The reading half of CNI runs, processes and system calls without a kernel: layouts, names, sums."""

import re
import struct
from pathlib import Path

import pytest

from exporter.catalog import FAMILIES, PLUGIN_DURATION
from exporter.monitors.kernel import cni, events, programs
from exporter.monitors.kernel.cni import Cni
from exporter.monitors.kernel.handover import Manifest
from exporter.monitors.kernel.process import Process, Syscalls
from exporter.monitors.kernel.reader import Tables

SOURCE = (Path(__file__).parents[2] / "bpf/cni.c").read_text(encoding="utf-8")
BUCKETS = len(FAMILIES[PLUGIN_DURATION].buckets)


class FakeMap:
    """A hash with these entries."""

    def __init__(self, **entries: tuple[int, ...]) -> None:
        self.entries = entries

    def items(self) -> list[tuple[bytes, bytes]]:
        found = []
        for name, (command, *words) in self.entries.items():
            found.append((struct.pack("=32sIxxxx", name.encode(), command), struct.pack(f"={len(words)}Q", *words)))
        return found


def _tables(**entries: tuple[int, ...]) -> Tables:
    return Tables(Manifest(), {"cni_runs": FakeMap(**entries)})  # type: ignore[dict-item] - it has what is used


def _event(class_: str, kind: int, body: bytes) -> events.Event:
    return events.Event(0, "1:2", class_, kind, 1.0, 7, "x", body)


def test_commands_have_the_numbers_of_the_program() -> None:
    """What a program calls CNI_DEL is read as DEL."""
    names = re.search(r"enum cni_command \{(.*?)\}", SOURCE)
    assert names
    read = [name.strip().removeprefix("CNI_") for name in names[1].split(",")]
    assert [name if name != "OTHER" else "other" for name in read] == list(cni.COMMANDS)


def test_what_is_written_twice_agrees() -> None:
    """Length of paths, kinds of events, and what one map needs to never be full before another."""
    assert f"#define CNI_PATH {programs._PLUGIN_PATH} " in SOURCE
    kinds = re.search(r"enum cni_kind \{ CNI_(\w+) = 1, CNI_(\w+) \}", SOURCE)
    assert kinds
    assert [kind.lower() for kind in kinds.groups()] == list(cni._KINDS[1:])
    maps = {shape.name: shape for shape in programs.CNI.maps}
    assert len(cni.COMMANDS) == programs._COMMANDS
    assert maps["cni_runs"].entries == (programs.PLUGINS + 1) * len(cni.COMMANDS)


def test_counts_become_families() -> None:
    """Runs are the sum of all buckets; the sum of durations is in seconds; failures stand beside."""
    reader = Cni(_tables(bridge=(1, *([2] * BUCKETS), 5, 3_500_000_000, 4), odd=(99, *([0] * BUCKETS), 1, 10**9, 0)))
    assert reader.snapshot() == {
        "cni_plugin_runs_total": {("bridge", "ADD"): 2.0 * BUCKETS + 5, ("odd", "other"): 1.0},
        "cni_plugin_failures_total": {("bridge", "ADD"): 4.0, ("odd", "other"): 0.0},
    }
    times = reader.histograms()[PLUGIN_DURATION]
    assert tuple(times["bridge", "ADD"]) == (*([2.0] * BUCKETS), 5.0, 3.5)


@pytest.mark.parametrize(
    ("status", "shown"),
    [(0, {"exit_status": 0}), (0x100, {"exit_status": 1}), (9, {"signal": 9}), (139, {"signal": 11})],
)
def test_a_process_end_is_read_as_wait_has_it(status: int, shown: dict[str, int]) -> None:
    """Exit status, or the signal without the bit that says that memory was dumped."""
    assert cni.outcome(status) == shown


def test_details_of_a_run() -> None:
    """A record of class cni_run for people."""
    body = struct.pack("=QII32s16s72s", 250_000_000, 0x100, 2, b"bridge", b"eth0", b"c" * 64)
    assert Cni(_tables()).details(_event("cni_run", 1, body)) == {
        "plugin": "bridge",
        "command": "DEL",
        "what": "ended",
        "duration": 0.25,
        "exit_status": 1,
        "interface": "eth0",
        "container_id": "c" * 64,
    }
    with pytest.raises(struct.error):
        Cni(_tables()).details(_event("cni_run", 1, body[:-1]))


def test_details_of_processes_and_system_calls() -> None:
    """A start has a path, an end has an outcome; nothing of them is a family."""
    start, end = (struct.pack("=QII64s", *values) for values in ((0, 0, 5, b"/bin/sh"), (10**9, 15, 5, b"")))
    reader = Process(_tables())
    assert reader.details(_event("exec", 1, start)) == {"what": "started", "file": "/bin/sh", "parent": 5}
    assert reader.details(_event("exec", 2, end)) == {"what": "ended", "duration": 1.0, "signal": 15, "parent": 5}
    calls = Syscalls(_tables())
    assert calls.details(_event("syscall", 0, struct.pack("=Q", 41))) == {"syscall": 41}
    assert reader.snapshot() == calls.snapshot() == {}


def test_directories_are_prefixes() -> None:
    """A directory ends with one slash; what is relative or too long to be seen is left out."""
    directories = ("/opt/cni/bin", "/usr//lib/cni/", "relative", "/" + "x" * 123)
    contents = list(programs.CNI.contents(programs.Settings(plugin_directories=directories)))
    assert [(key[4:].rstrip(b"\0"), struct.unpack("=I", key[:4])[0]) for _, key, _ in contents] == [
        (b"/opt/cni/bin/", 8 * 13),
        (b"/usr/lib/cni/", 8 * 13),
    ]
    assert {len(key) for _, key, _ in contents} == {4 + programs._PLUGIN_PATH}
    assert [struct.unpack("=II", value)[0] for _, _, value in contents] == [13, 13]


def test_system_calls_are_wanted_by_number() -> None:
    """Without numbers the program is not loaded; with some, they are in its map; impossible ones are not."""
    assert not programs.SYSCALLS.wanted(programs.Settings())
    settings = programs.Settings(syscalls=(41, 5000, -1))
    assert programs.SYSCALLS.wanted(settings)
    assert [struct.unpack("=I", key)[0] for _, key, _ in programs.SYSCALLS.contents(settings)] == [41]
