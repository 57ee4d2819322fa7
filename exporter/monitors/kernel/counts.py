"""The programs' counters by namespace: each CPU's own places, in memory that is mapped here.

Flows in: the map `counts`. Flows out: what was counted. Places of namespaces that are gone are free again.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

PLACE = struct.Struct("=QIIQI4x")
"""struct count of common.h: cookie, inum, what, count, counter."""
KEY = struct.Struct("=QIxxxxII")
"""struct count_key of common.h, the key of what found no place: cookie, inum, what, counter."""
DROPS, TCP = 1, 2
"""enum counter of common.h."""
PLACES = 1024
"""Places of a CPU."""
_WORDS = PLACE.size // 8
_COUNTER = 3  # word of a place; its upper half is the program's
_NOTHING = 0xFFFFFFFF  # counter of a place that is being freed


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

    def read(self, counter: int) -> Counter[Counted]:
        """Give what is counted by one program, added up over the CPUs."""
        found: Counter[Counted] = Counter()
        for cookie, inum, what, count, of in PLACE.iter_unpack(self._memory[:]):
            if of == counter:
                found[Counted(cookie, inum, what)] += count
        return found

    def forget(self, gone: Collection[tuple[int, int]]) -> None:
        """Free the places of namespaces (cookie, inum) in which nothing happens any more.

        A program takes a place whose counter is 0, so that is written last, and in one piece.
        """
        places = PLACE.iter_unpack(self._memory[:])
        ended = [slot for slot, (cookie, inum, _, _, of) in enumerate(places) if of and (cookie, inum) in gone]
        with memoryview(self._memory) as memory, memory.cast("Q") as words:
            for slot in ended:
                first = slot * _WORDS
                words[first + _COUNTER] = _NOTHING
                words[first] = words[first + 1] = words[first + 2] = 0
                words[first + _COUNTER] = 0

    def close(self) -> None:
        """Unmap."""
        self._memory.close()
