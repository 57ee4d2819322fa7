"""What steers events: observations are complete, decisions reach kernel and admission, and all of it is told."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from recorder import RecordedFamilies

from exporter import load_config
from exporter.config import Config
from exporter.config.models import KernelFilter, LoadConfig, PriorityFilter
from exporter.load.admission import CLASSES, Admission, KeptEvent
from exporter.load.decision import Decision, KeyRule, Observation
from exporter.load_config import KernelFilters
from exporter.monitors.kernel.consumer import Tally
from exporter.monitors.kernel.controls import Counts, Rule
from exporter.monitors.kernel.shapes import CLASSES as IN_KERNEL
from exporter.steering import Steering


class FakeGovernor:
    """Decides what the test says, and remembers what it was told."""

    def __init__(self, decision: Decision | None = None) -> None:
        self.decision = decision or Decision(0.0, dict.fromkeys(CLASSES, 1.0))
        self.observed: list[Observation] = []
        self.called = threading.Event()

    def step(self, observation: Observation) -> Decision:
        self.observed.append(observation)
        self.called.set()
        return self.decision


class FakeControls:
    """The kernel's maps, as far as steering knows them."""

    def __init__(self) -> None:
        self.counts = Counts({}, {}, {}, {})
        self.ring = 0.0
        self.applied: list[tuple[Mapping[str, float], tuple[Rule, ...], float]] = []
        self.refused: list[tuple[Rule, str]] = []
        self.met: dict[Rule, int] = {}
        self.broken = 0

    def observe(self) -> Counts:
        if self.broken:
            self.broken -= 1
            raise OSError(1, "Operation not permitted")
        return self.counts

    def apply(self, ratios: Mapping[str, float], rules: Iterable[Rule], now: float) -> list[tuple[Rule, str]]:
        self.applied.append((ratios, tuple(rules), now))
        return self.refused

    def matches(self) -> dict[Rule, int]:
        return self.met

    def fill(self) -> float:
        return self.ring


class Rig:
    """A steering with everything around it faked, and a clock."""

    def __init__(
        self, decision: Decision | None = None, filters: Iterable[KernelFilter] = (), *, on: bool = True
    ) -> None:
        self.now = 100.0
        self.governor = FakeGovernor(decision)
        self.controls = FakeControls()
        self.admission = Admission(coin=lambda: 0.9)
        self.families = RecordedFamilies()
        self.present: dict[str, tuple[str, tuple[str, str, str]]] = {}
        self.tally = Tally()
        kernel: Any = SimpleNamespace(programs=SimpleNamespace(tally=self.tally), controls=self.controls)
        governor: Any = self.governor if on else None
        self.steering = Steering(
            governor,
            self.admission,
            self.families,
            kernel,
            KernelFilters(tuple(filters), lambda: self.present),
            lambda: {"cpu": 0.5},
            lambda: self.now,
        )

    def value(self, family: str, *key: str) -> float:
        return self.families.value(family, key)


def test_an_observation_holds_what_the_kernel_and_the_admission_counted_since_the_last() -> None:
    """Classes of both sides are there, as differences; capacity is that of the processor share that may be used."""
    rig = Rig()
    rig.admission.steer({"container": 1.0})
    rig.controls.counts = Counts(
        {"exec": 100}, {"exec": 10}, {"exec": 5}, {"exec": 2}, {"exec": {("comm", "cc"): 60}}, ring=0.25
    )
    rig.tally.busy = 0.5
    for _ in range(3):
        rig.admission.should_sample("container", {})
    rig.steering.step()
    rig.tally.handled["exec"] = 83
    rig.tally.busy, rig.tally.share = 0.75, 0.25
    rig.now = 101.0
    rig.steering.step()
    first, second = rig.governor.observed
    assert (first.time, first.seen, first.filtered, first.lost) == (
        *(100.0, {"exec": 100, "container": 3}, {"exec": 10}),
        {"exec": 2},
    )
    assert (first.keys, first.ring, first.pressure) == ({"exec": {("comm", "cc"): 60}}, 0.25, {"cpu": 0.5})
    assert (first.handled, first.busy) == (0, 0.0)
    assert second.seen == {"exec": 100}
    assert (second.handled, second.busy) == (83, 3.0)


def test_a_decision_reaches_the_kernel_and_the_admission() -> None:
    """Ratios go to whoever decides on the class; learned rules to the kernel, in its words."""
    ratios = dict.fromkeys(CLASSES, 1.0) | {"container": 0.5, "exec": 0.25}
    rig = Rig(Decision(100.0, ratios, (KeyRule("exec", ("comm", "cc"), 0.1, 160.0),)))
    rig.steering.step()
    ((in_kernel, rules, now),) = rig.controls.applied
    assert in_kernel == {class_: ratios[class_] for class_ in IN_KERNEL}
    assert rules == (Rule("comm", "cc", ("exec",), 0.1, "learned", expires=160.0),)
    assert now == 100.0
    assert rig.admission.should_sample("container", {}) == 0.0


