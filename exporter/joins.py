"""Whose series it is: network namespace -> owning container -> names, as two info families say it at this moment.

Flows in: the snapshots of `cni_netns_info` and `cni_container_info`. Flows out: workload labels, which for a known
workload never change while its namespace lives, because a changed label is a new series and a broken rate().
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from exporter.catalog import HOST
from exporter.contract import Key

Workload = tuple[str, str, str]
"""namespace, pod, container."""

UNKNOWN: Workload = ("", "", "")
_SHORT_ID = 12  # how docker and crictl print an id
_REMEMBERED = 1024  # namespaces, and containers, whose names are known after their end


class Workloads:
    """Names of namespaces and containers. Not thread-safe: the store calls it under its collection lock."""

    def __init__(self, grace: float) -> None:
        """Hold a namespace's series back for at most `grace` seconds while its names are not known."""
        self._grace = grace
        self._bound: dict[str, Workload] = {}
        self._first_seen: dict[str, float] = {}
        self._owners: dict[str, str] = {}
        self._by_label: dict[str, str] = {}
        self._aliases: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._containers: dict[str, Workload] = {}
        self._now = 0.0

    def learn(
        self, netns: Mapping[Key, float], containers: Mapping[Key, float], aliases: Iterable[Key], now: float
    ) -> None:
        """Take the info families in; what they no longer list is forgotten. `now` is monotonic seconds.

        `aliases` are pairs of an identity as the kernel programs know it (inode:cookie) and the label under which who
        may not look into the namespace lists it (proc-inode).
        """
        self._now = now
        self._by_label = {_label(key[0]): key[0] for key in netns}
        self._aliases = {key[0]: key[1] for key in aliases}
        self._owners = {key[0]: key[1] for key in netns}
        self._labels = {key[1]: key[2] for key in netns if key[1]}
        self._containers = {key[0]: (key[1], key[2], key[3]) for key in containers}
        for gone in self._bound.keys() - self._owners.keys():
            del self._bound[gone]
        for gone in self._first_seen.keys() - self._owners.keys():
            del self._first_seen[gone]

    def listed(self, netns_id: str) -> str:
        """Give the identity under which a namespace is listed; empty where it is not there.

        The kernel programs' identity holds a cookie. The link monitor may know no cookie (a kernel before 6.18), or
        not even the inode (no privileges): then inode, or the alias, must do, and a cookie that differs never does.
        """
        if netns_id in self._owners:
            return netns_id
        for label in (_label(netns_id), self._aliases.get(netns_id, "")):
            known = self._by_label.get(label, "")
            if known.startswith(f"{label}:g"):
                return known
        return ""

    @property
    def container_ids(self) -> AbstractSet[str]:
        """Ids of the containers that are there."""
        return self._containers.keys()

    def of_netns(self, netns_id: str) -> tuple[Workload | None, bool]:
        """Give the workload of a namespace, and whether that is final; None while its series are held back."""
        if not netns_id:
            return UNKNOWN, True  # a packet that was in no namespace
        bound = self._bound.get(netns_id)
        if bound is not None:
            return bound, True
        listed = self.listed(netns_id)
        if listed != netns_id:
            return self.of_netns(listed) if listed else (None, False)
        owner = self._owners[netns_id]
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


class Names:
    """Names for single events: as the info families say at once, without grace, and for a while after the end.

    An event's namespace is `inode:cookie`. Where the links monitor cannot read cookies, it has a generation of its own
    in the cookie's place (`inode:gN`, `proc-inode:gN`): then inode or alias decide. Not thread-safe.
    """

    def __init__(self) -> None:
        """Know nothing."""
        self._netns: dict[str, Workload] = {}
        self._containers: dict[str, Workload] = {}
        self._aliases: dict[str, str] = {}
        self._gone: dict[str, Workload] = {}

    def learn(self, netns: Iterable[Key], containers: Iterable[Key], aliases: Iterable[Key]) -> None:
        """Take in what `Workloads.learn` takes."""
        self._aliases = {key[0]: key[1] for key in aliases}
        before = self._netns | self._containers
        self._containers = {key[0]: (key[1], key[2], key[3]) for key in containers}
        self._netns = {}
        for netns_id, owner, *_ in netns:
            label, _, second = netns_id.partition(":")
            self._netns[label if second.startswith("g") else netns_id] = self._owner(owner)
        known = self._netns.keys() | self._containers.keys()
        self._gone |= {gone: names for gone, names in before.items() if gone not in known}
        for oldest in list(self._gone)[: len(self._gone) - 2 * _REMEMBERED]:
            del self._gone[oldest]

    def of(self, netns_id: str, container_id: str) -> Workload:
        """Give the names of a container, else of a namespace's workload; empty ones where nobody knows them."""
        if container_id:
            names = self._containers.get(container_id) or self._gone.get(container_id)
            return names or self._of_netns(netns_id) or ("", "", container_id[:_SHORT_ID])
        return self._of_netns(netns_id) or UNKNOWN

    def _of_netns(self, netns_id: str) -> Workload | None:
        for known in (netns_id, _label(netns_id), self._aliases.get(netns_id, "")):
            if known in self._netns:
                return self._netns[known]
        return self._gone.get(netns_id)

    def _owner(self, owner: str) -> Workload:
        if not owner or owner == HOST:
            return ("", "", owner)
        namespace, pod, container = self._containers.get(owner, ("", "", owner[:_SHORT_ID]))
        return (namespace, pod, "" if pod else container)


def _label(netns_id: str) -> str:
    """Give the part of an identity that is exported: the inode, or what stands for it."""
    return netns_id.partition(":")[0]
