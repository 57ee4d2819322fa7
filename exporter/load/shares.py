"""Who gets how much of a budget: bands of the priorities, floors that yield, weighted max-min between classes.

Flows in: what each class would need, a budget. Flows out: events per second for each class.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.load.decision import Level, Settings

BANDS: Mapping[str, tuple[float, float]] = {
    "critical": (1.0, 1.0),
    "error": (0.9, 1.0),
    "warning": (0.5, 0.8),
    "info": (0.1, 0.5),
    "debug": (0.01, 0.1),
}
"""Per priority: the ratio that a class should have at least, and with `thresholds` above the low level at most."""
WEIGHTS: Mapping[str, float] = {"critical": 16.0, "error": 8.0, "warning": 4.0, "info": 2.0, "debug": 1.0}
_YIELDING = ("debug", "info", "warning", "error")
_LEVEL_RATIO: Mapping[Level, float] = {"low": 1.0, "medium": 0.8, "high": 0.5}
_CRITICAL_RATIO = 0.2
_LEAST = 1e-4
_FOR_ALL = 0.1
"""Share of the floors, or of a smaller budget, that all classes part before any floor yields."""
_FIRST = 4.0
"""How much more weight network events have while the network is saturated."""


def level_ratio(level: Level, load: float, settings: Settings) -> float:
    """Return the share of all events that a level allows.

    100, 80 and 50 %; at the critical level from 20 % at its lower edge down to `min_ratio`, evenly by logarithms.
    """
    if level != "critical":
        return _LEVEL_RATIO[level]
    low, high = math.log(settings.thresholds[2]), math.log(settings.thresholds[3])
    lowest = max(settings.min_ratio, _LEAST)
    above = min(max((math.log(max(load, 1.0)) - low) / (high - low), 0.0), 1.0)
    return math.exp(math.log(_CRITICAL_RATIO) + above * (math.log(lowest) - math.log(_CRITICAL_RATIO)))


@dataclass(frozen=True, slots=True)
class Claim:
    """What one class may get."""

    class_: str
    priority: str
    rate: float
    """Events per second that are planned for."""
    least: float
    """The ratio that it keeps whatever happens."""
    floor: float
    """The ratio that its priority promises."""
    ceiling: float
    """The ratio that nothing may exceed."""
    weight: float


def claims(rates: Mapping[str, float], level: Level, pressed: Mapping[str, int], settings: Settings) -> list[Claim]:
    """Return the claims of all classes that are not critical. `rates`: to plan for; `pressed`: see pressure.Pressures.

    Network pressure halves the ceilings of what is no network event, and gives network events four times the weight;
    disk pressure halves the ceilings of what reads and writes files.
    """
    banded = settings.strategy == "thresholds" and level != "low"
    found = []
    for name, priority in settings.classes.items():
        if priority == "critical":
            continue
        lowest, highest = BANDS[priority]
        top = min(settings.max_ratio, highest if banded else 1.0)
        weight = WEIGHTS[priority]
        if pressed["network"]:
            first = name in settings.network_classes
            weight, top = (weight * _FIRST, top) if first else (weight, top / 2)
        if pressed["disk"] and name in settings.disk_classes:
            top /= 2
        least = min(max(settings.min_ratio, _LEAST), settings.max_ratio)
        top = max(top, least)
        low = min(max(lowest, least), top)
        found.append(Claim(name, priority, rates[name], least, low, top, weight))
    return found


def fit_floors(found: Sequence[Claim], budget: float) -> dict[str, float]:
    """Return the floors in events per second as they fit a budget: low priorities yield first, down to `least`.

    A tenth is parted by max-min before, and does not yield: to cut a class of which hardly anything comes makes no room
    for others. So a class that asks for less than its part is kept up to its ceiling, whatever floods the others.
    """
    promised = sum(claim.floor * claim.rate for claim in found)
    parts = max_min(found, dict.fromkeys((claim.class_ for claim in found), 0.0), _FOR_ALL * min(promised, budget))
    lowest = {claim.class_: max(claim.least * claim.rate, parts[claim.class_]) for claim in found}
    floors = {claim.class_: max(claim.floor * claim.rate, lowest[claim.class_]) for claim in found}
    over = sum(floors.values()) - budget
    for priority in _YIELDING:
        yielding = [claim for claim in found if claim.priority == priority]
        room = sum(floors[claim.class_] - lowest[claim.class_] for claim in yielding)
        if over <= 0 or room <= 0:
            continue
        share = min(over / room, 1.0)
        for claim in yielding:
            floors[claim.class_] -= share * (floors[claim.class_] - lowest[claim.class_])
        over -= share * room
    return floors


def max_min(found: Sequence[Claim], floors: Mapping[str, float], budget: float) -> dict[str, float]:
    """Return each class's events per second: floors, and above them the same amount per weight up to the ceilings.

    The sum is the budget, or less where all ceilings fit, or more where the floors alone are more.
    """

    def at(water: float) -> dict[str, float]:
        return {
            claim.class_: min(max(claim.weight * water, floors[claim.class_]), claim.ceiling * claim.rate)
            for claim in found
        }

    high = max((claim.ceiling * claim.rate / claim.weight for claim in found), default=0.0)
    if sum(at(high).values()) <= budget:
        return at(high)
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if sum(at(middle).values()) > budget:
            high = middle
        else:
            low = middle
    return at(low)
