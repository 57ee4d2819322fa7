"""What a monitor is: the one agreement between the observers of the host and the supervisor that runs them.

A monitor names its rungs, best first; a rung opens a source; a source brings metric families up to date. Nothing flows
back: a source sees its context and nothing else of the program.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:  # who only says what it is, as the loader, need not have it all in memory
    from exporter.load.admission import KeptEvent
    from exporter.load.filters import Attributes

Key = tuple[str, ...]
"""Hidden join key (if the family has one) followed by the family's own labels, in the order of the catalogue."""


class Unsupported(Exception):  # noqa: N818 - an answer, not a failure
    """This machine cannot serve a source. Not an error: the next rung is tried, the reason is shown to the user."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        """Say why in one sentence, and what the user can do about it."""
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


class Families(Protocol):
    """The families that one monitor owns. Every method is safe from any thread; unknown names raise ValueError."""

    def replace(self, snapshots: Mapping[str, Mapping[Key, float]]) -> None:
        """Swap whole families in one step: what a snapshot does not hold is gone at the next scrape."""

    def add(self, family: str, key: Key = (), amount: float = 1.0) -> None:
        """Raise a counter of our own (not one that is read from the kernel) by `amount` >= 0."""

    def replace_histograms(self, snapshots: Mapping[str, Mapping[Key, Sequence[float]]]) -> None:
        """Swap whole histograms that are counted elsewhere.

        A state is the count of each bucket (not cumulative; the last is +Inf's), then the sum of the observations.
        """

    def observe(self, family: str, value: float, key: Key = ()) -> None:
        """Put one observation, in base units, into a histogram."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Roots of the host's pseudo file systems; tests point them at plain files."""

    procfs: Path = Path("/proc")
    sysfs: Path = Path("/sys")


class EventSink(Protocol):
    """Where single events go, for those who watch. Safe from any thread."""

    wanted: frozenset[str]
    """Classes that somebody watches: an event of another need not be built."""

    def on_wanted(self, callback: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        """Call back at once, and whenever `wanted` has changed, before whoever begins to watch knows that he does.

        In the thread of whoever changed it; the callback must not block. The answer ends that.
        """

    def should_sample(self, event_type: str, attributes: "Attributes") -> float:
        """Decide on an event that no program in the kernel has decided on: its weight, or 0 where it is not kept.

        It is counted as seen, whether anybody watches or not; what is kept is then passed on by `record_event`. Raises
        ValueError for a class that `load.admission` does not know.
        """

    def record_event(self, event: "KeptEvent") -> None:
        """Pass an event on. Raises ValueError for a class that `load.admission` does not know."""


class Context(Protocol):
    """What a source may touch."""

    families: Families
    events: EventSink
    paths: Paths

    def error(self, kind: str, message: str) -> None:
        """Count a piece of bad input under `kind` (a fixed word of the source's own) and log it, at a bounded rate."""

    def dropped(self, count: int = 1) -> None:
        """Count what a bounded queue of this monitor had to shed."""

    def wake(self) -> None:
        """Ask for an update soon; from any thread. Calls before the update begins are one call."""


class Source(ABC):
    """One way to observe. Opened, updated and closed by one supervisor thread; every wait in it has a timeout."""

    mode: ClassVar[str]
    """The rung's name in `cni_exporter_monitor_mode_info{mode}`."""

    def open(self, context: Context) -> None:
        """Acquire what the source needs.

        Raises Unsupported where this machine cannot serve it, OSError (or the client's own error) where it failed.
        """
        self.context = context

    @abstractmethod
    def update(self) -> None:
        """Bring every family of the monitor up to date. An exception is a failure of the source: it is closed."""

    def readers(self) -> Mapping[int, Callable[[], None]]:
        """Descriptors to poll, each with what to call when it is readable; the call must not block."""
        return {}

    def close(self) -> None:  # noqa: B027 - nothing to release is the common case
        """Release everything, threads included. Called once, also after a failed open or update."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """A named observer and its ladder."""

    name: str
    rungs: Sequence[Callable[[], Source]]
    """Makers of sources, best first."""
    interval: float
    """Seconds between updates when nothing else asks for one."""
    max_age: float | None = None
    """A scrape refreshes data older than this many seconds before it answers; None: a scrape takes what is there."""
    optional: bool = False
    """True where the observed thing may rightly be absent (a container runtime): then absence is not a failure."""
    steady: bool = False
    """True where the interval is kept also while the exporter is to do less: it is what tells when to do more again."""
