"""What it costs in the kernel to decide on an event, by the kernel's own statistics: the second table of bpf/README.md.

Flows in: nothing; root loads the programs. Flows out: a table. Each row is a set of rules and of counts by key, under
two floods on loopback of events that are decided on and not kept: of one event over and over, and of events each of
which is about another one than those before. What is shown is nanoseconds per event more than with neither rule nor
count: of each round less the round without just before, the best and the median.
"""

import ctypes
import os
import socket
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from exporter.host import bpf
from exporter.monitors import kernel
from exporter.monitors.kernel.controls import COUNTED_KINDS, Controls, Rule

ROUNDS = 7
_CALL = 500  # no kernel has it
_CALLS, _DROPS = 60_000, 30_000
_RARE = 1e-9
_NAME = 15  # PR_SET_NAME, include/uapi/linux/prctl.h


def calls(names: Sequence[bytes]) -> None:
    """System calls under these names in turn."""
    libc = ctypes.CDLL(None)
    for number in range(_CALLS // len(names)):
        for name in names:
            if number == 0 or len(names) > 1:
                libc.prctl(_NAME, ctypes.c_char_p(name), 0, 0, 0)
            libc.syscall(_CALL)


def drops(places: Sequence[str]) -> None:
    """Datagrams to a port that nobody has, at these addresses in turn."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(_DROPS // len(places)):
            for place in places:
                sender.sendto(b"x", (place, 9))


MANY = 1000
PLACES = [f"127.3.{number // 250}.{number % 250 + 1}" for number in range(MANY)]
NAMES = [b"name%d" % number for number in range(MANY)]
ALIKE: dict[str, Callable[[], None]] = {"syscalls": lambda: calls(NAMES[:1]), "drops": lambda: drops(PLACES[:1])}
UNLIKE: dict[str, Callable[[], None]] = {"syscalls": lambda: calls(NAMES), "drops": lambda: drops(PLACES)}


@dataclass(frozen=True)
class Case:
    """Rules and counts by key that are in force, and the program that they are tried on."""

    name: str
    probe: str
    rules: tuple[Rule, ...] = ()
    counted: tuple[str, ...] = ()
    quota: int = 0


def _rules(kind: str, subjects: Iterable[str | int], class_: str = "syscall") -> tuple[Rule, ...]:
    return tuple(Rule(kind, subject, (class_,), 0.5) for subject in subjects)


def cases() -> list[Case]:
    """All rows; what a rule is about is met by the floods where it can be."""
    own = f"{Path('/proc/self/ns/net').stat().st_ino}:{_cookie()}"
    pids = _rules("pid", range(400_000, 400_000 + MANY))
    names = _rules("comm", (name.decode() for name in NAMES[:100]))
    prefixes = _rules("prefix", PLACES, "packet_drop")
    met = (*names, *_rules("netns", [own]), *_rules("syscall", [_CALL]), *_rules("cgroup", [1]), *pids)
    flow = (*prefixes, *_rules("netns", [own], "packet_drop"), *_rules("port", [9], "packet_drop"))
    return [
        Case("1,000 PIDs", "syscalls", pids),
        Case("100 commands", "syscalls", names),
        Case("20 system calls", "syscalls", _rules("syscall", range(_CALL, _CALL + 20))),
        Case("50 namespaces", "syscalls", _rules("netns", [own, *(f"{number}:{number}" for number in range(1, 50))])),
        Case("50 cgroups", "syscalls", _rules("cgroup", range(1, 51))),
        Case("all of these", "syscalls", met),
        Case("1,000 prefixes, both sides", "drops", prefixes),
        Case("these, a port, a namespace", "drops", flow),
        *(Case(f"by {kind}", "drops" if kind == "prefix" else "syscalls", (), (kind,)) for kind in COUNTED_KINDS),
        Case("by all of a packet", "drops", (), COUNTED_KINDS),
        Case("by all of a call", "syscalls", (), COUNTED_KINDS),
        Case("by namespace, within its quota", "syscalls", (), ("netns",), 1_000_000),
        Case("by namespace, far above its quota", "syscalls", (), ("netns",), 10),
        Case("all rules, all counts, call", "syscalls", met, COUNTED_KINDS),
        Case("all rules, all counts, packet", "drops", flow, COUNTED_KINDS),
    ]


def _cookie() -> int:
    with socket.socket() as one:
        return int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 71, 8), sys.byteorder)  # SO_NETNS_COOKIE


def _cost(programs: kernel.Programs, probe: str, flood: Callable[[], None]) -> float:
    """Drive a flood from a child, for the programs leave their exporter's own calls out; ns per run."""
    (fd,) = programs.manifest.programs[probe]
    before = bpf.runs(fd)
    child = os.fork()
    if not child:
        flood()
        os._exit(0)
    os.waitpid(child, 0)
    after = bpf.runs(fd)
    return 1e9 * (after.seconds - before.seconds) / (after.count - before.count)


def measured(programs: kernel.Programs, case: Case, flood: Callable[[], None]) -> list[float]:
    """Nanoseconds that a case takes longer than nothing in force, of each round."""
    found = []
    for number in range(ROUNDS + 1):
        costs = []
        for rules, counted, quota in (((), (), 0), (case.rules, case.counted, case.quota)):
            controls = Controls(programs.manifest.maps, counted, quota)
            refused = controls.apply(dict.fromkeys(("syscall", "packet_drop"), _RARE), rules)
            if refused:
                raise ValueError(refused[0])
            costs.append(_cost(programs, case.probe, flood))
            controls.apply({}, ())
        if number:
            found.append(costs[1] - costs[0])
    return found


def main() -> int:
    """Print the table; where nothing can be attached, say why: that is no failure."""
    programs = kernel.load(kernel.Settings(programs=("drops", "syscalls"), syscalls=tuple(range(_CALL, _CALL + 20))))
    if not (programs.serves("drops") and programs.serves("syscalls")):
        print(f"decisions: not measured: {programs.standings[0].reason}", file=sys.stderr)
        return 0
    print(f"{'more, ns per event':<34}{'alike: best':>14}{'median':>8}{'unlike: best':>14}{'median':>8}")
    for case in cases():
        cells = [measured(programs, case, floods[case.probe]) for floods in (ALIKE, UNLIKE)]
        (best, median), (other, others) = [(min(cell), statistics.median(cell)) for cell in cells]
        print(f"{case.name:<34}{best:>14.0f}{median:>8.0f}{other:>14.0f}{others:>8.0f}", flush=True)
    programs.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
