"""How much of the host's CPU, disks and links, and of our own memory, is in use.

Flows in: /proc/stat, diskstats, net/dev and net/softnet_stat, pressure stall information, our own control group, the
links' speeds. Flows out: `cni_load_pressure_ratio`, by which events are thinned. Formats: proc(5);
Documentation/admin-guide/iostats.rst, admin-guide/sysctl/net.rst, accounting/psi.rst, cgroup-v1 and cgroup-v2.rst.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from exporter.contract import Context, Monitor, Paths, Source, Unsupported
from exporter.host import cgroups

FAMILY = "cni_load_pressure_ratio"
INTERVAL = 0.5
"""Seconds between readings: what lasts for two seconds is seen to last."""

_SHORTEST = 0.1  # seconds; over less, the clock ticks that the kernel counts in are too coarse
_SPEED_AGE = 30.0  # seconds that a link's speed is believed
_IDLE_LINK = 1e6  # bytes per second below which no link of today is full, and its speed is not asked
_SHED_SHARE = 0.05  # dropped of all packets that counts as a full link
_SHED_LEAST = 100.0  # packets dropped per second below which it is no flood, whatever the share
_SURVIVED = 0.9  # share of a control group's limit up to which all is well: at the limit the kernel kills
_TICKS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_RECEIVED, _SENT = (0, 1, 3), (8, 9, 11)  # bytes, packets, dropped: columns of net/dev behind the name
_IO_TICKS = 12  # column of diskstats: milliseconds in which the disk had work


@dataclass(slots=True)
class _Growth:
    """How far counters have come. One that steps back has begun anew, and counts as still."""

    before: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, now: Mapping[str, float]) -> dict[str, float]:
        before, self.before = self.before, now
        return {name: max(value - before[name], 0.0) for name, value in now.items() if name in before}


class Pressures:
    """Reads how much is in use, each time over the span since the reading before. For one thread."""

    def __init__(
        self, paths: Paths, memory_limit: int, own: Paths | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Keep where to read, and read where the counters stand.

        Args:
            paths: the host's pseudo file systems.
            memory_limit: bytes that the exporter may use.
            own: those of the exporter itself, which may run in a container: for its control group.
            clock: monotonic seconds.
        """
        self._proc, self._sys, self._limit, self._clock = paths.procfs, paths.sysfs, memory_limit, clock
        self._own = own or Paths()
        self._process = psutil.Process()
        self._cpu, self._quota, self._links, self._backlog, self._disks, self._stalls = (_Growth() for _ in range(6))
        self._speeds: dict[str, tuple[float, float]] = {}
        self._whole: dict[str, bool] = {}
        self._read_at, self._last = float("-inf"), dict[str, float]()
        self.read()

    def read(self) -> dict[str, float]:
        """Give the share in use by resource; 1 is full. A resource that cannot be read, or not yet, is not there.

        cpu: time that the host's CPUs were not idle, or our control group's share of its quota, what is more. memory:
        our own resident memory over the limit, or our control group's working set over nine tenths of its own; may be
        above 1.
        network: the busiest link's traffic over its speed, or packets that were dropped: a twentieth of all counts as
        full. disk: time in which the busiest disk had work, or in which every task that is not idle waited for one.
        """
        now = self._clock()
        span = now - self._read_at
        if span < _SHORTEST:
            return dict(self._last)
        self._read_at = now
        groups = cgroups.lineage(self._own.sysfs, _bytes(self._own.procfs / "self" / "cgroup"))
        used = {
            "cpu": (*self._busy(), *self._throttled(groups, span)),
            "memory": (self._process.memory_info().rss / self._limit, *_memory(groups)),
            "network": (*self._carried(span), *self._shed(span)),
            "disk": (*self._worked(span), *self._stalled(span)),
        }
        self._last = {name: max(shares) for name, shares in used.items() if shares}
        return dict(self._last)

    def _busy(self) -> Iterator[float]:
        """Time that a hypervisor gave to others counts as busy: it was not ours to idle in."""
        for row in _rows(self._proc / "stat")[:1]:
            grown = self._cpu(dict(zip(_TICKS, map(float, row[1:]), strict=False)))
            if total := sum(grown.values()):
                yield 1 - (grown.get("idle", 0.0) + grown.get("iowait", 0.0)) / total

    def _throttled(self, groups: Sequence[cgroups.Resources], span: float) -> Iterator[float]:
        used = {str(step): group.cpu_seconds for step, group in enumerate(groups) if group.cpu_seconds is not None}
        for step, seconds in self._quota(used).items():
            if cores := groups[int(step)].cpu_limit_cores:
                yield min(seconds / span / cores, 1.0)

    def _carried(self, span: float) -> Iterator[float]:
        """How full the links are, the two directions apart; and what they dropped."""
        counters: dict[str, float] = {}
        for name, *columns in self._devices():
            for way, places in (("r", _RECEIVED), ("t", _SENT)):
                counters |= {f"{name}/{way}{n}": float(columns[place]) for n, place in enumerate(places)}
        grown = self._links(counters)
        for name in {key[:-3] for key in grown}:
            for way in "rt":
                sent, packets, dropped = (grown.get(f"{name}/{way}{n}", 0.0) for n in range(3))
                yield _dropped(packets, dropped, span)
                if sent / span > _IDLE_LINK and (speed := self._speed(name)):
                    yield min(sent / span / speed, 1.0)

    def _devices(self) -> Iterator[list[str]]:
        """Name and counters of each link of the host's network namespace."""
        path = self._proc / "1" / "net" / "dev"  # /proc/net is the reader's own namespace
        for row in (
            _bytes(path if path.exists() else self._proc / "net" / "dev").decode("ascii", "replace").splitlines()
        ):
            name, colon, columns = row.rpartition(":")
            if colon and len(values := columns.split()) > max(_SENT):
                yield [name.strip(), *values]

    def _speed(self, name: str) -> float:
        """Bytes per second that a link can carry; 0 where it has no such limit.

        A veth says 10 Gbit/s, which is its driver's convention (drivers/net/veth.c), and is taken at its word: it could
        carry more, but the host has its hands full with it by then. Bridges, tunnels and virtio say nothing.
        """
        now = self._clock()
        speed, until = self._speeds.get(name, (0.0, now))
        if until <= now:
            told = _bytes(self._sys / "class" / "net" / name / "speed").strip()
            speed = float(told) * 125_000 if told.isdigit() else 0.0  # Mbit/s; -1: not known
            self._speeds = {other: entry for other, entry in self._speeds.items() if entry[1] > now}
            self._speeds[name] = speed, now + _SPEED_AGE
        return speed

    def _shed(self, span: float) -> Iterator[float]:
        """Packets that came faster than a CPU could take them off its backlog (netdev_max_backlog)."""
        rows = _rows(self._proc / "net" / "softnet_stat")  # of all CPUs, whichever the namespace
        totals = [sum(int(row[place], 16) for row in rows if len(row) > place) for place in (0, 1)]
        grown = self._backlog({"taken": float(totals[0]), "dropped": float(totals[1])} if rows else {})
        if grown:
            yield _dropped(grown["taken"], grown["dropped"], span)

    def _worked(self, span: float) -> Iterator[float]:
        rows = (row for row in _rows(self._proc / "diskstats") if len(row) > _IO_TICKS)
        ticks = self._disks({row[2]: float(row[_IO_TICKS]) for row in rows if self._is_disk(row[2])})
        return (min(milliseconds / 1000 / span, 1.0) for milliseconds in ticks.values())

    def _is_disk(self, name: str) -> bool:
        """Whether it is a device: not a part of one, nor made of memory, files or other disks."""
        if name not in self._whole:
            self._whole[name] = (self._sys / "block" / name / "device").exists()
        return self._whole[name]

    def _stalled(self, span: float) -> Iterator[float]:
        """The `full` line of pressure stall information, whose total is in microseconds (Linux 4.20)."""
        rows = _rows(self._proc / "pressure" / "io")
        totals = {row[0]: float(row[-1].removeprefix("total=")) for row in rows if row[0] == "full"}
        return (min(stalled / 1e6 / span, 1.0) for stalled in self._stalls(totals).values())


