"""The audit log: what was read about which container by which monitor, and who was told. JSON, a line per record.

Flows in: what monitors write, events that were kept, answered requests, starts and reloads. Flows out: an append-only
file (docs/privacy.md describes its lines), written by a thread of its own: where the file cannot be written the log
waits in bounded memory, then loses records, counts them and says how many; nobody waits for it.
"""

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from exporter.audit.file import AppendOnly
from exporter.audit.reads import FAMILIES, Reads, Record
from exporter.audit.scrapes import Scrape, Scrapes
from exporter.contract import Families, Key
from exporter.load.admission import KeptEvent

__all__ = ["Audit", "Scrape", "Settings"]

log = logging.getLogger(__name__)

QUEUE = 4096
"""Items that wait for the thread at most."""
WRITES = 32
"""Snapshots among them at most: each holds a family."""
BACKLOG = 2**20
"""Bytes of lines that wait for the file at most."""

_DETAILS = 64  # details of an event that are recorded
_RETRY = 1.0  # seconds between attempts at a file that cannot be written
_TICK = 1.0  # longest sleep of the thread, in seconds
_STOP = 2.0  # seconds that the thread gets to end
_BURST = 20  # seconds' worth of records that may come at once: a node full of containers at the start
_FREQUENT = frozenset({"read", "event"})  # records whose rate is bounded
_TIMES = ("time", "since")

Writes = Mapping[str, Mapping[Key, float]]
NamesOf = Callable[[str, str], tuple[str, str, str]]
"""Namespace, pod and container for (netns_id, container_id)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says."""

    path: Path
    max_size: int = 10 * 2**20
    """Bytes at which the file is set aside."""
    keep: int = 9
    """Files set aside that are kept."""
    scrape_interval: float = 60.0
    """Seconds over which a client's requests are added up."""
    events: Collection[str] = ("container", "netns")
    """Classes of events that are recorded."""
    rate: int = 100
    """Records of reads and events per second, on average."""


