"""Whose series it is: network namespace -> owning container -> names, as two info families say it at this moment.

Flows in: the snapshots of `cni_netns_info` and `cni_container_info`. Flows out: workload labels, which for a known
workload never change while its namespace lives, because a changed label is a new series and a broken rate().
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from exporter.catalog import HOST
from exporter.contract import Key

Workload = tuple[str, str, str]
"""namespace, pod, container."""

UNKNOWN: Workload = ("", "", "")
_SHORT_ID = 12  # how docker and crictl print an id


class Workloads:
    """Names of namespaces and containers. Not thread-safe: the store calls it under its collection lock."""

    def __init__(self, grace: float) -> None:
        """Hold a namespace's series back for at most `grace` seconds while its names are not known."""
        self._grace = grace
        self._bound: dict[str, Workload] = {}
        self._first_seen: dict[str, float] = {}
        self._owners: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._containers: dict[str, Workload] = {}
        self._now = 0.0

    def learn(self, netns: Mapping[Key, float], containers: Mapping[Key, float], now: float) -> None:
        """Take the two info families in; what they no longer list is forgotten. `now` is monotonic seconds."""
        self._now = now
        self._owners = {key[0]: key[1] for key in netns}
        self._labels = {key[1]: key[2] for key in netns if key[1]}
        self._containers = {key[0]: (key[1], key[2], key[3]) for key in containers}
        for gone in self._bound.keys() - self._owners.keys():
            del self._bound[gone]
        for gone in self._first_seen.keys() - self._owners.keys():
            del self._first_seen[gone]

    @property
    def netns_ids(self) -> AbstractSet[str]:
        """Identities of the namespaces that are there."""
        return self._owners.keys()

    @property
    def container_ids(self) -> AbstractSet[str]:
        """Ids of the containers that are there."""
        return self._containers.keys()

    def of_netns(self, netns_id: str) -> tuple[Workload | None, bool]:
        """Give the workload of a namespace, and whether that is final; None while its series are held back."""
        bound = self._bound.get(netns_id)
        if bound is not None:
            return bound, True
        owner = self._owners.get(netns_id)
        if owner is None:
            return None, False
        workload = ("", "", HOST) if owner == HOST else self._network_of(owner)
        if workload is None:
            waited = self._now - self._first_seen.setdefault(netns_id, self._now)
            if waited < self._grace:
                return None, False
            if not owner:
                return UNKNOWN, False  # nobody's yet; once it has an owner, its series begin under that name
            workload = ("", "", owner[:_SHORT_ID])
        self._bound[netns_id] = workload
        return workload, True

    def of_container(self, container_id: str) -> Workload | None:
        """Give the names of a container; None while no runtime has told them."""
        return self._containers.get(container_id)

    def netns_of(self, container_id: str) -> str:
        """Give the `netns` label of the namespace that the container owns, or an empty text."""
        return self._labels.get(container_id, "")

    def _network_of(self, container_id: str) -> Workload | None:
        names = self._containers.get(container_id)
        if names is None:
            return None
        namespace, pod, container = names
        return (namespace, pod, "" if pod else container)
