"""What the BPF programs cost amid a flood of many classes, with decisions and without: two tables of bpf/README.md.

Flows in: nothing; root loads the programs, and runs exporters in turns. Flows out: two tables, of nanoseconds per run
by the kernel's own statistics, amid floods in 50 network namespaces (tests/real/mixed_flood.py).

The first is what it costs to decide. Counts by all kinds of keys and a learned rule for the heavy namespace are put in
force and taken out again, each for a fifth of a second of the same flood; the rule says what the ratio of the class
says, so that as much is kept. Shown are the medians, and the median and the quartiles of the differences.

The second is an exporter with load management and one without, one at a time, in turns. It is read each tenth of a
second: the median of these in a flood, since a processor that the hypervisor takes away amid a run is no work of the
program; and of the rounds the medians, and the median of their differences.
"""

import contextlib
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from run import EXPORTER, ROOT, serving

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "real"))

import mixed_flood

from exporter.host import bpf
from exporter.monitors import kernel
from exporter.monitors.kernel.controls import COUNTED_KINDS, Controls, Rule
from exporter.monitors.kernel.shapes import CLASSES
from exporter.monitors.kernel.source import KernelSource
from tests.recorder import Recorder

ROUNDS = 10
PAIRS = 100
RATIOS = {"packet_drop": 0.3, "tcp_fault": 0.15, "exec": 0.15, "connection": 0.15, "connection_close": 0.15}
"""Shares that are kept by class in the first table, about those that an exporter keeps; of calls, two in 1,000."""
RATES = (100_000, 490_000)
"""Events per second."""
PROBES = {"drops": "cni_drops", "tcp_state": "cni_tcp_state", "tcp_reset": "cni_tcp_reset", "syscalls": "cni_syscall"}
"""What the names of their programs begin with."""
_NAMESPACES, _SENDERS, _SECONDS = 50, 2, 6
_SLICE, _FEWEST = 0.1, 10  # seconds; runs in them
_SETTLED = 4.0  # seconds
_PART, _CHANGE, _LOOK = 0.2, 0.02, 0.02  # seconds

Slices = Mapping[str, list[float]]
"""Nanoseconds per run in each slice of time, by probe; `all` programs together, too."""


@contextlib.contextmanager
def exporter(*, managed: bool) -> Iterator[dict[str, list[int]]]:
    """Run one; give descriptors of its programs by probe."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        json.dump(
            {"general": {"enable_load_management": managed}, "kernel": {"syscalls": [mixed_flood.GETPPID]}}, config
        )
        config.flush()
        with serving(str(EXPORTER), "run", "--config", config.name, "--web.listen-address", "{address}") as server:
            time.sleep(_SETTLED)
            with programs_of(server.pid) as programs:
                yield programs


@contextlib.contextmanager
def programs_of(pid: int) -> Iterator[dict[str, list[int]]]:
    """Open the programs that a process holds, by probe."""
    held = set()
    for information in Path(f"/proc/{pid}/fdinfo").iterdir():
        held |= {int(line.split()[1]) for line in information.read_text().splitlines() if line.startswith("prog_id:")}
    listing = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True, timeout=10, check=True)
    libbpf = bpf.libbpf({"bpf_prog_get_fd_by_id": (ctypes.c_int, [ctypes.c_uint32])})
    found: dict[str, list[int]] = defaultdict(list)
    with contextlib.ExitStack() as opened:
        for one in json.loads(listing.stdout):
            for probe in (probe for probe, name in PROBES.items() if one.get("name", "").startswith(name)):
                if one["id"] in held:
                    found[probe].append(libbpf.bpf_prog_get_fd_by_id(one["id"]))
                    opened.callback(os.close, found[probe][-1])
        yield found


def flooded(rate: int, names: list[str], programs: Mapping[str, list[int]]) -> Slices:
    """Drive a flood, and read meanwhile."""
    found: dict[str, list[float]] = defaultdict(list)
    with mixed_flood.senders(_SENDERS, [(rate, _SECONDS)], names) as senders:
        mixed_flood.begin(senders)
        end, before = time.monotonic() + _SECONDS, _runs(programs)
        while time.monotonic() < end:
            time.sleep(_SLICE)
            after = _runs(programs)
            for probe, (seconds, count) in after.items():
                runs = count - before[probe][1]
                if runs >= _FEWEST:
                    found[probe].append(1e9 * (seconds - before[probe][0]) / runs)
            before = after
        for sender in senders:
            sender.communicate(timeout=60)
    return found


def _runs(programs: Mapping[str, list[int]]) -> dict[str, tuple[float, int]]:
    """Read seconds and runs so far, by probe and of all together."""
    found = {}
    for probe in PROBES:
        runs = [bpf.runs(fd) for fd in programs[probe]]
        found[probe] = sum(one.seconds for one in runs), sum(one.count for one in runs)
    found["all"] = sum(seconds for seconds, _ in found.values()), sum(count for _, count in found.values())
    return found


@contextlib.contextmanager
def loaded() -> Iterator[kernel.Programs]:
    """Load the programs, and read what they tell."""
    programs = kernel.load(kernel.Settings(syscalls=(mixed_flood.GETPPID,)))
    over = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.callback(programs.close)
        source = KernelSource(programs)
        source.open(Recorder())
        stack.callback(source.close)

        def read() -> None:
            while not over.wait(_LOOK):
                for ring in source._rings.values():
                    source._consume(ring)
                programs.tally.settle()

        reader = threading.Thread(target=read)
        reader.start()
        stack.callback(reader.join)
        stack.callback(over.set)
        yield programs


def decided(rate: int, names: list[str]) -> dict[str, list[tuple[float, float]]]:
    """Give ns per run with decisions and without, by probe, of each part of a flood and the part next to it."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    seconds = 4 + PAIRS * 2 * (_PART + 2 * _CHANGE)
    with loaded() as programs, mixed_flood.senders(_SENDERS, [(rate, seconds)], names) as senders:
        maps, probes = programs.manifest.maps, {probe: programs.manifest.programs[probe] for probe in PROBES}
        controls, words = Controls(maps, COUNTED_KINDS), bpf.Map(maps["filters"])
        ratios = RATIOS | {"syscall": 0.002}
        controls.apply(ratios, ())
        mixed_flood.begin(senders)
        time.sleep(2)
        _, heavy = max(
            (count, key[1]) for key, count in controls.observe().keys["packet_drop"].items() if key[0] == "netns"
        )
        controls.apply(ratios, [Rule("netns", heavy, (class_,), ratio, "learned") for class_, ratio in ratios.items()])
        numbers = [CLASSES.index(class_).to_bytes(4, sys.byteorder) for class_ in ratios]
        force = {number: words.get(number) or b"" for number in numbers}
        time.sleep(1)
        for pair in range(PAIRS):
            costs = {}
            for decides in (True, False) if pair % 2 else (False, True):
                for number, word in force.items():
                    words.put(number, word if decides else bytes(len(word)))
                time.sleep(_CHANGE)
                before = _runs(probes)
                time.sleep(_PART)
                after = _runs(probes)
                costs[decides] = {probe: _cost(before[probe], after[probe]) for probe in after}
            for probe, cost in costs[True].items():
                found[probe].append((cost, costs[False][probe]))
        for sender in senders:
            sender.communicate(timeout=60)
    return found


