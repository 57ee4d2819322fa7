"""What may come before ratios can change again: for a class, for a key.

Flows in: rates, as exact counts give them. Flows out: the rate to plan for, events per second. A forecast lies between
the mean and the peak: a plan for the mean is overrun by every burst, one for the peak leaves user space idle.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping

from exporter.load.decision import Key

_MEAN_SECONDS = 20.0
_FAST_SECONDS = 2.0
_BUCKET_SECONDS = 10.0
_BUCKETS = 6
_TOWARDS_PEAK = 0.7
_STEP = 1.5
_STEP_SECONDS = 0.25
_KEYS = 64
"""Keys of a class that are followed."""
_FORGOTTEN_SECONDS = 60.0
"""Seconds without a notable share after which a key is forgotten."""


class Forecast:
    """Follows one rate: mean + 0.7 (peak - mean), and not less than the mean of the last two seconds.

    The mean is exponential over 20 s. The peak is the highest of the last minute: of the mean of two seconds, since the
    ring takes what is shorter; and of the rate itself where the ring could not, and where it steps up: to one and a
    half times all of the last minute, more than chance makes, and is still half of that a quarter of a second later.
    """

    __slots__ = ("_elapsed", "_fast", "_in_bucket", "_peaks", "_step", "_step_age", "mean", "peak", "stepped")

    def __init__(self) -> None:
        """Begin without a rate."""
        self.mean = 0.0
        """Events per second."""
        self.peak = 0.0
        """The highest of the last minute, in events per second."""
        self.stepped = False
        """Whether the last rate has shown that there was a step up."""
        self._step = 0.0
        self._step_age = 0.0
        self._fast = 0.0
        self._peaks = deque([0.0], _BUCKETS)  # the highest of each ten seconds, the newest last
        self._in_bucket = 0.0
        self._elapsed = 0.0

    def update(self, rate: float, dt: float, *, strained: bool = False) -> None:
        """Take the rate (events per second) of the last `dt` seconds; `strained`: it was more than the ring takes."""
        self._elapsed += dt
        self.mean += (rate - self.mean) * max(-math.expm1(-dt / _MEAN_SECONDS), dt / self._elapsed)
        self._fast += (rate - self._fast) * max(-math.expm1(-dt / _FAST_SECONDS), dt / self._elapsed)
        self._in_bucket += dt
        if self._in_bucket >= _BUCKET_SECONDS:
            self._peaks.extend([0.0] * min(int(self._in_bucket / _BUCKET_SECONDS), _BUCKETS))
            self._in_bucket %= _BUCKET_SECONDS
            self.peak = max(self._peaks)
        self.stepped = self._steps_up(rate, dt)
        if self.stepped:
            self._fast = max(self._fast, rate)
        highest = max(self._fast, rate) if strained else self._fast
        self._peaks[-1] = max(self._peaks[-1], highest)
        self.peak = max(self.peak, highest)

    def _steps_up(self, rate: float, dt: float) -> bool:
        if self._step:
            self._step_age += dt
            self._step = max(self._step, rate)
            if self._step_age < _STEP_SECONDS:
                return False
            lasting, self._step = rate >= self._step / 2, 0.0
            return lasting
        highest = self.peak
        if self._elapsed > dt and rate > _STEP * highest + 6 * math.sqrt((highest + 1) / dt):
            self._step, self._step_age = rate, 0.0
        return False

    @property
    def suspected(self) -> bool:
        """Whether the last rate may be a step up, which the next one decides."""
        return self._step > 0

    @property
    def value(self) -> float:
        """Events per second to plan for."""
        return max(self.mean + _TOWARDS_PEAK * (self.peak - self.mean), self._fast)


class KeyForecasts:
    """The forecasts of a class's heavy keys, bounded: the key that was last heavy longest ago makes room."""

    def __init__(self) -> None:
        """Begin without a key."""
        self.evicted = 0
        """Keys that made room."""
        self._now = 0.0
        self._known: dict[Key, tuple[Forecast, float]] = {}  # with when it was last heavy; in that order

    def update(self, rates: Mapping[Key, float], dt: float, *, strained: bool = False) -> None:
        """Take the rates of the keys that are heavy now; the others have none."""
        self._now += dt
        for key in [key for key, (_, last) in self._known.items() if self._now - last > _FORGOTTEN_SECONDS]:
            del self._known[key]
        for key, (forecast, _) in self._known.items():
            if key not in rates:
                forecast.update(0.0, dt)
        for key, rate in rates.items():
            forecast = self._known.pop(key)[0] if key in self._known else Forecast()
            forecast.update(rate, dt, strained=strained)
            self._known[key] = (forecast, self._now)
        self._evict(len(self._known) - _KEYS)

    def _evict(self, surplus: int) -> None:
        for key in list(self._known)[: max(surplus, 0)]:
            del self._known[key]
            self.evicted += 1

    def heaviest(self, kind: str, count: int) -> list[tuple[Key, float]]:
        """Return keys of a kind, heaviest first, with the rate to plan for in events per second."""
        found = [(key, forecast.value) for key, (forecast, _) in self._known.items() if key[0] == kind]
        return sorted(found, key=lambda item: -item[1])[:count]

    @property
    def kinds(self) -> Iterable[str]:
        """The kinds of the keys that are followed."""
        return {key[0] for key in self._known}
