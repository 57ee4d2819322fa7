"""Topology: from metric families to the tree that a person looks at: node, bridges, links, workloads.

Flows in: a reader of joined, redacted families (as scraped). Flows out: frozen data, with rates where two readings
allow it, and its renderings as terminal text and as JSON-ready dictionaries. Nothing here touches the host.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from exporter.catalog import HOST
from exporter.traffic import LinkKey, Rates, Read, Traffic, clean, names, printable, quantity, totals

__all__ = [
    "Bridge",
    "Container",
    "Link",
    "Rates",
    "Read",
    "Topology",
    "Traffic",
    "Workload",
    "as_json",
    "as_text",
    "build",
]

LINK_LIMIT = 2000
"""Links in a topology at most; the rest is counted in `Topology.omitted`."""
NO_BRIDGE, NO_HOST_SIDE, HOST_NETWORK = "no bridge", "no host side", "host network"
_NOTHING = Traffic()


@dataclass(frozen=True, slots=True)
class Container:
    """A container as its runtime names it."""

    container_id: str
    name: str
    image: str
    runtime: str


@dataclass(frozen=True, slots=True)
class Workload:
    """Who owns a network namespace: a pod, a container, the host, or nobody that is known."""

    namespace: str = ""
    pod: str = ""
    container: str = ""
    netns: str = ""
    members: int = 0
    """Containers that share the network namespace."""
    pinned: bool = False
    """A bind mount keeps the network namespace alive."""
    containers: tuple[Container, ...] = ()

    @property
    def title(self) -> str:
        """How a person calls it: `namespace/pod`, the container, the host network, or `unknown`."""
        if self.pod:
            return f"{self.namespace}/{self.pod}" if self.namespace else self.pod
        if self.container == HOST:
            return HOST_NETWORK
        return self.container or "unknown"

    @property
    def abandoned(self) -> bool:
        """Whether a bind mount alone keeps the namespace: nobody is known to be in it."""
        return self.pinned and not self.members and not (self.pod or self.container)

    @property
    def detail(self) -> str:
        """The containers behind the title: those of a pod by name, a single one by its image."""
        if len(self.containers) == 1 and not self.pod:
            return self.containers[0].image
        inside = [container.name for container in self.containers if container.name != self.title]
        if inside:
            return ", ".join(inside)
        return f"network namespace {self.netns}" if self.title == "unknown" and self.netns else ""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of a container: a veth or netkit by its host side, or one that has no host side."""

    device: str
    state: str
    """`attached`, `orphaned` (no live process behind it), `host` (both ends on the host), `direct` (no host side)."""
    bridge: str = ""
    ifindex: str = ""
    peer_ifindex: str = ""
    kind: str = ""
    netns: str = ""
    workload: Workload | None = None
    traffic: Traffic = _NOTHING
    rate: Traffic | None = None
    """Per second; None until there are two readings."""

    @property
    def title(self) -> str:
        """Whose it is, in words."""
        if self.state == "orphaned":
            return "orphaned: no live process"
        if self.state == "host":
            return "both ends on the host"
        return self.workload.title if self.workload else "unknown"

    @property
    def contained(self) -> bool:
        """Whether a container's traffic passes here: not so on the host's own interfaces and pairs."""
        return self.state != "host" and not (self.workload and self.workload.container == HOST)

    @property
    def remark(self) -> str:
        """What is wrong with it, in a few words; empty when nothing is."""
        counts = ((self.traffic.dropped, "dropped"), (self.traffic.errors, "errors"))
        return ", ".join(f"{quantity(value)} {word}" for value, word in counts if value)


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge and the links on it; the empty name stands for links on none (routed, or switched by eBPF)."""

    name: str
    links: tuple[Link, ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """The container network of a node."""

    node: str
    bridges: tuple[Bridge, ...] = ()
    direct: tuple[Link, ...] = ()
    """Interfaces without a host side: macvlan, ipvlan, SR-IOV, and the host's own."""
    unlinked: tuple[Workload, ...] = ()
    """Workloads whose network namespace has no interface that is known."""
    omitted: int = 0
    """Links that are left out because there are more than `LINK_LIMIT`."""
    seconds: float = 0.0
    """Span of time behind the rates; 0 when there are none yet."""

    @property
    def links(self) -> tuple[Link, ...]:
        """Every link, those without a host side last."""
        return (*(link for bridge in self.bridges for link in bridge.links), *self.direct)

    @property
    def groups(self) -> tuple[tuple[str, tuple[Link, ...]], ...]:
        """Every link below what a drawing puts over it: its bridge, or why it has none."""
        groups = [(bridge.name or NO_BRIDGE, bridge.links) for bridge in self.bridges]
        groups.append((NO_HOST_SIDE, tuple(link for link in self.direct if link.contained)))
        groups.append((HOST_NETWORK, tuple(link for link in self.direct if not link.contained)))
        return tuple((name, links) for name, links in groups if links)


