"""The kernel monitor's source: maps and rings, read without any capability, become families.

Flows in: the descriptors of `Programs`, which stay the composition root's. Flows out: families of owner `kernel`, and
each event to the tap, if there is one. A new program adds its reader to `READERS` and nothing else here.
"""

import ctypes
import struct
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from exporter.contract import Context, Key, Source, Unsupported
from exporter.host import bpf
from exporter.load.admission import CLASSES as PRIORITIES
from exporter.load.admission import KeptEvent
from exporter.monitors.kernel.cni import Cni
from exporter.monitors.kernel.consumer import Bell
from exporter.monitors.kernel.counts import Counts
from exporter.monitors.kernel.departed import Departed, inhabited
from exporter.monitors.kernel.drops import Drops
from exporter.monitors.kernel.events import HEAD, NETNS, Event, decode
from exporter.monitors.kernel.lifecycle import Lifecycle
from exporter.monitors.kernel.peers import PEERED, Peers
from exporter.monitors.kernel.process import Process, Syscalls
from exporter.monitors.kernel.programs import LOADS, PROGRAMS
from exporter.monitors.kernel.reader import Histograms, Reader, Snapshot, Tables
from exporter.monitors.kernel.shapes import CLASSES, HASH, PERCPU_HASH, THINNED
from exporter.monitors.kernel.tcp import Tcp

if TYPE_CHECKING:
    from exporter.monitors.kernel import Programs

READERS: tuple[type[Reader], ...] = (Drops, Tcp, Lifecycle, Cni, Process, Syscalls)
"""Every program's reader."""

Tap = Callable[[Event, Reader | None], None]
"""Gets each event, with the reader that knows its details."""

_LISTENED = 3  # slot of the map constants
_BATCH = 8192  # records that are taken out of a ring at once, before anything else is looked at
_HASHES = frozenset({HASH, PERCPU_HASH})  # of those that can be full: an LRU map makes room for itself


