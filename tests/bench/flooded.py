"""What the BPF programs cost amid a flood of many classes, with load management and without: a table of bpf/README.md.

Flows in: nothing; root runs exporters, one at a time, in turns. Flows out: a table. Each meets the same floods in 50
network namespaces (tests/real/mixed_flood.py). What is shown is nanoseconds per run by the kernel's own statistics,
read each tenth of a second: the median of these in a flood, since a processor that the hypervisor takes away amid a
run is no work of the program; and of the rounds the medians, and the median of their differences.
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
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from run import EXPORTER, ROOT, serving

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "real"))

import mixed_flood

from exporter.host import bpf

ROUNDS = 10
RATES = (100_000, 490_000)
"""Events per second."""
PROBES = {"drops": "cni_drops", "tcp_state": "cni_tcp_state", "tcp_reset": "cni_tcp_reset", "syscalls": "cni_syscall"}
"""What the names of their programs begin with."""
_NAMESPACES, _SENDERS, _SECONDS = 50, 2, 6
_SLICE, _FEWEST = 0.1, 10  # seconds; runs in them
_SETTLED = 4.0  # seconds

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


def main() -> int:
    """Print the table; where nothing can be measured, say why: that is no failure."""
    missing = [name for name in ("ip", "bpftool") if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"flooded: not measured: {' and '.join(missing) or 'root'} is needed", file=sys.stderr)
        return 0
    figures: dict[tuple[int, str, bool], list[float]] = defaultdict(list)
    with mixed_flood.namespaces("cnibf", _NAMESPACES) as names:
        for number in range(ROUNDS):
            for managed in (True, False) if number % 2 else (False, True):
                with exporter(managed=managed) as programs:
                    for rate in RATES:
                        for probe, slices in flooded(rate, names, programs).items():
                            figures[rate, probe, managed].append(statistics.median(slices))
    if not figures:
        print("flooded: not measured: no programs are attached; `cni-exporter check` says why", file=sys.stderr)
        return 0
    print(f"{'probe':<12}{'events/s':>10}{'with':>8}{'without':>9}{'more':>8}   half of the rounds")
    for rate in RATES:
        for probe in (*PROBES, "all"):
            with_, without = figures[rate, probe, True], figures[rate, probe, False]
            lower, more, upper = statistics.quantiles([a - b for a, b in zip(with_, without, strict=True)], n=4)
            medians = f"{statistics.median(with_):>8.0f}{statistics.median(without):>9.0f}"
            print(f"{probe:<12}{rate:>10}{medians}{more:>+8.0f}   {lower:+.0f} to {upper:+.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
