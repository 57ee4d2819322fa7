"""The programs' counters by namespace: each CPU's own places, in memory that is mapped here.

Flows in: the map `places`. Flows out: what was counted. Places of namespaces that are gone are free again.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Collection, Iterator
from typing import NamedTuple

PLACE = struct.Struct("=QQ16sQIIIIIBBBB16s32x8H")
"""struct place of places.h: cookie, what it is about (inode in the lower half), address or command; count, what is
counted, counter; pending, generation, ratio; busy, special, learned, rules; command; the rules that it met."""
WITHOUT = 1024 + 1
"""Places of a CPU that have no counter: the first."""
PLACES = WITHOUT + 1024
"""Places of a CPU."""
WORDS = PLACE.size // 4
"""Of 32 bits."""
KEY = struct.Struct("=QIxxxxII")
"""struct count_key of places.h, the key of what found no place: cookie, inum, what, counter."""
DROPS, TCP = 1, 2
"""enum counter of places.h."""
COUNTER = 11
"""Which word of a place says what counter it has; 0: none."""
_COUNT = struct.Struct("=QQ16xQI")


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
        for _, of, counted, count in self._counters():
            if of == counter:
                found[counted] += count
        return found

    def forget(self, gone: Collection[tuple[int, int]]) -> None:
        """Free the places of namespaces (cookie, inum) in which nothing happens any more.

        What is noted there of events stays, until a program takes the place.
        """
        ended = [place for place, _, (cookie, inum, _), _ in self._counters() if (cookie, inum) in gone]
        with memoryview(self._memory) as memory, memory.cast("I") as words:
            for place in ended:
                words[place * WORDS + COUNTER] = 0

    def close(self) -> None:
        """Unmap."""
        self._memory.close()

    def _counters(self) -> Iterator[tuple[int, int, Counted, int]]:
        """Give place, counter, what it is about, count."""
        with memoryview(self._memory) as memory, memory.cast("I") as words:
            for first in range(0, len(words) // WORDS, PLACES):
                begin, end = (place * WORDS + COUNTER for place in (first + WITHOUT, first + PLACES))
                for place, counter in enumerate(words[begin:end:WORDS].tolist(), first + WITHOUT):
                    if counter:
                        cookie, about, count, what = _COUNT.unpack_from(memory, place * PLACE.size)
                        yield place, counter, Counted(cookie, about & 0xFFFFFFFF, what), count
