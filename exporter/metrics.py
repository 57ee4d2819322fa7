"""The family store: the only state that monitors, scrapes and pages share.

Flows in: what monitors write, under the names of the catalogue. Flows out: joined, redacted and capped series. An
encoded label set is kept with its series, so that a scrape formats values alone.
"""

import math
import operator
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from exporter.catalog import CONTAINER_INFO, FAMILIES, NETNS_ALIAS, NETNS_INFO, WORKLOAD, Family, Join, Kind
from exporter.contract import Key
from exporter.joins import Names, Workload, Workloads
from exporter.privacy import DEFAULT, Rules

_INTERNED = 100_000  # label values whose redaction is remembered
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@dataclass(slots=True, eq=False)
class Series:
    """One exported label set. Several keys may share it (a restarted container's two namespaces): they are summed."""

    labels: dict[str, str]
    text: str
    """The label set as scraped, without braces."""
    keys: int = 0
    base: float = 0.0
    """What counters of keys that are gone had reached, so that a shared counter never goes backwards."""
    total: float = 0.0
    round: int = 0


@dataclass(slots=True, eq=False)
class _Table:
    """A family, what was written to it, and the series that its keys have become."""

    family: Family
    cap: int
    values: Mapping[Key, float] = field(default_factory=dict)
    parts: dict[frozenset[str], Mapping[Key, float]] = field(default_factory=dict)
    """What `values` is the sum of, by writer: where several write a family, each has its part."""
    histograms: dict[Key, list[float]] = field(default_factory=dict)
    histograms_by: frozenset[str] = frozenset()
    """Who has replaced `histograms`; nobody where they are observed."""
    series: dict[Key, Series] = field(default_factory=dict)
    unsettled: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    """Keys whose joined labels may still change, with what they are now."""
    by_text: dict[str, Series] = field(default_factory=dict)
    previous: Mapping[Key, float] = field(default_factory=dict)
    dropped: int = 0
    replaced: bool = False
    """Whether it is written whole, as what is read from the host is; else it is a counter of our own."""


@dataclass(frozen=True, slots=True)
class Collected:
    """A family at one moment."""

    family: Family
    samples: list[tuple[Series, float]]
    histograms: list[tuple[Series, list[float]]]
    """Counts per bucket (the last is +Inf's, not cumulative), then the sum."""


class OwnedFamilies:
    """What one monitor may write: the `Families` of its context."""

    def __init__(self, store: "Store", owners: frozenset[str]) -> None:
        """Bind the store to the owners whose families may be written."""
        self._store = store
        self._owners = owners

    def replace(self, snapshots: Mapping[str, Mapping[Key, float]]) -> None:
        """Swap whole families in one step. Raises ValueError for a family of another owner."""
        self._store.replace(self._owners, snapshots)

    def add(self, family: str, key: Key = (), amount: float = 1.0) -> None:
        """Raise a counter. Raises ValueError for another owner's family, a wrong key or a negative amount."""
        self._store.add(self._owners, family, key, amount)

    def replace_histograms(self, snapshots: Mapping[str, Mapping[Key, Sequence[float]]]) -> None:
        """Swap whole histograms. Raises ValueError as `add` does, and for a state that does not fit the buckets."""
        self._store.replace_histograms(self._owners, snapshots)

    def observe(self, family: str, value: float, key: Key = ()) -> None:
        """Put one observation into a histogram. Raises ValueError as `add` does."""
        self._store.observe(self._owners, family, value, key)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration says about series."""

    limits: Mapping[str, int] = field(default_factory=dict)
    """Caps by family name, over those of the catalogue."""
    grace: float = 2.0
    """Seconds that a series waits for its workload's names."""
    rules: Rules = DEFAULT
    """What is secret."""
    admits: Callable[[str], bool] | None = None
    """Whether the pods of a Kubernetes namespace are exported; None: all are."""


