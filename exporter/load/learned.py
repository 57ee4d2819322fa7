"""The learned rules in force, and how long they live.

Flows in: plans. Flows out: rules.
"""

from collections.abc import Mapping

from exporter.load.decision import Key, KeyRule, Settings
from exporter.load.plan import Plan

Pair = tuple[str, Key]
"""A class and a key of it."""


class Learned:
    """Rules by class and key. What no plan wants any more stays until its time is over, at its class' ratio."""

    def __init__(self, settings: Settings) -> None:
        """Begin without a rule."""
        self._settings = settings
        self._rules: dict[Pair, tuple[float, float]] = {}  # ratio, and when it ends

    @property
    def ratios(self) -> Mapping[str, dict[Key, float]]:
        """The ratio in force of each key that has a rule, per class."""
        found: dict[str, dict[Key, float]] = {}
        for (class_, key), (ratio, _) in self._rules.items():
            found.setdefault(class_, {})[key] = ratio
        return found

    def renew(self, wanted: Plan, now: float, *, apply: bool) -> None:
        """Let rules live on that are wanted, end those whose time is over; with `apply`, take the plan's ratios."""
        until = now + self._settings.rule_ttl
        kept = {
            pair: (ratio, until if pair in wanted.rules else ends)
            for pair, (ratio, ends) in self._rules.items()
            if pair in wanted.rules or ends > now
        }
        if apply:
            kept = {pair: (wanted.ratios[pair[0]], ends) for pair, (_, ends) in kept.items()}
            kept |= {pair: (ratio, until) for pair, ratio in wanted.rules.items()}
        self._rules = self._bounded(kept, wanted)

    def _bounded(self, rules: dict[Pair, tuple[float, float]], wanted: Plan) -> dict[Pair, tuple[float, float]]:
        """Order rules by how much they cut; leave out what is beyond the limit of a class."""
        room = dict.fromkeys(self._settings.classes, self._settings.max_rules)
        kept = {}
        for pair in sorted(rules, key=lambda pair: (pair not in wanted.rules, rules[pair][0])):
            if room[pair[0]]:
                room[pair[0]] -= 1
                kept[pair] = rules[pair]
        return kept

    def as_decided(self, offset: float) -> tuple[KeyRule, ...]:
        """Return the rules; `offset`: seconds from our clock to the observations'."""
        return tuple(KeyRule(pair[0], pair[1], ratio, ends + offset) for pair, (ratio, ends) in self._rules.items())
