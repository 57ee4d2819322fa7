"""What a program's reader is: the half of a BPF program that lives in the exporter.

Flows in: the program's maps, and the records of its classes. Flows out: snapshots of the families that it serves.
"""

import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from exporter.contract import Key
from exporter.host.bpf import Map
from exporter.monitors.kernel.counts import KEY, Counted, Counts
from exporter.monitors.kernel.events import Details, Event
from exporter.monitors.kernel.handover import Manifest

Snapshot = dict[str, dict[Key, float]]
"""Family, key, value."""
Histograms = dict[str, dict[Key, Sequence[float]]]
"""Family, key, counts per bucket (not cumulative; the last is +Inf's) and then the sum."""


@dataclass(frozen=True, slots=True)
class Tables:
    """The maps of everything that is in force."""

    manifest: Manifest
    maps: Mapping[str, Map] = field(default_factory=dict)
    counts: Counts | None = None
    """Counters at places of their own; None: there are none beside the map."""
    gone: set[bytes] = field(default_factory=set)
    """Namespaces (struct netns_id) whose entries go after the next snapshot."""

    def counted(self, counter: int) -> Counter[Counted]:
        """Give all that one program counts by namespace, at places and beside them. Raises OSError."""
        found: Counter[Counted] = self.counts.read(counter) if self.counts else Counter()
        for raw, (count,) in self.maps["counted"].sums():
            *what, of = KEY.unpack(raw)
            if of == counter:
                found[Counted(*what)] += count
        return found

    def forget(self, inum: int, cookie: int) -> None:
        """Note that a namespace is gone. What it counted is in one more snapshot."""
        self.gone.add(cookie.to_bytes(8, sys.byteorder) + inum.to_bytes(4, sys.byteorder) + bytes(4))

    def attached(self, probe: str) -> bool:
        """Whether a probe is attached."""
        return any(standing.attached for standing in self.manifest.standings if standing.program == probe)


class Reader(ABC):
    """Reads one program. Made when at least one of the program's probes is attached; used by one thread."""

    program: ClassVar[str]
    """Name in programs.py."""
    classes: ClassVar[tuple[str, ...]] = ()
    """Event classes whose records come to `handle` and `details`."""
    by_netns: ClassVar[tuple[str, ...]] = ()
    """Names of maps whose keys begin with struct netns_id: their entries go when their namespace does."""

    def __init__(self, tables: Tables) -> None:
        """Keep the tables; a reader that has maps to fill fills them here. Raises OSError."""
        self.tables = tables

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """Read all counters, whole. Raises OSError."""

    def histograms(self) -> Histograms:
        """Read all histograms, whole. Raises OSError."""
        return {}

    def handle(self, event: Event) -> None:  # noqa: B027 - most classes are only passed on
        """Take an event into account. Must not block."""

    def details(self, event: Event) -> Details:  # noqa: ARG002 - for those who override it
        """Give an event's body for people. Raises ValueError or struct.error where it is malformed."""
        return {}
