"""The programs' counters by namespace: each CPU's own places, in memory that is mapped here.

Flows in: the map `counts`. Flows out: what was counted, by the number of the map that has what found no place. Places
of namespaces that are gone are free again.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

PLACE = struct.Struct("=QIIQI4x")
"""struct count of common.h: cookie, inum, what, count, owner."""
KEY = struct.Struct("=QIxxxxIxxxx")
"""struct count_key of common.h, the key of those maps: cookie, inum, what."""
PLACES = 1024
"""Places of a CPU."""
_WORDS = PLACE.size // 8
_OWNER = 3  # word of a place; its upper half is the program's
_NOBODY = 0xFFFFFFFF  # owner of a place that is being freed


class Counted(NamedTuple):
    """What a counter is about."""

    cookie: int
    inum: int
    what: int


class Counts:
    """The places of all CPUs."""

    def __init__(self, fd: int, capacity: int) -> None:
        """Map the array with so many places; the descriptor stays the caller's. Raises OSError."""
        self._memory = mmap.mmap(fd, capacity * PLACE.size)

    def read(self, number: int) -> Counter[Counted]:
        """Give what is counted for the map of this number, added up over the CPUs."""
        found: Counter[Counted] = Counter()
        for cookie, inum, what, count, owner in PLACE.iter_unpack(self._memory[:]):
            if owner == number + 1:
                found[Counted(cookie, inum, what)] += count
        return found

    def forget(self, gone: Collection[tuple[int, int]]) -> None:
        """Free the places of namespaces (cookie, inum) in which nothing happens any more.

        A program takes a place whose owner is 0, so that is written last, and in one piece.
        """
        places = PLACE.iter_unpack(self._memory[:])
        ended = [slot for slot, (cookie, inum, _, _, owner) in enumerate(places) if owner and (cookie, inum) in gone]
        with memoryview(self._memory) as memory, memory.cast("Q") as words:
            for slot in ended:
                first = slot * _WORDS
                words[first + _OWNER] = _NOBODY
                words[first] = words[first + 1] = words[first + 2] = 0
                words[first + _OWNER] = 0

    def close(self) -> None:
        """Unmap."""
        self._memory.close()
