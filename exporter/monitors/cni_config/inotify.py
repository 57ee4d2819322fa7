"""The best rung: inotify tells of changes, and nothing is read until it does.

An event says when to look, never what there is: every look reads whole directories, so it does not matter which
events came, in what order, or how many. Looks wait until what is under way is over: a file that was created is being
written, a file that is gone may be on its way back (editors move the old one away first).
"""

import os
import select
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

from exporter.contract import Context, Source, Unsupported
from exporter.monitors.cni_config.files import Found, Reader, Tree
from exporter.monitors.cni_config.records import OVERFLOWS, RESCANS, Records, pools
from exporter.monitors.cni_config.watches import (
    CREATE,
    DELETE,
    ISDIR,
    MODIFY,
    MOVED_FROM,
    Interest,
    Watches,
    entries_of,
    lookups,
)

_WRITING = 0.2  # seconds without an event after which a file that nobody closes is read
_GONE = 0.05  # seconds in which a file may come back
_LONGEST = 1.0  # seconds that a look waits at most, whatever goes on
_CHECK = 3600.0  # seconds between looks that no event asked for
_ROUNDS = 5
_RETRY = 60.0  # seconds until inotify is tried again after a limit was met
_EMPTY = sha256().hexdigest()
_MOUNTS = "/proc/self/mountinfo"


@dataclass(slots=True)
class Refusal:
    """Why inotify could not be had the last time; the supervisor asks more often than it is worth to try."""

    error: Unsupported | None = None
    until: float = 0.0


class InotifySource(Source):
    """Hears of changes."""

    mode = "inotify"

    def __init__(self, records: Records, refusal: Refusal, clock: Callable[[], float] = time.monotonic) -> None:
        """Fill `records`; `clock` is in seconds."""
        self._records = records
        self._refusal = refusal
        self._clock = clock
        self._reader = Reader()
        self._watches: Watches | None = None
        self._mounts: _Mounts | None = None
        self._identities: list[tuple[int, int]] = []
        self._pending: dict[tuple[int, str], float] = {}
        """Monotonic time up to which each file that something is done to is waited for."""
        self._began = 0.0
        self._mounted = False
        self._surroundings = False
        self._rescan = False
        self._next = 0.0
        self._refused: set[str] = set()

    def open(self, context: Context) -> None:
        """Open inotify. Raises Unsupported where it cannot be had."""
        super().open(context)
        if self._refusal.error and self._clock() < self._refusal.until:
            raise self._refusal.error
        try:
            self._watches = Watches(self._heed, self._lost)
        except Unsupported as error:
            self._refuse(error)
            raise
        with suppress(OSError):
            self._mounts = _Mounts()

    def readers(self) -> Mapping[int, Callable[[], None]]:
        """Take events as they come, and news of mounts, which inotify does not tell."""
        readers: dict[int, Callable[[], None]] = {}
        if self._watches:
            readers[self._watches.fileno()] = self._watches.receive
        if self._mounts:
            readers[self._mounts.fileno()] = self._remounted
        return readers

    def update(self) -> None:
        """Look, if there is reason to and nothing is under way."""
        now = self._clock()
        if self._mounted:
            self._mounted = False
            if self._identify() != self._identities:
                self._await(0, "", 0.0)
        if now >= self._next:
            self._rescan = True
        elif self._pending and now < self._due():
            self.context.wake()
            return
        if self._rescan or self._pending:
            self._look(now)
        elif self._surroundings:
            self._surroundings = False
            self._records.tell_surroundings(self.context)

    def close(self) -> None:
        """End every watch."""
        if self._watches:
            self._watches.close()
        if self._mounts:
            self._mounts.close()

    def _due(self) -> float:
        return min(max(self._pending.values()), self._began + _LONGEST)

    def _look(self, now: float) -> None:
        """Read everything; again where a directory was not watched yet while it was read."""
        if self._rescan:
            self._reader.forget()
        trees: list[Tree] = []
        for _ in range(_ROUNDS):
            self._identities = self._identify()
            trees = self._reader.trees(self._records.settings.directories)
            if not self._watch(trees):
                break
        if now < self._began + _LONGEST and any(
            _is_begun(found) for tree in trees for found in tree.files + tree.parts
        ):
            self._await(0, "", _WRITING)
            return
        if self._rescan and self._next:  # the first look is none
            self.context.families.add(RESCANS)
        self._rescan = self._surroundings = False
        self._next = now + _CHECK
        self._pending.clear()
        self._records.take(trees, self.context)
        self._records.tell_surroundings(self.context)

    def _watch(self, trees: list[Tree]) -> bool:
        """Watch what these trees say is to be watched; whether there is anything new."""
        if self._watches is None:
            return False
        try:
            new, refused = self._watches.watch(_wanted(self._records, trees))
        except Unsupported as error:
            self._refuse(error)
            raise
        for path in set(refused) - self._refused:
            self.context.error("watch", f"{path!r} cannot be watched: its changes are seen once an hour")
        self._refused = set(refused)
        return new

    def _refuse(self, error: Unsupported) -> None:
        self._refusal.error, self._refusal.until = error, self._clock() + _RETRY

    def _heed(self, interest: Interest, name: str, mask: int) -> None:
        if not name or interest.in_configuration(name, mask):
            self._await(id(interest), name, _patience(mask))
        elif interest.in_surroundings(name, mask):
            self._surroundings = True
            self.context.wake()

    def _await(self, place: int, name: str, seconds: float) -> None:
        now = self._clock()
        if not self._pending:
            self._began = now
        self._pending[place, name] = now + seconds
        self.context.wake()

    def _lost(self) -> None:
        """Events were lost: everything must be read, once whatever it is that makes so many has paused."""
        self.context.families.add(OVERFLOWS)
        self._rescan = True
        self._await(0, "", _WRITING)

    def _remounted(self) -> None:
        """Something was mounted somewhere: whether it matters is asked in the next update, once for many mounts."""
        if self._mounts:
            self._mounts.acknowledge()
        self._mounted = True
        self.context.wake()

    def _identify(self) -> list[tuple[int, int]]:
        """Tell which directories the configured paths lead to."""
        identities = []
        for directory in self._records.settings.directories:
            try:
                status = os.stat(directory)  # noqa: PTH116 - a text
            except OSError:
                identities.append((0, 0))
            else:
                identities.append((status.st_dev, status.st_ino))
        return identities