class _Witnessed:
    """A monitor's writer whose snapshots the audit log sees too."""

    def __init__(self, families: Families, see: Callable[[Writes], None]) -> None:
        self.add, self.observe = families.add, families.observe
        self.replace_histograms = families.replace_histograms
        self._replace, self._see = families.replace, see

    def replace(self, snapshots: Writes) -> None:
        """Write, then show."""
        self._replace(snapshots)
        self._see(snapshots)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a monitor wrote, as far as it tells what was read."""

    snapshots: Writes


_Item = _Seen | KeptEvent | Scrape | Record


@dataclass(slots=True)
class Audit:
    """The log and its thread. Whatever feeds it returns at once, from any thread."""

    settings: Settings
    families: Families
    """Writer for the families of owner `audit`."""
    names: NamesOf
    clean: Callable[[str], str]
    """What a text may be shown as."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, for rates and intervals."""
    _queue: deque[_Item] = field(default_factory=deque)
    _writes: int = 0
    """Snapshots in the queue."""
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _stopping: bool = False
    _lost: Counter[str] = field(default_factory=Counter)
    """Records lost since a line last said so, by reason; guarded by the condition."""
    _reads: Reads = field(default_factory=Reads)
    _lines: "_Lines | None" = None
    _number: int = 0
    _credit: float = 0.0
    _credited: float = 0.0

    def start(self, facts: Mapping[str, object]) -> None:
        """Begin, with a record of the start that holds `facts`."""
        for reason in ("queue", "rate", "write"):
            self.families.add("cni_exporter_audit_records_dropped_total", (reason,), 0)
        self._credit, self._credited = float(self.settings.rate * _BURST), self.clock()
        self._lines = _Lines(self.settings, self.families, self.clock)
        self._thread = threading.Thread(target=self._run, args=(self._lines,), name="audit", daemon=True)
        self.note("start", facts)
        self._thread.start()

    def stop(self) -> None:
        """End with a record of the end; within two seconds, even where the disk hangs."""
        if self._thread is None:
            return
        self.note("stop", {})
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_STOP)
        if self._thread.is_alive():
            log.warning("audit log: the disk does not answer, the last records are lost")

    def witness(self, families: Families) -> Families:
        """Give a writer in place of a monitor's own, from which is known what the monitor has read."""
        return _Witnessed(families, self._see)

    def tap(self, event: KeptEvent) -> None:
        """Take an event of the admission."""
        if event.class_ in self.settings.events:
            self._put(event)

    def served(self, scrape: Scrape) -> None:
        """Take a request that was answered."""
        self._put(scrape)

    def note(self, record: str, facts: Mapping[str, object]) -> None:
        """Take what happened to the exporter itself."""
        self._put({"record": record, **facts})

    def _see(self, snapshots: Writes) -> None:
        telling = {name: snapshots[name] for name in FAMILIES & snapshots.keys()}
        if telling:
            self._put(_Seen(telling))

    def _put(self, item: _Item) -> None:
        write = isinstance(item, _Seen)
        with self._changed:
            if self._thread is None or self._stopping:
                return
            if len(self._queue) >= QUEUE or (write and self._writes >= WRITES):
                self._lose("queue")
                return
            self._writes += write
            self._queue.append(item)
            self._changed.notify()

    def _lose(self, reason: str) -> None:
        """Count a record that is lost. The condition is held."""
        self._lost[reason] += 1
        self.families.add("cni_exporter_audit_records_dropped_total", (reason,))

    # The thread.

    def _run(self, lines: "_Lines") -> None:
        scrapes, ending, tell_at = Scrapes(self.settings.scrape_interval), False, 0.0
        while not ending:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping, _TICK)
                items, self._queue, self._writes = self._queue, deque(), 0
                ending = self._stopping
            for item in items:
                self._keep(self._records(item, scrapes), lines)
            self._keep(scrapes.due(self.clock()), lines)
            if self.clock() >= tell_at:
                tell_at = self.clock() + _TICK
                self._keep(self._losses(), lines)
            lines.flush(ending=ending)
        lines.close()

    def _records(self, item: _Item, scrapes: Scrapes) -> Iterator[Record]:
        match item:
            case _Seen():
                yield from self._reads.records(item.snapshots)
            case Scrape():
                yield from scrapes.add(item, self.clock())
            case KeptEvent():
                yield self._event(item)
            case _:
                if item["record"] == "stop":
                    yield from scrapes.due(float("inf"))
                    yield from self._losses()
                yield item

    def _keep(self, records: Iterator[Record], lines: "_Lines") -> None:
        """Make lines of records, as many as the rate and the backlog allow."""
        for record in records:
            self._number += 1
            kind = str(record["record"])
            reason = "rate" if kind in _FREQUENT and not self._afford() else ""
            if not reason and not lines.add(kind, self._encode(record)):
                reason = "write"
            if reason:
                with self._changed:
                    self._lose(reason)

    def _afford(self) -> bool:
        """Take one from what the rate has left."""
        now, rate = self.clock(), self.settings.rate
        self._credit = min(self._credit + (now - self._credited) * rate, rate * _BURST)
        self._credited = now
        if self._credit < 1:
            return False
        self._credit -= 1
        return True

    def _losses(self) -> Iterator[Record]:
        with self._changed:
            lost, self._lost = dict(self._lost), Counter()
        if lost:
            yield {"record": "lost", "count": sum(lost.values()), "reasons": lost}

    def _event(self, event: KeptEvent) -> Record:
        namespace, pod, container = self.names(event.netns, event.container_id)
        return {
            "time": event.time,
            "record": "event",
            "class": event.class_,
            "kind": event.kind,
            "container_id": event.container_id,
            "namespace": namespace,
            "pod": pod,
            "container": container,
            "netns": event.netns,
            "pid": event.pid,
            "command": event.command,
            "details": dict(islice(event.details.items(), _DETAILS)),
        }

    def _encode(self, record: Record) -> bytes:
        """Write a line: time and number first, every text as the gate shows it."""
        told = {"time": time.time(), "seq": self._number, **record}
        told = {name: _moment(value) if name in _TIMES else self._safe(value) for name, value in told.items()}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    def _safe(self, value: object) -> object:
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, Mapping):
            return {self.clean(str(name)): self._safe(inner) for name, inner in value.items()}
        return [self._safe(inner) for inner in value] if isinstance(value, list | tuple) else value


def _moment(seconds: object) -> str:
    """Write Unix time as RFC 3339 does, in UTC, to the millisecond."""
    moment = datetime.fromtimestamp(float(str(seconds)), UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Lines:
    """Lines on their way to the file. For one thread."""

    def __init__(self, settings: Settings, families: Families, clock: Callable[[], float]) -> None:
        self._path = settings.path
        self._file = AppendOnly(settings.path, settings.max_size, settings.keep)
        self._families = families
        self._clock = clock
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._size = 0
        self._retry_at = float("-inf")
        self._well: bool | None = None

    def add(self, kind: str, line: bytes) -> bool:
        """Queue a line; False where too many wait already."""
        if self._size + len(line) > BACKLOG:
            return False
        self._waiting.append((kind, line))
        self._size += len(line)
        return True

    def flush(self, *, ending: bool) -> None:
        """Write what waits, as far as the file takes it; not too often where it took nothing."""
        if self._clock() < self._retry_at and not ending:
            return
        while self._waiting:
            kind, line = self._waiting[0]
            try:
                self._file.append(line)
            except OSError as error:
                self._fail(error)
                return
            self._waiting.popleft()
            self._size -= len(line)
            self._families.add("cni_exporter_audit_records_total", (kind,))
            self._tell(well=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fail(self, error: OSError) -> None:
        self._file.close()
        self._retry_at = self._clock() + _RETRY
        if self._well is not False:
            log.warning("audit log %s cannot be written: %s; records wait, then are lost", self._path, error.strerror)
        self._tell(well=False)

    def _tell(self, *, well: bool) -> None:
        if self._well is False and well:
            log.info("audit log %s is written again", self._path)
        if self._well is not well:
            self._families.replace({"cni_exporter_audit_up": {(): float(well)}})
        self._well = well
