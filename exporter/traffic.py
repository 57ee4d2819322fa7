"""Traffic of links: totals as the families give them, and rates between two readings.

Flows in: a reader of families (as scraped) and a clock. Flows out: `Traffic` per link, total or per second, and how a
person reads such a number.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import NamedTuple

Read = Callable[[str], Iterable[tuple[Mapping[str, str], float]]]
"""Gives the current series of a family by its name: labels and value; nothing for a family without series."""

LinkKey = tuple[str, ...]
"""("veth", device), or ("direct", interface, namespace, pod, container) for an interface without a host side."""
Names = tuple[str, str, str]
"""namespace, pod, container."""


class Traffic(NamedTuple):
    """Counters of a link from the container's point of view: totals, or the same per second."""

    receive_bytes: float = 0.0
    transmit_bytes: float = 0.0
    receive_packets: float = 0.0
    transmit_packets: float = 0.0
    receive_errors: float = 0.0
    transmit_errors: float = 0.0
    receive_dropped: float = 0.0
    transmit_dropped: float = 0.0

    @property
    def bytes(self) -> float:
        """Both directions together."""
        return self.receive_bytes + self.transmit_bytes

    @property
    def errors(self) -> float:
        """Both directions together."""
        return self.receive_errors + self.transmit_errors

    @property
    def dropped(self) -> float:
        """Both directions together."""
        return self.receive_dropped + self.transmit_dropped

    def plus(self, other: "Traffic") -> "Traffic":
        """Add field by field."""
        return Traffic(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def clean(text: str) -> str:
    """Replace what is no printable character: control characters, lone surrogates, direction marks."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in text)


def printable(read: Read) -> Read:
    """Make a reader whose labels are clean: a name is a stranger's text, and may be shown on a terminal."""
    return lambda family: (
        ({name: clean(text) for name, text in labels.items()}, value) for labels, value in read(family)
    )


def names(labels: Mapping[str, str]) -> Names:
    """Give the workload that a series is labelled with."""
    return labels.get("namespace", ""), labels.get("pod", ""), labels.get("container", "")


def quantity(value: float, unit: str = "") -> str:
    """Write a number as a person reads it: three digits or less, decimal prefix, unit: `0`, `1.5 kB/s`, `12k`."""
    if 0 < value < 0.05:  # noqa: PLR2004 - what would be written as 0.0
        return f"<0.1 {unit}".rstrip()
    prefixes = ("", "k", "M", "G", "T", "P")
    step = 0
    while value >= 999.5 and step < len(prefixes) - 1:  # noqa: PLR2004 - what would be written as 1000
        value /= 1000
        step += 1
    digits = f"{value:.1f}" if value < 9.95 and value != int(value) else f"{value:.0f}"  # noqa: PLR2004 - likewise
    return f"{digits}{' ' if unit else ''}{prefixes[step]}{unit}"


def _counters(read: Read, prefix: str, label: str) -> dict[LinkKey, Traffic]:
    """Gather the eight counter families of a kind of link, by its device or interface name and its workload."""
    values: dict[LinkKey, list[float]] = defaultdict(lambda: [0.0] * len(Traffic._fields))
    for position, name in enumerate(Traffic._fields):
        for labels, value in read(f"{prefix}_{name}_total"):
            values[labels.get(label, ""), *names(labels)][position] += value
    return {key: Traffic(*value) for key, value in values.items()}


def totals(read: Read) -> dict[LinkKey, Traffic]:
    """Gather the totals of every link: ("veth", device) or ("direct", interface, names of the workload)."""
    veths = {("veth", key[0]): traffic for key, traffic in _counters(read, "cni_veth", "device").items()}
    return veths | {("direct", *key): traffic for key, traffic in _counters(read, "cni_netns", "interface").items()}


class Rates:
    """Turns totals into rates: remembers one earlier reading, of a bounded number of links. Safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, least: float = 1.0, limit: int = 10000) -> None:
        """Take a clock in seconds, the least span between two readings, and the links to remember at most."""
        self._clock = clock
        self._least = least
        self._limit = limit
        self._lock = threading.Lock()
        self._when: float | None = None
        self._last: dict[LinkKey, Traffic] = {}
        self._rates: dict[LinkKey, Traffic] = {}
        self._seconds = 0.0

    def update(self, read: Read) -> None:
        """Take a reading of every link's counters."""
        self.take(totals(printable(read)))

    def take(self, reading: Mapping[LinkKey, Traffic]) -> tuple[Mapping[LinkKey, Traffic], float]:
        """Give the rates per second since the earlier reading, and the span of seconds that they cover.

        A reading that comes sooner than the least span gets the rates of the one before. A link that is new, or whose
        counters went back (another device under the same name), has no rate.
        """
        with self._lock:
            now = self._clock()
            if self._when is not None and now - self._when < self._least:
                return self._rates, self._seconds
            if self._when is not None:
                self._seconds = now - self._when
                self._rates = self._between(reading, self._seconds)
            self._when = now
            self._last = dict(islice(reading.items(), self._limit))
            return self._rates, self._seconds

    def _between(self, reading: Mapping[LinkKey, Traffic], seconds: float) -> dict[LinkKey, Traffic]:
        rates = {}
        for key, traffic in reading.items():
            before = self._last.get(key)
            if before is not None and all(new >= old for new, old in zip(traffic, before, strict=True)):
                rates[key] = Traffic(*((new - old) / seconds for new, old in zip(traffic, before, strict=True)))
        return rates
