"""What was read about which container, as the families tell: a record when it is first read, and when it has changed.

Flows in: the snapshots that monitors write into the store. Flows out: one record per container and monitor. Only names
are told, never values: a record that held what it is about would be a second place to leak from.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

from exporter.catalog import CONTAINER_INFO, HOST, NETNS_INFO
from exporter.contract import Key

Row = tuple[str, ...]
"""A family's key behind its container id."""
Record = dict[str, object]


def _count(rows: Collection[Row]) -> object:
    return len(rows)


def _names(rows: Collection[Row]) -> object:
    return sorted({row[0] for row in rows})


def _variables(rows: Collection[Row]) -> object:
    return {"names": len(rows), "values": sorted(name for name, value in rows if value)}


_RUNTIMES = "runtimes"
_RESOURCES = ("cpu_usage_seconds_total", "memory_working_set_bytes", "disk_read_bytes_total", "pids")

_READ: Mapping[str, tuple[str, str, Callable[[Collection[Row]], object]]] = {
    CONTAINER_INFO: ("identity", _RUNTIMES, lambda _: ["name", "image"]),
    "cni_container_label_info": ("labels", _RUNTIMES, _names),
    "cni_container_annotation_info": ("annotations", _RUNTIMES, _names),
    "cni_container_environment_info": ("environment", _RUNTIMES, _variables),
    "cni_container_mount_info": ("mounts", _RUNTIMES, _count),
    "cni_container_network_info": ("networks", _RUNTIMES, _count),
    "cni_container_port_info": ("ports", _RUNTIMES, _count),
    **{f"cni_container_{name}": (name, "cgroup", lambda _: True) for name in _RESOURCES},
    "cni_container_namespace_info": ("namespaces", "namespaces", _names),
    "cni_container_process_info": ("processes", "namespaces", _count),
    NETNS_INFO: ("network_namespace", "links", _names),
}
"""Family to what it tells was read, who reads it, and how much of that is recorded.

The monitors of the runtimes write one table: there the container's own runtime is the reader.
"""

FAMILIES = frozenset(_READ)
"""The families that tell anything."""


class Reads:
    """Remembers what is recorded, for as long as the container is in the families. For one thread."""

    def __init__(self) -> None:
        """Know nothing."""
        self._recorded: dict[str, dict[str, int]] = {}
        self._names: dict[str, Row] = {}

    def records(self, snapshots: Mapping[str, Mapping[Key, float]]) -> Iterator[Record]:
        """Give a record for whatever is new or has changed in what a monitor wrote."""
        info = snapshots.get(CONTAINER_INFO)
        if info is not None:
            self._names = {key[0]: key[1:] for key in info}
        found: dict[tuple[str, str], Record] = defaultdict(dict)
        for family in FAMILIES & snapshots.keys():
            what, reader, shown = _READ[family]
            rows = _by_container(family, snapshots[family])
            digests = {container_id: hash(frozenset(its)) for container_id, its in rows.items()}
            before, self._recorded[family] = self._recorded.get(family, {}), digests
            for container_id in [known for known, digest in digests.items() if before.get(known) != digest]:
                found[container_id, self._reader(reader, container_id)][what] = shown(rows[container_id])
        for (container_id, monitor), read in found.items():
            yield self._record(container_id, monitor, read)

    def _reader(self, reader: str, container_id: str) -> str:
        """Name the monitor. What has neither image nor Kubernetes namespace is known by its processes alone."""
        namespace, *_, image, runtime = self._names.get(container_id, ("", "", ""))
        return reader if reader != _RUNTIMES else runtime if image or namespace else "cgroup"

    def _record(self, container_id: str, monitor: str, read: Record) -> Record:
        namespace, pod, container, *_ = self._names.get(container_id, ("", "", ""))
        return {
            "record": "read",
            "monitor": monitor,
            "container_id": container_id,
            "namespace": namespace,
            "pod": pod,
            "container": container,
            "what": dict(sorted(read.items())),
        }


def _by_container(family: str, snapshot: Mapping[Key, float]) -> dict[str, list[Row]]:
    """Group a family's keys by container; a network namespace is its owner's."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for key in snapshot:
        owner, row = (key[1], key[2:]) if family == NETNS_INFO else (key[0], key[1:])
        if owner and owner != HOST:
            rows[owner].append(row)
    return rows
