"""The admission: the one point through which every kept event passes on its way to those who watch.

Flows in: events of the monitors, ratios, the user's rules. Flows out: the events that are kept, to each tap (the live
feed, the audit log), and the account of all. Monitors do not know who taps. Events that the kernel programs have
sampled and accounted for are only passed on; a source without a kernel side asks `should_sample` first.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from exporter.load.bucket import Bucket
from exporter.load.estimates import Estimate
from exporter.load.filters import Attributes, Rule, Rules

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
NOT_IN_KERNEL = ("container",)
"""Classes that no kernel program serves: their account is there from the start."""


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


@dataclass(slots=True)
class Account:
    """What became of the events of a class: seen = filtered + sampled_out + lost + handled, when all are at rest."""

    seen: int = 0
    filtered: int = 0
    """Left out by a rule that keeps none."""
    sampled_out: int = 0
    """Left out by a ratio."""
    handled: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    """By the stage at which it happened."""
    estimate: Estimate = field(default_factory=Estimate)
    """How many there were behind filters, by the weights of those that were to be kept."""


class Admission:
    """Decides on events, counts them, and hands them to taps. Safe from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, coin: Callable[[], float] = random.random) -> None:
        """Begin without a tap, keeping everything; `coin` gives numbers from 0 (included) to 1 (excluded)."""
        self.wanted: frozenset[str] = frozenset()
        """Classes that anybody taps: a monitor that has to build its events asks first."""
        self.failures = 0
        """Taps that raised, and were removed for it."""
        self._taps: tuple[Tapping, ...] = ()
        self._interested: tuple[Callable[[frozenset[str]], None], ...] = ()
        self._accounts = {class_: Account() for class_ in NOT_IN_KERNEL}
        self._rules = Rules()
        self._ratios: Mapping[str, float] = {}
        self._by_priority: Mapping[str, float] = {}
        self._bucket: Bucket | None = None
        self._clock, self._coin = clock, coin
        self._lock = threading.Lock()

    # Those who steer.

    def configure(self, rules: Iterable[Rule] = (), max_events_per_second: float | None = None) -> None:
        """Put the user's rules and limit in force; None: no limit. Counts go on."""
        with self._lock:
            self._rules.replace(rules)
            limit = max_events_per_second
            self._bucket = Bucket(limit, limit, self._clock()) if limit else None

    def steer(self, ratios: Mapping[str, float]) -> None:
        """Keep these shares of the classes' events from now on; a class without one is kept whole."""
        by_priority: dict[str, float] = {}
        for class_, ratio in ratios.items():
            priority = CLASSES.get(class_, "")
            by_priority[priority] = min(ratio, by_priority.get(priority, 1.0))
        with self._lock:
            self._ratios, self._by_priority = dict(ratios), by_priority

    def stats(self) -> Mapping[str, Account]:
        """Give the account of each class that a source has asked about, as it is now."""
        with self._lock:
            return {
                name: replace(account, lost=dict(account.lost), estimate=replace(account.estimate))
                for name, account in self._accounts.items()
            }

    def matches(self) -> Mapping[str, int]:
        """Give the user's rules in force, by name, each with how many events it met."""
        with self._lock:
            return dict(self._rules.matches)

    # Sources.

    def should_sample(self, event_type: str, attributes: Attributes) -> float:
        """Decide on an event of a source without a kernel side, and count it as seen.

        Args:
            event_type: its class.
            attributes: what the user's patterns may look at.

        Returns:
            How many events this one stands for, to be its `weight`; 0: it is not kept. Whoever gets another number
            calls record_event, or record_drop where that cannot be.

        Raises ValueError for an unknown class.
        """
        with self._lock:
            account = self._accounts.get(event_type) or self._open(event_type)
            account.seen += 1
            rule = self._rules.find(event_type, attributes)
            ratio = self._ratio(event_type, rule)
            if ratio < 1.0:
                if rule and rule.ratio == 0.0:
                    account.filtered += 1
                    return 0.0
                if self._coin() >= ratio:
                    account.sampled_out += 1
                    return 0.0
            if self._bucket:
                self._bucket.take()
            weight = 1.0 / ratio
            account.estimate.add(weight)
            return weight

    def _ratio(self, class_: str, rule: Rule | None) -> float:
        """The share that is to be kept: the rule's own, else the class', braked by the bucket unless it is critical."""
        priority = rule.priority if rule else CLASSES[class_]
        if rule and rule.ratio is not None:
            ratio = rule.ratio
        elif rule:
            ratio = self._by_priority.get(priority, 1.0)
        else:
            ratio = self._ratios.get(class_, 1.0)
        if self._bucket and priority != "critical":
            ratio *= self._bucket.ratio(self._clock())
        return ratio

    def _open(self, class_: str) -> Account:
        if class_ not in CLASSES:
            raise ValueError(f"{class_} is no class of events: see exporter/load/admission.py")
        account = self._accounts[class_] = Account()
        return account

    def record_drop(self, event_type: str, stage: str, count: int = 1) -> None:
        """Count events that were to be kept and got lost at a stage (`queue`, `handler`) of their source."""
        with self._lock:
            account = self._accounts.get(event_type) or self._open(event_type)
            account.lost[stage] = account.lost.get(stage, 0) + count

    def record_event(self, event: KeptEvent) -> None:
        """Hand an event to every tap. Raises ValueError for an unknown class, where anybody taps.

        Of what the kernel has decided on, and accounted for, the user's rules thin what the taps get.
        """
        account = self._accounts.get(event.class_)
        if account:
            with self._lock:
                account.handled += 1
        if not self.wanted:
            return
        if event.class_ not in CLASSES:
            raise ValueError(f"{event.class_} is no class of events: see exporter/load/admission.py")
        if event.class_ not in self.wanted:
            return
        shown = event if account else self._judged(event)
        if shown is None:
            return
        for tapping in self._taps:
            if event.class_ not in tapping.classes:
                continue
            try:
                tapping.callback(shown)
            except Exception:
                log.exception("a tap failed and gets no more events")
                with self._lock:
                    self.failures += tapping in self._taps
                tapping.end()

    def _judged(self, event: KeptEvent) -> KeptEvent | None:
        """Apply the user's rules to an event of the kernel's; None: the taps do not get it."""
        with self._lock:
            rule = self._rules.find(event.class_, {"kind": event.kind, "command": event.command, **event.details})
            ratio = 1.0 if rule is None or rule.ratio is None else rule.ratio
            if ratio < 1.0 and self._coin() >= ratio:
                return None
        return replace(event, priority=rule.priority, weight=event.weight / ratio) if rule else event

    def tap(self, callback: Tap, classes: Iterable[str] = CLASSES) -> "Tapping":
        """Hand every event of these classes from now on to `callback` too."""
        tapping = Tapping(callback, self._retap)
        tapping.want(classes)
        return tapping

    def on_wanted(self, callback: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Say which classes are tapped, now and whenever that has changed; the answer ends that."""
        with self._lock:
            self._interested = (*self._interested, callback)
            callback(self.wanted)

        def end() -> None:
            with self._lock:
                self._interested = tuple(other for other in self._interested if other is not callback)

        return end

    def _retap(self, tapping: "Tapping", classes: frozenset[str]) -> None:
        with self._lock:
            others = tuple(other for other in self._taps if other is not tapping)
            tapping.classes = classes
            self._taps = (*others, tapping) if classes else others
            wanted = frozenset().union(*(one.classes for one in self._taps))
            if wanted == self.wanted:
                return
            self.wanted = wanted
            for tell in self._interested:
                tell(wanted)


class Tapping:
    """One tap, and the classes of events that it gets."""

    def __init__(self, callback: Tap, change: Callable[["Tapping", frozenset[str]], None]) -> None:
        """Begin with nothing; `change` puts other classes in force."""
        self.callback = callback
        self.classes: frozenset[str] = frozenset()
        self._change = change

    def want(self, classes: Iterable[str]) -> None:
        """Take events of these classes and of no other; of all of them, each is told of once."""
        self._change(self, frozenset(classes))

    def end(self) -> None:
        """Take no more. May be called more than once."""
        self._change(self, frozenset())
