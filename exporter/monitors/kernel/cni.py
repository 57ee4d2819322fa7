"""Reads cni.c: runs of CNI plugins.

Flows in: the map `cni_runs`, in which every run is counted once, and records of class cni_run for the feed. Flows out:
the `cni_plugin_*` families. No event is needed to count: the ring may lose.
"""

import struct
from typing import TYPE_CHECKING

from exporter.catalog import FAMILIES, PLUGIN_DURATION
from exporter.monitors.kernel.events import Details, Event, text
from exporter.monitors.kernel.reader import Histograms, Reader, Snapshot

if TYPE_CHECKING:
    from exporter.contract import Key

COMMANDS = ("other", "ADD", "DEL", "CHECK", "VERSION", "STATUS", "GC")
"""Values of CNI_COMMAND (CNI specification 1.1, section 2) that are told apart; the order of enum cni_command."""

_KEY = struct.Struct("=32sIxxxx")  # struct cni_key
_COUNTS = struct.Struct(f"={len(FAMILIES[PLUGIN_DURATION].buckets) + 3}Q")
"""struct cni_counts: runs per bucket, sum of their durations in ns, failures."""
_BODY = struct.Struct("=QII32s16s72s")  # struct cni_event behind its head
_KINDS = ("", "ended", "replaced")  # enum cni_kind


class Cni(Reader):
    """Exact counts by plugin and command."""

    program = "cni"
    classes = ("cni_run",)

    def snapshot(self) -> Snapshot:
        """Read the counters. A plugin that never failed has a failures series of 0."""
        runs: dict[Key, float] = {}
        failures: dict[Key, float] = {}
        for key, (*counts, _, failed) in self._entries().items():
            runs[key] = float(sum(counts))
            failures[key] = float(failed)
        return {"cni_plugin_runs_total": runs, "cni_plugin_failures_total": failures}

    def histograms(self) -> Histograms:
        """Read the durations; the kernel's sum is in nanoseconds."""
        return {
            PLUGIN_DURATION: {
                key: (*map(float, counts), total / 1e9) for key, (*counts, total, _) in self._entries().items()
            }
        }

    def details(self, event: Event) -> Details:
        """Give plugin, command, what became of it, duration in seconds, interface and container id."""
        duration, status, command, plugin, interface, container = _BODY.unpack_from(event.body)
        return {
            "plugin": text(plugin),
            "command": _command(command),
            "what": _KINDS[event.kind] if event.kind < len(_KINDS) else str(event.kind),
            "duration": duration / 1e9,
            **outcome(status),
            "interface": text(interface),
            "container_id": text(container),
        }

    def _entries(self) -> "dict[Key, tuple[int, ...]]":
        found: dict[Key, tuple[int, ...]] = {}
        for raw, value in self.tables.maps["cni_runs"].items():
            plugin, command = _KEY.unpack(raw)
            found[text(plugin), _command(command)] = _COUNTS.unpack(value)
        return found


def _command(number: int) -> str:
    return COMMANDS[number] if number < len(COMMANDS) else COMMANDS[0]


def outcome(status: int) -> dict[str, str | int | float]:
    """Read a process' end as wait(2) tells it: its exit status, or the signal that killed it."""
    return {"signal": status & 0x7F} if status & 0x7F else {"exit_status": status >> 8 & 0xFF}
