"""What decides about ratios in the simulation: the governor, and those that it is to beat.

The rivals are given the same exact counts, the same measured capacity (80 % of it is their budget) and the same
priorities: critical events are never sampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from exporter.load.decision import Key, Observation, Settings, Strategy
from exporter.load.governor import Governor
from exporter.load.shares import level_ratio

_BUDGET = 0.8


class Controller(Protocol):
    """Decides now and then."""

    name: str
    interval: float
    """Seconds until the next step is wanted."""
    ratios: Mapping[str, float]
    rules: Mapping[tuple[str, Key], float]

    def step(self, observation: Observation) -> int:
        """Take an observation, return the number of adaptations made."""


class Ours:
    """The governor."""

    def __init__(self, strategy: Strategy, settings: Settings | None = None) -> None:
        self.name = f"ours, {strategy}"
        self.governor = Governor(settings or Settings(strategy=strategy, max_events_per_second=1e6))
        self.interval = 0.0
        self.ratios: Mapping[str, float] = dict.fromkeys(self.governor.settings.classes, 1.0)
        self.rules: Mapping[tuple[str, Key], float] = {}

    def step(self, observation: Observation) -> int:
        decision = self.governor.step(observation)
        self.interval, self.ratios = decision.next, decision.ratios
        self.rules = {(rule.class_, rule.key): rule.ratio for rule in decision.rules}
        return len(decision.reasons)


@dataclass(frozen=True)
class Now:
    """What a rival goes by."""

    load: float
    """Events per second."""
    capacity: float
    """Events per second that the consumer handles while it works; 0 where it did not."""
    ring: float
    """The highest occupancy, 0 to 1."""


class Rival:
    """One ratio for all classes that are not critical."""

    name = "no control"
    interval = 1.0

    def __init__(self) -> None:
        self.classes = Settings().classes
        self.ratio = 1.0
        self.rules: Mapping[tuple[str, Key], float] = {}
        self.ratios = self._spread()
        self._last = 0.0

    def _spread(self) -> dict[str, float]:
        return {name: 1.0 if priority == "critical" else self.ratio for name, priority in self.classes.items()}

    def step(self, observation: Observation) -> int:
        dt, self._last = observation.time - self._last, observation.time
        load = sum(observation.seen.values()) / dt
        capacity = observation.handled / observation.busy if observation.busy else 0.0
        before, self.ratio = self.ratio, min(max(self.decide(Now(load, capacity, observation.ring)), 0.01), 1.0)
        self.ratios = self._spread()
        return int(abs(self.ratio - before) > 0.01 * before)

    def decide(self, _: Now) -> float:
        """Return the ratio."""
        return 1.0


class Static(Rival):
    name = "static 10 %"

    def decide(self, _: Now) -> float:
        return 0.1


class Table(Rival):
    name = "table verbatim"

    def decide(self, now: Now) -> float:
        edges = Settings().thresholds[:3]
        level = ("low", "medium", "high", "critical")[sum(now.load >= edge for edge in edges)]
        return level_ratio(level, now.load, Settings())


class TableWithHysteresis(Table):
    name = "table, hysteresis"

    def __init__(self) -> None:
        super().__init__()
        self._low = 0

    def decide(self, now: Now) -> float:
        wanted = super().decide(now)
        self._low = self._low + 1 if wanted > self.ratio else 0
        return wanted if wanted < self.ratio or self._low > 15 else self.ratio


class MeanBudget(Rival):
    name = "EMA budget"

    def __init__(self) -> None:
        super().__init__()
        self._mean = 0.0

    def decide(self, now: Now) -> float:
        self._mean += (now.load - self._mean) * 0.2
        return _BUDGET * now.capacity / self._mean if now.capacity else 1.0


class Aimd(Rival):
    name = "AIMD on the ring"

    def decide(self, now: Now) -> float:
        return self.ratio / 2 if now.ring > 0.5 else self.ratio + 0.02


class Pi(Rival):
    name = "PI on the ring"
    interval = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._sum = 1.0

    def decide(self, now: Now) -> float:
        error = 0.25 - now.ring
        self._sum = min(max(self._sum + 0.1 * error, 0.01), 1.0)
        return self._sum + 0.5 * error


RIVALS: tuple[type[Rival], ...] = (Rival, Static, Table, TableWithHysteresis, MeanBudget, Aimd, Pi)
