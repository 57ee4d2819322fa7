"""Reads lifecycle.c: network namespaces and the host's veth and netkit devices, how they come and go.

Flows in: the maps `lifecycles`, `netns_lifetime` and `netns_alive`, records of classes netns and veth. Flows out:
LIFECYCLE_FAMILIES. Where no kernel function tells of a namespace's end, programs look at all that live in each update.
"""

import struct
import sys
from typing import TYPE_CHECKING

from exporter.catalog import NETNS_LIFETIME
from exporter.host import bpf
from exporter.monitors.kernel.events import NETNS, Details, Event, netns_key, text
from exporter.monitors.kernel.reader import Histograms, Reader, Snapshot, Tables

if TYPE_CHECKING:
    from exporter.contract import Key

_COUNTS = {  # enum lifecycle_count, by probe
    "netns": {0: "cni_netns_created_total", 1: "cni_netns_destroyed_total"},
    "veth": {2: "cni_veth_created_total", 3: "cni_veth_deleted_total", 4: "cni_veth_moved_total"},
}
_KINDS = ("", "created", "destroyed", "deleted", "moved", "arrived")  # enum lifecycle_kind
_DESTROYED = 2
_SWEPT = "tp_btf"
"""The rung of `netns` on which ends are looked for; its last two programs are netns_sweep and netns_walk."""
_NETNS_BODY = struct.Struct("=Q")  # struct netns_event behind its head: lifetime
_VETH_BODY = struct.Struct("=16s16sQIxxxxQ")  # struct veth_event behind its head: name, kind, other's id, ifindex


class Lifecycle(Reader):
    """Exact counts for the whole machine (namespaces) and for the host's own namespace (devices)."""

    program = "lifecycle"
    classes = ("netns", "veth")

    def __init__(self, tables: Tables) -> None:
        """Note which namespaces are there already, where their end must be looked for. Raises OSError."""
        super().__init__(tables)
        self._probes = [probe for probe in _COUNTS if tables.attached(probe)]
        self._sweep = self._walk = 0
        standing = next((s for s in tables.manifest.standings if s.program == "netns" and s.attached), None)
        if standing and standing.rung == _SWEPT:
            *_, self._sweep, self._walk = tables.manifest.programs["netns"]
            self._look()

    def snapshot(self) -> Snapshot:
        """Read the counters, after a look at who lives."""
        if self._sweep:
            self._look()
        counts = {int.from_bytes(raw, sys.byteorder): total for raw, (total,) in self.tables.maps["lifecycles"].sums()}
        found: Snapshot = {}
        for probe in self._probes:
            for number, family in _COUNTS[probe].items():
                key: Key = ()
                found[family] = {key: float(counts.get(number, 0))}
        return found

    def _look(self) -> None:
        """Have the programs count which namespaces are gone, and which are there that nobody met. Raises OSError."""
        alive = self.tables.maps["netns_alive"]
        for raw, _ in list(alive.items()):
            bpf.run(self._sweep, *NETNS.unpack(raw))
        for _ in range(alive.capacity):
            if not bpf.run(self._walk):
                break

    def histograms(self) -> Histograms:
        """Read the lifetimes; the kernel's sum is in nanoseconds."""
        if "netns" not in self._probes:
            return {}
        ((_, (*counts, total)),) = self.tables.maps["netns_lifetime"].sums()
        return {NETNS_LIFETIME: {(): (*map(float, counts), total / 1e9)}}

    def handle(self, event: Event) -> None:
        """Have the entries of a namespace that is gone taken out of all maps."""
        if event.class_ == "netns" and event.kind == _DESTROYED and event.netns:
            inum, cookie = event.netns.split(":")
            self.tables.forget(int(inum), int(cookie))

    def details(self, event: Event) -> Details:
        """Give what happened; the lifetime in seconds, where it is known; name, kind and way of a device."""
        shown: dict[str, str | int | float] = {
            "what": _KINDS[event.kind] if event.kind < len(_KINDS) else str(event.kind)
        }
        if event.class_ == "netns":
            (lifetime,) = _NETNS_BODY.unpack_from(event.body)
            return shown | ({"lifetime": lifetime / 1e9} if lifetime else {})
        name, kind, cookie, inum, ifindex = _VETH_BODY.unpack_from(event.body)
        shown |= {"device": text(name), "kind": text(kind), "ifindex": ifindex}
        return shown | ({"into": netns_key(cookie, inum)} if inum else {})
