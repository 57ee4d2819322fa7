"""The admission: every event is decided on and accounted for once, taps get what is kept and cannot harm a monitor."""

import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.load.admission import CLASSES, Account, Admission, KeptEvent
from exporter.load.bucket import Bucket
from exporter.load.estimates import Estimate
from exporter.load.filters import TEXT_LIMIT, Rule, described

EVENT = KeptEvent(1.5, "veth", "created", CLASSES["veth"])
START = {"kind": "start", "runtime": "docker"}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rule(name: str, *patterns: str, priority: str = "info", ratio: float | None = None, enabled: bool = True) -> Rule:
    return Rule(name, priority, tuple(map(re.compile, patterns)), ratio, enabled)


def coin(seed: int) -> Callable[[], float]:
    return random.Random(seed).random  # noqa: S311 - a coin that falls alike on each run


def balanced(account: Account) -> bool:
    return account.seen == account.filtered + account.sampled_out + sum(account.lost.values()) + account.handled


def offered(admission: Admission, class_: str, count: int) -> list[float]:
    """Offer events as a source does; give the weights of those that were kept."""
    weights = [admission.should_sample(class_, START) for _ in range(count)]
    for weight in filter(None, weights):
        admission.record_event(KeptEvent(0.0, class_, "start", CLASSES[class_], weight=weight))
    return [weight for weight in weights if weight]


# Taps


def test_every_tap_gets_every_event_until_it_ends() -> None:
    """Two taps are two copies; ending one, even twice, leaves the other."""
    admission, one, two = Admission(), [], []
    tapping = admission.tap(one.append)
    admission.tap(two.append)
    admission.record_event(EVENT)
    tapping.end()
    tapping.end()
    admission.record_event(EVENT)
    assert (len(one), len(two)) == (1, 2)
    assert admission.failures == 0


def test_an_admission_is_wanted_while_somebody_taps() -> None:
    """No tap: a monitor need not build its events; the last tap that ends makes it so again."""
    admission = Admission()
    assert not admission.wanted
    admission.record_event(EVENT)
    tapping = admission.tap(lambda _: None)
    assert admission.wanted
    tapping.end()
    assert not admission.wanted


def test_a_tap_gets_the_classes_that_it_wants_and_sources_know_which() -> None:
    """Whoever is interested is told at once, and of each change of what all want together, before `want` returns."""
    admission, got, told = Admission(), [], []
    end = admission.on_wanted(told.append)
    tapping = admission.tap(got.append, ("exec",))
    admission.record_event(EVENT)
    tapping.want((EVENT.class_,))
    admission.record_event(EVENT)
    other = admission.tap(lambda _: None, (EVENT.class_,))
    tapping.end()
    other.end()
    end()
    admission.tap(got.append)
    assert EVENT.class_ != "exec"
    assert got == [EVENT]
    assert told == [set(), {"exec"}, {EVENT.class_}, set()]


def test_the_same_callback_may_tap_twice() -> None:
    """Each tap is its own: ending the first does not end the second."""
    admission, got = Admission(), []
    tapping = admission.tap(got.append)
    admission.tap(got.append)
    tapping.end()
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
    with pytest.raises(ValueError, match="vethh is no class of events"):
        admission.should_sample("vethh", {})
    with pytest.raises(ValueError, match="vethh is no class of events"):
        admission.record_drop("vethh", "queue")


# Decisions


def test_everything_is_kept_until_somebody_says_otherwise() -> None:
    """Without ratios, rules and a limit each event stands for itself."""
    admission = Admission()
    assert offered(admission, "connection", 23) == [1.0] * 23
    assert admission.stats()["connection"] == Account(seen=23, handled=23, estimate=Estimate(23, 23.0))


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_a_ratio_keeps_its_share_and_the_estimate_stays_right(ratio: float) -> None:
    """Of 20,000 events the kept ones, by their weights, stand for as many, within four standard errors."""
    admission = Admission(coin=coin(7))
    admission.steer({"connection": ratio})
    weights = offered(admission, "connection", 20_000)
    account = admission.stats()["connection"]
    assert set(weights) == {1 / ratio}
    assert abs(account.estimate.total - 20_000) < 4 * account.estimate.standard_error
    assert account.estimate.total == pytest.approx(sum(weights))
    assert account.estimate.variance == pytest.approx(20_000 * (1 / ratio - 1), rel=0.2)
    assert balanced(account)
    assert account.filtered == 0


