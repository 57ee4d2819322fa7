"""How the load moves, and what is out of line: a history of five minutes, looked at once a second.

Flows in: rates of the classes. Flows out: pattern, period, growth, what is to be expected next, anomalies. The
definitions are in docs/load-management.md.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from operator import mul
from statistics import fmean

from exporter.load.decision import Pattern

LENGTH = 300
"""Seconds of history, one value each."""
_ENOUGH = 30
_RECOGNISED_EVERY = 5
_TREND_SECONDS = 120
_BASELINE_SECONDS = 60
_ALIKE = 0.5
_SHORTEST_PERIOD = 4
_CYCLES = 2.5
_LEAST_STEP = 0.1


class History:
    """Rates of the last five minutes in bins of one second, per class, and their sum under the name ''."""

    def __init__(self, classes: Iterable[str]) -> None:
        """Begin without history."""
        self.rates: dict[str, deque[float]] = {name: deque(maxlen=LENGTH) for name in ("", *classes)}
        """Events per second, oldest first."""
        self._open = dict.fromkeys(self.rates, 0.0)
        self._filled = 0.0

    def add(self, rates: Mapping[str, float], dt: float) -> int:
        """Take rates (events per second) of the last `dt` seconds; return how many bins that completed."""
        with_sum = {"": sum(rates.values()), **rates}
        completed = 0
        if dt > LENGTH:  # all of it is older than what is kept
            completed, dt = int(dt - LENGTH), LENGTH + math.fmod(dt, 1.0)
        while dt > 0:
            part = min(1.0 - self._filled, dt)
            for name, rate in with_sum.items():
                self._open[name] += rate * part
            self._filled += part
            dt -= part
            if self._filled > 1.0 - 1e-9:
                completed += 1
                self._close()
        return completed

    def _close(self) -> None:
        for name, value in self._open.items():
            self.rates[name].append(value)
            self._open[name] = 0.0
        self._filled = 0.0


def quantile(ascending: Sequence[float], share: float) -> float:
    """Return the value below which a share of all values is."""
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


def period(rates: Sequence[float]) -> int:
    """Return the lag in seconds at which a series repeats itself, 0 where it does not.

    It does where the autocorrelation, having been below a quarter of it, rises to a local maximum of at least 0.5, with
    two and a half periods in the series.
    """
    count = len(rates)
    mean = fmean(rates)
    values = [rate - mean for rate in rates]
    variance = sum(map(mul, values, values))
    if variance <= count * (mean + 1.0):  # no more than chance makes of arrivals that know nothing of each other
        return 0
    longest = int(count / _CYCLES)
    alike = [0.0] * (longest + 2)
    for lag in range(1, longest + 2):
        alike[lag] = sum(map(mul, values, islice(values, lag, None))) / variance * count / (count - lag)
    best, fell = 0, False
    for lag in range(2, longest + 1):
        fell = fell or alike[lag] < _ALIKE / 4
        peak = fell and lag >= _SHORTEST_PERIOD and alike[lag - 1] <= alike[lag] >= alike[lag + 1]
        if peak and alike[lag] >= _ALIKE and alike[lag] > 1.1 * (alike[best] if best else 0.0):
            best = lag
    return best


def growth(rates: Sequence[float]) -> float:
    """Return by how many events per second a series grows each second; 0 where it has no trend.

    A trend: the medians of its four quarters go one way, no step of them being less than a tenth of the whole way, and
    the whole way is at least a fifth of the mean, and more than chance makes.
    """
    quarter = len(rates) // 4
    medians = [quantile(sorted(rates[n * quarter : (n + 1) * quarter]), 0.5) for n in range(4)]
    way = medians[3] - medians[0]
    mean = fmean(rates)
    steps = [(later - earlier) / way if way else 0.0 for earlier, later in pairwise(medians)]
    if min(steps) < _LEAST_STEP or abs(way) < max(0.2 * mean, 6 * math.sqrt(mean + 1) / math.sqrt(quarter)):
        return 0.0
    return way / (3 * quarter)


def bursts(rates: Sequence[float]) -> bool:
    """Tell whether a series leaves its median by half of it, and by more than chance, at least three times."""
    median = quantile(sorted(rates), 0.5)
    margin = max(0.5 * median, 6 * math.sqrt(median + 1))
    away, times = False, 0
    for rate in rates:
        out = abs(rate - median) > margin
        times += out and not away
        away = out
    return times >= 3  # noqa: PLR2004 - one is a step, two a peak


class Patterns:
    """Recognises the pattern of the sum of all classes, and anomalies of each."""

    def __init__(self, classes: Iterable[str]) -> None:
        """Begin without history."""
        self.history = History(classes)
        self.pattern: Pattern = "unknown"
        self.period = 0
        """Seconds; 0 where the pattern is not periodic."""
        self.growth = 0.0
        """Share of the mean rate by which the load grows each second; 0 where the pattern is not trending."""
        self._since = 0
        self._bursty = frozenset[str]()  # classes, by their own rates
        self._away: dict[str, int] = {}

    def update(self, rates: Mapping[str, float], dt: float) -> tuple[str, ...]:
        """Take rates (events per second) of the last `dt` seconds; return the classes that are anomalous as of now."""
        completed = self.history.add(rates, dt)
        if not completed:
            return ()
        found = tuple(name for name in rates if self._departs(name))
        self._since += completed
        if self._since >= _RECOGNISED_EVERY:
            self._since = 0
            self.pattern = self._recognise(list(self.history.rates[""]))
            self._bursty = frozenset(name for name in rates if bursts(self.history.rates[name]))
        return found

    def ahead(self, name: str, horizon: int) -> float:
        """Return the highest rate that the last period had from this point on, for `horizon` seconds.

        Events per second of a class; 0 where there is no period.
        """
        rates = self.history.rates[name]
        if not self.period or len(rates) < self.period:
            return 0.0
        start = len(rates) - self.period
        return max(islice(rates, start, min(start + horizon, len(rates))), default=0.0)

    def _recognise(self, rates: list[float]) -> Pattern:
        self.period, self.growth = 0, 0.0
        if len(rates) < _ENOUGH:
            return "unknown"
        self.period = period(rates)
        if self.period:
            return "periodic"
        recent = rates[-_TREND_SECONDS:]
        self.growth = growth(recent) / max(fmean(recent), 1.0)
        return "trending" if self.growth else "bursty" if bursts(rates) else "steady"

    def _departs(self, name: str) -> bool:
        """Tell whether the newest bin of a class leaves what was expected, and did not in the ten bins before."""
        rates = self.history.rates[name]
        if len(rates) <= _ENOUGH:
            return False
        low, high = self._expected(list(rates), bursty=name in self._bursty)
        out = not low <= rates[-1] <= high
        quiet = self._away.get(name, 10)
        self._away[name] = 0 if out else quiet + 1
        return out and quiet >= 10  # noqa: PLR2004 - seconds, as the docstring says

    def _expected(self, rates: list[float], *, bursty: bool) -> tuple[float, float]:
        """Return the range in which the newest value is no anomaly."""
        *before, _ = rates
        spread = 0.0
        if self.period and len(before) > self.period + 3:
            at = len(before) - self.period
            past = before[max(at - 3, 0) : at + 4]
            low, high = min(past), max(past)
        elif bursty:
            low, high = min(before), max(before)
        else:
            recent = sorted(before[-_BASELINE_SECONDS:])
            low = high = quantile(recent, 0.5)
            spread = 6 * 1.4826 * quantile(sorted(abs(rate - low) for rate in recent), 0.5)
        return low - max(spread, _margin(low)), high + max(spread, _margin(high))


def _margin(rate: float) -> float:
    """Return by how many events per second a rate may differ: a quarter, and six times what chance makes of it."""
    return max(0.25 * rate, 6 * math.sqrt(rate + 1))
