"""What is wrong with a configuration, and where: one line per problem, all of them in one exception.

Flows in: places (a file's line, a variable, a flag), keys and findings. Flows out: lines that a person can act on.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from exporter import privacy

MOST_PROBLEMS = 100
"""Problems shown at most; a file with more is not the file that was meant."""
_MOST_SHOWN = 60
_LONGEST_NAME = 64


def printable(text: str) -> str:
    """Return `text` without anything that a terminal or UTF-8 could not take; for paths and names."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


@dataclass(frozen=True, slots=True)
class Where:
    """A place that a value comes from."""

    file: str
    """Path of a file, or `environment NAME`, or `flag --name`."""
    line: int | None = None
    """Counted from 1; None where there are no lines."""

    def __str__(self) -> str:
        """Say it as compilers do."""
        return printable(self.file) if self.line is None else f"{printable(self.file)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding."""

    where: Where
    key: str
    """Path of the key, dotted; empty where the file as a whole is meant."""
    wrong: str
    instead: str
    """What to write, or do, instead."""

    def __str__(self) -> str:
        """Return the line that the user reads."""
        return ": ".join(filter(None, (str(self.where), self.key, f"{self.wrong}; {self.instead}")))


class ConfigError(ValueError):
    """The configuration cannot be used. Holds every problem that was found, in the order of the layers and lines."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Keep the problems; the message is one line for each."""
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:MOST_PROBLEMS]]
        if len(self.problems) > len(lines):
            lines.append(f"and {len(self.problems) - len(lines)} more problems")
        super().__init__("\n".join(lines))


def show_value(key: str, value: object) -> str:
    """Quote a wrong value for a message: short, printable, and never a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "an empty value"
    if not isinstance(value, str):
        return privacy.redact(key, str(value)[:_MOST_SHOWN])
    safe = privacy.redact(key, value)
    return json.dumps(safe if len(safe) <= _MOST_SHOWN else safe[: _MOST_SHOWN - 1] + "…", ensure_ascii=False)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest to `name`, or an empty text where none is near."""
    if len(name) > _LONGEST_NAME:
        return ""
    by_lower = {key.lower(): key for key in known}
    return next((by_lower[close] for close in get_close_matches(name.lower(), by_lower, n=1)), "")