class _Builder:
    """One reading of the families, and what follows from it."""

    def __init__(self, read: Read, rates: Rates | None) -> None:
        self._infos = [labels for labels, value in read("cni_veth_info") if value]
        self._traffic = totals(read)
        self._rates, self.seconds = rates.take(self._traffic) if rates else ({}, 0.0)
        self._workloads = _workloads(read)
        counts = {labels.get("state"): value for labels, value in read("cni_veths")}
        self._orphans = counts.get("orphaned", 1 if not counts else 0) > 0
        pairs = {(labels.get("ifindex", ""), labels.get("peer_ifindex", "")) for labels in self._infos}
        self._pairs = {pair for pair in pairs if pair[::-1] in pairs}

    def veths(self) -> list[Link]:
        """Every veth and netkit device."""
        return [self._veth(labels) for labels in self._infos]

    def _veth(self, labels: Mapping[str, str]) -> Link:
        device, netns = labels.get("device", ""), labels.get("netns", "")
        workload = self._workloads.get(netns, Workload(netns=netns)) if netns else None
        ends = labels.get("ifindex", ""), labels.get("peer_ifindex", "")
        state = labels.get("state") or self._state(workload, ends)  # the monitor knows best, where it says it
        key = ("veth", device)
        traffic, rate = self._traffic.get(key, _NOTHING), self._rates.get(key)
        return Link(
            device, state, labels.get("bridge", ""), *ends, labels.get("kind", ""), netns, workload, traffic, rate
        )

    def _state(self, workload: Workload | None, ends: tuple[str, str]) -> str:
        """Infer whether a live process is behind a veth."""
        if (workload and workload.container == HOST) or (not workload and ends in self._pairs):
            return "host"
        return "orphaned" if self._orphans and (not workload or workload.abandoned) else "attached"

    def direct(self) -> list[Link]:
        """Every interface without a host side."""
        owners = defaultdict(list)
        for workload in self._workloads.values():
            owners[workload.namespace, workload.pod, workload.container].append(workload)
        links = []
        for key, traffic in self._traffic.items():
            if key[0] != "direct":
                continue
            _, interface, namespace, pod, container = key
            known = owners[namespace, pod, container]
            # Several namespaces may answer to the same names, or to none: then it is not said which one it is.
            workload = known[0] if len(known) == 1 else Workload(namespace, pod, container)
            netns = workload.netns
            links.append(
                Link(interface, "direct", netns=netns, workload=workload, traffic=traffic, rate=self._rates.get(key))
            )
        return links

    def unlinked(self, links: Iterable[Link]) -> list[Workload]:
        """Workloads with a name that no link leads to."""
        seen = {link.netns for link in links}
        return [item for item in self._workloads.values() if item.netns not in seen and item.title != "unknown"]


def _containers(read: Read) -> dict[LinkKey, list[Container]]:
    """Gather containers by ("netns", inode) and, for those in a pod, by ("pod", namespace, pod)."""
    found: dict[LinkKey, list[Container]] = defaultdict(list)
    for labels, _ in read("cni_container_info"):
        if not labels.get("container"):  # a sandbox, which has no name of its own
            continue
        container = Container(*(labels.get(name, "") for name in ("container_id", "container", "image", "runtime")))
        # The sandbox owns the namespace of a pod, so only it carries the inode.
        pod = ("pod", labels.get("namespace", ""), labels["pod"]) if labels.get("pod") else ()
        found[pod or ("netns", labels.get("netns", ""))].append(container)
    return found


def _workloads(read: Read) -> dict[str, Workload]:
    """Find the owner of each known network namespace, by the namespace's inode."""
    containers = _containers(read)
    members = {labels.get("netns", ""): int(value) for labels, value in read("cni_netns_members")}
    workloads = {}
    for labels, value in read("cni_netns_info"):
        netns = labels.get("netns", "")
        if not netns or not value:
            continue
        owner = names(labels)
        key = ("pod", owner[0], owner[1]) if owner[1] else ("netns", netns)
        inside = tuple(sorted(containers.get(key, ()), key=lambda container: container.name))
        pinned = labels.get("pinned") == "true"
        workloads[netns] = Workload(*owner, netns, members.get(netns, len(inside)), pinned, inside)
    return workloads


def importance(link: Link) -> tuple[bool, bool, float]:
    """Rank links where not all can be shown: orphans first, then trouble, then traffic; sort in reverse."""
    return link.state == "orphaned", bool(link.remark), link.rate.bytes if link.rate else link.traffic.bytes


