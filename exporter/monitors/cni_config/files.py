"""Configuration files on disk: which there are, and their content, whatever they turn out to be.

Flows in: directories. Flows out: a `Found` per file that counts; every failure is a problem of that file.
"""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from exporter.monitors.cni_config.configuration import EXTENSIONS, Configuration, read
from exporter.monitors.cni_config.document import Problem
from exporter.monitors.cni_config.reading import content

_MOST_FILES = 1000
_MOST_DIRECTORIES = 100
_MOST_NAMES = 20_000
_DEEPEST = 4
_RACY = 2.0
"""Seconds in which a file may change again without another time stamp, on file systems with coarse ones."""

_PROBLEMS = {
    errno.ENOENT: "a link that leads nowhere",
    errno.ELOOP: "a loop of links",
    errno.EACCES: "cannot be read: no permission",
}

Signature = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A file that counts by its name."""

    path: str
    configuration: Configuration
    sha256: str = ""
    """Of the content; empty where there is none."""
    changed: float = 0.0
    """Unix time of the last change of the content (st_mtime); 0 where there is none."""
    readable: bool = True
    """False where the exporter may not read it: then nobody knows whether it is valid."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A configuration directory as it was found."""

    directory: str
    files: tuple[Found, ...] = ()
    """Those right in the directory, in the order of the runtimes: by the bytes of their names."""
    parts: tuple[Found, ...] = ()
    """Those in its subdirectories."""
    subdirectories: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    """Those of the files that are symbolic links."""
    exists: bool = False
    complete: bool = True
    """False where a bound cut it short, or a part of it could not be listed."""


@dataclass(slots=True)
class _Listing:
    """The names in a directory that matter."""

    names: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    """Paths of those among them that are symbolic links."""
    inner: list[str] = field(default_factory=list)
    """Paths of subdirectories."""
    complete: bool = True


class Reader:
    """Reads directories; what has not changed since the last time is not read again."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Take a clock in Unix seconds, against which the files' own times are held."""
        self._clock = clock
        self._known: dict[str, tuple[Signature, Found]] = {}
        self._seen: dict[str, tuple[Signature, Found]] = {}

    def forget(self) -> None:
        """Read everything anew the next time."""
        self._known = {}

    def trees(self, directories: tuple[str, ...]) -> list[Tree]:
        """Look at every directory; one that is not there, or was met under another name, gives an empty tree."""
        self._seen = {}
        trees: list[Tree] = []
        identities: set[tuple[int, int]] = set()
        for directory in directories:
            try:
                status = os.stat(directory)  # noqa: PTH116 - names may be of any bytes, here and below
            except (OSError, ValueError):
                trees.append(Tree(directory))
                continue
            twice = (status.st_dev, status.st_ino) in identities
            identities.add((status.st_dev, status.st_ino))
            trees.append(Tree(directory) if twice or not stat.S_ISDIR(status.st_mode) else self._tree(directory))
        self._known = self._seen
        return trees

    def _tree(self, root: str) -> Tree:
        """Read a directory and what is below it, within bounds."""
        listings = list(_walk(root))
        found: list[list[Found]] = [[], []]
        room = _MOST_FILES
        for directory, listing in listings:
            for name in listing.names[:room]:
                file = self._file(f"{directory}/{name}", name, part=directory != root)
                if file:
                    found[directory != root].append(file)
            room = max(0, room - len(listing.names))
        return Tree(
            root,
            tuple(found[0]),
            tuple(found[1]),
            tuple(directory for directory, _ in listings[1:]),
            tuple(link for _, listing in listings for link in listing.links),
            exists=True,
            complete=room > 0 and all(listing.complete for _, listing in listings),
        )

    def _file(self, path: str, name: str, *, part: bool) -> Found | None:
        """Look at a file; None where it is gone."""
        try:
            status = os.stat(path)  # noqa: PTH116
            if not stat.S_ISREG(status.st_mode):
                return _unusable(path, "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            signature = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            known = self._known.get(path)
            found = known[1] if known and known[0] == signature else _read(path, name, part=part)
        except OSError as error:
            if error.errno == errno.ENOENT and not os.path.lexists(path):
                return None
            problem = _PROBLEMS.get(error.errno or 0, f"cannot be read: {error.strerror}")
            return _unusable(path, problem, readable=error.errno != errno.EACCES)
        if self._clock() - max(status.st_mtime, status.st_ctime) > _RACY:
            self._seen[path] = (signature, found)
        return found


def _walk(root: str) -> Iterator[tuple[str, _Listing]]:
    """List a directory and those below it, in breadth."""
    waiting, left = [(root, 0)], _MOST_DIRECTORIES
    while waiting:
        directory, depth = waiting.pop(0)
        listing = _listed(directory)
        room = left if depth < _DEEPEST else 0
        listing.complete = listing.complete and len(listing.inner) <= room
        waiting += [(path, depth + 1) for path in listing.inner[:room]]
        left -= len(listing.inner[:room])
        yield directory, listing


def _listed(directory: str) -> _Listing:
    """List the names that count, in order, and subdirectories.

    Subdirectories that begin with a dot are not looked into: there a ConfigMap's volume keeps what its links lead to.
    """
    listing = _Listing()
    try:
        with os.scandir(directory) as entries:
            for entry in islice(entries, _MOST_NAMES):
                _sort_in(listing, entry)
            listing.complete = next(entries, None) is None
    except OSError:
        listing.complete = False
    listing.names.sort(key=os.fsencode)
    return listing


def _sort_in(listing: _Listing, entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        if not entry.name.startswith("."):
            listing.inner.append(entry.path)
    elif entry.name.endswith(EXTENSIONS):
        listing.names.append(entry.name)
        if entry.is_symlink():
            listing.links.append(entry.path)


def _read(path: str, name: str, *, part: bool) -> Found:
    """Read what was a regular file a moment ago. Raises OSError."""
    try:
        status, held = content(path)
    except ValueError as reason:
        return _unusable(path, str(reason))
    return Found(path, read(name, held, part=part), hashlib.sha256(held).hexdigest(), status.st_mtime)


def _unusable(path: str, problem: str, *, readable: bool = True) -> Found:
    return Found(path, Configuration(problem=Problem(problem)), readable=readable)
