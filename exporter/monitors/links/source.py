"""The rungs of the links monitor: netlink with news, netlink by polling, sysfs.

Flows in: `host.netlink` or /sys/class/net, and procfs. Flows out: one pass over devices, namespaces, interfaces and
protocol health, written as whole families; counters of what appeared and went away.
"""

import errno
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, TypeVar

from exporter.contract import Context, Source, Unsupported
from exporter.host import procfs
from exporter.host.netlink import Route, Subscription
from exporter.host.netlink_messages import Link
from exporter.monitors.links import health, sysfs, traffic
from exporter.monitors.links.devices import KINDS, Devices
from exporter.monitors.links.namespaces import Change, Inventory
from exporter.monitors.links.processes import Process, ProcessTable

CREATED = "cni_netns_created_total"
DESTROYED = "cni_netns_destroyed_total"
LIFETIME = "cni_netns_lifetime_seconds"

_T = TypeVar("_T")

_REFUSED = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ENOSYS)
_DATAGRAMS = 10_000
"""Handled at most in one go; what is left is readable again at once."""


class LinksSource(Source):
    """What the rungs share: the pass. A rung says where links come from."""

    def __init__(
        self,
        serials: Iterator[int],
        clock: Callable[[], float] = time.monotonic,
        *,
        counts_netns: bool = True,
        counts_veths: bool = True,
    ) -> None:
        """Take serial numbers for identities of our own, a monotonic clock, and what is to be counted."""
        self._serials = serials
        self._counts_netns = counts_netns
        self._counts_veths = counts_veths
        self._clock = clock
        self._route: Route | None = None
        self._lost_news = False

    def open(self, context: Context) -> None:
        """Open the rung. Raises Unsupported where links or processes cannot be read here, OSError for a failure."""
        super().open(context)
        self._connect()
        root = str(context.paths.procfs)
        self._processes = ProcessTable(root, self._clock)
        self._find_host(root)
        self._inventory = Inventory(root, self._route, self._serials, self._clock)
        self._interfaces = traffic.Interfaces(context)
        self._health = health.Health(context, self._clock)
        families = context.families if self._counts_veths else None
        self._devices = Devices(families, self._links({}), context.events)
        if self._counts_netns:
            for family in (CREATED, DESTROYED):
                context.families.add(family, (), 0)
        self._told_hidden = False

    def _find_host(self, root: str) -> None:
        """Make sure that there are processes, and that the network we see is the host's. Raises Unsupported."""
        try:
            own = self._processes.own_network()
        except OSError as error:
            reason = f"{root} shows no process of this host: {error.strerror}"
            raise Unsupported(reason, "mount the host's procfs there") from error
        with suppress(OSError):  # init is hidden: nothing to compare with
            if own != procfs.network(root, 1):
                self.context.error("not_host_network", "init is in another network namespace: run in the host's")

    @abstractmethod
    def _connect(self) -> None:
        """Acquire what the rung reads from. Raises Unsupported, OSError."""

    @abstractmethod
    def _links(self, groups: Mapping[int, Sequence[Process]]) -> list[Link]:
        """Every device of the host. `groups` serves the rung that must find out itself who is behind a device."""

    @abstractmethod
    def _account(self, links: list[Link]) -> None:
        """Count devices that appeared and went away."""

    def update(self) -> None:
        """Make one pass. Raises OSError where links cannot be read any more."""
        host = self._processes.own_network()
        groups = self._processes.groups(host)
        links = self._links(groups)
        self._account(links)
        change = self._inventory.update(host, groups, self._mounts(), [link for link in links if link.kind in KINDS])
        out: traffic.Snapshots = {family: {} for family in (*traffic.FAMILIES, *health.FAMILIES)}
        traffic.write_namespaces(self._inventory, out)
        traffic.write_devices(self._inventory, links, out)
        self._interfaces.write(self._inventory, links, out)
        self._health.write(self._inventory, out)
        self.context.families.replace(out)
        if self._counts_netns:
            self._count(change)
        if not self._inventory.sees_all and not self._told_hidden:
            self._told_hidden = True
            self.context.error(
                "processes_hidden", "other processes are hidden from us: run in the host's PID namespace"
            )

    def _count(self, change: Change) -> None:
        families = self.context.families
        families.add(CREATED, (), change.created)
        families.add(DESTROYED, (), change.destroyed)
        for seconds in change.lifetimes:
            families.observe(LIFETIME, seconds)

    def _mounts(self) -> list[procfs.Mount]:
        """Bind-mounted namespaces of the host's mount namespace, of ours where that is hidden."""
        for pid in ("1", "self"):
            try:
                return procfs.namespace_mounts(procfs.read(f"{self.context.paths.procfs}/{pid}/mountinfo"))
            except OSError:
                continue
        return []


