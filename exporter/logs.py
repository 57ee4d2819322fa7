"""The log: one line per message on standard error, as logfmt or JSON, without secrets and without floods.

Flows in: records of the standard library's logging. Flows out: lines. Our own loggers follow the configured level;
those of the client libraries speak from warning on, since at debug some of them print whole requests.
"""

import json
import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

from exporter import privacy

OURS = "exporter"
MOST_PER_WINDOW = 5
WINDOW = 60.0
"""Seconds; so many times is a message written within them."""
_MOST_MESSAGES = 1000
_LONGEST = 8192
"""Characters of a message, or of a traceback, at most."""
_BARE = re.compile(r"[^\s\"=\x00-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def setup(level: str, form: str, rules: privacy.Rules = privacy.DEFAULT, stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (standard error). Called again, it replaces what it set up before.

    Args:
        level: debug, info, warning or error: the least that our own loggers write.
        form: logfmt or json.
        rules: what is secret.
        stream: where the lines go.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, Lines)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(Lines(form, rules, stream or sys.stderr))
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(threshold, logging.WARNING))
    logging.getLogger(OURS).setLevel(threshold)
    logging.captureWarnings(capture=True)


def take_the_uncaught() -> None:
    """Send exceptions that nobody caught to the log too: Python would print them whole, secrets included."""
    log = logging.getLogger(OURS)

    def note(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        shown = error or kind()
        log.critical("nobody caught this: please report it", exc_info=(kind, shown, trace))

    sys.excepthook = note
    threading.excepthook = lambda seen: note(seen.exc_type, seen.exc_value, seen.exc_traceback)
    sys.unraisablehook = lambda seen: note(seen.exc_type, seen.exc_value, seen.exc_traceback)


@dataclass(slots=True)
class _Count:
    """How often one message came in the window that began at `begin`."""

    begin: float
    level: int
    seen: int = 0

    @property
    def held_back(self) -> int:
        return max(0, self.seen - MOST_PER_WINDOW)


class RepeatFilter(logging.Filter):
    """Lets a message (logger and template) pass five times a minute, and counts the others.

    At most a thousand messages are known at a time; the one that came longest ago is forgotten, its count told first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take a clock in seconds."""
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: OrderedDict[tuple[str, str], _Count] = OrderedDict()
        self._told: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Count the record; False where it has come too often."""
        key, now = (record.name, str(record.msg)[:_LONGEST]), self._clock()
        with self._lock:
            self._end(now)
            count = self._counts.setdefault(key, _Count(now, record.levelno))
            count.seen += 1
            if len(self._counts) > _MOST_MESSAGES:
                self._tell(*self._counts.popitem(last=False))
            return count.held_back == 0

    def told(self, *, everything: bool = False) -> list[logging.LogRecord]:
        """Return what is to be said about windows that are over (or about all of them, at the end), once."""
        with self._lock:
            self._end(float("inf") if everything else self._clock())
            told, self._told = self._told, []
            return told

    def _end(self, now: float) -> None:
        """End the windows that are over. They lie in the order in which they began."""
        while self._counts:
            key, count = next(iter(self._counts.items()))
            if now - count.begin < WINDOW:
                return
            del self._counts[key]
            self._tell(key, count)

    def _tell(self, key: tuple[str, str], count: _Count) -> None:
        if count.held_back:
            name, template = key
            text = "suppressed %d more of this message within %d s: %s"
            values = (count.held_back, int(WINDOW), template)
            self._told.append(logging.LogRecord(name, count.level, "", 0, text, values, None))


class Lines(logging.Handler):
    """Writes records as lines. A line that cannot be written is counted in `lost`; there is nowhere left to say so."""

    def __init__(
        self,
        form: str,
        rules: privacy.Rules,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `setup`; `clock` counts the seconds of the repeat filter."""
        super().__init__()
        self.lost = 0
        self._encode = _as_json if form == "json" else _as_logfmt
        self._rules = rules
        self._stream = stream
        self._repeats = RepeatFilter(clock)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless it has come too often, behind what is to be said about others."""
        admitted = self._repeats.filter(record)
        self._write(self._repeats.told())
        if admitted:
            self._write([record])

    def close(self) -> None:
        """Say what was held back and not told yet."""
        self._write(self._repeats.told(everything=True))
        super().close()

    def _write(self, records: list[logging.LogRecord]) -> None:
        for record in records:
            try:
                self._stream.write(self._encode(dict(self._parts(record))) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a reader that left, a closed stream, another encoding
                self.lost += 1

    def _parts(self, record: logging.LogRecord) -> Iterator[tuple[str, str]]:
        """Return the parts of a line, in order, without secrets."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        yield "ts", moment.replace("+00:00", "Z")
        yield "level", record.levelname.lower()
        yield "logger", self._clean(record.name)
        yield "msg", self._clean(_message(record))
        if record.exc_info and record.exc_info[0] is not None:
            yield "exception", self._clean(logging.Formatter().formatException(record.exc_info))
        if record.stack_info:
            yield "stack", self._clean(record.stack_info)

    def _clean(self, text: str) -> str:
        """Take out secrets, bound the length (after: a cut must not hide that something is a secret)."""
        clean = _SURROGATE.sub("\ufffd", self._rules.scrub(privacy.bounded(text, 2 * _LONGEST)))
        return clean if len(clean) <= _LONGEST else clean[: _LONGEST - 1] + "…"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - a template that does not fit, or any error of an argument's own __str__
        return f"{record.msg} (its arguments do not fit: {type(error).__name__})"


def _as_json(parts: dict[str, str]) -> str:
    return json.dumps(parts, ensure_ascii=False)


def _as_logfmt(parts: dict[str, str]) -> str:
    return " ".join(f"{name}={_value(name, value)}" for name, value in parts.items())


def _value(name: str, value: str) -> str:
    """Quote what holds more than one plain word; messages always, so that a reader finds them."""
    bare = name != "msg" and _BARE.fullmatch(value)
    return value if bare else json.dumps(value, ensure_ascii=False)
