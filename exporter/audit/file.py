"""A file that only grows: lines of ours alone, private to our user, set aside by size, a bounded number kept.

Flows in: lines. Flows out: PATH, and PATH.1 (the youngest set aside) to PATH.N. Nothing of it ever blocks on what has
the path by mistake: a FIFO, a directory, a device or a symbolic link is refused.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_MODE = 0o600


class AppendOnly:
    """The file. For one thread."""

    def __init__(self, path: Path, max_size: int, keep: int) -> None:
        """Set aside at `max_size` bytes, and keep `keep` (1 or more) of those set aside. Nothing is opened yet."""
        self._path = path
        self._max_size = max_size
        self._keep = keep
        self._file = -1
        self._torn = False
        """Whether the last line has no end: the disk was full, or the process before us was killed."""

    def append(self, line: bytes) -> None:
        """Write a line, its end included, whole or not at all as far as a reader can tell. Raises OSError."""
        if self._file >= 0 and not self._is_ours():
            self.close()  # somebody set it aside, or removed it
        if self._file < 0:
            self._open()
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self._max_size:
            self._set_aside()
            self._open()
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self._path, _FLAGS, _MODE)
        try:
            self._torn = _is_torn(file)
            os.fchmod(file, _MODE)
        except OSError:
            os.close(file)
            raise
        self._file = file

    def _is_ours(self) -> bool:
        """Whether the path still leads to the file that is open."""
        try:
            return os.path.samestat(os.fstat(self._file), self._path.lstat())
        except OSError:
            return False

    def _set_aside(self) -> None:
        """Number the files anew; the oldest is gone. Raises OSError: rather no line than a file without bound."""
        for number in range(self._keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                self._aside(number).replace(self._aside(number + 1))
        self._path.replace(self._aside(1))
        self.close()

    def _aside(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _is_torn(file: int) -> bool:
    """Look at what was opened: whether its last line lacks an end. Raises OSError where it is nothing for us."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "it belongs to another user")
    return status.st_size > 0 and os.pread(file, 1, status.st_size - 1) != b"\n"
