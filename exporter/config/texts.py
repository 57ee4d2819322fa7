"""The kinds of values that a key can take, continued: texts of a certain form.

Flows in: what YAML, JSON, the environment or a flag holds. Flows out: texts and paths, or a `Refused` that says what is
wrong and what to write instead.
"""

import ipaddress
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import catalog
from exporter.config.problems import did_you_mean
from exporter.config.values import Kind

_HOST = re.compile(r"(?!-)[A-Za-z0-9.-]{1,253}(?<!-)")
_PORT = re.compile(r"[0-9]{1,5}")
_PORT_LIMIT = 65535
_PATTERN_LENGTH = 1000
_PATH_LENGTH = 4095  # PATH_MAX of linux/limits.h without the final zero


@dataclass(frozen=True, slots=True)
class Text(Kind):
    """A short text."""

    form: str = "text"
    example: str = "web"
    longest: int = 253

    def read(self, value: object) -> str:
        """Take printable text that is not empty."""
        if not isinstance(value, str):
            raise self.refuse(value, "is no text", f'write for example "{self.example}"')
        if not value or len(value) > self.longest or not value.isprintable():
            reason = "is empty, too long or not printable"
            raise self.refuse(value, reason, f'write for example "{self.example}" (at most {self.longest} characters)')
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "minLength": 1, "maxLength": self.longest}


@dataclass(frozen=True, slots=True)
class FilePath(Kind):
    """A path; whether it exists is found out by those who use it."""

    form = "path"

    def read(self, value: object) -> Path:
        """Take a text that the kernel could take."""
        if not isinstance(value, str):
            raise self.refuse(value, "is no path", 'write for example "/etc/cni/net.d"')
        if not value or not value.isprintable() or len(value.encode()) > _PATH_LENGTH:
            raise self.refuse(value, "is empty, too long or not printable", 'write for example "/etc/cni/net.d"')
        return Path(value)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "minLength": 1}

    def show(self, value: Path) -> str:
        """Write it as text."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Pattern(Kind):
    """A regular expression of Python's module re."""

    form = "regular expression"

    def read(self, value: object) -> str:
        """Take what compiles."""
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _PATTERN_LENGTH:
            reason = f"is no regular expression of 1 to {_PATTERN_LENGTH} printable characters"
            raise self.refuse(value, reason, 'write for example "^veth"')
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.refuse(value, f"is no regular expression ({error})", 'write for example "^veth"') from None
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "format": "regex", "minLength": 1, "maxLength": _PATTERN_LENGTH}


@dataclass(frozen=True, slots=True)
class Subject(Kind):
    """What a rule is about: a number, or printable text."""

    form = "text or whole number"

    def read(self, value: object) -> str:
        """Take a number as its digits. Whether it fits the kind of the rule is seen when that is known."""
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return Text(example="nginx").read(value)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "minLength": 1, "maxLength": 253}]}


@dataclass(frozen=True, slots=True)
class Address(Kind):
    """Where to listen: HOST:PORT, [IPv6]:PORT or :PORT."""

    form = "address"

    def read(self, value: object) -> str:
        """Take a host (or none, for all) and a port."""
        host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        if not colon or not _PORT.fullmatch(port) or int(port) > _PORT_LIMIT or not _is_host(host):
            raise self.refuse(value, "is no address", 'write for example ":10266", "127.0.0.1:10266" or "[::1]:10266"')
        return str(value)

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "pattern": r":\d{1,5}$"}


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return False
        return True
    return not host or _HOST.fullmatch(host) is not None


@dataclass(frozen=True, slots=True)
class FamilyName(Kind):
    """The name of a metric family."""

    form = "family"

    def read(self, value: object) -> str:
        """Take a name of the catalogue."""
        if not isinstance(value, str) or value not in catalog.FAMILIES:
            close = did_you_mean(str(value), catalog.FAMILIES)
            instead = f'did you mean "{close}"?' if close else '"cni-exporter metrics" lists the families'
            raise self.refuse(value, "is no metric family", instead)
        return value

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON schema."""
        return {"type": "string", "pattern": "^cni_"}


def one_or_more(value: object) -> object:
    """Let a single text stand for a list of one."""
    return (value,) if isinstance(value, str) else value
