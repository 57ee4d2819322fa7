"""What the BPF programs cost per run on this machine, by the kernel's own statistics: the table in bpf/README.md.

Flows in: nothing; root loads the programs. Flows out: a table. Each row is a workload on loopback, driven in rounds,
first with no event kept (the programs only count), then with every event kept. What is shown is nanoseconds per run,
the kernel's measuring included: the best round, which others disturbed least, and the median. Then the floods once
more, longer, under an exporter as it comes, which steers what is kept, and reads it meanwhile.
"""

import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from run import our_exporter

sys.path.insert(0, str(Path(__file__).parents[2]))

from exporter.host import bpf
from exporter.monitors import kernel
from exporter.monitors.kernel.controls import Controls
from exporter.monitors.kernel.shapes import CLASSES

ROUNDS = 8
_ENOUGH = 250  # runs of a program in a round: fewer are other people's
_NOBODY = ("127.0.0.1", 9)


def drops() -> None:
    """20,000 datagrams to a port that nobody has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(20_000):
            sender.sendto(b"x", _NOBODY)


def refused() -> None:
    """5,000 connections that are refused: two changes of state each."""
    for _ in range(5000):
        with socket.socket() as client:
            client.connect_ex(_NOBODY)


def connections() -> None:
    """1,000 connections that succeed: ten changes of state each, both ends together."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(1000):
            with socket.create_connection(listener.getsockname()), listener.accept()[0]:
                pass


def processes() -> None:
    """300 processes of the host."""
    for _ in range(300):
        subprocess.run(["/bin/true"], check=True)


WORKLOADS: tuple[Callable[[], None], ...] = (drops, refused, connections, processes)
Figures = dict[tuple[str, int], list[float]]
"""Nanoseconds per run of each round, by probe and number of its program."""


def measured(programs: kernel.Programs, workload: Callable[[], None]) -> Figures:
    """Drive a workload in rounds, after one that does not count; the rings are emptied in between."""
    found: Figures = defaultdict(list)
    rings = [bpf.Ring(programs.manifest.maps[name], lambda _address, _size: None) for name in ("events", "lifecycle")]
    for number in range(ROUNDS + 1):
        before = _runs(programs)
        workload()
        for program, after in _runs(programs).items():
            count = after.count - before[program].count
            if number and count >= _ENOUGH:
                found[program].append(1e9 * (after.seconds - before[program].seconds) / count)
        for ring in rings:
            while ring.consume():
                pass
    for ring in rings:
        ring.close()
    return found


def _runs(programs: kernel.Programs) -> dict[tuple[str, int], bpf.Runs]:
    groups = programs.manifest.programs.items()
    return {(probe, number): bpf.runs(fd) for probe, group in groups for number, fd in enumerate(group)}


def in_an_exporter() -> None:
    """Print what each flood costs in the exporter as it comes, by its own families; a round is some two seconds."""
    families = ("cni_bpf_program_run_time_seconds_total", "cni_bpf_program_runs_total")
    with our_exporter() as server:

        def read() -> list[dict[str, float]]:
            with urllib.request.urlopen(server.url, timeout=10) as answer:  # noqa: S310 - our own loopback address
                text = answer.read().decode()
            found = [re.findall(rf'^{name}{{program="(\w+)".*}} (\S+)$', text, re.MULTILINE) for name in families]
            return [{program: float(value) for program, value in pairs} for pairs in found]

        deadline = time.monotonic() + 20
        while "tcp_reset" not in read()[1]:
            if time.monotonic() > deadline:
                raise TimeoutError("the exporter has attached no programs")
            time.sleep(0.2)
        for flood, times, about in ((drops, 15, ["drops"]), (refused, 12, ["tcp_state", "tcp_reset"])):
            costs: dict[str, list[float]] = defaultdict(list)
            for _ in range(ROUNDS):
                (seconds, runs), _ = read(), [flood() for _ in range(times)]
                later, more = read()
                for program in about:
                    costs[program].append(1e9 * (later[program] - seconds[program]) / (more[program] - runs[program]))
            for program, rounds in costs.items():
                print(f"{flood.__name__:<14}{program:<16}{min(rounds):>16.0f}{statistics.median(rounds):>8.0f}")


def main() -> int:
    """Print the tables; where nothing can be attached, say why: that is no failure."""
    programs = kernel.load(kernel.Settings(programs=("drops", "tcp", "cni", "process")))
    if not programs.attached:
        print(f"programs: not measured: {programs.standings[0].reason}", file=sys.stderr)
        return 0
    controls = Controls(programs.manifest.maps)
    print(f"{'workload':<14}{'program':<16}{'counting: best':>16}{'median':>8}{'kept: best':>14}{'median':>8}")
    for workload in WORKLOADS:
        figures: list[Figures] = []
        for share in (0.0, 1.0):
            for class_ in CLASSES:
                controls.set_ratio(class_, share)
            figures.append(measured(programs, workload))
        for probe, number in sorted(set(figures[0]) & set(figures[1])):
            cells = [(min(f[probe, number]), statistics.median(f[probe, number])) for f in figures]
            (best, median), (kept_best, kept) = cells
            line = f"{best:>16.0f}{median:>8.0f}{kept_best:>14.0f}{kept:>8.0f}"
            print(f"{workload.__name__:<14}{f'{probe} {number}':<16}{line}")
    programs.close()
    print(f"{'as it comes':<14}{'program':<16}{'best':>16}{'median':>8}")
    in_an_exporter()
    return 0


if __name__ == "__main__":
    sys.exit(main())
