"""A Context for tests: it keeps what a source writes, so that a test can compare it with what it expects.

Flows in: families, errors and wakes of a source under test. Flows out: plain dictionaries and lists.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.catalog import FAMILIES
from exporter.contract import Key, Paths
from exporter.load.admission import CLASSES, KeptEvent
from exporter.load.filters import Attributes


@dataclass
class RecordedFamilies:
    """Families that are written down, checked against the catalogue: unknown names and keys of a wrong width raise."""

    snapshots: dict[str, dict[Key, float]] = field(default_factory=dict)
    """What `replace` wrote last, by family; counters of `add` are here too."""
    histograms: dict[str, dict[Key, tuple[float, ...]]] = field(default_factory=dict)
    """What `replace_histograms` wrote last, by family."""
    observations: dict[str, list[tuple[Key, float]]] = field(default_factory=dict)
    """What `observe` wrote, in order, by family."""

    def replace(self, snapshots: Mapping[str, Mapping[Key, float]]) -> None:
        for name, series in snapshots.items():
            for key in series:
                _check(name, key)
            self.snapshots[name] = dict(series)

    def add(self, family: str, key: Key = (), amount: float = 1.0) -> None:
        _check(family, key)
        if amount < 0:
            raise ValueError(f"{family}: a counter cannot fall by {amount}")
        series = self.snapshots.setdefault(family, {})
        series[key] = series.get(key, 0.0) + amount

    def observe(self, family: str, value: float, key: Key = ()) -> None:
        _check(family, key)
        self.observations.setdefault(family, []).append((key, value))

    def replace_histograms(self, snapshots: Mapping[str, Mapping[Key, Sequence[float]]]) -> None:
        for name, series in snapshots.items():
            for key, state in series.items():
                _check(name, key)
                if len(state) != len(FAMILIES[name].buckets) + 2:
                    raise ValueError(f"{name}: {len(state)} figures do not fit its buckets")
            self.histograms[name] = {key: tuple(state) for key, state in series.items()}

    def value(self, family: str, key: Key = ()) -> float:
        """One sample; KeyError where it was not written."""
        return self.snapshots[family][key]


@dataclass
class RecordedEvents:
    """An EventSink that somebody watches, unless the test says otherwise."""

    wanted: frozenset[str] = frozenset(CLASSES)
    kept: list[KeptEvent] = field(default_factory=list)

    def should_sample(self, event_type: str, attributes: Attributes) -> float:  # noqa: ARG002 - keeps all
        if event_type not in CLASSES:
            raise ValueError(f"{event_type}: no class of events")
        return 1.0

    def on_wanted(self, callback: Callable[[frozenset[str]], None]) -> Callable[[], None]:
        callback(self.wanted)
        return lambda: None

    def record_event(self, event: KeptEvent) -> None:
        if event.class_ not in CLASSES:
            raise ValueError(f"{event.class_}: no class of events")
        self.kept.append(event)


@dataclass
class Recorder:
    """A Context that remembers everything."""

    paths: Paths = field(default_factory=Paths)
    families: RecordedFamilies = field(default_factory=RecordedFamilies)
    events: RecordedEvents = field(default_factory=RecordedEvents)
    errors: list[tuple[str, str]] = field(default_factory=list)
    """(kind, message) in order."""
    wakes: int = 0
    shed: int = 0
    """Sum of what `dropped` reported."""

    def error(self, kind: str, message: str) -> None:
        self.errors.append((kind, message))

    def dropped(self, count: int = 1) -> None:
        self.shed += count

    def wake(self) -> None:
        self.wakes += 1

    def error_kinds(self) -> list[str]:
        """The kinds of the errors so far, in order."""
        return [kind for kind, _ in self.errors]


def _check(name: str, key: Key) -> None:
    """Hold a source to the catalogue, as the real store does."""
    if name not in FAMILIES:
        raise ValueError(f"{name}: not in the catalogue")
    if len(key) != len(FAMILIES[name].key) or not all(isinstance(part, str) for part in key):
        raise ValueError(f"{name}: key {key!r} does not fit {FAMILIES[name].key}")
