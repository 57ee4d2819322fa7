"""The kinds of values that a key can take: how each is written, read, bounded and described. Here: what is measured.

Flows in: what YAML, JSON, the environment or a flag holds. Flows out: plain Python values in base units (seconds,
bytes, ratios), or a `Refused` that says what is wrong and what to write instead.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from exporter.config.problems import show_value

_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(r"(?:\d{1,12}(?:\.\d{1,9})?(?:ms|[smhd]))+", re.ASCII)
_DURATION_PART = re.compile(r"([\d.]+)(ms|[smhd])", re.ASCII)
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([kKMGT]i?|)B?", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE][-+]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[-+]?\d{1,18}", re.ASCII)
_SWITCH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def number(text: str) -> int | float | None:
    """Read a decimal number as YAML 1.2 and JSON write it; None where it is none, or too long to be meant."""
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else None


class Kind(ABC):
    """One kind of value. Placed in a field's annotation, where pydantic finds it."""

    form: str
    """What the reference calls it."""

    @abstractmethod
    def read(self, value: object) -> Any:  # noqa: ANN401 - each kind has its own type
        """Return the value in base units; raises ValueError."""

    @abstractmethod
    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of what may be written."""

    def show(self, value: Any) -> Any:  # noqa: ANN401 - each kind has its own type
        """Return a value as a person writes it in YAML."""
        return value

    def from_text(self, text: str) -> object:
        """Return what a variable or a flag holds as the file would hold it."""
        return text

    def refuse(self, value: object, reason: str, instead: str) -> ValueError:
        """Say what is wrong with `value`. Kinds do not know their key; the caller adds it."""
        return Refused(value, reason, instead)

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `read` alone."""
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe by `json_schema` alone."""
        return self.json_schema()


class Refused(ValueError):  # noqa: N818 - a ValueError with its parts
    """A value that its kind refuses. The text is made when the key is known, so that no secret gets into it."""

    def __init__(self, value: object, reason: str, instead: str) -> None:
        """Keep the parts."""
        super().__init__(f"{reason}; {instead}")
        self.value = value
        self.reason = reason
        self.instead = instead

    def wrong(self, key: str) -> str:
        """Say what is wrong under `key`."""
        return f"{show_value(key, self.value)} {self.reason}"


@dataclass(frozen=True, slots=True)
class Switch(Kind):
    """On or off."""

    form = "switch"

    def read(self, value: object) -> bool:
        """Take YAML's truth values, and the words that the environment uses."""
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _SWITCH:
            return _SWITCH[value.lower()]
        raise self.refuse(value, "is no switch", "write true or false")

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Whole(Kind):
    """A whole number within bounds."""

    low: int
    high: int

    @property
    def form(self) -> str:  # type: ignore[override]
        """Name the bounds."""
        return f"whole number, {self.low} to {self.high}"

    def read(self, value: object) -> int:
        """Take an int that is no truth value."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(value, "is no whole number", f"write for example {max(self.low, min(1000, self.high))}")
        if not self.low <= value <= self.high:
            raise self.refuse(value, "is out of range", f"write {self.low} to {self.high}")
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def from_text(self, text: str) -> object:
        """Read digits."""
        return found if (found := number(text)) is not None else text


@dataclass(frozen=True, slots=True)
class Number(Kind):
    """A number within bounds; a ratio is 0 to 1."""

    low: float
    high: float

    @property
    def form(self) -> str:  # type: ignore[override]
        """Name the bounds."""
        return f"number, {self.low:g} to {self.high:g}"

    def read(self, value: object) -> float:
        """Take an int or float that is no truth value."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(value, "is no number", f"write for example {self.high:g}")
        if not self.low <= value <= self.high:
            raise self.refuse(value, "is out of range", f"write {self.low:g} to {self.high:g}")
        return float(value)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def from_text(self, text: str) -> object:
        """Read a decimal number."""
        return found if (found := number(text)) is not None else text

    def show(self, value: float) -> float:
        """Leave out the fraction where there is none."""
        return int(value) if value.is_integer() else value


def read_duration(value: object) -> float | None:
    """Return seconds of "1m30s", "500ms" or a plain number (of seconds); None where it is no duration."""
    if isinstance(value, str):
        text = value.strip()
        if _DURATION.fullmatch(text):
            return round(sum(float(count) * _SECONDS[unit] for count, unit in _DURATION_PART.findall(text)), 9)
        value = number(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e15 else None  # noqa: PLR2004 - also refuses infinity and not-a-number


def show_duration(seconds: float) -> str | float:
    """Write seconds as a person would; a number where no unit fits."""
    rest = round(seconds * 1000)
    if rest == 0 or rest / 1000 != seconds:
        return seconds
    parts = []
    for unit, size in _SECONDS.items():
        count, rest = divmod(rest, round(size * 1000))
        parts.append(f"{count}{unit}" if count else "")
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Duration(Kind):
    """A span of time in seconds, between two durations."""

    low: str
    high: str

    @property
    def form(self) -> str:  # type: ignore[override]
        """Name the bounds."""
        return f"duration, {self.low} to {self.high}"

    def read(self, value: object) -> float:
        """Return seconds."""
        seconds = read_duration(value)
        if seconds is None:
            raise self.refuse(value, "is no duration", 'write for example "30s"')
        if not (read_duration(self.low) or 0) <= seconds <= (read_duration(self.high) or 0):
            raise self.refuse(value, "is out of range", f'write "{self.low}" to "{self.high}"')
        return seconds

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": f"^{_DURATION.pattern}$"}]}

    def show(self, value: float) -> str | float:
        """Write it with units."""
        return show_duration(value)


@dataclass(frozen=True, slots=True)
class Size(Kind):
    """An amount of memory in bytes, between two sizes."""

    low: str
    high: str

    @property
    def form(self) -> str:  # type: ignore[override]
        """Name the bounds."""
        return f"size, {self.low} to {self.high}"

    def read(self, value: object) -> int:
        """Return bytes."""
        size = _read_size(value)
        if size is None:
            raise self.refuse(value, "is no size", 'write for example "1GiB" or a number of bytes')
        if not (_read_size(self.low) or 0) <= size <= (_read_size(self.high) or 0):
            raise self.refuse(value, "is out of range", f'write "{self.low}" to "{self.high}"')
        return size

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{_SIZE.pattern}$"}]}

    def show(self, value: int) -> str | int:
        """Write it in the largest binary unit that leaves no rest."""
        for unit in ("Ti", "Gi", "Mi", "Ki"):
            if value and value % _BYTES[unit] == 0:
                return f"{value // _BYTES[unit]}{unit}B"
        return value


def _read_size(value: object) -> int | None:
    """Return bytes of "512MiB", "1.5Gi", "2GB" or a whole number; None where it is no size."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        unit = match[2] if match[2] != "K" else "k"
        return int(float(match[1]) * _BYTES[unit]) if "." in match[1] else int(match[1]) * _BYTES[unit]
    return value if isinstance(value, int) and not isinstance(value, bool) else None
