"""Takes records out of the rings: when, at what cost, and what is noted of each even if nobody watches.

Flows in: the rings' wake-ups, records. Flows out: per class how many were handled, how late, and what they stand for.
"""

import ctypes
import select
import struct
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from exporter.catalog import FAMILIES
from exporter.host.timer import Timer
from exporter.monitors.kernel.events import weight
from exporter.monitors.kernel.shapes import CLASSES

GATHER = 0.05
"""Seconds that records may gather in the ring before they are taken out together."""
_BRIEF = struct.Struct("=Q12xBxHI")  # of struct event: time, class, size, ratio
_BOUNDS = tuple(round(bound * 1e9) for bound in FAMILIES["cni_events_lag_seconds"].buckets)


@dataclass(slots=True)
class Tally:
    """What became of the records, by class; it outlives the sources that count. One thread counts, any may read."""

    handled: Counter[str] = field(default_factory=Counter)
    """Records taken out."""
    lags: dict[str, list[float]] = field(default_factory=dict)
    """Histograms of the time from event to handling, where it is told: counts per bucket, then the sum in seconds."""
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    """Sum of the records' weights: an estimate, without bias, of how many events passed filters and were not lost."""
    variances: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    """Estimated variance of that: the sum of weight * (weight - 1) (Horvitz-Thompson, each event drawn by itself)."""
    busy: float = 0.0
    """CPU seconds that the thread has spent on records."""
    share: float = 1.0
    """Of a processor, what the thread may spend on them, critical ones aside."""
    _new: Counter[tuple[int, int]] = field(default_factory=Counter)
    _late: list[list[int]] = field(default_factory=lambda: [[0] * (len(_BOUNDS) + 2) for _ in CLASSES])

    def count(self, address: int, size: int, now: int) -> str:
        """Note a record by its address in the ring; `now` is CLOCK_MONOTONIC in ns. The answer is its class.

        Raises ValueError where it is no record. What is noted shows after the next `settle`.
        """
        if size < _HEAD:
            raise ValueError(f"a record of {size} bytes has no head")
        when, class_, said, ratio = _BRIEF.unpack(ctypes.string_at(address, _BRIEF.size))
        if class_ >= len(CLASSES) or said != size:
            raise ValueError(f"a record of class {class_} says {said} bytes and has {size}")
        self._new[class_, ratio] += 1
        if when:
            late = self._late[class_]
            lag = now - when if now > when else 0
            late[bisect_left(_BOUNDS, lag)] += 1
            late[-1] += lag
        return CLASSES[class_]

    def settle(self) -> None:
        """Add up what was noted since the last time."""
        new, self._new = self._new, Counter()
        for (number, ratio), count in new.items():
            class_, stands_for = CLASSES[number], weight(ratio)
            self.handled[class_] += count
            self.weights[class_] += count * stands_for
            self.variances[class_] += count * stands_for * (stands_for - 1)
        for class_, (*counts, total) in zip(CLASSES, self._late, strict=True):
            if any(counts):
                self.lags[class_] = [*map(float, counts), total / 1e9]


_HEAD = 48  # bytes of struct event


class Bell:
    """Says when a ring is to be emptied: some time after its first record, or at once when it fills.

    The kernel wakes a reader by the first record that it has not read, and as each further eighth of the ring fills
    (event_submit in events.h). So the first wake-up starts a timer, and a second one does not wait for it. After work
    that took long there is a rest, which nothing cuts short: what comes meanwhile the brake in the kernel thins out.
    """

    def __init__(self, ring: int, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Listen to a ring by its descriptor; emptying it may take `share` of a processor. Raises OSError."""
        self._timer = Timer()
        self._epoll = select.epoll()
        self._epoll.register(ring, select.EPOLLIN | select.EPOLLET)
        self._epoll.register(self._timer.fileno(), select.EPOLLIN)
        self._gathering = False
        self._clock = clock
        self._rest = max(0.0, 1 / share - 1)  # seconds for each second of work
        self._resting_until = 0.0

    def fileno(self) -> int:
        """Descriptor that is readable when `due` is to be asked."""
        return self._epoll.fileno()

    def due(self) -> bool:
        """Whether the ring is to be emptied now; begins to wait where it is not."""
        rang = bool(self._epoll.poll(0))
        rest = self._resting_until - self._clock()
        if self._gathering and rest <= 0:
            return rang
        if rang:
            self._timer.start(rest if rest > 0 else GATHER)
            self._gathering = True
        return False

    def emptied(self, *, wholly: bool, spent: float = 0.0) -> None:
        """Begin anew after so many seconds of work, with another turn where something is left."""
        rest = spent * self._rest
        self._resting_until = self._clock() + rest
        self._gathering = not wholly
        if wholly:
            self._timer.stop()
        else:
            self._timer.start(rest)

    def close(self) -> None:
        """Stop listening."""
        self._epoll.close()
        self._timer.close()
