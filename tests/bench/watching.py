"""What it costs to watch CNI configurations that do not change: inotify, polling each 30 s, and loops of stat(2).

Flows in: how long to look, in seconds. Flows out: a table, and build/bench-watching.json. All run at the same time over
the same four directories with 100 files in all, each twice: one that strace(1) counts the system calls of, and one that
it does not disturb, for the CPU time. `stat` looks each 30 s, `eager` as often as it must to see a change in 100 ms.
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 90.0
INTERVAL = 30.0
_DIRECTORIES, _FILES = 4, 100
_ON_FILES = {
    *("stat", "lstat", "fstat", "newfstatat", "statx", "open", "openat", "close", "getdents64"),
    *("readlink", "readlinkat", "access", "faccessat2", "inotify_add_watch"),
}
"""System calls that look at files and directories; what is left is waiting, clocks and locks."""
_SUPERVISED = """
import sys, time
from exporter.contract import Paths
from exporter.metrics import Store
from exporter.monitors import cni_config
from exporter.supervisor import Supervisor

store, settings = Store(), cni_config.Settings(tuple(sys.argv[2:]), ())
supervisor = Supervisor(store.owned("supervisor"))
monitor = cni_config.monitor(settings, use_inotify=sys.argv[1] == "inotify")
supervisor.add(monitor, store.owned("cni_config"), Paths())
supervisor.start()
while not supervisor.standings()[0].seen:
    time.sleep(0.01)
print(supervisor.standings()[0].mode, flush=True)
sys.stdin.read()
"""
_STAT = """
import os, sys, time
print(sys.argv[1], flush=True)
while True:
    for directory in sys.argv[2:]:
        for name in os.listdir(directory):
            os.stat(f"{directory}/{name}")
    time.sleep(30 if sys.argv[1] == "stat" else 0.1)
"""
PROGRAMS = {"inotify": _SUPERVISED, "polling": _SUPERVISED, "stat": _STAT, "eager": _STAT}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one of them cost, per 30 seconds."""

    calls: float
    on_files: float
    cpu_seconds: float


@contextlib.contextmanager
def directories() -> Iterator[list[str]]:
    """Make the directories, away from where others make and remove files."""
    place = ROOT / "build"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as directory:
        made = [Path(directory, f"net-{number}") for number in range(_DIRECTORIES)]
        for number in range(_FILES):
            made[number % _DIRECTORIES].mkdir(exist_ok=True)
            network = {"cniVersion": "1.0.0", "name": f"net-{number}", "plugins": [{"type": "bridge"}]}
            (made[number % _DIRECTORIES] / f"{number:02}.conflist").write_text(json.dumps(network))
        time.sleep(2.5)  # so that no file is so young that it might change unseen
        yield [str(path) for path in made]


@contextlib.contextmanager
def running(mode: str, where: list[str]) -> Iterator[int]:
    """Run one of them, where the mounts that others make are not seen; the answer is its PID."""
    apart = ["unshare", "--mount", "--propagation", "private"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*apart, sys.executable, "-c", PROGRAMS[mode], mode, *where],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout
        said = process.stdout.readline().strip()
        if said != mode:
            raise OSError(f"{mode} cannot be measured here: it is {said or 'not running'}")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def _cpu_seconds(pid: int) -> float:
    clock = ctypes.c_int()
    if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise ProcessLookupError(f"process {pid} is gone")
    return time.clock_gettime(clock.value)


def costs(seconds: float) -> dict[str, Cost]:
    """Look at all of them at once. Raises FileNotFoundError where there is no strace."""
    strace = shutil.which("strace")
    if not strace:
        raise FileNotFoundError("strace is not installed")
    with contextlib.ExitStack() as stack:
        where = stack.enter_context(directories())
        traced = {mode: stack.enter_context(running(mode, where)) for mode in PROGRAMS}
        plain = {mode: stack.enter_context(running(mode, where)) for mode in PROGRAMS}
        time.sleep(1)
        before = {mode: _cpu_seconds(pid) for mode, pid in plain.items()}
        tracers = {mode: _trace(strace, pid) for mode, pid in traced.items()}
        time.sleep(seconds)
        used = {mode: _cpu_seconds(pid) - before[mode] for mode, pid in plain.items()}
        counted = {mode: _counted(tracer) for mode, tracer in tracers.items()}
    share = INTERVAL / seconds
    return {
        mode: Cost(
            calls=sum(calls.values()) * share,
            on_files=sum(count for name, count in calls.items() if name in _ON_FILES) * share,
            cpu_seconds=used[mode] * share,
        )
        for mode, calls in counted.items()
    }


def _trace(strace: str, pid: int) -> subprocess.Popen[str]:
    command = [strace, "-f", "-c", "-U", "calls,name", "-p", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _counted(tracer: subprocess.Popen[str]) -> dict[str, int]:
    """End a tracer and read its table."""
    tracer.send_signal(signal.SIGINT)
    _, table = tracer.communicate(timeout=30)
    rows = (line.split() for line in table.splitlines())
    return {row[1]: int(row[0]) for row in rows if len(row) == 2 and row[0].isdecimal() and row[1] != "total"}


@cache
def measured(seconds: float = SECONDS) -> dict[str, Cost]:
    """Measure once: a reading takes as long as several intervals of polling."""
    return costs(seconds)


def _case(figure: str, *modes: str) -> Callable[[], contextlib.AbstractContextManager[tuple[Callable[[], float], ...]]]:
    @contextlib.contextmanager
    def opened() -> Iterator[tuple[Callable[[], float], ...]]:
        yield tuple(lambda mode=mode: float(getattr(measured()[mode], figure)) for mode in modes)

    return opened


CASES = {
    "watch-calls": ("calls/30s", _case("calls", "inotify", "polling")),
    "watch-cpu": ("cpu seconds", _case("cpu_seconds", "inotify", "polling")),
    "watch-eager": ("cpu seconds", _case("cpu_seconds", "inotify", "eager")),
}
"""For tests/bench/run.py. All rounds are of one reading; calls on files have no ratio, as inotify makes none."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to look [%(default)s]")
    found = costs(parser.parse_args().seconds)
    print(f"{'per 30 s':<10}{'system calls':>14}{'on files':>12}{'CPU ms':>10}")
    for mode, cost in found.items():
        print(f"{mode:<10}{cost.calls:>14.1f}{cost.on_files:>12.1f}{cost.cpu_seconds * 1000:>10.2f}")
    figures = {mode: asdict(cost) for mode, cost in found.items()}
    (ROOT / "build" / "bench-watching.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
