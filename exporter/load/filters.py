"""The user's rules for single events: which match by their text, and what then holds for them.

Flows in: an event's class and attributes. Flows out: the first rule that matches, with the ratio that it asks for.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

TEXT_LIMIT = 512
"""Characters of an event's text that are looked at: what a pattern costs is not up to whoever names things."""

_EVERY = re.compile("")

Attributes = Mapping[str, str | int | float]
"""What is known of an event beside its class: names and values."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule about the events whose text one of the patterns is found in."""

    name: str
    priority: str
    """One of critical, error, warning, info, debug: of the events that it is about, in place of their class'."""
    patterns: Sequence[re.Pattern[str]]
    """Looked for in turn; none: every event matches."""
    ratio: float | None = None
    """Share that is kept, whatever the load; None: as the events of its priority are."""
    enabled: bool = True


class Rules:
    """Rules in their order; the first that matches holds. Not safe from several threads."""

    def __init__(self) -> None:
        """Begin without rules."""
        self.matches: dict[str, int] = {}
        """Events that each rule in force has met, by its name."""
        self._looks: tuple[tuple[Callable[[str], object], Rule], ...] = ()

    def replace(self, rules: Iterable[Rule]) -> None:
        """Put other rules in force; a rule whose name stays keeps its count."""
        enabled = [rule for rule in rules if rule.enabled]
        self.matches = {rule.name: self.matches.get(rule.name, 0) for rule in enabled}
        self._looks = tuple((pattern.search, rule) for rule in enabled for pattern in rule.patterns or (_EVERY,))

    def find(self, class_: str, attributes: Attributes) -> Rule | None:
        """Give the first rule that is about an event, and count it."""
        if not self._looks:
            return None
        text = described(class_, attributes)
        for found, rule in self._looks:
            if found(text):
                self.matches[rule.name] += 1
                return rule
        return None


def described(class_: str, attributes: Attributes) -> str:
    """Write an event as patterns see it: `class container, kind start, runtime docker`."""
    text = f"class {class_}"
    for name, value in attributes.items():
        text = f"{text}, {name} {value}"
    return text[:TEXT_LIMIT]
