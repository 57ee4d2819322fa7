"""The supervisor: ladder, backoff, circuit breaker, freshness for scrapes, end."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from exporter import supervisor as module
from exporter.contract import Context, Monitor, Paths, Source, Unsupported
from exporter.metrics import Store
from exporter.supervisor import Supervisor


class Scripted(Source):
    """A source that does what the test says."""

    def __init__(self, mode: str, opening: list[Exception], updating: list[Exception]) -> None:
        self.mode = mode
        self.opening, self.updating = opening, updating
        self.updates = 0
        self.closed = 0

    def open(self, context: Context) -> None:
        super().open(context)
        if self.opening:
            raise self.opening.pop(0)

    def update(self) -> None:
        self.updates += 1
        if self.updating:
            raise self.updating.pop(0)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", (0.01, 0.02))
    monkeypatch.setattr(module, "_RETRY", 0.05)


@pytest.fixture
def house() -> Iterator[tuple[Supervisor, Store]]:
    store = Store()
    supervisor = Supervisor(store.owned("supervisor"))
    yield supervisor, store
    assert supervisor.stop(5) == []


def run(house: tuple[Supervisor, Store], *sources: Source, optional: bool = False, **options: float) -> None:
    rungs = [lambda source=source: source for source in sources]
    monitor = Monitor("links", rungs, options.pop("interval", 0.02), optional=optional, **options)
    house[0].add(monitor, house[1].owned("links"), Paths())
    house[0].start()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 5 s"
        time.sleep(0.005)


def mode(house: tuple[Supervisor, Store]) -> tuple[str, str]:
    rows = house[1].read("cni_exporter_monitor_mode_info")
    return (rows[0][0]["mode"], rows[0][0]["reason"]) if rows else ("", "")


def value(house: tuple[Supervisor, Store], family: str) -> float | None:
    rows = house[1].read(f"cni_exporter_monitor_{family}")
    return rows[0][1] if rows else None


def test_the_best_rung_that_holds_is_stood_on_and_the_reason_told(house: tuple[Supervisor, Store]) -> None:
    run(house, Scripted("best", [Unsupported("no kprobes", "another kernel")] * 99, []), Scripted("floor", [], []))
    eventually(lambda: mode(house) == ("floor", "no kprobes"))
    assert value(house, "fallback") == 1
    assert value(house, "up") == 1


def test_a_better_rung_is_taken_when_it_becomes_possible(house: tuple[Supervisor, Store]) -> None:
    floor = Scripted("floor", [], [])
    run(house, Scripted("best", [Unsupported("not yet")], []), floor)
    eventually(lambda: mode(house) == ("best", ""))
    assert value(house, "fallback") == 0
    eventually(lambda: floor.closed == 1)


def test_a_failing_source_falls_and_comes_back(house: tuple[Supervisor, Store]) -> None:
    best = Scripted("best", [], [])
    run(house, best, Scripted("floor", [], []))
    eventually(lambda: mode(house)[0] == "best")
    best.opening += [OSError("gone")] * 2
    best.updating.append(OSError("lost"))
    eventually(lambda: mode(house)[0] == "floor")
    eventually(lambda: mode(house) == ("best", ""))
    assert value(house, "restarts_total") == 1


def test_what_may_be_absent_is_no_failure(house: tuple[Supervisor, Store]) -> None:
    run(house, Scripted("events", [Unsupported("no socket")] * 999, []), optional=True)
    eventually(lambda: mode(house) == ("absent", "no socket"))
    assert value(house, "up") is None


def test_what_may_be_absent_but_is_broken_is_down(house: tuple[Supervisor, Store]) -> None:
    run(house, Scripted("events", [OSError("refused")] * 9999, []), optional=True)
    eventually(lambda: mode(house) == ("down", "refused"))
    assert value(house, "up") == 0


def test_the_circuit_opens_after_repeated_failures_and_closes_again(
    house: tuple[Supervisor, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_REST", 0.3)
    run(house, Scripted("best", [OSError("no")] * 5, []))
    eventually(lambda: value(house, "circuit_open") == 1)
    eventually(lambda: mode(house)[0] == "best" and value(house, "circuit_open") == 0)


def test_a_scrape_gets_data_that_is_fresh(house: tuple[Supervisor, Store]) -> None:
    source = Scripted("best", [], [])
    run(house, source, interval=3600, max_age=0.0)
    eventually(lambda: source.updates == 1)
    house[0].refresh(5)
    assert source.updates == 2


def test_a_scrape_takes_what_is_young_enough(house: tuple[Supervisor, Store]) -> None:
    source = Scripted("best", [], [])
    run(house, source, interval=3600, max_age=3600)
    eventually(lambda: source.updates == 1)
    house[0].refresh(5)
    assert source.updates == 1


def test_a_scrape_does_not_wait_for_a_hung_monitor(house: tuple[Supervisor, Store]) -> None:
    gate = threading.Event()

    class Hung(Scripted):
        def update(self) -> None:
            super().update()
            if self.updates > 1:
                gate.wait(20)

    source = Hung("best", [], [])
    run(house, source, interval=3600, max_age=0.0)
    eventually(lambda: source.updates == 1)
    started = time.monotonic()
    house[0].refresh(0.1)
    assert time.monotonic() - started < 5
    gate.set()


def test_an_event_is_followed_by_an_update(house: tuple[Supervisor, Store]) -> None:
    read, write = os.pipe()

    class Eventful(Scripted):
        def readers(self) -> dict[int, Callable[[], None]]:
            return {read: self.handle}

        def handle(self) -> None:
            os.read(read, 1)
            self.context.wake()

    source = Eventful("best", [], [])
    run(house, source, interval=3600)
    eventually(lambda: source.updates == 1)
    os.write(write, b"x")
    eventually(lambda: source.updates == 2)
    for descriptor in (read, write):
        os.close(descriptor)


def test_updates_asked_for_by_events_stay_within_their_share(
    house: tuple[Supervisor, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no burst left, a storm of events leads to few updates."""
    monkeypatch.setattr(module, "_BURST", 0.0)

    class Busy(Scripted):
        def update(self) -> None:
            super().update()
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass

    source = Busy("best", [], [])
    run(house, source, interval=3600)
    stop = time.monotonic() + 1.0
    while time.monotonic() < stop:
        house[0].runners[0].wake()
        time.sleep(0.001)
    assert 2 <= source.updates <= 10


def test_errors_and_losses_are_counted(house: tuple[Supervisor, Store]) -> None:
    run(house, Scripted("best", [], []))
    house[0].runners[0].error("netlink", "truncated message")
    house[0].runners[0].dropped(7)
    kinds = {labels["kind"]: count for labels, count in house[1].read("cni_exporter_monitor_errors_total")}
    assert kinds == {"netlink": 1, "source_failed": 0}
    assert value(house, "queue_dropped_total") == 7


def test_a_steady_monitor_keeps_its_interval_while_the_others_do_less() -> None:
    """What tells when the pressure is over must not be slowed down by it."""
    supervisor = Supervisor(Store().owned("supervisor"))
    for steady in (False, True):
        monitor = Monitor("links", (Scripted,), 1.0, steady=steady)
        supervisor.add(monitor, Store().owned("links"), Paths())
    supervisor.slow_down(4.0)
    assert [runner.slowdown for runner in supervisor.runners] == [4.0, 1.0]
    assert supervisor.stop(5) == []