def _memory(groups: Iterable[cgroups.Resources]) -> Iterator[float]:
    for group in groups:
        if group.memory_working_set_bytes is not None and group.memory_limit_bytes:
            yield group.memory_working_set_bytes / (group.memory_limit_bytes * _SURVIVED)


def _dropped(passed: float, dropped: float, span: float) -> float:
    if dropped / span < _SHED_LEAST:
        return 0.0
    return min(dropped / (passed + dropped) / _SHED_SHARE, 1.0)


def _bytes(path: Path) -> bytes:
    """Read a small file; empty where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _rows(path: Path) -> list[list[str]]:
    return [row for line in _bytes(path).decode("ascii", "replace").splitlines() if (row := line.split())]


class HostLoad(Source):
    """Passes over /proc and our own control group."""

    mode = "procfs"

    def __init__(self, memory_limit: int) -> None:
        """Keep the limit, in bytes."""
        self._limit = memory_limit

    def open(self, context: Context) -> None:
        """Read where the counters stand. Raises Unsupported where there are none."""
        super().open(context)
        if not _rows(context.paths.procfs / "stat"):
            raise Unsupported(f"no {context.paths.procfs}/stat", "give the host's /proc with --path.procfs")
        self._pressures = Pressures(context.paths, self._limit)

    def update(self) -> None:
        """Say how much is in use."""
        self.context.families.replace({FAMILY: {(name,): share for name, share in self._pressures.read().items()}})


def monitor(memory_limit: int) -> Monitor:
    """Describe the monitor; `memory_limit` is how many bytes the exporter may use."""
    return Monitor("host_load", (partial(HostLoad, memory_limit),), INTERVAL, steady=True)