def _is_begun(found: Found) -> bool:
    """Whether a file was created a moment ago and has nothing in it yet.

    In a directory that was made just before, nobody heard of its creation, nor will of its being closed.
    """
    return found.sha256 == _EMPTY and time.time() - found.changed < _WRITING


def _patience(mask: int) -> float:
    """How long to wait for what may follow, in seconds."""
    if mask & ISDIR:
        return 0.0
    if mask & (CREATE | MODIFY):
        return _WRITING
    return _GONE if mask & (MOVED_FROM | DELETE) else 0.0


def _wanted(records: Records, trees: list[Tree]) -> dict[str, Interest]:
    """Say what is of interest where."""
    settings = records.settings
    wanted: dict[str, Interest] = {}

    def at(directory: str) -> Interest:
        return wanted.setdefault(directory, Interest())

    for tree in trees:
        entries, place = lookups(tree.directory)
        for directory, name in entries:
            at(directory).names.add(name)
        for directory in (place, *tree.subdirectories) if place else ():
            at(directory).configurations = True
    for path in (*settings.bin_directories, *(pool.directory for pool in pools(trees))):
        entries, place = lookups(path)
        for directory, name in entries:
            at(directory).names.add(name)
        if place:
            at(place).members = True
    links = (link for tree in trees for link in tree.links)
    subnets = (pool.subnet_file for pool in pools(trees) if pool.subnet_file)
    for directory, name in entries_of((*links, *subnets)):
        at(directory).names.add(name)
        at(directory).contents = True
    for directory, name in entries_of(settings.telling_sockets()):
        at(directory).names.add(name)
    return wanted


class _Mounts:
    """Tells when something is mounted or unmounted (proc(5): mountinfo becomes POLLERR and POLLPRI).

    Plain readiness means nothing there, so it is behind an epoll instance, which is readable for these two alone.
    """

    def __init__(self) -> None:
        """Open it. Raises OSError."""
        self._file = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._file, select.EPOLLPRI | select.EPOLLERR)

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._epoll.fileno()

    def acknowledge(self) -> None:
        """Take the news."""
        self._epoll.poll(0)

    def close(self) -> None:
        """Close both."""
        self._epoll.close()
        os.close(self._file)