def test_without_load_management_all_is_kept_and_no_rule_is_in_force() -> None:
    """Ratios of a run before are taken back; the account is told nevertheless, a level is not."""
    rig = Rig(on=False)
    rig.admission.should_sample("container", {})
    rig.steering.step()
    assert rig.controls.applied == [(dict.fromkeys(IN_KERNEL, 1.0), (), 100.0)]
    assert rig.value("cni_events_seen_total", "container") == 1
    assert "cni_load_level" not in rig.families.snapshots
    assert rig.steering.learned() == []


def test_what_was_decided_is_told() -> None:
    """Level, pattern, load, forecast, target and actual share per class, adaptations and anomalies as counters."""
    ratios = dict.fromkeys(CLASSES, 1.0) | {"exec": 0.5}
    rig = Rig(
        Decision(
            *(100.0, ratios, (), "high", 30_000.0, 40_000.0),
            pattern="bursty",
            anomalies=("exec",),
            reasons=("level", "cpu"),
        )
    )
    rig.controls.counts = Counts({"exec": 110, "veth": 10}, {"exec": 10}, {"exec": 60}, {"exec": 20})
    rig.steering.step()
    rig.controls.counts = Counts({}, {}, {}, {})
    rig.steering.step()
    levels = {key: value for (key,), value in rig.families.snapshots["cni_load_level"].items()}
    assert levels == {"low": 0, "medium": 0, "high": 1, "critical": 0}
    assert rig.value("cni_load_pattern", "bursty") == 1
    assert (rig.value("cni_load_events_per_second"), rig.value("cni_load_forecast_events_per_second")) == (3e4, 4e4)
    assert rig.value("cni_sampling_target_ratio", "exec") == 0.5
    assert rig.value("cni_sampling_ratio", "exec") == pytest.approx(0.2)  # the last there was to say
    assert rig.value("cni_sampling_ratio", "connection") == 1
    assert rig.value("cni_drop_ratio") == 0
    assert rig.value("cni_load_adaptations_total", "cpu") == 2
    assert rig.value("cni_load_adaptations_total", "disk") == 0
    assert rig.value("cni_load_anomalies_total", "exec") == 2


def test_the_share_that_was_not_kept_is_of_what_is_behind_filters() -> None:
    """Of 110 met and 10 filtered 60 are sampled out and 20 lost: four fifths."""
    rig = Rig()
    rig.controls.counts = Counts({"exec": 110}, {"exec": 10}, {"exec": 60}, {"exec": 20})
    rig.steering.step()
    assert rig.value("cni_drop_ratio") == pytest.approx(0.8)


def test_the_account_of_both_sides_is_told_with_estimates() -> None:
    """The admission's classes are told whole, estimates are those of both sides with their standard error."""
    rig = Rig()
    rig.admission.record_drop("container", "queue", 2)
    for _ in range(5):
        rig.admission.should_sample("container", {})
    for _ in range(3):
        rig.admission.record_event(KeptEvent(0.0, "container", "start", "critical"))
    rig.tally.weights, rig.tally.variances = {"exec": 400.0, "container": 1.0}, {"exec": 900.0}
    rig.steering.refresh()
    account = {name: rig.value(f"cni_events_{name}_total", "container") for name in ("seen", "handled", "filtered")}
    assert account == {"seen": 5, "handled": 3, "filtered": 0}
    assert rig.value("cni_events_lost_total", "container", "queue") == 2
    assert rig.value("cni_events_estimated_total", "exec") == 400
    assert rig.value("cni_events_estimated_total", "container") == 6
    assert rig.value("cni_events_estimate_standard_error", "exec") == 30


def test_rules_are_counted_by_kind_and_origin_and_their_matches_never_fall() -> None:
    """Rules about one subject share the kernel's count; a rule that is gone, or begins anew, takes nothing away."""
    rig = Rig()
    rig.admission.configure(load_config.patterns(LoadConfig(priority_filters=(PriorityFilter(name="any"),))))
    rig.controls.met = {
        Rule("comm", "cc", ("exec",), 0.1, "learned"): 7,
        Rule("comm", "cc", ("connection",), 0.2, "learned"): 7,
        Rule("port", "53"): 3,
    }
    rig.admission.should_sample("container", {})
    rig.steering.step()
    rig.controls.met = {Rule("comm", "cc", ("exec",), 0.1, "learned"): 2}
    rig.steering.step()
    found = rig.families.snapshots
    assert found["cni_filter_rules"] == {
        ("container", "learned"): 0,
        ("command", "learned"): 1,
        ("address", "learned"): 0,
        ("pattern", "configured"): 1,
    }
    assert found["cni_filter_rule_matches_total"] == {
        ("container", "learned"): 0,
        ("command", "learned"): 9,
        ("address", "learned"): 0,
        ("port", "configured"): 3,
        ("pattern", "configured"): 1,
    }


