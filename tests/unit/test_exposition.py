"""Scrapes: formats, negotiation, one collection for many clients."""

import gzip
import threading
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter.exposition import Exposition
from exporter.metrics import Policy, Store

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
NASTY = 'a "quoted" \\ back\nnew line ü'


@pytest.fixture
def store() -> Store:
    store = Store(Policy(grace=0.0))
    store.owned("runtimes").replace({"cni_containers": {("docker", NASTY): 1.5, ("docker", "x"): float("inf")}})
    store.owned("runtimes").add("cni_container_events_total", ("docker", "start"), 23)
    for seconds in (0.5, 5, 1e7):
        store.owned("lifecycle").observe("cni_netns_lifetime_seconds", seconds)
    return store


def exposition(store: Store, refresh: object = lambda: None, **options: float) -> Exposition:
    return Exposition(store.collect, refresh, store.owned("metrics"), **options)


@pytest.mark.parametrize(("accept", "parse"), [("", parse_text), (OPENMETRICS, parse_openmetrics)])
def test_both_formats_say_the_same(store: Store, accept: str, parse: object) -> None:
    """The library's parsers read back what was written, escapes and buckets included."""
    headers, body = exposition(store).scrape(accept, "")
    families = {family.name: family for family in parse(body.decode())}
    assert headers["Content-Type"].startswith("application/openmetrics-text" if accept else "text/plain; version=0.0.4")
    states = {sample.labels["state"]: sample.value for sample in families["cni_containers"].samples}
    assert states["x"] == float("inf")
    assert 1.5 in states.values()
    (events,) = families["cni_container_events"].samples
    assert (events.name, events.value) == ("cni_container_events_total", 23)
    lifetimes = families["cni_netns_lifetime_seconds"].samples
    buckets = {sample.labels.get("le", sample.name.rpartition("_")[2]): sample.value for sample in lifetimes}
    assert (buckets["1.0"], buckets["10.0"], buckets["+Inf"], buckets["count"]) == (1, 2, 3, 3)
    assert "process_resident_memory_bytes" in families
    assert body.endswith(b"# EOF\n") == bool(accept)
    assert body.count(b"# EOF") == bool(accept)


@pytest.mark.parametrize(
    ("header", "zipped"), [("gzip", True), ("deflate, gzip;q=0.8", True), ("*", True), ("gzip;q=0", False), ("", False)]
)
def test_gzip_is_given_to_who_takes_it(store: Store, header: str, zipped: bool) -> None:  # noqa: FBT001
    headers, body = exposition(store).scrape("", header)
    assert ("Content-Encoding" in headers) == zipped
    assert b"cni_containers" in (gzip.decompress(body) if zipped else body)


def test_many_clients_at_once_cost_few_collections(store: Store) -> None:
    """While one collection runs, all who arrive share the next one."""
    begun = []
    gate = threading.Event()

    def refresh() -> None:
        begun.append(1)
        gate.wait(10)

    target = exposition(store, refresh)
    threads = [threading.Thread(target=target.scrape, args=("", "")) for _ in range(32)]
    for thread in threads:
        thread.start()
    while not begun:
        time.sleep(0.001)
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(begun) <= 3


def test_a_scrape_never_gets_what_was_collected_before_it_came(store: Store) -> None:
    target = exposition(store)
    target.scrape("", "")
    store.owned("runtimes").replace({"cni_containers": {("docker", "later"): 1.0}})
    assert b'state="later"' in target.scrape("", "")[1]


def test_a_failed_collection_is_one_clients_failure(store: Store) -> None:
    failures = [RuntimeError("broken")]

    def refresh() -> None:
        if failures:
            raise failures.pop()

    target = exposition(store, refresh)
    with pytest.raises(RuntimeError):
        target.scrape("", "")
    assert target.scrape("", "")[1]


def test_a_hung_collection_is_not_waited_for_without_end(store: Store) -> None:
    gate = threading.Event()
    begun = threading.Event()

    def refresh() -> None:
        begun.set()
        gate.wait(10)

    target = exposition(store, refresh, patience=0.05)
    first = threading.Thread(target=target.scrape, args=("", ""))
    first.start()
    begun.wait(10)
    with pytest.raises(TimeoutError, match="hung monitor"):
        target.scrape("", "")
    gate.set()
    first.join(10)
