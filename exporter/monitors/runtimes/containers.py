"""The one table of containers: what Docker, the CRI and the cgroup scan know, merged by container id.

Flows in: records of the runtimes' own interfaces and sightings of the cgroup scan, from a thread each. Flows out: the
families of owner `runtimes`. Who knows a container's name wins; a container that two of them know is counted once.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from exporter.contract import Families, Key
from exporter.host.cgroups import Identity, Resources
from exporter.monitors.runtimes.record import LIVE, STATES, Record

CAPACITY = 20_000
"""Records of runtimes, and sightings, that are held at most."""

GRACE = 2.0
"""Seconds that a container waits for its name while a runtime that could know it is asked."""

_EXITED_SHOWN = 500
"""Exited containers with series of their own, the newest first; all of them are counted in cni_containers."""

_SHORT_ID = 12
_RESOURCES = {
    "cni_container_cpu_usage_seconds_total": "cpu_seconds",
    "cni_container_cpu_limit_cores": "cpu_limit_cores",
    "cni_container_memory_working_set_bytes": "memory_working_set_bytes",
    "cni_container_memory_limit_bytes": "memory_limit_bytes",
    "cni_container_disk_read_bytes_total": "disk_read_bytes",
    "cni_container_disk_written_bytes_total": "disk_written_bytes",
    "cni_container_pids": "pids",
}
_DETAILS = {
    "cni_container_network_info": "networks",
    "cni_container_port_info": "ports",
    "cni_container_mount_info": "mounts",
    "cni_container_label_info": "labels",
    "cni_container_annotation_info": "annotations",
    "cni_container_environment_info": "environment",
}


@dataclass(frozen=True, slots=True)
class Sighting:
    """A container as the cgroup scan sees it: it has at least one process."""

    identity: Identity
    sandbox: bool = False
    resources: Resources = field(default_factory=Resources)


@dataclass(slots=True)
class _Interface:
    """What one runtime's own interface knows."""

    runtime: str
    token: object = None
    """Whoever keeps it up to date; None where nobody does."""
    absent: bool = False
    """Whether there is certainly nothing to ask."""
    records: dict[str, Record] = field(default_factory=dict)

    def may_know(self, identity: Identity) -> bool:
        """Tell whether the name may yet come from here. cgroupfs pods look alike under Docker and containerd."""
        if self.absent:
            return False
        return identity.runtime in {self.runtime, "unknown"} or (bool(identity.pod_uid) and self.runtime == "docker")


