"""The inventory of network namespaces: an identity for each that is never used again, its owner, its lifetime.

Flows in: process groups, bind mounts, host devices with namespace ids. Flows out: `Namespace` records. The identity is
inode and cookie where the kernel gives both; else a serial number of ours that moves on as soon as nothing proves that
the namespace is still the one of the last pass (a process in it, a host device into it, the bind mount that held it).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from exporter.catalog import HOST
from exporter.host import procfs
from exporter.host.netlink import Route
from exporter.host.netlink_messages import Link
from exporter.host.procfs import Mount
from exporter.monitors.links.processes import Process

GRACE_SECONDS = 5.0
"""So long may a namespace be without any process when it is new: a CNI plugin wires it up before the process starts."""
NO_ID = -1
_TRIES = 8
"""Processes of a group that are asked before it counts as vanished."""
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO of include/uapi/linux/nsfs.h: here every process of the machine is visible."""


@dataclass(slots=True, eq=False)
class Namespace:
    """One network namespace, from the pass that first saw it to the one that did not."""

    netns_id: str
    first_seen: float
    born: bool
    """It appeared while we watched, so its lifetime can be told."""
    weak: bool = False
    """Known by its id only; it gets its real name when a process or a mount of it shows up."""
    host: bool = False
    network: int = 0
    inode: int = 0
    cookie: int = 0
    nsid: int = NO_ID
    processes: Sequence[Process] = ()
    devices: dict[int, int] = field(default_factory=dict)
    """Host devices into it: interface index on the host, index of the peer inside."""
    pinned: bool = False
    owner: str = ""
    members: int = 0
    had_process: bool = False

    @property
    def label(self) -> str:
        """The exported label `netns`."""
        return self.netns_id.partition(":")[0]


class _Seen(NamedTuple):
    """What one pass knows of a namespace; 0 and NO_ID where it does not know."""

    network: int = 0
    inode: int = 0
    cookie: int = 0
    nsid: int = NO_ID
    processes: Sequence[Process] = ()
    pinned: bool = False


class Change(NamedTuple):
    """The difference between two passes."""

    created: int
    destroyed: int
    lifetimes: list[float]
    """Seconds, of the destroyed ones whose creation was seen."""


def device_nsid(link: Link) -> int | None:
    """Key of the namespace behind a host device; None: this one. Without an id each device has a key < 0 of its own."""
    return link.nsid if link.nsid is None or link.nsid >= 0 else -1 - link.ifindex