def _sum(parts: Mapping[frozenset[str], Mapping[Key, float]]) -> Mapping[Key, float]:
    """Add up what several writers say; the one there mostly is stands for itself."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    total: dict[Key, float] = {}
    for part in parts.values():
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


class Store:
    """Every family's current state. Safe from any thread."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        families: Mapping[str, Family] = FAMILIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty store."""
        self._tables = {name: _Table(family, family.cap) for name, family in families.items()}
        for table in self._tables.values():
            if table.family.kind is Kind.HISTOGRAM and not table.family.key:
                table.histograms[()] = [0.0] * (len(table.family.buckets) + 2)  # there from the start, as counters are
        self._clock = clock
        self._writing = threading.Lock()
        self._collecting = threading.Lock()
        self._naming = threading.Lock()
        self._names = Names()
        self._named: tuple[Mapping[Key, float], ...] = ()
        """What `_names` has learnt: snapshots are replaced, never changed, so that identity tells."""
        self._round = 0
        self.held = 0
        """Keys that the last collection held back because their workload is not known yet."""
        self.admitting = True
        """False under memory pressure: then no new series is taken in (counted as dropped)."""
        self.apply(policy or Policy())

    def apply(self, policy: Policy) -> None:
        """Put a policy in force, for the series that exist too."""
        with self._collecting:
            self._policy = policy
            self._workloads = Workloads(policy.grace)
            self._clean: dict[str, str] = {}
            for name, table in self._tables.items():
                table.cap = policy.limits.get(name, table.family.cap)
                table.series, table.by_text, table.unsettled = {}, {}, {}

    def owned(self, *owners: str) -> OwnedFamilies:
        """Give the view through which a monitor writes the families of these owners."""
        return OwnedFamilies(self, frozenset(owners))

    def replace(self, owners: frozenset[str], snapshots: Mapping[str, Mapping[Key, float]]) -> None:
        """Swap what `owners` wrote of these families in one step; the mappings belong to the store afterwards."""
        tables = [(self._table(owners, name), snapshot) for name, snapshot in snapshots.items()]
        for table, snapshot in tables:
            self._check_width(table.family, next(iter(snapshot), None))
        with self._writing:
            for table, snapshot in tables:
                table.parts[owners] = snapshot
                table.values, table.replaced = _sum(table.parts), True

    def add(self, owners: frozenset[str], name: str, key: Key, amount: float) -> None:
        """Raise a counter of `owners`."""
        table = self._table(owners, name)
        self._check_width(table.family, key)
        if not amount >= 0:
            raise ValueError(f"{name}: a counter cannot be raised by {amount}")
        with self._writing:
            values = dict(table.values) if not isinstance(table.values, dict) else table.values
            values[key] = values.get(key, 0.0) + amount
            table.values = values

    def observe(self, owners: frozenset[str], name: str, value: float, key: Key) -> None:
        """Put one observation into a histogram of `owners`."""
        table = self._table(owners, name)
        self._check_width(table.family, key)
        if table.family.kind is not Kind.HISTOGRAM or math.isnan(value):
            raise ValueError(f"{name}: cannot observe {value}")
        bounds = table.family.buckets
        with self._writing:
            state = table.histograms.setdefault(key, [0.0] * (len(bounds) + 2))
            slot = next((i for i, bound in enumerate(bounds) if value <= bound), len(bounds))
            state[slot] += 1
            state[-1] += value

    def replace_histograms(
        self, owners: frozenset[str], snapshots: Mapping[str, Mapping[Key, Sequence[float]]]
    ) -> None:
        """Swap histograms of `owners` that are counted elsewhere, in one step."""
        tables = [(self._table(owners, name), snapshot) for name, snapshot in snapshots.items()]
        for table, snapshot in tables:
            for key, state in snapshot.items():
                self._check_width(table.family, key)
                if table.family.kind is not Kind.HISTOGRAM or len(state) != len(table.family.buckets) + 2:
                    raise ValueError(f"{table.family.name}: {len(state)} figures do not fit its buckets")
        with self._writing:
            for table, snapshot in tables:
                table.histograms = {key: list(state) for key, state in snapshot.items()}
                table.histograms_by, table.replaced = owners, True

    def clear(self, *owners: str) -> None:
        """Empty what the view of these owners has replaced: its writer no longer runs. Its own counters stay."""
        with self._writing:
            for table in self._tables.values():
                if table.parts.pop(frozenset(owners), None) is not None:
                    table.values = _sum(table.parts)
                if table.histograms_by == frozenset(owners):
                    table.histograms = {}

    def read(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """Give a family's series as they would be scraped now: (labels, value)."""
        with self._collecting:
            self._learn()
            collected = self._collect_family(self._tables[name])
            return [(series.labels, value) for series, value in collected.samples]

    def names_of(self, netns_id: str, container_id: str = "") -> Workload:
        """Name a container, else the workload of a namespace, for a single event. Waits for no collection."""
        with self._naming:
            told = tuple(self._tables[name].values for name in (NETNS_INFO, CONTAINER_INFO, NETNS_ALIAS))
            if len(self._named) != len(told) or any(map(operator.is_not, told, self._named)):
                self._names.learn(*told)
                self._named = told
            return self._names.of(netns_id, container_id)

    def latest(self, name: str) -> Mapping[Key, float]:
        """Give a family as it was written last, by keys and not joined. Waits for no collection."""
        return self._tables[name].values

    def namespaces(self) -> dict[str, tuple[str, Workload]]:
        """Give the network namespaces that have an `inode:cookie`, by that: the owner's container id, and names."""
        told = self._tables[NETNS_INFO].values, self._tables[NETNS_ALIAS].values
        owners = {key[0]: key[1] for key in told[0]}
        known = dict.fromkeys(key[0] for key in (*told[0], *told[1]) if key[0].partition(":")[2].isdigit())
        return {netns_id: (owners.get(netns_id, ""), self.names_of(netns_id)) for netns_id in known}

    def collect(self) -> list[Collected]:
        """Join, redact and cap every family."""
        with self._collecting:
            self._learn()
            self.held = 0
            own = [table for table in self._tables.values() if table.family.owner == "metrics"]
            shown = [table for table in self._tables.values() if table not in own and not table.family.internal]
            families = [self._collect_family(table) for table in shown]
            self._account(families)
            return families + [self._collect_family(table) for table in own]

    def _table(self, owners: frozenset[str], name: str) -> _Table:
        table = self._tables.get(name)
        if table is None or table.family.owner not in owners:
            raise ValueError(f"{name} is no family of {', '.join(sorted(owners))}: see exporter/catalog.py")
        return table

    @staticmethod
    def _check_width(family: Family, key: Key | None) -> None:
        if key is not None and len(key) != len(family.key):
            raise ValueError(f"{family.name}: key {key} does not fit {family.key}")

    def _learn(self) -> None:
        with self._writing:
            netns, containers, aliases = (
                dict(self._tables[name].values) for name in (NETNS_INFO, CONTAINER_INFO, NETNS_ALIAS)
            )
        self._workloads.learn(netns, containers, aliases, self._clock())

    def _collect_family(self, table: _Table) -> Collected:
        with self._writing:
            values: Mapping[Key, float] = dict(table.values)
            histograms = {key: list(state) for key, state in table.histograms.items()}
        self._forget(table, values.keys() | histograms.keys())
        self._round += 1
        samples: list[tuple[Series, float]] = []
        known, current = table.series, self._round
        shared: list[Series] = []
        for key in [key for key in values if key not in known]:
            self._admit(table, key)
        for key, value in values.items():
            series = known.get(key)
            if series is None:
                continue
            if series.keys == 1 and not series.base:
                samples.append((series, value))
                continue
            if series.round != current:
                series.round, series.total = current, series.base
                shared.append(series)
            series.total += value
        samples += [(series, series.total) for series in shared]
        table.previous = values
        return Collected(table.family, samples, self._sum_histograms(table, histograms))

    def _sum_histograms(self, table: _Table, histograms: dict[Key, list[float]]) -> list[tuple[Series, list[float]]]:
        sums: dict[str, tuple[Series, list[float]]] = {}
        for key, state in histograms.items():
            series = table.series.get(key) or self._admit(table, key)
            if series is None:
                continue
            if series.text in sums:
                state = [a + b for a, b in zip(sums[series.text][1], state, strict=True)]  # noqa: PLW2901 - the sum
            sums[series.text] = (series, state)
        return list(sums.values())

    def _forget(self, table: _Table, present: set[Key]) -> None:
        """Let go of the series whose keys are gone, whose workload is gone, or whose workload has become known."""
        for key in table.series.keys() - present:
            self._release(table, key)
        if table.family.join is not None:
            there = self._workloads.listed if table.family.join is Join.NETNS else self._workloads.of_container
            for key in [key for key in table.series if key[0] and not there(key[0])]:
                self._release(table, key)
        for key, joined in list(table.unsettled.items()):
            if self._joined(table.family, key) != (joined, False):
                self._release(table, key)

    @staticmethod
    def _release(table: _Table, key: Key) -> None:
        series = table.series.pop(key)
        table.unsettled.pop(key, None)
        series.keys -= 1
        if series.keys == 0:
            del table.by_text[series.text]
        elif table.family.kind is Kind.COUNTER:
            series.base += table.previous.get(key, 0.0)

    def _admit(self, table: _Table, key: Key) -> Series | None:
        """Make a key's series: join, redact, cap. None where it is held back or over the cap."""
        family = table.family
        joined, final = self._joined(family, key)
        if joined is None:
            self.held += 1
            return None
        values = key[len(family.hidden) :] + joined
        if not self._is_admitted(family, values):
            return None
        labels = self._redacted(family, values)
        text = ",".join(f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
        series = table.by_text.get(text)
        if series is None:
            if len(table.by_text) >= table.cap or not self.admitting:
                table.dropped += 1
                return None
            series = table.by_text[text] = Series(labels, text)
        series.keys += 1
        table.series[key] = series
        if not final:
            table.unsettled[key] = joined
        return series

    def _is_admitted(self, family: Family, values: tuple[str, ...]) -> bool:
        """Apply the filter of Kubernetes namespaces; a pod whose namespace nobody knows cannot pass one."""
        admits = self._policy.admits
        if admits is None or not {"namespace", "pod"} <= set(family.exported):
            return True
        pod = values[family.exported.index("pod")]
        return not pod or admits(values[family.exported.index("namespace")])

    def _joined(self, family: Family, key: Key) -> tuple[tuple[str, ...] | None, bool]:
        """Give the labels that the join adds (None: held back) and whether they are final."""
        if family.join is None:
            return (), True
        if family.join is Join.NETNS:
            return self._workloads.of_netns(key[0])
        if family.joined == WORKLOAD:
            names = self._workloads.of_container(key[0])
            return names, names is not None
        return (self._workloads.netns_of(key[0]),), False

    def _redacted(self, family: Family, values: tuple[str, ...]) -> dict[str, str]:
        labels = {name: self._cleaned(value) for name, value in zip(family.exported, values, strict=True)}
        if family.secret:
            name, holder = family.secret
            raw = dict(zip(family.exported, values, strict=True))
            labels[holder] = self._cleaned(self._policy.rules.redact(raw[name], raw[holder]))
        return labels

    def _cleaned(self, value: str) -> str:
        clean = self._clean.get(value)
        if clean is None:
            if len(self._clean) >= _INTERNED:
                self._clean.clear()
            clean = self._clean[value] = self._policy.rules.safe_label(value)
        return clean

    def _account(self, families: Iterable[Collected]) -> None:
        """Bring the store's own families up to date."""
        sizes = {one.family.name: len(one.samples) + len(one.histograms) for one in families}
        told = {name: size for name, size in sizes.items() if size or self._tables[name].dropped}
        own: dict[str, dict[Key, float]] = {
            "cni_exporter_series": {(name,): float(size) for name, size in told.items()},
            "cni_exporter_series_limit": {(name,): float(self._tables[name].cap) for name in told},
            "cni_exporter_series_dropped_total": {(name,): float(self._tables[name].dropped) for name in told},
            "cni_exporter_series_held": {(): float(self.held)},
        }
        self.replace(frozenset({"metrics"}), {name: values for name, values in own.items() if name in self._tables})
