"""The plan: what should be kept, if nothing of it were in force yet.

Flows in: what is planned for, level, pressure, capacity. Flows out: ratios, caps of heavy keys, the budget behind them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.load.decision import Key, Level, Settings
from exporter.load.forecast import KeyForecasts
from exporter.load.rules import Cut, Share, dominant_kind, fill
from exporter.load.shares import Claim, claims, fit_floors, level_ratio, max_min

_CAPACITY_SHARE = 0.8
"""Of what user space can handle: the rest is for what the forecast did not know."""
_CPU_SHARE = 0.5
_OFF = (frozenset[str](), frozenset({"debug"}), frozenset({"debug", "info"}))
_YIELDED = 0.999  # less than a thousandth below the floor is rounding


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a plan is made for."""

    rates: Mapping[str, float]
    """Events per second to plan for, per class."""
    keys: Mapping[str, KeyForecasts]
    level: Level
    highest: float
    """Events per second, the highest of the last minute of all classes: the ratio of the critical level is for that."""
    pressed: Mapping[str, int]
    """See pressure.Pressures.on."""
    capacity: float
    """Events per second that user space can handle; 0 where that is not known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What should be kept."""

    ratios: Mapping[str, float]
    rules: Mapping[tuple[str, Key], float]
    ceilings: Mapping[str, float]
    """Ratio per class that nothing may exceed."""
    budget: float
    """Events per second."""
    yielded: tuple[str, ...]
    urgent: bool = False
    """Whether a heavy key takes far more than its cap, for want of a rule or of a tighter one."""


def make(outlook: Outlook, ruled: Mapping[str, Mapping[Key, float]], settings: Settings) -> Plan:
    """Return the plan. `ruled`: the rules in force, per class."""
    off = _OFF[outlook.pressed["memory"]]
    found = [
        claim for claim in claims(outlook.rates, outlook.level, outlook.pressed, settings) if claim.priority not in off
    ]
    critical = sum(outlook.rates[name] for name, priority in settings.classes.items() if priority == "critical")
    budget, floors = _budget(found, critical, outlook, settings)
    shares = max_min(found, floors, budget)
    cuts = {claim.class_: _cut(claim, shares[claim.class_], outlook, ruled, settings) for claim in found}
    ceilings = {claim.class_: claim.ceiling for claim in found}
    ratios = {
        name: 1.0 if priority == "critical" else cuts[name].ratio if name in cuts else 0.0
        for name, priority in settings.classes.items()
    }
    return Plan(
        ratios,
        {(name, key): ratio for name, cut in cuts.items() for key, ratio in cut.rules.items()},
        ceilings,
        budget + critical,
        tuple(claim.class_ for claim in found if shares[claim.class_] < claim.floor * claim.rate * _YIELDED),
        any(cut.urgent for cut in cuts.values()),
    )


def _budget(
    found: list[Claim], critical: float, outlook: Outlook, settings: Settings
) -> tuple[float, dict[str, float]]:
    """Return the budget of all but critical events, and the floors in it.

    The ratio of the level is a ceiling for what is above the floors: priorities are promises, levels are not. Only what
    user space cannot take, and pressure on the CPU, which halves whatever would be kept, make floors yield.
    """
    total = sum(claim.rate for claim in found)
    room = settings.max_events_per_second
    if outlook.capacity:
        room = min(room, max(_CAPACITY_SHARE * outlook.capacity - critical, 0.0))
    wanted = min(room, sum(claim.ceiling * claim.rate for claim in found))
    if settings.strategy == "thresholds":
        wanted = min(wanted, level_ratio(outlook.level, outlook.highest, settings) * total)
    floors = fit_floors(found, room)
    budget = max(wanted, min(sum(floors.values()), room))
    if outlook.pressed["cpu"]:
        budget *= _CPU_SHARE
        floors = fit_floors(found, budget)
    return budget, floors


def _cut(
    claim: Claim, amount: float, outlook: Outlook, ruled: Mapping[str, Mapping[Key, float]], settings: Settings
) -> Cut:
    keys, have = outlook.keys.get(claim.class_), ruled.get(claim.class_, {})
    heaviest: list[tuple[Key, float]] = []
    if keys is not None:
        kind = dominant_kind(keys, settings.rule_kinds, have)
        heaviest = [(key, min(rate, claim.rate)) for key, rate in keys.heaviest(kind, settings.max_rules + 1)]
    ceiling = claim.ceiling
    if outlook.pressed["cpu"] and not claim.rate:  # nothing of it to halve, but what may come is halved from its first
        ceiling = max(ceiling * _CPU_SHARE, claim.least)
    return fill(Share(claim.rate, amount, ceiling, claim.least, settings.max_rules), heaviest, have)