class Inventory:
    """All network namespaces that processes, bind mounts or host devices give away."""

    def __init__(self, root: str, route: Route | None, serials: Iterator[int], clock: Callable[[], float]) -> None:
        """Take the path of procfs, a netlink socket (None: no namespace ids), serial numbers and a clock."""
        self._root = root
        self._route = route
        self._serials = serials
        self._clock = clock
        self._own_pids = _own_pids(root)
        self._sees_all = _sees_all(root)
        self._first = True
        self._now = 0.0
        self._old: dict[tuple[str, int, int], Namespace] = {}
        self._new: set[Namespace] = set()
        self.all: list[Namespace] = []
        self.by_nsid: dict[int, Namespace] = {}
        self.host: Namespace | None = None

    @property
    def sees_all(self) -> bool:
        """False where processes of other namespaces are hidden from us, so that nothing can be called orphaned."""
        return self._sees_all

    def forget(self, nsid: int) -> None:
        """The kernel freed this id: whoever bears it next is another namespace."""
        for namespace in self.all:
            if namespace.nsid == nsid:
                namespace.nsid, namespace.devices = NO_ID, {}
                namespace.pinned = False
                namespace.processes = ()

    def update(
        self, host: int, groups: Mapping[int, Sequence[Process]], mounts: Iterable[Mount], veths: list[Link]
    ) -> Change:
        """Bring the inventory up to date; `host` is the number of our own namespace."""
        self._now = self._clock()
        before, self.all, self.by_nsid, self._new = self.all, [], {}, set()
        self._old = {key: namespace for namespace in before for key in _keys(namespace)}
        devices: dict[int, dict[int, int]] = {}
        for link in veths:
            nsid = device_nsid(link)
            if nsid is not None:
                devices.setdefault(nsid, {})[link.ifindex] = link.peer
        pins = {mount.inode: mount for mount in mounts}
        for network, processes in groups.items():
            seen = self._look(network, processes, host=network == host)
            if seen is not None:
                self._settle(seen._replace(pinned=seen.inode in pins), devices).host = network == host
        self._add_mounts(pins, devices)
        for nsid in devices:
            if nsid not in self.by_nsid:
                self._settle(_Seen(nsid=nsid), devices)
        self.host = next((namespace for namespace in self.all if namespace.host), None)
        self._own()
        return self._difference(before)

    def orphaned(self, namespace: Namespace) -> bool:
        """True where no process lives in it, and it is not one that is still being set up or that hides from us."""
        if namespace.processes or not self._sees_all or namespace.nsid < NO_ID:
            return False
        return namespace.had_process or self._now - namespace.first_seen >= GRACE_SECONDS

    def _look(self, network: int, processes: Sequence[Process], *, host: bool) -> _Seen | None:
        """Identity of a group by the oldest process that is still there; None where all are gone or moved away."""
        pids = ["self"] if host else [process.pid for process in processes[:_TRIES]]
        for pid in pids:
            with suppress(OSError):
                inode, cookie, nsid = self._identify(pid)
                if procfs.network(self._root, pid) != network:
                    continue
                if host or self._route is None:  # without ids of the kernel's the number is as good an id
                    nsid = NO_ID if host else network
                return _Seen(network, inode, cookie, nsid, processes)
        return _Seen(network, processes=processes) if host else None

    def _identify(self, pid: int | str) -> tuple[int, int, int]:
        """(inode, cookie, nsid) of a process's namespace. Raises OSError where the process is gone."""
        route = self._route
        try:
            descriptor = os.open(f"{self._root}/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            nsid = route.nsid_of_pid(int(pid)) if route and self._own_pids else NO_ID
            return 0, 0, nsid
        try:
            nsid = route.nsid_of_fd(descriptor) if route else NO_ID
            return *procfs.namespace_identity(descriptor), nsid
        finally:
            os.close(descriptor)

    def _add_mounts(self, pins: Mapping[int, Mount], devices: Mapping[int, dict[int, int]]) -> None:
        """Tell which namespaces are pinned, and add those that nothing else holds."""
        known = {namespace.inode for namespace in self.all}
        for inode, mount in pins.items():
            if inode in known:
                continue
            seen = self._open_mount(mount)
            holder = self.by_nsid.get(seen.nsid) if seen.nsid >= 0 else None
            if holder is not None:
                self._recognise(holder, seen)
            elif seen.nsid >= 0 or 0 not in known:  # else it may be one that we know by its processes only
                self._settle(seen, devices)

    def _open_mount(self, mount: Mount) -> _Seen:
        """Identity of a bind-mounted namespace. The inode is compared first: the path may lead elsewhere from here."""
        for path in (mount.path, os.fsencode(f"{self._root}/1/root") + mount.path):
            with suppress(OSError):
                if os.stat(path).st_ino != mount.inode:  # noqa: PTH116 - the path is bytes
                    continue
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
                try:
                    inode, cookie = procfs.namespace_identity(descriptor)
                    nsid = self._route.nsid_of_fd(descriptor) if self._route else NO_ID
                finally:
                    os.close(descriptor)
                if inode == mount.inode:
                    return _Seen(0, inode, cookie, nsid, pinned=True)
        return _Seen(inode=mount.inode, pinned=True)

    def _recognise(self, namespace: Namespace, seen: _Seen) -> None:
        """Without the right to read its inode, a group's namespace is recognised by the mount that has the same id."""
        if namespace in self._new:
            namespace.netns_id = self._name(seen)
        namespace.pinned, namespace.inode, namespace.cookie = True, seen.inode, seen.cookie

    def _settle(self, seen: _Seen, devices: Mapping[int, dict[int, int]]) -> Namespace:
        """Take the record of the last pass that is provably the same namespace, else make a new one."""
        into = devices.get(seen.nsid, {})
        namespace = self._match(seen, into)
        if namespace is None:
            namespace = Namespace(self._name(seen), self._now, not self._first, weak=not (seen.inode or seen.network))
            self._new.add(namespace)
        elif namespace.weak and (seen.inode or seen.network):
            namespace.netns_id, namespace.weak = self._name(seen), False
        for key in _keys(namespace):
            if self._old.get(key) is namespace:
                del self._old[key]
        namespace.network = seen.network
        namespace.inode = seen.inode or namespace.inode
        namespace.cookie = seen.cookie or namespace.cookie
        namespace.nsid = seen.nsid if seen.nsid != NO_ID else namespace.nsid
        namespace.processes, namespace.devices, namespace.pinned = seen.processes, into, seen.pinned
        namespace.had_process = namespace.had_process or bool(seen.processes)
        self.all.append(namespace)
        if namespace.nsid != NO_ID:
            self.by_nsid[namespace.nsid] = namespace
        return namespace

    def _match(self, seen: _Seen, into: Mapping[int, int]) -> Namespace | None:
        """Find the same namespace in the last pass."""
        for key in _keys(seen):
            last = self._old.get(key)
            if last is None or (last.cookie and seen.cookie and last.cookie != seen.cookie):
                continue
            if (
                (last.cookie and last.cookie == seen.cookie)
                or (last.network == seen.network and not set(last.processes).isdisjoint(seen.processes))
                or (last.nsid == seen.nsid and not last.devices.keys().isdisjoint(into))
                or (last.pinned and seen.pinned and last.inode == seen.inode)
            ):
                return last
        return None

    def _name(self, seen: _Seen) -> str:
        if seen.inode and seen.cookie:
            return f"{seen.inode}:{seen.cookie}"
        serial = next(self._serials)
        if seen.inode:
            return f"{seen.inode}:g{serial}"
        if seen.network:
            return f"proc-{seen.network}:g{serial}"
        return f"nsid-{seen.nsid}:g{serial}" if seen.nsid >= 0 else f"unknown-{serial}:g{serial}"

    def _own(self) -> None:
        """Set owner and members: the owner is the container of the oldest process that is in one.

        A namespace that outlives its container keeps the owner, so that its series keep their labels, unless the
        container lives in another namespace now.
        """
        vacant = []
        owners = set()
        for namespace in self.all:
            containers = {process.container for process in namespace.processes} - {""}
            namespace.members = len(containers)
            if namespace.host:
                namespace.owner = HOST
            elif containers:
                namespace.owner = next(process.container for process in namespace.processes if process.container)
                owners.add(namespace.owner)
            else:
                vacant.append(namespace)
            if not self._sees_all and namespace.devices and namespace.processes:
                self._sees_all = True  # a container's process is visible, so others would be as well
        for namespace in vacant:
            if namespace.owner in owners:
                namespace.owner = ""

    def _difference(self, before: list[Namespace]) -> Change:
        created = 0 if self._first else len(self._new)
        self._first = False
        gone = set(before).difference(self.all)
        return Change(created, len(gone), [self._now - namespace.first_seen for namespace in gone if namespace.born])


def _keys(known: Namespace | _Seen) -> Iterator[tuple[str, int, int]]:
    """Under what a namespace may be found again, best first."""
    if known.cookie:
        yield "cookie", known.inode, known.cookie
    if known.network:
        yield "network", known.network, 0
    if known.nsid != NO_ID:
        yield "nsid", known.nsid, 0
    if known.inode:
        yield "inode", known.inode, 0


def _own_pids(root: str) -> bool:
    """True where the pids in this procfs are those that we may give to the kernel."""
    try:
        return str(Path(root, "self").readlink()) == str(os.getpid())
    except OSError:
        return False


def _sees_all(root: str) -> bool:
    """True where procfs shows every process of the machine: the initial PID namespace, and init is not hidden."""
    try:
        procfs.network(root, 1)
        return str(Path(root, "self/ns/pid").readlink()) == _INITIAL_PID_NAMESPACE
    except OSError:
        return False