def build(read: Read, node: str, rates: Rates | None = None) -> Topology:
    """Build the topology from the current families; with `rates`, each link gets its traffic per second."""
    builder = _Builder(printable(read), rates)
    every = builder.veths() + builder.direct()
    kept = sorted(every, key=importance, reverse=True)[:LINK_LIMIT]
    kept.sort(key=lambda link: (_natural(link.title), link.device))
    bridges: dict[str, list[Link]] = defaultdict(list)
    for link in kept:
        if link.state != "direct":
            bridges[link.bridge].append(link)
    return Topology(
        clean(node),
        tuple(Bridge(name, tuple(bridges[name])) for name in sorted(bridges, key=lambda name: (not name, name))),
        tuple(link for link in kept if link.state == "direct"),
        tuple(sorted(builder.unlinked(every), key=lambda workload: workload.title)),
        len(every) - len(kept),
        builder.seconds,
    )


def _natural(text: str) -> list[tuple[str, int]]:
    """Order `web-2` before `web-10`."""
    return [(word, int(number or 0)) for word, number in re.findall(r"([^0-9]*)([0-9]{0,18})", text)]


def as_json(topology: Topology) -> dict[str, object]:
    """Give the topology as plain dictionaries and lists; rates are per second, null while there are none."""
    return {
        "node": topology.node,
        "rate_seconds": topology.seconds,
        "bridges": [
            {"name": bridge.name, "links": [_link_json(link) for link in bridge.links]} for bridge in topology.bridges
        ],
        "direct": [_link_json(link) for link in topology.direct],
        "unlinked": [asdict(workload) for workload in topology.unlinked],
        "omitted": topology.omitted,
    }


def _link_json(link: Link) -> dict[str, object]:
    plain = asdict(link)  # leaves named tuples as they are
    plain["traffic"] = link.traffic._asdict()
    plain["rate"] = link.rate._asdict() if link.rate else None
    return plain


def as_text(topology: Topology, width: int = 120) -> str:
    """Draw the topology as a tree for a terminal that is `width` columns wide (60 at least); no line is longer."""
    rows: list[tuple[str, ...]] = [("DEVICE", "WORKLOAD", "RECEIVED", "SENT", "REMARK")]
    branches = topology.groups
    for number, (name, links) in enumerate(branches, 1):
        last = number == len(branches)
        rows.append((f"{'└' if last else '├'}─ {name}", "", "", "", ""))
        for position, link in enumerate(links, 1):
            stem = f"{' ' if last else '│'}  {'└' if position == len(links) else '├'}─ "
            rows.append(_row(stem, link))
    lines = [summary(topology), *_columns(rows, max(width, 60))] if branches else [summary(topology)]
    if topology.omitted:
        lines.append(f"and {topology.omitted} more")
    return "\n".join(_fitted(line.rstrip(), max(width, 60)) for line in lines)


def summary(topology: Topology) -> str:
    """Say in one line what there is."""
    counts = {
        "bridge": sum(bool(bridge.name) for bridge in topology.bridges),
        "veth": sum(len(bridge.links) for bridge in topology.bridges),
        "interface": len(topology.direct),
        "orphan": sum(link.state == "orphaned" for link in topology.links),
    }
    said = ", ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items() if count)
    span = f"; per second over the last {topology.seconds:.0f} s" if topology.seconds else ""
    return f"{topology.node}: {said or 'no container interfaces'}{span}"


def _row(stem: str, link: Link) -> tuple[str, ...]:
    detail = link.workload.detail if link.workload and link.state in ("attached", "direct") else ""
    workload = f"{link.title} ({detail})" if detail else link.title
    traffic, unit = (link.rate, "B/s") if link.rate else (link.traffic, "B")
    received, sent = quantity(traffic.receive_bytes, unit), quantity(traffic.transmit_bytes, unit)
    return stem + link.device, workload, received, sent, link.remark


def _columns(rows: list[tuple[str, ...]], width: int) -> list[str]:
    """Set rows in columns; the workload's gives way where the terminal is narrow."""
    sizes = [max(len(row[column]) for row in rows) for column in range(5)]
    spare = width - sizes[2] - sizes[3] - 8
    sizes[0] = min(sizes[0], spare * 2 // 5)
    sizes[4] = min(sizes[4], spare // 4)
    sizes[1] = max(8, min(sizes[1], spare - sizes[0] - sizes[4]))
    return [
        "  ".join(
            _fitted(cell, size).rjust(size) if column in (2, 3) else _fitted(cell, size).ljust(size)
            for column, (cell, size) in enumerate(zip(row, sizes, strict=True))
        )
        for row in rows
    ]


def _fitted(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}…"