class KernelSource(Source):
    """Reads what the loader has put in force."""

    mode = "ebpf"

    def __init__(self, programs: "Programs", tap: Tap | None = None, share: float = 1.0) -> None:
        """Keep the programs; nothing is opened yet. Events, critical ones aside, may cost `share` of a processor."""
        self._programs = programs
        self._share = programs.tally.share = share
        self._tap = tap
        self._rings: dict[str, bpf.Ring] = {}
        self._bell: Bell | None = None
        self._counts: Counts | None = None
        self._evicted: dict[str, int] = {}

    def open(self, context: Context) -> None:
        """Open maps and rings by their descriptors. Raises Unsupported where nothing is attached, OSError."""
        super().open(context)
        manifest = self._programs.manifest
        if not self._programs.attached:
            standing = next(iter(self._programs.standings), None)
            reason = standing.reason if standing else "no program is wanted"
            raise Unsupported(reason, standing.remedy if standing else "")
        rings = ("lifecycle", "events")
        maps = {name: bpf.Map(fd) for name, fd in manifest.maps.items() if name not in rings}
        self._counts = Counts(manifest.maps["places"], maps["places"].capacity)
        self._tables = Tables(manifest, maps, self._counts)
        probes = {program.name: [probe.name for probe in program.probes] for program in PROGRAMS}
        self._readers = [
            make(self._tables) for make in READERS if any(map(self._tables.attached, probes[make.program]))
        ]
        self._by_class = {class_: reader for reader in self._readers for class_ in reader.classes}
        self._handling = {c for c, reader in self._by_class.items() if type(reader).handle is not Reader.handle}
        self._peers = Peers()
        self._departed = Departed(time.monotonic, partial(inhabited, context.paths.procfs))
        self._unheard = context.events.on_wanted(self._listened_to)
        for name in rings:
            self._rings[name] = bpf.Ring(manifest.maps[name], self._take)
        self._bell = Bell(manifest.maps["events"], self._share)

    def readers(self) -> Mapping[int, Callable[[], None]]:
        """Read critical records at once, the others in batches."""
        readers: dict[int, Callable[[], None]] = {}
        if self._bell:
            readers[self._rings["lifecycle"].fileno()] = self._hurry
            readers[self._bell.fileno()] = partial(self._listen, self._bell)
        return readers

    def update(self) -> None:
        """Read everything."""
        snapshot: Snapshot = {}
        histograms: Histograms = {}
        for ring in self._rings.values():
            self._consume(ring)
        self._programs.tally.settle()
        gone = set(self._tables.gone)
        for reader in self._readers:
            snapshot |= reader.snapshot()
            histograms |= reader.histograms()
        aliases = self._aliases()
        self._look_for_departed(aliases, snapshot)
        snapshot |= self._peers.snapshot()
        snapshot |= aliases | self._account() | standings(self._programs) | self._costs() | self._fill()
        lags = self._programs.tally.lags
        histograms["cni_events_lag_seconds"] = {(class_,): lag for class_, lag in lags.items()}
        self.context.families.replace(snapshot)
        self.context.families.replace_histograms(histograms)
        self._purge(gone)

    def close(self) -> None:
        """Unmap what is mapped."""
        if self._bell:
            self._unheard()
            self._bell.close()
            self._bell = None
        if self._counts:
            self._counts.close()
            self._counts = None
        for ring in self._rings.values():
            ring.close()
        self._rings.clear()

    def _hurry(self) -> None:
        """Empty the ring of critical records."""
        self._consume(self._rings["lifecycle"])

    def _listen(self, bell: Bell) -> None:
        """Empty the ring where it is time to."""
        if bell.due():
            before = self._programs.tally.busy
            wholly = self._consume(self._rings["events"]) < _BATCH
            self._programs.tally.settle()
            bell.emptied(wholly=wholly, spent=self._programs.tally.busy - before)

    def _listened_to(self, classes: frozenset[str]) -> None:
        """Have the programs tell all of events of these classes, and of others no more than is counted here."""
        bits = sum(1 << number for number, class_ in enumerate(CLASSES) if self._tap or class_ in classes)
        try:
            self._tables.maps["constants"].put(_LISTENED.to_bytes(4, sys.byteorder), bits.to_bytes(8, sys.byteorder))
        except OSError as error:
            self.context.error("map", f"what is listened to is not known to the programs: {error}")

    def _consume(self, ring: bpf.Ring) -> int:
        started = time.thread_time()
        count = ring.consume(_BATCH)
        self._programs.tally.busy += time.thread_time() - started
        return count

    def _take(self, address: int, size: int) -> None:
        """Handle one record of a ring. A flood passes here: what nobody looks into is counted, and that is all."""
        try:
            class_ = self._programs.tally.count(address, size, time.monotonic_ns())
        except ValueError as error:
            self.context.error("record", str(error))
            return
        if class_ in PEERED:
            self._peers.note(ctypes.string_at(address, size))
        if size == HEAD.size and class_ in THINNED:
            return  # nobody listened when it was written
        if not (class_ in self._handling or self._tap or class_ in self.context.events.wanted):
            return
        event = decode(ctypes.string_at(address, size))
        reader = self._by_class.get(class_)
        if reader:
            reader.handle(event)
        (self._tap or self._tell)(event, reader)

    def _tell(self, event: Event, reader: Reader | None) -> None:
        """Pass an event on to those who watch, if anybody does."""
        if event.class_ not in self.context.events.wanted:
            return
        try:
            details = dict(reader.details(event)) if reader else {}
        except (ValueError, struct.error) as error:
            self.context.error("record", f"{event.class_}: {error}")
            return
        what = str(details.pop("what", event.class_))
        container_id = str(details.get("container_id", ""))
        at = time.time() - (time.monotonic_ns() - event.time) / 1e9
        self.context.events.record_event(
            KeptEvent(
                *(at, event.class_, what, PRIORITIES[event.class_], event.netns, container_id),
                *(event.pid, event.comm, event.weight, details),
            )
        )

    def _aliases(self) -> Snapshot:
        """Tell the join under which inode of /proc/PID/net/stat a namespace is found."""
        aliases: dict[Key, float] = {}
        for key, value in self._tables.maps["namespaces"].items():
            cookie, inum = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:12], "little")
            proc = int.from_bytes(value[8:12], "little")
            aliases[f"{inum}:{cookie}", f"proc-{proc}"] = 1.0
        return {"cni_netns_alias": aliases}

    def _look_for_departed(self, aliases: Snapshot, counted: Snapshot) -> None:
        known = {netns: int(proc.removeprefix("proc-")) for netns, proc in aliases["cni_netns_alias"]}
        for key in self._departed.find(known, counted):
            inum, cookie = key.split(":")
            self._tables.forget(int(inum), int(cookie))

    def _purge(self, gone: set[bytes]) -> None:
        """Take the entries of namespaces that are gone out of the kernel's maps."""
        if not gone:
            return
        if self._counts:
            self._counts.forget({NETNS.unpack(netns) for netns in gone})
        names = ("namespaces", "counted", *(name for reader in self._readers for name in reader.by_netns))
        for map_ in (self._tables.maps[name] for name in names):
            for key in [key for key, _ in map_.items() if key[: NETNS.size] in gone]:
                map_.delete(key)
        self._tables.gone.difference_update(gone)

    def _account(self) -> Snapshot:
        """Read what became of the events of each class."""
        account = self._tables.maps["account"]
        names = ("seen", "filtered", "sampled_out", "lost")
        families: Snapshot = {f"cni_events_{name}_total": {} for name in (*names, "handled")}
        for number, class_ in enumerate(CLASSES):
            value = account.get(number.to_bytes(4, "little"))
            seen, filtered, sampled_out, lost, *_ = account.total(value or bytes(64 * bpf.cpus()))
            families["cni_events_seen_total"][class_,] = float(seen)
            families["cni_events_filtered_total"][class_,] = float(filtered)
            families["cni_events_sampled_out_total"][class_,] = float(sampled_out)
            families["cni_events_lost_total"][class_, "kernel_reserve"] = float(lost)
            families["cni_events_handled_total"][class_,] = float(self._programs.tally.handled[class_])
        return families

    def _costs(self) -> Snapshot:
        """Read what the programs cost; nothing where the kernel does not measure it."""
        seconds: dict[Key, float] = {}
        counts: dict[Key, float] = {}
        misses: dict[Key, float] = {}
        for probe, descriptors in self._programs.manifest.programs.items():
            runs = [bpf.runs(descriptor) for descriptor in descriptors]
            seconds[probe,] = sum(run.seconds for run in runs)
            counts[probe,] = float(sum(run.count for run in runs))
            misses[probe,] = float(sum(run.misses for run in runs))
        measured = self._programs.manifest.measured
        return {
            "cni_bpf_program_run_time_seconds_total": seconds if measured else {},
            "cni_bpf_program_runs_total": counts if measured else {},
            "cni_bpf_program_misses_total": misses,
        }

    def _fill(self) -> Snapshot:
        """Say how full the maps are, what did not fit, and what was put out for something newer."""
        hashes = {name: map_ for name, map_ in self._tables.maps.items() if map_.type in _HASHES}
        for name in LOADS:  # nobody else takes anything out of these
            evicted = self._raised("inserts", name) - self._tables.maps[name].length()
            self._evicted[name] = max(evicted, self._evicted.get(name, 0))
        return {
            "cni_bpf_map_entries": {(name,): float(map_.length()) for name, map_ in hashes.items()},
            "cni_bpf_map_capacity": {(name,): float(map_.capacity) for name, map_ in hashes.items()},
            "cni_bpf_map_insert_failures_total": {
                (name,): float(self._raised("insert_failures", name)) for name in hashes
            },
            "cni_bpf_map_evictions_total": {(name,): float(count) for name, count in self._evicted.items()},
        }

    def _raised(self, counter: str, name: str) -> int:
        """Read what the programs have counted for a map."""
        counts = self._tables.maps[counter]
        value = counts.get(self._programs.manifest.map_numbers[name].to_bytes(4, "little"))
        return counts.total(value)[0] if value else 0


class Standings(Source):
    """What is left where nothing is attached: each program's standing, with the reason."""

    mode = "none"

    def __init__(self, programs: "Programs") -> None:
        """Keep the programs."""
        self._programs = programs

    def update(self) -> None:
        """Say that nothing is attached, and why."""
        self.context.families.replace(standings(self._programs))


def standings(programs: "Programs") -> Snapshot:
    """Say where each program stands."""
    return {
        "cni_bpf_program_attached": {(s.program, s.hook, s.rung): float(s.attached) for s in programs.standings},
        "cni_bpf_program_info": {(s.program, s.reason or s.cannot_see): 1.0 for s in programs.standings},
    }
