"""Who asked for what over HTTP: the first request of a client at once, those that follow added up over an interval.

Flows in: requests as they were answered. Flows out: records, each with the number of requests that it stands for.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.audit.reads import Record

_CLIENTS = 256
"""Kinds of requests that are added up at a time; the one that began longest ago makes room."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """A request that was answered."""

    time: float
    """Unix time in seconds."""
    client: str
    """Address, without port."""
    user: str
    """Whom the client proved to be; empty where nobody asks."""
    path: str
    status: int
    series: int
    """Series in the answer; 0 for other paths than /metrics."""
    size: int
    """Bytes of the body."""


@dataclass(slots=True)
class _Window:
    """What one client asked since the last record."""

    begin: float
    """Seconds of the caller's clock."""
    count: int = 0
    size: int = 0
    since: float = 0.0
    last: Scrape | None = None

    def add(self, scrape: Scrape) -> None:
        self.since = self.since if self.count else scrape.time
        self.count += 1
        self.size += scrape.size
        self.last = scrape

    def record(self) -> Iterator[Record]:
        """Give what was added up, if anything was, and begin anew."""
        last, count, size = self.last, self.count, self.size
        self.last, self.count, self.size = None, 0, 0
        if last is not None:
            yield {
                "time": last.time,
                "record": "scrape",
                "client": last.client,
                "user": last.user,
                "path": last.path,
                "status": last.status,
                "count": count,
                "since": self.since,
                "series": last.series,
                "bytes": size,
            }


class Scrapes:
    """The windows. For one thread; `now` is in seconds of any clock that only goes on."""

    def __init__(self, interval: float) -> None:
        """Add up over `interval` seconds; 0: every request has its own record."""
        self._interval = interval
        self._windows: OrderedDict[tuple[str, str, str, int], _Window] = OrderedDict()

    def add(self, scrape: Scrape, now: float) -> Iterator[Record]:
        """Take a request in; give the records that follow at once."""
        key = (scrape.client, scrape.user, scrape.path, scrape.status)
        known = key in self._windows
        window = self._windows.setdefault(key, _Window(now))
        window.add(scrape)
        if not known or not self._interval:
            yield from window.record()
        if len(self._windows) > _CLIENTS:
            yield from self._windows.popitem(last=False)[1].record()

    def due(self, now: float) -> Iterator[Record]:
        """Give the records of the windows that are over. A client that asked for nothing is forgotten."""
        for key, window in [(k, w) for k, w in self._windows.items() if now - w.begin >= self._interval]:
            del self._windows[key]
            if window.count:
                self._windows[key] = window
                window.begin = now
                yield from window.record()