def test_a_class_that_is_turned_off_is_sampled_out_and_has_no_estimate() -> None:
    """Ratio 0: nothing is kept, and nothing pretends to know how many there were."""
    admission = Admission()
    admission.steer({"connection_close": 0.0})
    assert offered(admission, "connection_close", 5) == []
    assert admission.stats()["connection_close"] == Account(seen=5, sampled_out=5)


def test_critical_events_are_kept_whatever_the_bucket_says() -> None:
    """A flood of a class that brakes itself does not touch the critical one."""
    admission = Admission(Clock(), coin(7))
    admission.configure(max_events_per_second=100)
    assert len(offered(admission, "connection", 5000)) < 500
    assert offered(admission, "container", 1000) == [1.0] * 1000


def test_the_bucket_brakes_with_known_ratios_and_fills_again() -> None:
    """A burst beyond the limit is thinned, not cut: its estimate is right; a second later everything is kept again."""
    clock = Clock()
    admission = Admission(clock, coin(7))
    admission.configure(max_events_per_second=1000)
    weights = offered(admission, "connection", 20_000)
    account = admission.stats()["connection"]
    assert len(weights) < 1600
    assert abs(sum(weights) - 20_000) < 4 * account.estimate.standard_error
    assert balanced(account)
    clock.now = 1.0
    assert offered(admission, "connection", 500) == [1.0] * 500


def test_a_bucket_is_never_empty_of_hope_and_never_over_its_size() -> None:
    """However much was taken something is still seen; however long it rests it holds a second's worth."""
    bucket = Bucket(8.0)
    assert bucket.ratio(0.0) == 1 / 64
    assert bucket.ratio(100.0) == 1.0
    for _ in range(7):
        bucket.take()
    assert bucket.ratio(100.0) == 0.5
    bucket.take()
    bucket.take()
    assert bucket.ratio(100.0) == 1 / 64


# The user's rules


def test_patterns_see_class_and_attributes() -> None:
    """The text is what the documents say, and is bounded."""
    assert described("container", START) == "class container, kind start, runtime docker"
    assert len(described("container", {"name": "x" * 5000})) == TEXT_LIMIT


def test_the_first_rule_that_matches_holds() -> None:
    """Its ratio is the user's word: 0 filters, 1 keeps what the load would thin; others go by the class."""
    admission = Admission(coin=lambda: 0.7)
    admission.configure(
        [rule("noise", "port 9$", r"port 1\d\b", ratio=0.0), rule("dns", "port 53", ratio=1.0), rule("all-dns", "53")]
    )
    admission.steer({"connection": 0.5})
    ports = {9: 0.0, 17: 0.0, 53: 1.0, 80: 0.0}
    assert {port: admission.should_sample("connection", {"port": port}) for port in ports} == ports
    assert admission.stats()["connection"] == Account(seen=4, filtered=2, sampled_out=1, estimate=Estimate(1, 1.0))
    assert admission.matches() == {"noise": 2, "dns": 1, "all-dns": 0}


def test_a_rule_without_a_ratio_gives_another_priority() -> None:
    """Its events are kept as those of the priority are: critical ones whole, debug ones like the thinnest class."""
    admission = Admission(coin=lambda: 0.3)
    admission.configure([rule("vip", "vip", priority="critical"), rule("chatter", "cron", priority="debug")], 1.0)
    admission.steer({"exec": 0.9, "connection_close": 0.2, "syscall": 0.25, "container": 1.0})
    assert admission.should_sample("exec", {"command": "vip"}) == 1.0
    assert admission.should_sample("exec", {"command": "cron"}) == 0.0