class Containers:
    """The table. Every method is safe from any thread."""

    def __init__(
        self,
        runtimes: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        capacity: int = CAPACITY,
    ) -> None:
        """Name the runtimes whose interfaces will be tried, best first."""
        self._interfaces = {runtime: _Interface(runtime) for runtime in runtimes}
        self._clock = clock
        self._capacity = capacity
        self._lock = threading.Lock()
        self._alive: dict[str, Sighting] = {}
        self._first_seen: dict[str, float] = {}
        self._names: dict[str, tuple[str, str, str]] = {}
        self._scanned = False
        self._changed = True
        self._next_release = float("inf")

    # What a runtime's own interface says.

    def up(self, runtime: str, token: object) -> None:
        """Say that `token` keeps the runtime's records up to date from now on."""
        with self._lock:
            interface = self._interfaces[runtime]
            self._changed = self._changed or interface.token is not token
            interface.token, interface.absent = token, False

    def down(self, runtime: str, token: object) -> None:
        """Say that `token` stopped. Records stay while the scan sees their processes; the others go.

        Ignored where another source has taken over. Containers still wait for their names: it may come back soon.
        """
        with self._lock:
            interface = self._interfaces[runtime]
            if interface.token is token:
                interface.token = None
                # What started after the last scan is left to the next one to judge.
                live = {known: one for known, one in interface.records.items() if one.state in LIVE and self._scanned}
                interface.records = live
                self._changed = True

    def absent(self, runtime: str) -> None:
        """Say that the runtime is not on this machine: nobody waits for its names."""
        with self._lock:
            interface = self._interfaces[runtime]
            if interface.token is None and not interface.absent:
                interface.absent = self._changed = True

    def reconcile(self, runtime: str, records: Iterable[Record]) -> int:
        """Take a full list in: what it does not hold is gone. Answers how many records found no room."""
        with self._lock:
            interface = self._interfaces[runtime]
            before, interface.records = interface.records, {}
            shed = sum(not self._put(interface, record) for record in records)
            for gone in before.keys() - interface.records.keys():
                self._forget(gone)
            self._changed = self._changed or before != interface.records
            return shed

    def put(self, runtime: str, record: Record) -> bool:
        """Take one record in, for a new container or in place of the old; False where there is no room."""
        with self._lock:
            interface = self._interfaces[runtime]
            self._changed = self._changed or interface.records.get(record.container_id) != record
            return self._put(interface, record)

    def get(self, runtime: str, container_id: str) -> Record | None:
        """Give what the runtime said last of a container."""
        with self._lock:
            return self._interfaces[runtime].records.get(container_id)

    def remove(self, runtime: str, container_id: str) -> None:
        """Forget a container that the runtime removed; also that the last scan saw it."""
        with self._lock:
            self._interfaces[runtime].records.pop(container_id, None)
            self._forget(container_id)
            self._changed = True

    # What the cgroup scan says.

    def seen(self, alive: Mapping[str, Sighting]) -> tuple[int, list[tuple[str, str]]]:
        """Take in what has processes now, by id.

        Answers how many found no room, and (runtime, event) of the starts and ends that no runtime's own interface
        tells of.
        """
        with self._lock:
            before = self._alive
            self._alive = dict(list(alive.items())[: self._capacity])
            now = self._clock()
            self._first_seen = {known: self._first_seen.get(known, now) for known in self._alive}
            events = (
                [("start", self._alive[new]) for new in self._alive.keys() - before.keys()] if self._scanned else []
            )
            events += [("die", before[gone]) for gone in before.keys() - self._alive.keys()]
            for interface in self._interfaces.values():
                if interface.token is None:
                    running = interface.records.keys() & self._alive.keys()
                    interface.records = {known: interface.records[known] for known in running}
            self._scanned = self._changed = True
            told = [(seen.identity.runtime, event) for event, seen in events if not self._told(seen.identity)]
            return len(alive) - len(self._alive), told

    def unseen(self) -> None:
        """Say that nobody scans any more."""
        with self._lock:
            self._alive, self._first_seen, self._scanned, self._changed = {}, {}, False, True
            for interface in self._interfaces.values():
                if interface.token is None:
                    interface.records.clear()

    # What everybody may know.

    def publish(self, families: Families) -> None:
        """Write every family anew, unless nothing changed since."""
        with self._lock:
            if self._changed or self._clock() >= self._next_release:
                self._changed = False
                # Inside the lock: an older snapshot must never overtake a newer one.
                families.replace(self._snapshot(self._visible()))

    def _put(self, interface: _Interface, record: Record) -> bool:
        room = sum(len(one.records) for one in self._interfaces.values()) < self._capacity
        if room or record.container_id in interface.records:
            interface.records[record.container_id] = record
            return True
        return False

    def _forget(self, container_id: str) -> None:
        self._alive.pop(container_id, None)
        self._first_seen.pop(container_id, None)

    def _told(self, identity: Identity) -> bool:
        return any(one.token is not None and one.may_know(identity) for one in self._interfaces.values())

    def _visible(self) -> list[Record]:
        """Merge, name, and hold back what may still get its name."""
        now = self._clock()
        self._next_release = float("inf")
        merged: dict[str, Record] = {}
        for interface in self._interfaces.values():
            for container_id, record in interface.records.items():
                merged.setdefault(container_id, record)
        for container_id, sighting in self._alive.items():
            if container_id not in merged and self._is_released(container_id, sighting, now):
                merged[container_id] = _nameless(sighting)
        for gone in self._names.keys() - merged.keys():
            del self._names[gone]
        return [self._named(record) for record in merged.values()]

    def _is_released(self, container_id: str, sighting: Sighting, now: float) -> bool:
        release = self._first_seen[container_id] + GRACE
        if container_id in self._names or now >= release:
            return True
        if not any(interface.may_know(sighting.identity) for interface in self._interfaces.values()):
            return True
        self._next_release = min(self._next_release, release)
        return False

    def _named(self, record: Record) -> Record:
        """Give a container the names that it was first published under: a changed label is another series."""
        names = (record.namespace, record.pod, record.container)
        first = self._names.setdefault(record.container_id, names)
        if names == first:
            return record
        return replace(record, namespace=first[0], pod=first[1], container=first[2])

    def _snapshot(self, records: list[Record]) -> dict[str, dict[Key, float]]:
        counts: dict[Key, float] = {
            (interface.runtime, state): 0.0
            for interface in self._interfaces.values()
            if interface.token is not None
            for state in STATES
        }
        for record in records:
            if not record.sandbox:
                counts[record.runtime, record.state] = counts.get((record.runtime, record.state), 0.0) + 1.0
        shown = _shown(records)
        live = [record for record in shown if record.state in LIVE]
        return {
            "cni_containers": counts,
            "cni_container_info": {_info(record): 1.0 for record in shown},
            "cni_container_state": {(record.container_id, record.state): 1.0 for record in shown if not record.sandbox},
            **{family: _rows(live, attribute) for family, attribute in _DETAILS.items()},
            **{family: self._usage(live, attribute) for family, attribute in _RESOURCES.items()},
        }

    def _usage(self, live: list[Record], attribute: str) -> dict[Key, float]:
        """Collect one figure. A sandbox's own process is nobody's workload."""
        pairs = ((record.container_id, self._alive.get(record.container_id)) for record in live if not record.sandbox)
        figures = ((known, getattr(seen.resources, attribute)) for known, seen in pairs if seen)
        return {(known,): figure for known, figure in figures if figure is not None}


def _nameless(sighting: Sighting) -> Record:
    """Describe a container that only its processes tell of."""
    identity = sighting.identity
    name = "" if sighting.sandbox else identity.container_id[:_SHORT_ID]
    return Record(
        identity.container_id,
        identity.runtime,
        "running",
        pod=identity.pod_uid,
        container=name,
        sandbox=sighting.sandbox,
    )


def _shown(records: list[Record]) -> list[Record]:
    """Choose who gets series: everybody live, and of each name that is not live the newest exited one.

    A restarted container leaves its predecessors behind under the same name; their series would be the same ones.
    """
    live = [record for record in records if record.state in LIVE]
    taken = {_names(record) for record in live}
    exited: dict[Key, Record] = {}
    for record in sorted((one for one in records if one.state not in LIVE), key=lambda one: -one.created):
        if _names(record) not in taken:
            exited.setdefault(_names(record), record)
    return live + list(exited.values())[:_EXITED_SHOWN]


def _names(record: Record) -> Key:
    return (record.namespace, record.pod, record.container)


def _info(record: Record) -> Key:
    return (
        record.container_id,
        record.namespace,
        record.pod,
        record.container,
        record.image,
        record.runtime,
    )


def _rows(records: list[Record], attribute: str) -> dict[Key, float]:
    return {(record.container_id, *row): 1.0 for record in records for row in getattr(record, attribute)}