def _cost(before: tuple[float, int], after: tuple[float, int]) -> float:
    return 1e9 * (after[0] - before[0]) / max(1, after[1] - before[1])


def main() -> int:
    """Print the tables; where nothing can be measured, say why: that is no failure."""
    missing = [name for name in ("ip", "bpftool") if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"flooded: not measured: {' and '.join(missing) or 'root'} is needed", file=sys.stderr)
        return 0
    standings = kernel.load(kernel.Settings())
    attached = all(map(standings.serves, ("drops", "tcp_state", "tcp_reset")))
    standings.close()
    if not attached:
        print("flooded: not measured: programs are not attached; `cni-exporter check` says why", file=sys.stderr)
        return 0
    alone: dict[tuple[int, str], list[tuple[float, float]]] = {}
    figures: dict[tuple[int, str, bool], list[float]] = defaultdict(list)
    with mixed_flood.namespaces("cnibf", _NAMESPACES) as names:
        for rate in RATES:
            alone |= {(rate, probe): pairs for probe, pairs in decided(rate, names).items()}
        _print("with, without decisions", alone)
        for number in range(ROUNDS):
            for managed in (True, False) if number % 2 else (False, True):
                with exporter(managed=managed) as programs:
                    for rate in RATES:
                        for probe, slices in flooded(rate, names, programs).items():
                            figures[rate, probe, managed].append(statistics.median(slices))
    both = {key[:2]: zip(figures[*key[:2], True], figures[*key[:2], False], strict=True) for key in figures}
    _print("exporters with, without load management", {key: list(pairs) for key, pairs in both.items()})
    return 0


def _print(title: str, figures: Mapping[tuple[int, str], list[tuple[float, float]]]) -> None:
    """Print medians, and how far the middle half of the differences reaches."""
    print(f"{title}\n{'probe':<12}{'events/s':>10}{'with':>8}{'without':>9}{'more':>8}   half of the differences")
    for (rate, probe), pairs in sorted(figures.items(), key=lambda one: one[0][0]):
        lower, more, upper = statistics.quantiles([with_ - without for with_, without in pairs], n=4)
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        print(f"{probe:<12}{rate:>10}{medians[0]:>8.0f}{medians[1]:>9.0f}{more:>+8.0f}   {lower:+.0f} to {upper:+.0f}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
