"""Reads drops.c: packets dropped, by reason.

Flows in: its counters, records of class packet_drop. Flows out: cni_packet_drops_total.
"""

import struct
from typing import TYPE_CHECKING

from exporter.monitors.kernel.counts import DROPS
from exporter.monitors.kernel.events import Details, Event, flow, netns_key, text
from exporter.monitors.kernel.reader import Reader, Snapshot

if TYPE_CHECKING:
    from exporter.contract import Key

_BODY = struct.Struct("=QII16sHxxxxxx")  # struct drop_event behind its head, up to the flow


class Drops(Reader):
    """Exact counts by namespace and reason."""

    program = "drops"
    classes = ("packet_drop",)

    def snapshot(self) -> Snapshot:
        """Read the counters."""
        counts: dict[Key, float] = {}
        for (cookie, inum, reason), count in self.tables.counted(DROPS).items():
            counts[netns_key(cookie, inum), self._reason(reason)] = float(count)
        return {"cni_packet_drops_total": counts}

    def details(self, event: Event) -> Details:
        """Give reason, device, protocol, addresses and ports."""
        location, reason, ifindex, device, protocol = _BODY.unpack_from(event.body)
        found = flow(event.body, _BODY.size)
        shown: dict[str, str | int | float] = {
            "reason": self._reason(reason),
            "device": text(device),
            "ifindex": ifindex,
            "ethertype": f"0x{protocol:04x}",
            "location": f"0x{location:x}",
        }
        if found:
            shown |= {"source": found.source, "source_port": found.source_port}
            shown |= {"destination": found.destination, "destination_port": found.destination_port}
            shown["protocol"] = found.protocol
        return shown

    def _reason(self, number: int) -> str:
        """Name a reason; a subsystem's that this kernel does not name keeps its number."""
        if number >= 0xFFFFFFFE:  # noqa: PLR2004 - REASON_NOT_SPECIFIED of a kernel without reasons
            return "not_specified"
        return self.tables.manifest.reasons.get(number, f"reason_{number:#x}")