def test_events_of_the_kernel_are_thinned_for_those_who_watch() -> None:
    """A rule that keeps half passes one of two, with twice the weight and the rule's priority; one of 0 passes none."""
    coins = iter((0.4, 0.6, 0.0))
    admission, got = Admission(coin=lambda: next(coins)), []
    admission.configure([rule("dns", "port 53", priority="error", ratio=0.5), rule("noise", "curl", ratio=0.0)])
    admission.tap(got.append)
    event = KeptEvent(1.0, "connection", "opened", "info", weight=4.0, details={"port": 53})
    admission.record_event(event)
    admission.record_event(event)
    admission.record_event(replace(event, command="curl", details={}))
    admission.record_event(replace(event, details={}))
    assert [(one.priority, one.weight) for one in got] == [("error", 8.0), ("info", 4.0)]
    assert admission.matches() == {"dns": 2, "noise": 1}
    assert "connection" not in admission.stats()


def test_rules_that_are_off_match_nothing_and_a_reload_keeps_counts() -> None:
    """`enabled: false` is as if it were not there; a rule of the same name goes on counting."""
    admission = Admission()
    admission.configure([rule("one", ratio=0.0), rule("two", enabled=False)])
    admission.should_sample("exec", {})
    admission.configure([rule("one", "nothing like it"), rule("three")])
    admission.should_sample("exec", {})
    assert admission.matches() == {"one": 1, "three": 1}


@given(
    st.dictionaries(st.text(max_size=20), st.text(max_size=600) | st.integers() | st.floats(), max_size=5),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_any_attributes_are_decided_on(attributes: dict[str, str | int | float], ratio: float, coin: float) -> None:
    """Any bytes, any numbers: the answer is 0 or the inverse of the ratio, and the account holds."""
    admission = Admission(coin=lambda: coin)
    admission.configure([rule("zero", "\0", ratio=0.0), rule("some", "a|[^x]z", ratio=ratio)], 10.0)
    admission.steer({"exec": ratio})
    weight = admission.should_sample("exec", attributes)
    assert weight == 0.0 or weight >= 1.0
    if weight:
        admission.record_event(KeptEvent(0.0, "exec", "start", "info", weight=weight))
    assert balanced(admission.stats()["exec"])


# The account


def test_what_is_lost_behind_the_decision_is_accounted_for_by_stage() -> None:
    """Of 23 kept events two find no room in a queue and one no handler: 20 are handled, none is missing."""
    admission = Admission()
    for number in range(23):
        assert admission.should_sample("exec", START)
        if number >= 3:
            admission.record_event(KeptEvent(0.0, "exec", "start", "info"))
    admission.record_drop("exec", "queue", 2)
    admission.record_drop("exec", "handler")
    account = admission.stats()["exec"]
    assert (account.handled, account.lost) == (20, {"queue": 2, "handler": 1})
    assert balanced(account)


def test_events_that_the_kernel_accounts_for_are_not_counted_twice() -> None:
    """A class that no source has asked about is only passed on."""
    admission, got = Admission(), []
    admission.tap(got.append)
    admission.record_event(EVENT)
    assert ("veth" in admission.stats(), got) == (False, [EVENT])


def test_an_account_that_was_given_does_not_change() -> None:
    """What stats() gave is of its moment."""
    admission = Admission()
    admission.record_drop("exec", "queue")
    before = admission.stats()
    admission.record_drop("exec", "queue")
    assert before["exec"].lost == {"queue": 1}


def test_threads_do_not_lose_count() -> None:
    """Four threads offer 23 x 100 events each, half of them thinned: the account is exact."""
    admission = Admission()
    admission.steer({"exec": 0.5})
    threads = [threading.Thread(target=lambda: offered(admission, "exec", 2300)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    account = admission.stats()["exec"]
    assert account.seen == 4 * 2300
    assert balanced(account)
