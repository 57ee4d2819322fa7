"""Reads tcp.c: connections opened and failed, the time to connect, retransmits and resets.

Flows in: its counters, the map `tcp_connect`, records of three classes. Flows out: the `cni_tcp_*` families.
"""

import struct
from typing import TYPE_CHECKING

from exporter.catalog import CONNECT_DURATION
from exporter.monitors.kernel.counts import TCP
from exporter.monitors.kernel.events import FLOW, NETNS, Details, Event, flow, netns_key
from exporter.monitors.kernel.reader import Histograms, Reader, Snapshot

if TYPE_CHECKING:
    from exporter.contract import Key

_REST = struct.Struct("=QQQII")  # struct tcp_event behind the flow
_OPENED, _FAILED = "cni_tcp_connections_opened_total", "cni_tcp_connection_failures_total"
_FAULTS = "cni_tcp_faults_total"
_WHAT = (  # enum tcp_count
    (_OPENED, "outgoing"),
    (_OPENED, "incoming"),
    (_FAILED, "outgoing"),
    (_FAILED, "incoming"),
    (_FAULTS, "retransmit"),
    (_FAULTS, "reset_sent"),
)
_KINDS = ("", "opened", "failed", "retransmit", "reset_sent", "closed")  # enum tcp_kind
_DIRECTIONS = ("incoming", "outgoing")


class Tcp(Reader):
    """Exact counts by namespace."""

    program = "tcp"
    classes = ("tcp_fault", "connection", "connection_close")
    by_netns = ("tcp_connect",)

    def snapshot(self) -> Snapshot:
        """Read the counters."""
        counts: dict[str, dict[Key, float]] = {_OPENED: {}, _FAILED: {}, _FAULTS: {}}
        for (cookie, inum, what), count in self.tables.counted(TCP).items():
            family, label = _WHAT[what]
            counts[family][netns_key(cookie, inum), label] = float(count)
        return dict(counts)

    def histograms(self) -> Histograms:
        """Read the times to connect; the kernel's sum is in nanoseconds."""
        times: dict[Key, tuple[float, ...]] = {}
        for raw, (*counts, total) in self.tables.maps["tcp_connect"].sums():
            cookie, inum = NETNS.unpack(raw)
            times[(netns_key(cookie, inum),)] = (*map(float, counts), total / 1e9)
        return {CONNECT_DURATION: dict(times)}

    def details(self, event: Event) -> Details:
        """Give what happened, direction, addresses and ports, durations in seconds."""
        duration, sent, received, direction, _ = _REST.unpack_from(event.body, FLOW.size)
        shown: dict[str, str | int | float] = {
            "what": _KINDS[event.kind] if event.kind < len(_KINDS) else str(event.kind),
            "direction": _DIRECTIONS[direction & 1],
        }
        found = flow(event.body)
        if found:
            shown |= {"local": found.source, "local_port": found.source_port}
            shown |= {"remote": found.destination, "remote_port": found.destination_port}
        if duration:
            shown["duration"] = duration / 1e9
        if event.class_ == "connection_close":
            shown |= {"sent_bytes": sent, "received_bytes": received}
        return shown
