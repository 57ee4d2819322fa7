"""Links without rtnetlink: /sys/class/net, for machines whose seccomp profile refuses netlink sockets.

Flows in: sysfs (Documentation/ABI/testing/sysfs-class-net) and the interface indexes that procfs shows. Flows out: the
same `Link` records. The namespace behind a veth is found where only one namespace has an interface of its peer's index.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from exporter.contract import Unsupported
from exporter.host import procfs
from exporter.host.netlink_messages import Counters, Link
from exporter.monitors.links.processes import Process

_ETHERNET = 1
_LOOPBACK = 772
"""Device types of include/uapi/linux/if_arp.h."""
_UNKNOWN = -1
_TRIES = 8


def probe(root: str) -> None:
    """Raise Unsupported where there is no /sys/class/net."""
    if not Path(root, "class/net").is_dir():
        raise Unsupported(f"{root}/class/net is missing", "mount sysfs there, or allow netlink sockets")


def links(root: str, procfs_root: str, groups: Mapping[int, Sequence[Process]]) -> list[Link]:
    """Every device of this namespace. One that vanishes while it is read is left out.

    `groups` are processes by namespace number; that number takes the place of the kernel's namespace id.
    """
    found = []
    for device in Path(root, "class/net").iterdir():
        with suppress(OSError, ValueError):
            found.append(_link(device))
    here = {link.ifindex: link for link in found}
    inside = _indexes(procfs_root, groups)
    return [link._replace(nsid=_namespace(link, here, inside)) if link.kind == "veth" else link for link in found]


def _namespace(link: Link, here: Mapping[int, Link], inside: Mapping[int, Sequence[int]]) -> int | None:
    """Number of the namespace that the peer is in; None: this one; -1: cannot be told."""
    twin = here.get(link.peer)
    if twin is not None and twin.kind == "veth" and twin.peer == link.ifindex:
        return None
    homes = inside.get(link.peer, ())
    return homes[0] if len(homes) == 1 else _UNKNOWN


def _indexes(root: str, groups: Mapping[int, Sequence[Process]]) -> dict[int, list[int]]:
    """Numbers of the namespaces that have an interface with a given index."""
    found: dict[int, list[int]] = {}
    own = 0
    with suppress(OSError):
        own = procfs.network(root, "self")
    for network, members in groups.items():
        if network != own:
            tried = (procfs.interface_indexes(root, process.pid) for process in members[:_TRIES])
            for index in next(filter(None, tried), ()):  # a process that is gone shows none
                found.setdefault(index, []).append(network)
    return found


def _link(device: Path) -> Link:
    """Read one device. Raises OSError where it is gone, ValueError for odd content."""
    ifindex, iflink, type_ = (int((device / name).read_bytes()) for name in ("ifindex", "iflink", "type"))
    statistics = device / "statistics"
    counters = Counters._make(int((statistics / field).read_bytes()) for field in Counters._fields)
    master = device / "master"
    master_index = int((master / "ifindex").read_bytes()) if master.exists() else 0
    kind = _kind(device, ifindex, iflink, type_)
    return Link(
        ifindex, device.name, kind, iflink if iflink != ifindex else 0, None, master_index, type_ == _LOOPBACK, counters
    )


def _kind(device: Path, ifindex: int, iflink: int, type_: int) -> str:
    """`DEVTYPE` of the device; a veth has none, and unlike a VLAN or macvlan no lower device beside its `iflink`."""
    for line in (device / "uevent").read_text(errors="replace").splitlines():
        if line.startswith("DEVTYPE="):
            return line.removeprefix("DEVTYPE=")
    virtual = "virtual" in device.resolve().parts
    stacked = any(entry.name.startswith("lower_") for entry in device.iterdir())
    return "veth" if virtual and type_ == _ETHERNET and iflink not in (0, ifindex) and not stacked else ""
