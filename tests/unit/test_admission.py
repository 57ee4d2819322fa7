"""The admission: taps get every event, cost nothing where there are none, and cannot harm a monitor."""

import threading
import time

import pytest

from exporter.load.admission import CLASSES, Admission, KeptEvent

EVENT = KeptEvent(1.5, "veth", "created", CLASSES["veth"])


def test_every_tap_gets_every_event_until_it_ends() -> None:
    """Two taps are two copies; ending one, even twice, leaves the other."""
    admission, one, two = Admission(), [], []
    untap = admission.tap(one.append)
    admission.tap(two.append)
    admission.record_event(EVENT)
    untap()
    untap()
    admission.record_event(EVENT)
    assert (len(one), len(two)) == (1, 2)
    assert admission.seen["veth"] == 2
    assert admission.failures == 0


def test_nothing_is_done_without_a_tap() -> None:
    """No tap: not wanted, not counted; the last tap that ends makes it so again."""
    admission = Admission()
    assert not admission.wanted
    admission.record_event(EVENT)
    untap = admission.tap(lambda _: None)
    assert admission.wanted
    untap()
    assert not admission.wanted
    assert admission.seen["veth"] == 0


def test_the_same_callback_may_tap_twice() -> None:
    """Each tap is its own: ending the first does not end the second."""
    admission, got = Admission(), []
    untap = admission.tap(got.append)
    admission.tap(got.append)
    untap()
    admission.record_event(EVENT)
    assert got == [EVENT]


def test_a_tap_that_raises_is_removed_counted_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The event reaches the next tap, the monitor sees no exception, the log has the reason."""
    admission, got = Admission(), []

    def broken(_: KeptEvent) -> None:
        raise RuntimeError("no room")

    admission.tap(broken)
    admission.tap(got.append)
    admission.record_event(EVENT)
    admission.record_event(EVENT)
    assert (len(got), admission.failures) == (2, 1)
    assert "no room" in caplog.text


def test_an_unknown_class_is_refused() -> None:
    """A class that has no priority is a mistake of the monitor's author."""
    admission = Admission()
    admission.tap(lambda _: None)
    with pytest.raises(ValueError, match="vethh is no class of events"):
        admission.record_event(KeptEvent(0.0, "vethh", "created", "info"))


def test_threads_do_not_lose_count() -> None:
    """Four threads record 23 x 100 events each: all are seen."""
    admission = Admission()
    admission.tap(lambda _: None)

    def work() -> None:
        for _ in range(2300):
            admission.record_event(EVENT)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert admission.seen["veth"] == 4 * 2300


def test_an_event_costs_less_than_5_microseconds_with_a_tap_and_next_to_nothing_without() -> None:
    """The best of five rounds, so that a busy machine does not count."""
    tapped, untapped = Admission(), Admission()
    tapped.tap(lambda _: None)

    def cost(admission: Admission) -> float:
        rounds = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(2000):
                admission.record_event(EVENT)
            rounds.append((time.perf_counter() - started) / 2000)
        return min(rounds)

    with_tap, without = cost(tapped), cost(untapped)
    print(f"{with_tap * 1e6:.2f} us with a tap, {without * 1e6:.2f} us without")
    assert with_tap < 5e-6
    assert without < 1e-6
