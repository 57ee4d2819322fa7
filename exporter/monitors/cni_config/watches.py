"""inotify watches by pyinotify: which directories are watched, and what their events are about.

Flows in: what is of interest, by path. Flows out: for each event whose interest it is, and how it should be waited on.
pyinotify is imported here alone, when a source is opened; it needs `asyncore`, which the package pyasyncore brings back
where Python has it no more (3.12). Flags: inotify(7).
"""

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from exporter.contract import Unsupported
from exporter.monitors.cni_config.configuration import EXTENSIONS

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
_SELF = 0x400 | 0x800  # IN_DELETE_SELF, IN_MOVE_SELF
OVERFLOW, ISDIR = 0x4000, 0x40000000
_ONLYDIR, _MASK_ADD = 0x01000000, 0x20000000
_ENTRIES = MOVED_FROM | MOVED_TO | CREATE | DELETE
_MEMBERS = _ENTRIES | ATTRIB
_CONTENTS = _MEMBERS | MODIFY | CLOSE_WRITE
_LINKS = 40  # that are followed in a path, as many as the kernel does (path_resolution(7))
_LIMITS = {
    errno.ENOSPC: "fs.inotify.max_user_watches",
    errno.EMFILE: "fs.inotify.max_user_instances",
    errno.ENFILE: "fs.file-max",
    errno.ENOMEM: "the memory limit",
}


@dataclass(slots=True)
class Interest:
    """What is of interest in a directory."""

    names: set[str] = field(default_factory=set)
    """Entries that decide what a path leads to: its parts, links, what links lead to."""
    configurations: bool = False
    """Whether files with a configuration's extension are."""
    members: bool = False
    """Whether it is of interest which entries there are, and who may execute them: plugins, leases."""
    contents: bool = False
    """Whether what is written into the entries is of interest too."""

    @property
    def mask(self) -> int:
        """The events to ask for; two paths may lead to one directory, so one does not take away what another needs."""
        wanted = _CONTENTS if self.contents or self.configurations else _MEMBERS if self.members else _ENTRIES
        return wanted | _SELF | _ONLYDIR | _MASK_ADD

    def add(self, other: "Interest") -> None:
        """Be interested in what either is."""
        self.names |= other.names
        self.configurations |= other.configurations
        self.members |= other.members
        self.contents |= other.contents

    def in_configuration(self, name: str, mask: int) -> bool:
        """Whether an event is about configurations, or about what is to be watched."""
        return name in self.names or (self.configurations and bool(mask & ISDIR or name.endswith(EXTENSIONS)))

    def in_surroundings(self, name: str, mask: int) -> bool:
        """Whether an event is about plugins or leases alone."""
        return self.members and bool(name and mask & _MEMBERS)


def lookups(path: str) -> tuple[list[tuple[str, str]], str]:
    """Follow a path as the kernel does: give every directory entry that decides where it leads, and where that is.

    Where an entry is missing the list ends with it, for there it would appear, and the place is empty.
    """
    entries: list[tuple[str, str]] = []
    here, links = "", 0
    waiting = path.split("/")[::-1]
    while waiting:
        name = waiting.pop()
        if name == "..":
            here = here.rpartition("/")[0]
        if name in ("", ".", ".."):
            continue
        entries.append((here or "/", name))
        try:
            target = os.readlink(f"{here}/{name}")  # noqa: PTH115 - texts, one for each part of each path
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: it is no link
                return entries, ""
            here = f"{here}/{name}"
            continue
        links += 1
        if links > _LINKS:
            return entries, ""
        here = "" if target.startswith("/") else here
        waiting += target.split("/")[::-1]
    return entries, here or "/"


class Watches:
    """An inotify instance and its watches."""

    def __init__(self, heed: Callable[[Interest, str, int], None], lost: Callable[[], None]) -> None:
        """Open an instance; `heed` hears of events (interest, name, mask), `lost` that some were lost.

        Raises Unsupported where there can be none.
        """
        self._heed = heed
        self._lost = lost
        self._interests: dict[int, Interest] = {}
        pyinotify = _imported()
        try:
            self._manager: Any = pyinotify.WatchManager()
        except (OSError, pyinotify.PyinotifyError) as error:
            raise _unsupported(ctypes.get_errno()) from error
        os.set_inheritable(self.fileno(), False)  # noqa: FBT003 - the function's own interface
        self._notifier: Any = pyinotify.Notifier(self._manager, self._handle)

    def fileno(self) -> int:
        """Descriptor to poll."""
        return int(self._manager.get_fd())

    def receive(self) -> None:
        """Handle what waits."""
        try:
            self._notifier.read_events()
        except UnicodeDecodeError:  # pyinotify decodes names strictly; the events behind this one are gone
            self._lost()
        self._notifier.process_events()

    def watch(self, wanted: dict[str, Interest]) -> tuple[bool, list[str]]:
        """Watch these directories and no others: whether one of them is newly watched, and which may not be.

        Every path is asked for anew: it may lead to another directory than before. Raises Unsupported at a limit.
        """
        interests: dict[int, Interest] = {}
        refused = []
        for path, interest in wanted.items():
            number, reason = self._add(path, interest.mask)
            if number >= 0:
                interests.setdefault(number, Interest()).add(interest)
            elif reason in _LIMITS:
                raise _unsupported(reason)
            elif reason not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # gone meanwhile: its parent will tell
                refused.append(path)
        new = bool(interests.keys() - self._interests.keys())
        for number in self._interests.keys() - interests.keys():
            if self._manager.get_watch(number):
                self._manager.rm_watch(number)
        self._interests = interests
        return new, refused

    def close(self) -> None:
        """End every watch."""
        self._notifier.stop()

    def _add(self, path: str, mask: int) -> tuple[int, int]:
        try:
            number: int = self._manager.add_watch(path, mask)[path]
        except UnicodeEncodeError:  # as above
            return -1, errno.EILSEQ
        return number, ctypes.get_errno() if number < 0 else 0

    def _handle(self, event: Any) -> None:  # noqa: ANN401 - pyinotify has no types
        if event.mask & OVERFLOW:
            self._lost()
            return
        interest = self._interests.get(event.wd)
        if interest:
            self._heed(interest, getattr(event, "name", ""), event.mask)


def entries_of(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Give what decides where each of these paths leads."""
    for path in paths:
        yield from lookups(path)[0]


def _imported() -> Any:  # noqa: ANN401 - as above
    try:
        import pyinotify  # type: ignore[import-untyped] # noqa: PLC0415 - needed only where there is inotify
    except ImportError as error:
        remedy = "install pyinotify and, for Python 3.12 or later, pyasyncore"
        raise Unsupported(f"no module {error.name}", remedy) from error
    logger = logging.getLogger("pyinotify")  # it writes to standard error by itself; what it says, we say
    logger.handlers.clear()
    logger.setLevel(logging.CRITICAL)
    return pyinotify


def _unsupported(reason: int) -> Unsupported:
    limit = _LIMITS.get(reason)
    remedy = f"raise {limit}" if limit else ""
    return Unsupported(f"inotify: {os.strerror(reason) if reason else 'not to be had'}", remedy)
