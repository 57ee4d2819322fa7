"""Traffic from the container's point of view: over host devices, and over interfaces that have no host side.

Flows in: links of a dump, /proc/PID/net/dev, the inventory. Flows out: the families `cni_veth*`, `cni_netns_info`,
`cni_netns_members`, `cni_netns_{receive,transmit}_*`. What the host's end sends is what the container receives. Of a
pair with both ends on the host each end is shown the same way, as the host's.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from exporter.catalog import NETNS_INFO
from exporter.contract import Context, Key
from exporter.host import procfs
from exporter.host.netlink_messages import Counters, Link
from exporter.monitors.links.devices import KINDS
from exporter.monitors.links.namespaces import Inventory, Namespace, device_nsid

_T = TypeVar("_T")

Snapshots = dict[str, dict[Key, float]]

VETH_INFO = "cni_veth_info"
VETHS = "cni_veths"
MEMBERS = "cni_netns_members"

_UNITS = ("packets", "bytes", "errors", "dropped")
_VETH = tuple(f"cni_veth_{way}_{unit}_total" for unit in _UNITS for way in ("transmit", "receive"))
_NETNS = tuple(f"cni_netns_{way}_{unit}_total" for unit in _UNITS for way in ("receive", "transmit"))
"""In the order of `Counters`: for each unit first what the device received, then what it sent."""

FAMILIES = (VETH_INFO, VETHS, NETNS_INFO, MEMBERS, *_VETH, *_NETNS)

_FALLBACK_TUNNELS = frozenset(
    ("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0")
)
"""Devices that a tunnel module puts into every namespace (sysctl net.core.fb_tunnels_only_for_init_net)."""
_TRIES = 8


def write_namespaces(inventory: Inventory, out: Snapshots) -> None:
    """Describe every namespace: whose it is, whether it is pinned, how many containers share it."""
    info, members = out[NETNS_INFO], out[MEMBERS]
    for namespace in inventory.all:
        label = namespace.label
        info[(namespace.netns_id, namespace.owner, label, "true" if namespace.pinned else "false")] = 1
        members[(label,)] = namespace.members


def write_devices(inventory: Inventory, links: list[Link], out: Snapshots) -> None:
    """Describe the host's veth and netkit devices with their state and counters."""
    names = {link.ifindex: link.name for link in links}
    states = dict.fromkeys(("attached", "orphaned", "host"), 0)
    info = out[VETH_INFO]
    families = [out[family] for family in _VETH]
    for link in links:
        if link.kind not in KINDS:
            continue
        nsid = device_nsid(link)
        namespace = inventory.host if nsid is None else inventory.by_nsid.get(nsid)
        if namespace is None:
            continue
        state = "host" if nsid is None else "orphaned" if inventory.orphaned(namespace) else "attached"
        states[state] += 1
        bridge = names.get(link.master, "")
        info[(link.name, str(link.ifindex), str(link.peer), namespace.label, bridge, link.kind, state)] = 1
        _write_counters(families, (namespace.netns_id, link.name), link.counters)
    out[VETHS].update({(state,): count for state, count in states.items()})


class Interfaces:
    """Interfaces that no host device is the other end of: ipvlan, macvlan, SR-IOV, WireGuard, and the host's own."""

    def __init__(self, context: Context) -> None:
        """Take the context: procfs is read, bad input is reported."""
        self._root = str(context.paths.procfs)
        self._error = context.error

    def write(self, inventory: Inventory, links: Iterable[Link], out: Snapshots) -> None:
        """Write their counters. A namespace whose processes vanish in the middle is left out."""
        families = [out[family] for family in _NETNS]
        for namespace in inventory.all:
            if namespace.host:
                found = _own(links)
            else:
                found = read_somewhere(namespace, self._without_host_side, self._error) or {}
            for name, counters in found.items():
                _write_counters(families, (namespace.netns_id, name), counters)

    def _without_host_side(self, namespace: Namespace, pid: int) -> dict[str, Counters]:
        """Raises OSError where the process is gone, ValueError for odd content.

        Counting is enough in the common case. Else the names behind the peers' indexes are looked up; as long as one
        of them stays unknown, an interface with an unknown index may be it, and is left out: nothing counts twice.
        """
        found = procfs.interfaces(procfs.read(f"{self._root}/{pid}/net/dev"))
        found.pop("lo", None)
        for name in _FALLBACK_TUNNELS & found.keys():
            if not any(found[name]):
                del found[name]
        if len(found) <= len(namespace.devices):
            return {}
        indexes = procfs.interface_indexes(self._root, pid)
        peers = set(namespace.devices.values())
        other = {name for index, name in indexes.items() if index not in peers}
        if peers <= indexes.keys():
            other = found.keys() - {indexes[peer] for peer in peers}
        return {name: counters for name, counters in found.items() if name in other}


def _own(links: Iterable[Link]) -> dict[str, Counters]:
    """The host's interfaces but for loopback, bridges and what is shown as a veth."""
    return {
        link.name: link.counters
        for link in links
        if link.counters is not None
        and not link.loopback
        and link.kind not in KINDS
        and link.kind != "bridge"
        and not (link.name in _FALLBACK_TUNNELS and not any(link.counters))
    }


def _write_counters(families: list[dict[Key, float]], key: Key, counters: Counters | None) -> None:
    if counters is not None:
        for family, value in zip(families, counters, strict=True):
            family[key] = value


def read_somewhere(
    namespace: Namespace, reader: Callable[[Namespace, int], _T], error: Callable[[str, str], None]
) -> _T | None:
    """Read by the oldest process that is still there; None where nobody is, or the content is odd (reported)."""
    for process in namespace.processes[:_TRIES]:
        try:
            return reader(namespace, process.pid)
        except OSError:
            continue
        except ValueError as odd:
            error("procfs_format", str(odd))
            return None
    return None
