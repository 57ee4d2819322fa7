"""The admission: the one point through which every kept event passes on its way to those who watch.

Flows in: events of the monitors. Flows out: the same events, to each tap (the live feed, the audit log). Monitors do
not know who taps; without a tap nothing is done.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

log = logging.getLogger(__name__)

Priority = Literal["critical", "error", "warning", "info", "debug"]

CLASSES: Mapping[str, Priority] = {
    "container": "critical",
    "netns": "critical",
    "veth": "critical",
    "cni_run": "critical",
    "packet_drop": "error",
    "tcp_fault": "warning",
    "exec": "info",
    "connection": "info",
    "connection_close": "debug",
    "syscall": "debug",
}
"""Event classes and the priority of their events."""


@dataclass(frozen=True, slots=True)
class KeptEvent:
    """An event that passed filters and sampling."""

    time: float
    """Unix time in seconds."""
    class_: str
    """One of CLASSES."""
    kind: str
    """What happened, in a word of the class's own."""
    priority: str
    netns: str = ""
    """Identity of the network namespace, as in the hidden key `netns_id` of the families; empty where not known."""
    container_id: str = ""
    """Full id; empty where the namespace alone tells whose event it is."""
    pid: int = 0
    """Who did it; 0 where nobody is behind it."""
    command: str = ""
    weight: float = 1.0
    """How many events this one stands for: the inverse of the ratio that it was kept with."""
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    """What the class tells beside that: names and values, in the order to be read."""


Tap = Callable[[KeptEvent], None]
"""Gets each event in the thread of its monitor; must not block."""


class Admission:
    """Hands events to taps. Safe from any thread."""

    def __init__(self) -> None:
        """Begin without a tap."""
        self.wanted = False
        """Whether anybody taps: a monitor that has to build its events asks first."""
        self.failures = 0
        """Taps that raised, and were removed for it."""
        self._taps: tuple[Tap, ...] = ()
        self._seen = dict.fromkeys(CLASSES, 0)
        self._lock = threading.Lock()

    @property
    def seen(self) -> Mapping[str, int]:
        """Events that passed while somebody tapped, by class."""
        with self._lock:
            return dict(self._seen)

    def record_event(self, event: KeptEvent) -> None:
        """Hand an event to every tap. Raises ValueError for an unknown class, where anybody taps."""
        if not self.wanted:
            return
        with self._lock:
            taps = self._taps
            if event.class_ not in self._seen:
                raise ValueError(f"{event.class_} is no class of events: see exporter/load/admission.py")
            self._seen[event.class_] += 1
        for tap in taps:
            try:
                tap(event)
            except Exception:
                log.exception("a tap failed and gets no more events")
                self._remove(tap, failed=True)

    def tap(self, callback: Tap) -> Callable[[], None]:
        """Hand every event from now on to `callback` too; the answer ends that, and may be called more than once."""

        def one(event: KeptEvent) -> None:  # a callback that taps twice is two taps
            callback(event)

        with self._lock:
            self._taps = (*self._taps, one)
            self.wanted = True
        return lambda: self._remove(one)

    def _remove(self, tap: Tap, *, failed: bool = False) -> None:
        with self._lock:
            self.failures += failed and tap in self._taps
            self._taps = tuple(other for other in self._taps if other is not tap)
            self.wanted = bool(self._taps)
