"""Scrapes: refresh the monitors, collect the store once for everyone who waits, encode, compress.

Flows in: collected families and the process's own figures. Flows out: text 0.0.4 or OpenMetrics 1.0, the choice of the
client's Accept header. The only user of prometheus_client.
"""

import gzip
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from exporter.catalog import Family, Kind
from exporter.contract import Families
from exporter.metrics import Collected, Series

_EXACT = 2.0**53  # integers are exact in a double below this
_GZIP_LEVEL = 1  # a third larger than the default level's answer here, for less than half of its time
_END = b"# EOF\n"  # OpenMetrics 1.0, section "Text format"


class Exposition:
    """Answers scrapes; safe from any thread.

    A collection serves every scrape that arrived before it began: many clients at once cost two collections, not many.
    """

    def __init__(
        self,
        collect: Callable[[], list[Collected]],
        refresh: Callable[[], None],
        own: Families,
        *,
        procfs: str = "/proc",
        patience: float = 30.0,
    ) -> None:
        """Take what brings monitors up to date (bounded in time itself) and the store's collection.

        `own` is the writer for the families of owner `metrics`; `patience` bounds the wait for a shared collection, in
        seconds.
        """
        self._collect = collect
        self._refresh = refresh
        self._own = own
        self._patience = patience
        self._registry = CollectorRegistry()
        ProcessCollector(proc=procfs, registry=self._registry)
        self._turn = threading.Condition()
        self._begun = 0
        self._ended = 0
        self._busy = False
        self._latest: _Encoded | None = None
        self.series = 0
        """Series of the catalogue's families in the last collection."""

    def scrape(self, accept: str, accept_encoding: str) -> tuple[dict[str, str], bytes]:
        """Give headers and body for the client's Accept and Accept-Encoding.

        Raises TimeoutError when no collection ended in time.
        """
        _, content_type = choose_encoder(accept)
        zipped = _accepts_gzip(accept_encoding)
        body = self._shared().body(openmetrics=content_type.startswith("application/openmetrics"), zipped=zipped)
        self._own.add("cni_exporter_scrapes_total")
        headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
        return (headers | {"Content-Encoding": "gzip"} if zipped else headers), body

    def _shared(self) -> "_Encoded":
        """Give a collection that began after this call: another thread's, or our own."""
        deadline = time.monotonic() + self._patience
        with self._turn:
            wanted = self._begun + 1
            while self._busy and self._ended < wanted:
                if not self._turn.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"no collection ended within {self._patience} s: see the log for a hung monitor")
            if self._ended >= wanted and self._latest:
                return self._latest
            self._busy = True
            self._begun += 1
        return self._run()

    def _run(self) -> "_Encoded":
        started = time.perf_counter()
        encoded = None
        try:
            self._refresh()
            families = self._collect()
            self.series = sum(len(one.samples) + len(one.histograms) for one in families)
            encoded = _Encoded(families, self._registry)
            self._own.replace({"cni_exporter_scrape_duration_seconds": {(): time.perf_counter() - started}})
        finally:
            with self._turn:
                self._busy = False
                if encoded:
                    self._latest, self._ended = encoded, self._begun
                self._turn.notify_all()
        return encoded


class _Encoded:
    """One collection, each of its four bodies made when it is first asked for."""

    def __init__(self, families: list[Collected], registry: CollectorRegistry) -> None:
        self._families = families
        self._registry = registry
        self._making = threading.Lock()
        self._bodies: dict[tuple[bool, bool], bytes] = {}

    def body(self, *, openmetrics: bool, zipped: bool) -> bytes:
        with self._making:
            if (openmetrics, False) not in self._bodies:
                self._bodies[openmetrics, False] = self._encode(openmetrics=openmetrics)
            if (openmetrics, zipped) not in self._bodies:
                self._bodies[openmetrics, True] = gzip.compress(self._bodies[openmetrics, False], _GZIP_LEVEL)
            return self._bodies[openmetrics, zipped]

    def _encode(self, *, openmetrics: bool) -> bytes:
        encoder, _ = choose_encoder("application/openmetrics-text; version=1.0.0" if openmetrics else "")
        process = encoder(self._registry).removesuffix(_END)
        ours = "".join(lines(self._families, openmetrics=openmetrics)).encode()
        return ours + process + (_END if openmetrics else b"")


def _accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding header (RFC 9110, section 12.5.3) takes gzip."""
    for part in header.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() in {"gzip", "*"}:
            return weight.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


def lines(families: Iterable[Collected], *, openmetrics: bool) -> Iterator[str]:
    """Encode as text 0.0.4 or OpenMetrics 1.0, the latter without its end mark; empty families are left out."""
    for collected in families:
        family, name = collected.family, collected.family.name
        if not collected.samples and not collected.histograms:
            continue
        if openmetrics and family.kind is Kind.COUNTER:
            name = name.removesuffix("_total")
        text = family.help.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {name} {text}\n# TYPE {name} {family.kind.value}\n"
        for series, value in collected.samples:
            yield (
                f"{family.name}{{{series.text}}} {_number(value)}\n"
                if series.text
                else f"{family.name} {_number(value)}\n"
            )
        for series, state in collected.histograms:
            yield from _histogram(family, series, state)


def _histogram(family: Family, series: Series, state: list[float]) -> Iterator[str]:
    labels = f"{series.text}," if series.text else ""
    braces = f"{{{series.text}}}" if series.text else ""
    total = 0.0
    for bound, count in zip((*family.buckets, math.inf), state, strict=False):
        total += count
        edge = "+Inf" if math.isinf(bound) else repr(float(bound))
        yield f'{family.name}_bucket{{{labels}le="{edge}"}} {_number(total)}\n'
    yield f"{family.name}_count{braces} {_number(total)}\n{family.name}_sum{braces} {_number(state[-1])}\n"


def _number(value: float) -> str:
    if -_EXACT < value < _EXACT and value == int(value):
        return str(int(value))
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