def test_learned_rules_are_told_to_people_until_they_end() -> None:
    """In the user's words, with the seconds that are left."""
    rules = (KeyRule("exec", ("netns", "7:41"), 0.1, 130.0), KeyRule("exec", ("prefix", "::1"), 0.2, 110.0))
    rig = Rig(Decision(100.0, dict.fromkeys(CLASSES, 1.0), rules))
    rig.steering.step()
    assert [(rule.kind, rule.subject, rule.expires_in) for rule in rig.steering.learned()] == [
        ("container", "7:41", 30.0),
        ("address", "::1", 10.0),
    ]
    rig.now = 120.0
    assert [rule.kind for rule in rig.steering.learned()] == ["container"]


def test_a_rule_that_the_kernel_does_not_take_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The reason is in the log, not once a second."""
    rig = Rig()
    rig.controls.refused = [(Rule("port", "x"), "x is no port")]
    rig.steering.step()
    rig.steering.step()
    assert caplog.text.count("x is no port") == 1


# The thread


def until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_thread_steps_survives_a_failure_and_ends(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A map that cannot be read costs a step, is logged, and the next one is made; stop waits for the thread."""
    monkeypatch.setattr("exporter.steering._REST", 0.0)
    rig = Rig()
    rig.controls.broken = 1
    rig.steering.start()
    assert rig.governor.called.wait(10)
    assert "a step failed" in caplog.text
    assert rig.steering.stop(10)
    assert not rig.steering.hung


def test_a_ring_that_is_half_full_is_not_waited_for() -> None:
    """The next step was to come in an hour; the ring calls for it now."""
    rig = Rig(Decision(100.0, dict.fromkeys(CLASSES, 1.0), next=3600.0))
    rig.steering.start()
    assert rig.governor.called.wait(10)
    rig.controls.ring = 0.5
    until(lambda: len(rig.governor.observed) > 2)
    assert rig.steering.stop(10)


def test_a_steering_that_was_never_started_can_be_stopped() -> None:
    """The exporter ends before it began."""
    assert Rig().steering.stop(0.1)


# What the configuration means


def test_settings_follow_the_configuration() -> None:
    """Percent become shares, switches choose kinds of keys, configured subjects are exempt; 0 is the least there is."""
    section = LoadConfig(
        strategy="budget",
        min_sampling_rate=0.0,
        cpu_threshold=75.0,
        adaptation_interval=2.0,
        enable_intelligent_sampling=False,
        enable_load_balancing=False,
        kernel_filters=(
            KernelFilter(kind="command", subject="cc"),
            KernelFilter(kind="container", subject="web"),
        ),
    )
    found = load_config.settings(section)
    assert (found.strategy, found.min_ratio, found.cpu_threshold) == ("budget", 0.0001, 0.75)
    assert (found.interval, found.forecast, found.rule_kinds) == (2.0, False, ("comm", "prefix"))
    assert found.exempt == {("comm", "cc")}
    assert load_config.settings(Config().load_config).rule_kinds == ("netns", "comm", "prefix")
    assert load_config.counted(LoadConfig(enable_adaptive_filtering=False)) == ("netns",)
    assert load_config.counted(LoadConfig(enable_kernel_filtering=False)) == ()


def test_rules_are_put_into_the_kernels_words() -> None:
    """A ratio stands in place of the class' own; 0 filters; no class means all."""
    filters = (
        KernelFilter(kind="command", subject="cc", classes=("exec",), ratio=0.5),
        KernelFilter(kind="address", subject="10.0.0.0/8"),
        KernelFilter(kind="port", subject="53"),
    )
    assert KernelFilters(filters, dict).rules() == [
        Rule("comm", "cc", ("exec",), 0.5, instead=True),
        Rule("prefix", "10.0.0.0/8"),
        Rule("port", "53"),
    ]


@pytest.mark.parametrize(
    ("subject", "found"),
    [
        ("web", ["1:1"]),
        ("shop/web-0", ["2:2"]),
        ("abcdef", ["1:1"]),
        ("abcde", []),
        ("", []),
        ("/", []),
        ("nobody", []),
    ],
)
def test_a_container_is_found_by_name_id_or_pod(subject: str, found: list[str]) -> None:
    """Five digits are a name; what has no name is nobody's."""
    present = {
        "1:1": ("abcdef" + "0" * 58, ("", "", "web")),
        "2:2": ("123456" + "0" * 58, ("shop", "web-0", "")),
        "3:3": ("", ("", "", "")),
    }
    one = KernelFilter.model_construct(kind="container", subject=subject, classes=(), ratio=0.0)
    assert [rule.subject for rule in KernelFilters((one,), lambda: present).rules()] == found


def test_a_container_that_comes_gets_its_rule() -> None:
    """Who is there is asked anew for each decision."""
    rig = Rig(filters=[KernelFilter(kind="container", subject="web")])
    rig.steering.step()
    rig.present["1:1"] = ("", ("", "", "web"))
    rig.steering.step()
    assert [[rule.subject for rule in rules] for _, rules, _ in rig.controls.applied] == [[], ["1:1"]]