class PollingSource(LinksSource):
    """Second rung: dumps alone. What comes and goes between two passes is not seen."""

    mode: ClassVar[str] = "polling"

    def _connect(self) -> None:
        self._route = _or_unsupported(Route)

    def close(self) -> None:
        """Close the socket."""
        if self._route is not None:
            self._route.close()

    def _links(self, groups: Mapping[int, Sequence[Process]]) -> list[Link]:  # noqa: ARG002 - the kernel tells itself
        assert self._route is not None  # noqa: S101 - opened
        dump = self._route.links()
        for message in dump.malformed:
            self.context.error("netlink_message", message)
        if dump.interrupted:
            self.context.error("netlink_interrupted", "the list of links changed during each of several dumps")
        return dump.links

    def _account(self, links: list[Link]) -> None:
        self._devices.compare(links)


class NetlinkSource(PollingSource):
    """Best rung: dumps, and the kernel's news in between."""

    mode: ClassVar[str] = "netlink"
    _subscription: Subscription | None = None

    def _connect(self) -> None:
        self._subscription = _or_unsupported(Subscription)  # before the first dump: nothing falls between
        super()._connect()

    def close(self) -> None:
        """Close both sockets."""
        if self._subscription is not None:
            self._subscription.close()
        super().close()

    def readers(self) -> Mapping[int, Callable[[], None]]:
        """The news socket."""
        return {self._subscription.fileno(): self._on_news} if self._subscription else {}

    def update(self) -> None:
        """Hear the news, then make a pass."""
        self._hear()
        super().update()

    def _on_news(self) -> None:
        if self._hear():
            self.context.wake()

    def _hear(self) -> bool:
        """Handle what waits. True where an update should follow."""
        relevant = False
        for _ in range(_DATAGRAMS):
            try:
                heard = self._subscription.receive() if self._subscription else None
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost_news = relevant = True
                self.context.error("netlink_overrun", "the kernel dropped news about links: comparing with a dump")
                continue
            if heard is None:
                break
            for item in heard:
                if isinstance(item, ValueError):
                    self._lost_news = relevant = True
                    self.context.error("netlink_message", str(item))
                    continue
                if item.gone and item.nsid is not None:
                    self._inventory.forget(item.nsid)
                relevant = self._devices.hear(item) or relevant
        return relevant

    def _account(self, links: list[Link]) -> None:
        if self._lost_news:
            self._lost_news = False
            self._devices.compare(links)


class ProcfsSource(LinksSource):
    """Last rung, where rtnetlink is refused (seccomp): /sys/class/net and procfs. Orphans cannot be told here."""

    mode: ClassVar[str] = "procfs"

    def _connect(self) -> None:
        sysfs.probe(str(self.context.paths.sysfs))

    def _links(self, groups: Mapping[int, Sequence[Process]]) -> list[Link]:
        return sysfs.links(str(self.context.paths.sysfs), str(self.context.paths.procfs), groups)

    def _account(self, links: list[Link]) -> None:
        self._devices.compare(links)


def _or_unsupported(make: Callable[[], _T]) -> _T:
    """Make a socket. Raises Unsupported where the machine refuses it, OSError where it failed."""
    try:
        return make()
    except OSError as error:
        if error.errno in _REFUSED:
            reason = f"rtnetlink is refused here: {error.strerror}"
            raise Unsupported(reason, "allow socket(AF_NETLINK) in the seccomp profile") from error
        raise
