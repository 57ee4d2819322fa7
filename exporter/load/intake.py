"""What the governor believes of an observation: rates instead of counts, and nothing that cannot be.

Flows in: observations, possibly wrong ones. Flows out: readings.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.load.decision import RESOURCES, Key, Observation, Settings

_LARGEST = 1e15
"""Counts above are taken for this: no machine has as many events, and sums of them stay exact enough."""
_SHORTEST = 1e-3
"""Seconds between observations that count as time having advanced."""
_KEYS_READ = 1000
"""Keys of a class that one observation may bring."""
_HEAVY = 0.02
"""Share of its class from which a key is worth following: the 16 rules of a class go to heavier ones."""


@dataclass(frozen=True, slots=True)
class Reading:
    """An observation as rates per second."""

    dt: float
    """Seconds that it covers."""
    rates: Mapping[str, float]
    """Per class, all classes, after configured filters."""
    keys: Mapping[str, Mapping[Key, float]]
    """Per class, of its keys that have a notable share of it."""
    handled: float
    busy: float
    ring: float
    """1 where anything was lost."""
    pressure: Mapping[str, float]


class Intake:
    """Turns observations into readings. Counts what it leaves out."""

    def __init__(self, settings: Settings) -> None:
        """Begin; the first observation covers one interval."""
        self.ignored = 0
        self.evicted = 0
        self._settings = settings
        self._kinds = frozenset(settings.rule_kinds)
        self._last: float | None = None

    def read(self, observation: Observation) -> Reading | None:
        """Return the reading; None where time has not advanced. A clock that was set back is followed from there on."""
        time = observation.time
        if not math.isfinite(time):
            self.ignored += 1
            return None
        dt = self._settings.interval if self._last is None else time - self._last
        if dt < _SHORTEST:
            self.ignored += 1
            self._last = time if dt < -_SHORTEST else self._last
            return None
        self._last = time
        classes = self._settings.classes
        seen, filtered = self._known(observation.seen, classes), self._known(observation.filtered, classes)
        lost = self._known(observation.lost, classes)
        rates = {name: max(seen.get(name, 0.0) - filtered.get(name, 0.0), 0.0) / dt for name in classes}
        return Reading(
            dt,
            rates,
            {
                name: self._heavy(found, rates[name] * dt, dt)
                for name, found in observation.keys.items()
                if name in rates
            },
            self._number(observation.handled) or 0.0,
            self._number(observation.busy) or 0.0,
            1.0 if any(lost.values()) else min(self._number(observation.ring) or 0.0, 1.0),
            self._known(observation.pressure, dict.fromkeys(RESOURCES)),
        )

    def _known(self, numbers: Mapping[str, float], names: Mapping[str, object]) -> dict[str, float]:
        found = {}
        for name, number in numbers.items():
            value = self._number(number)
            if name not in names:
                self.ignored += 1
            elif value is not None:
                found[name] = value
        return found

    def _number(self, value: float) -> float | None:
        if 0 <= value < math.inf:  # false for what is not a number
            return float(min(value, _LARGEST))
        self.ignored += 1
        return None

    def _heavy(self, counts: Mapping[Key, int], total: float, dt: float) -> dict[Key, float]:
        if len(counts) > _KEYS_READ:
            self.evicted += len(counts) - _KEYS_READ
            counts = dict(heapq.nlargest(_KEYS_READ, counts.items(), key=lambda item: item[1]))
        least = _HEAVY * total
        exempt, kinds = self._settings.exempt, self._kinds
        heavy = {}
        for key, count in counts.items():
            if count > least and key[0] in kinds and key not in exempt:
                value = self._number(count)
                if value is not None:
                    heavy[key] = value / dt
        return heavy
