"""What the programs said of events that come again and again, and how many those were: in memory that is mapped here.

Flows in: the map `places`, of each CPU's own; keys of which other things are to be said. Flows out: counts of
keys and of learned rules that are in no other map yet: a program adds them there when it needs the place for others.
"""

import mmap
import struct
from collections import Counter, defaultdict
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from exporter.monitors.kernel.counts import PLACE, WORDS
from exporter.monitors.kernel.events import NETNS
from exporter.monitors.kernel.shapes import CLASSES, THINNED

_HEAD = struct.Struct("=QQ16s16xIII4B16s")  # what says whose events they are, and how many
_ABOUT = struct.Struct("=QQ16s32x16s")
_MET = struct.Struct("=8H")
_MET_AT = 112
_PENDING, _GENERATION = 12, 13  # words of a place
_WHOLE_ADDRESS = struct.pack("=I", 128)
_BY_NETNS, _BY_COMM, _BY_PREFIX = 1 << 56, 1 << 57, 1 << 58  # COUNT_x in the word that says what it is about
_FIRST = CLASSES.index(THINNED[0])

Keys = dict[bytes, list[int]]
"""Keys of a map load_x, each with its events by class, in the order of THINNED."""


class _Seen(NamedTuple):
    """A place, as it was when it was looked at last."""

    raw: bytes
    pending: int
    class_: int
    keys: tuple[tuple[str, bytes], ...]
    slots: tuple[int, ...]


class Verdicts:
    """The places of all CPUs."""

    def __init__(self, fd: int, places: int) -> None:
        """Map the array; the descriptor stays the caller's. Raises OSError."""
        self._memory = mmap.mmap(fd, places * PLACE.size)
        self._seen: dict[int, _Seen] = {}

    def pending(self) -> tuple[dict[str, Keys], Counter[int]]:
        """Give what is not counted elsewhere: by kind of key and key, and of learned rules by slot of `rule_matches`.

        What a program adds to other maps right now may be there and here: so ask here first, and never take back.
        """
        keys: dict[str, Keys] = {kind: defaultdict(lambda: [0] * len(THINNED)) for kind in ("netns", "comm", "prefix")}
        slots: Counter[int] = Counter()
        with memoryview(self._memory) as memory, memory.cast("I") as words:
            pending = words[_PENDING::WORDS].tolist()
            looked = ((place, self._look(place, memory)) for place, count in enumerate(pending) if count)
            self._seen = {place: seen for place, seen in looked if seen}
        for seen in self._seen.values():
            for kind, key in seen.keys:
                keys[kind][key][seen.class_] += seen.pending
            for slot in seen.slots:
                slots[slot] += seen.pending
        return keys, slots

    def forget(self, keys: AbstractSet[tuple[str, bytes]]) -> None:
        """Have the programs decide anew on events of these keys: kinds and keys of maps filter_x.

        What a program decides at that moment may be by what was before: it is to be forgotten once more, later.
        """
        if not keys:
            return
        with memoryview(self._memory) as memory, memory.cast("I") as words:
            generations = words[_GENERATION::WORDS].tolist()
            for place in (place for place, generation in enumerate(generations) if generation):
                cookie, what, key, comm = _ABOUT.unpack_from(memory, place * PLACE.size)
                netns = NETNS.pack(cookie, what & 0xFFFFFFFF)
                if not keys.isdisjoint((("netns", netns), ("comm", comm), ("prefix", _WHOLE_ADDRESS + key))):
                    words[place * WORDS + _GENERATION] = 0

    def _look(self, place: int, memory: memoryview) -> _Seen | None:
        """Look at a place; where a program is at work in it, it is as it was before."""
        before, at = self._seen.get(place), place * PLACE.size
        raw = bytes(memory[at : at + _HEAD.size])
        if before and before.raw == raw:
            return before
        met = _MET.unpack_from(memory, at + _MET_AT)
        cookie, what, address, pending, _, _, busy, _, learned, rules, comm = _HEAD.unpack(raw)
        if busy or _ABOUT.unpack_from(memory, at) != (cookie, what, address, comm):
            return before
        keys: list[tuple[str, bytes]] = []
        if what & _BY_NETNS and what & 0xFFFFFFFF:
            keys.append(("netns", NETNS.pack(cookie, what & 0xFFFFFFFF)))
        if what & _BY_COMM:
            keys.append(("comm", comm))
        if what & _BY_PREFIX and any(address):
            keys.append(("prefix", _WHOLE_ADDRESS + address))
        slots = tuple(one >> 1 for one in met[: min(rules, len(met))] if one & 1) if learned else ()
        return _Seen(raw, pending, (what >> 32 & 15) - _FIRST, tuple(keys), slots)
