"""Finds the namespaces that are gone, where no program reports their end: their counters must not stay for ever.

Flows in: namespaces and what they counted; /proc. Flows out: the namespaces to forget. No capability is needed: the
inode of /proc/PID/net/stat is a namespace's own, and anyone may look at it.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from exporter.host.procfs import namespace_mounts
from exporter.monitors.kernel.reader import Snapshot

_LOOK = 30.0  # seconds between looks at all processes
_LOOKS = 2  # looks in a row at which nobody was at home and nothing was counted


def inhabited(procfs: Path) -> set[int]:
    """Give the inodes of /proc/PID/net/stat of all processes, and those of the namespaces that a mount we see pins.

    Both are numbers of one allocator (fs/proc/generic.c, proc_alloc_inum): none means two things.
    """
    found = set()
    with suppress(OSError):
        mounts = procfs.joinpath("self/mountinfo").read_bytes()
        found = {mount.inode for mount in namespace_mounts(mounts)}
    for directory in procfs.iterdir():
        if directory.name.isdigit():
            try:
                found.add((directory / "net/stat").stat().st_ino)
            except OSError:  # gone in between
                continue
    return found


class Departed:
    """Remembers who was not at home. A namespace that is only pinned counts as there while it counts anything."""

    def __init__(self, clock: Callable[[], float], look: Callable[[], set[int]]) -> None:
        """Take the time in seconds and a way to look at who is there (see `inhabited`)."""
        self._clock, self._look = clock, look
        self._next = clock() + _LOOK
        self._missed: dict[str, tuple[int, float]] = {}

    def find(self, known: Mapping[str, int], snapshot: Snapshot) -> list[str]:
        """Say which namespaces are gone: `known` has their keys and proc inodes, `snapshot` the counters by key."""
        now = self._clock()
        if now < self._next:
            return []
        self._next = now + _LOOK
        there = self._look()
        counted = _sums(snapshot)
        missed = {}
        for key, inode in known.items():
            if inode not in there and int(key.partition(":")[0]) not in there:
                looks, before = self._missed.get(key, (0, -1.0))
                total = counted.get(key, 0.0)
                missed[key] = (looks + 1 if total == before else 1, total)
        self._missed = missed
        return [key for key, (looks, _) in missed.items() if looks > _LOOKS]


def _sums(snapshot: Snapshot) -> dict[str, float]:
    sums: dict[str, float] = {}
    for series in snapshot.values():
        for key, value in series.items():
            if key:
                sums[key[0]] = sums.get(key[0], 0.0) + value
    return sums
