"""Rules for heavy keys: within a class, who sends much is kept to what leaves room for all others.

Flows in: a class's share, the rates of its keys. Flows out: the ratio of the class, and of the keys that are capped.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.load.decision import Key
from exporter.load.forecast import KeyForecasts

_ENTER = 1.2
_LEAVE = 0.8
_URGENT = 0.2
_FEW = 50.0
"""Events per second of a class below which no key of it is worth a rule."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How a class is kept to its share."""

    ratio: float
    """Of all events of the class that no rule is for."""
    rules: dict[Key, float] = field(default_factory=dict)
    """Ratio per capped key, heaviest first."""
    urgent: bool = False
    """Whether keys take so much more than their caps that it should not wait: a fifth of the share and more."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a class may keep."""

    rate: float
    """Events per second that are planned for."""
    amount: float
    """Events per second that may be kept."""
    ceiling: float
    """Ratio that nothing may exceed."""
    least: float
    """Ratio that nothing goes below."""
    rules: int
    """Keys that may have a rule."""


def fill(share: Share, keys: Sequence[tuple[Key, float]], ruled: Mapping[Key, float]) -> Cut:
    """Cut a class to its share by water-filling over its keys.

    `keys`: heaviest first, in events per second, one more than may have rules; `ruled`: ratios of those that have one.
    A key is capped when it would take more than 1.2 times the cap, and stays so until it would take less than 0.8 of
    it. The ratio is the same for all others; it is the ceiling as long as there is room.
    """
    rate, ceiling, least = share.rate, share.ceiling, share.least
    plain = min(max(share.amount / rate, least), ceiling) if rate > 0 else ceiling
    if rate < _FEW or share.amount >= ceiling * rate:
        return Cut(plain)
    capped, cap, ratio = min(share.rules, len(keys)), 0.0, plain
    thresholds = [_LEAVE if key in ruled else _ENTER for key, _ in keys]
    while capped:  # from as many as there may be downwards: the fewer are capped, the higher the cap
        ratio, cap = _level(share, keys, capped)
        over = [ratio * demand > cap * at for (_, demand), at in zip(keys[:capped], thresholds, strict=False)]
        if all(over):
            break
        capped, ratio = over.index(False), plain
        thresholds = [1.0] * capped
    ratio = min(max(ratio, least), ceiling)
    rules = {key: max(min(cap / demand, ratio), least) for key, demand in keys[:capped]}
    excess = sum(max(ruled.get(key, plain) - rules[key], 0.0) * demand for key, demand in keys[:capped])
    return Cut(ratio, rules, excess > share.amount * _URGENT)


def _level(share: Share, keys: Sequence[tuple[Key, float]], capped: int) -> tuple[float, float]:
    """Return the ratio of those without a rule and the cap of those with one, so that both together make the share."""
    rest = max(share.rate - sum(demand for _, demand in keys[:capped]), 0.0)
    following = min(keys[capped][1] if capped < len(keys) else rest / 10, rest)
    left = share.amount - share.ceiling * rest
    if left >= capped * share.ceiling * following:  # all small ones have room: the heavy ones part what is left
        return share.ceiling, left / capped
    ratio = share.amount / (capped * following + rest)  # the heavy ones get as much as the heaviest of the others
    return ratio, ratio * following


def dominant_kind(keys: KeyForecasts, kinds: Sequence[str], ruled: Collection[Key]) -> str:
    """Return the kind of key to cut by: one kind per class, since an event has a key of each and would be cut twice.

    It is the kind that has rules already, else the one whose heaviest key is heaviest, the first named on a tie.
    """
    present = [kind for kind in kinds if kind in keys.kinds]
    held = [kind for kind in present if any(key[0] == kind for key in ruled)]
    heaviest = {kind: found[0][1] for kind in held or present if (found := keys.heaviest(kind, 1))}
    return max(heaviest, key=lambda kind: heaviest[kind], default="")
