"""The content of a file whose path somebody else wrote: only of a regular file, only up to a bound, without waiting."""

import os
import stat
from collections.abc import Iterator

LARGEST = 1 << 20
"""Bytes of a file at most: what a ConfigMap can hold. Larger ones are not read."""
_CHUNK = 1 << 16


def content(path: str) -> tuple[os.stat_result, bytes]:
    """Give what the file is and what it holds. Raises OSError; ValueError where it is not to be read, and says why.

    What it is gets asked of a descriptor that cannot be read from, so that no FIFO is waited for, no device is touched,
    and nothing can be put in its place in between.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > LARGEST:
            raise ValueError(f"larger than {LARGEST >> 20} MiB")
        descriptor = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(place)
    try:
        held = b"".join(_chunks(descriptor))
    finally:
        os.close(descriptor)
    if len(held) > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB")
    return status, held


def _chunks(descriptor: int) -> Iterator[bytes]:
    """Read until it is more than is allowed: the file may have grown, or never have told its size."""
    count = 0
    while count <= LARGEST and (chunk := os.read(descriptor, _CHUNK)):
        count += len(chunk)
        yield chunk
