"""What the governor is told and what it answers: plain data, so that anybody can drive it with their own numbers.

Flows in: nothing. Flows out: types. Times are seconds of one clock that never steps back (CLOCK_MONOTONIC); rates are
events per second; ratios and pressures are shares of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from exporter.load.admission import CLASSES

Key = tuple[str, str]
"""Whose events: (kind, subject), for example ("container", full id), ("comm", "nginx"), ("prefix", "10.0.0.1")."""

Level = Literal["low", "medium", "high", "critical"]
Pattern = Literal["unknown", "steady", "trending", "periodic", "bursty"]
Reason = Literal["level", "cpu", "memory", "network", "disk", "ring", "forecast", "heavy_hitter"]
Strategy = Literal["thresholds", "budget"]

LEVELS: tuple[Level, ...] = ("low", "medium", "high", "critical")
PATTERNS: tuple[Pattern, ...] = ("unknown", "steady", "trending", "periodic", "bursty")
REASONS: tuple[Reason, ...] = ("level", "cpu", "memory", "network", "disk", "ring", "forecast", "heavy_hitter")
RESOURCES: tuple[Reason, ...] = ("cpu", "memory", "network", "disk")
"""Names in Observation.pressure."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What happened since the observation before. Counts are exact: taken before sampling, never estimated from it.

    Numbers that cannot be (negative, not finite), classes and resources that the governor does not know are left out,
    and counted in Decision.ignored. An observation whose time has not advanced changes nothing.
    """

    time: float
    """When, in seconds of a monotonic clock."""
    seen: Mapping[str, int]
    """Events per class since the observation before, before any filter."""
    filtered: Mapping[str, int] = field(default_factory=dict)
    """Events per class, of `seen`, that a configured filter left out: they are no load."""
    keys: Mapping[str, Mapping[Key, int]] = field(default_factory=dict)
    """Events since then per class of its heaviest keys, after filters. An event may count in a key of each kind.

    The map of a class need not be complete; some 64 keys of each kind are enough. Of more than 1,000 keys of a class
    the heaviest 1,000 are read, the others count as evicted.
    """
    handled: int = 0
    """Events that user space has handled since then."""
    busy: float = 0.0
    """Seconds that user space was busy with these: handled / busy is its capacity. 0 where it is not measured.

    Where it may use no more than a share of a processor: its CPU seconds divided by that share.
    """
    ring: float = 0.0
    """The highest occupancy of the ring since then, 0 to 1."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """Events per class since then for which there was no room. Any loss is taken as a full ring."""
    pressure: Mapping[str, float] = field(default_factory=dict)
    """How much of a resource is in use, by name in RESOURCES; what is missing is unknown, and stays as it was.

    `cpu`: of the host, all cores. `memory`: the exporter's own over its threshold (or its cgroup's over the cgroup's
    limit, whichever is nearer); 1 is at the threshold, more is above. `network`: the busiest link over its speed.
    `disk`: the busiest disk's share of time with work.
    """


@dataclass(frozen=True, slots=True)
class KeyRule:
    """A learned rule: events of one class that belong to one key are kept with a ratio of their own."""

    class_: str
    key: Key
    ratio: float
    """In place of the ratio of the class, and never above it. Where several rules match an event, the lowest holds."""
    expires: float
    """When the rule ends unless a later decision renews it, in seconds of the clock of the observations."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done until the next decision. It is complete: rules and ratios that it does not name are gone."""

    time: float
    """The time of the observation that led to it, in seconds."""
    ratios: Mapping[str, float]
    """Share of events to be kept, per class, all classes; 0 only for classes that are turned off."""
    rules: tuple[KeyRule, ...] = ()
    """The learned rules in force, those that cut most first, at most Settings.max_rules a class."""
    level: Level = "low"
    load: float = 0.0
    """Events per second offered, after configured filters, as of this observation."""
    forecast: float = 0.0
    """Events per second that are planned for: what may well come before ratios could change again."""
    budget: float = 0.0
    """Events per second that may be kept."""
    capacity: float = 0.0
    """Events per second that user space could handle, as measured; 0 while nothing is known."""
    pattern: Pattern = "unknown"
    """How the load moves; `unknown` while there are less than 30 seconds of it."""
    period: float = 0.0
    """Seconds after which the load repeats itself; 0 where the pattern is not `periodic`."""
    anomalies: tuple[str, ...] = ()
    """Classes whose rate left what was to be expected with this observation. A class is named once per departure."""
    reasons: tuple[Reason, ...] = ()
    """The adaptations of this step, by their cause; empty where the decision is that of the step before."""
    yielded: tuple[str, ...] = ()
    """Classes that get less than the floor of their priority, since all floors together do not fit the budget."""
    off: tuple[str, ...] = ()
    """Classes that are off for want of memory, at ratio 0: nothing of them can be estimated, which is not zero."""
    next: float = 1.0
    """Seconds after which the next step is wanted. Step earlier when the ring is half full, but not within 0.1 s."""
    evicted: int = 0
    """Keys that were not followed for want of room, since the governor began."""
    ignored: int = 0
    """Numbers that could not be, and names that nobody knows, since the governor began."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user wants. Raises ValueError for what cannot be, with the field's name and range."""

    strategy: Strategy = "thresholds"
    """`thresholds`: the ratio of the level and the bands of the priorities are ceilings. `budget`: what user space can
    handle is kept; levels are told, but bind nothing."""
    max_events_per_second: float = 10_000.0
    """Events per second that are kept at most, beside critical ones."""
    min_ratio: float = 0.01
    """No class that is on and no rule goes below; nor below 0.0001, so that every estimate stays possible."""
    max_ratio: float = 1.0
    """No class but critical ones goes above."""
    thresholds: tuple[float, float, float, float] = (1_000.0, 10_000.0, 50_000.0, 100_000.0)
    """Upper ends of low, medium and high; from the last on the ratio is at its lowest. Events per second, ascending."""
    interval: float = 1.0
    """Seconds between steps."""
    cpu_threshold: float = 0.8
    """Share of the host's CPU above which half is kept. 0 to 1."""
    network_threshold: float = 0.8
    """Share of a link's speed above which network events come first."""
    disk_threshold: float = 0.8
    """Share of time with disk work above which events about files and programs are thinned."""
    memory_threshold: float = 1.0
    """Observation.pressure["memory"] from which debug, then info events are turned off."""
    forecast: bool = True
    """Whether forecast, trend and season are planned for; else what was just seen."""
    rule_kinds: tuple[str, ...] = ("container", "netns", "comm", "prefix")
    """Kinds of keys that may get a rule; empty: no learned rules."""
    max_rules: int = 16
    """Learned rules per class at most."""
    rule_ttl: float = 60.0
    """Seconds that a rule outlives the last decision that wanted it."""
    exempt: frozenset[Key] = frozenset()
    """Keys that a configured rule speaks of: the user's own rule holds, none is learned."""
    classes: Mapping[str, str] = field(default_factory=lambda: dict(CLASSES))
    """Every class and its priority (critical, error, warning, info, debug)."""
    network_classes: frozenset[str] = frozenset({"packet_drop", "tcp_fault", "connection", "connection_close"})
    """What comes first when the network is saturated."""
    disk_classes: frozenset[str] = frozenset({"exec", "syscall"})
    """What is thinned when disks are: starts of programs and system calls, which read and write files."""

    def __post_init__(self) -> None:
        """Check what a caller could get wrong."""
        if not (0 <= self.min_ratio <= self.max_ratio <= 1 and self.max_ratio > 0):
            raise ValueError(
                f"min_ratio {self.min_ratio:g}, max_ratio {self.max_ratio:g}: give 0 <= min_ratio <= max_ratio <= 1, "
                "and max_ratio above 0"
            )
        if not all(a < b for a, b in zip((0.0, *self.thresholds), self.thresholds, strict=False)):
            raise ValueError(f"thresholds {self.thresholds}: give four ascending numbers of events per second")
        if self.strategy not in {"thresholds", "budget"}:
            raise ValueError(f"strategy {self.strategy!r}: give thresholds or budget")
        for name in ("max_events_per_second", "interval", "rule_ttl"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)!r}: give a number above 0")
