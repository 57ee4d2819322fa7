"""The governor in the simulated world, a minute of each trace: what docs/load-management.md says of ten."""

from collections.abc import Callable, Sequence
from functools import cache

import pytest

from simulation.chance import binomial, multinomial, poisson, seeded
from simulation.controllers import Controller, Ours, Pi, Rival, Table
from simulation.traces import Trace, standard
from simulation.world import Figures, World

SECONDS = 60
HARD = ("step 1k to 100k", "bursts of 3 s", "one key with 95 %")
"""Traces on which rivals are run too."""


def _runs(make: Callable[[], Controller], *, brake: bool, only: Sequence[str] = ()) -> list[Figures]:
    traces = [trace for trace in _traces() if not only or trace.name in only]
    return [World(trace, make(), 1, brake=brake).run() for trace in traces]


@cache
def _traces() -> list[Trace]:
    return standard(SECONDS)


@pytest.fixture(scope="module")
def thresholds() -> list[Figures]:
    return _runs(lambda: Ours("thresholds"), brake=True)


@pytest.fixture(scope="module")
def budget() -> list[Figures]:
    return _runs(lambda: Ours("budget"), brake=True)


@pytest.fixture(params=["thresholds", "budget"])
def ours(request: pytest.FixtureRequest) -> list[Figures]:
    return list(request.getfixturevalue(request.param))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_nothing_is_lost_on_any_trace(ours: list[Figures]) -> None:
    """Neither critical events nor others: what does not fit is sampled, with its weight."""
    assert {one.trace: one.loss for one in ours if one.loss} == {}
    assert {one.trace: one.critical_loss for one in ours if one.critical_loss} == {}


def test_no_minute_has_more_than_ten_adaptations(ours: list[Figures]) -> None:
    """On no trace, in no 60 seconds."""
    assert max(one.worst_minute for one in ours) <= 10
    assert _mean([one.adaptations for one in ours]) <= 3


def test_a_step_up_is_followed_within_a_second(ours: list[Figures]) -> None:
    """In the mean of all steps of all traces; none takes three."""
    steps = [step for one in ours for step in one.step_up]
    assert _mean(steps) < 1
    assert max(steps) < 3


def test_estimates_of_classes_are_unbiased(ours: list[Figures]) -> None:
    """Less than half a percent off in the mean of classes and traces, on each trace less than two."""
    biases = [_mean(list(one.bias.values())) for one in ours]
    assert abs(_mean(biases)) < 0.005
    assert max(map(abs, biases)) < 0.02


def test_small_keys_are_estimated_well(thresholds: list[Figures], budget: list[Figures]) -> None:
    """Over a minute: thresholds 5.4 % (worst 11 %), budget 2 % (worst 4.7 %)."""
    assert _mean([one.key_error for one in thresholds]) < 0.054
    assert max(one.key_error for one in thresholds) < 0.11
    assert _mean([one.key_error for one in budget]) < 0.0204
    assert max(one.key_error for one in budget) < 0.047


def test_the_consumer_is_used(thresholds: list[Figures], budget: list[Figures]) -> None:
    """Of what could be handled: 38 % by the table, 74 % by budget, and more."""
    assert _mean([one.use for one in thresholds]) > 0.38
    assert _mean([one.use for one in budget]) > 0.74


def test_the_table_read_literally_and_a_pi_controller_are_beaten(budget: list[Figures]) -> None:
    """They lose events, critical ones among them, estimate small keys worse, and adapt more often."""
    mine = [one for one in budget if one.trace in HARD]
    for rival in (Table, Pi):
        runs = _runs(rival, brake=False, only=HARD)
        assert max(one.loss for one in runs) > 0.01
        assert max(one.critical_loss for one in runs) > 0.01
        assert _mean([one.key_error for one in runs]) > _mean([one.key_error for one in mine])
        assert _mean([one.adaptations for one in runs]) > 3 * _mean([one.adaptations for one in mine])


@pytest.mark.parametrize("strategy", ["thresholds", "budget"])
def test_other_shapes_do_no_harm(strategy: str) -> None:
    """Swings of a second, a million events per second, single ticks of a million, errors alone: no loss, no churn."""
    errors = {"cni_run": 0.01, "packet_drop": 0.99}
    for trace in (
        Trace("swings", 60, lambda at, _: 60_000.0 if at % 1 < 0.5 else 1_000.0),
        Trace("million", 60, lambda *_: 1e6),
        Trace("ticks", 60, lambda _, random: 1e6 if random.random() < 0.003 else 3_000.0),
        Trace("errors", 60, lambda *_: 60_000.0, mix=lambda _: errors),
    ):
        controller = Ours("thresholds" if strategy == "thresholds" else "budget")
        figures = World(trace, controller, 7, brake=True).run()
        assert (figures.loss, figures.critical_loss) == (0.0, 0.0)
        assert figures.worst_minute <= 10


# The simulator's own ground


def test_random_counts_are_unbiased() -> None:
    """Small and large ones; parts of a multinomial sum up to the whole."""
    random = seeded(5)
    for count, share in ((40, 0.1), (1_000, 0.002), (5_000, 0.3), (90, 0.97)):
        drawn = _mean([binomial(random, count, share) for _ in range(4_000)])
        assert drawn == pytest.approx(count * share, abs=4 * (count * share * (1 - share) / 4_000) ** 0.5)
    assert _mean([poisson(random, 3.5) for _ in range(4_000)]) == pytest.approx(3.5, abs=0.12)
    assert sum(multinomial(random, 1_000, [0.2, 0.3, 0.5])) == 1_000


def test_without_control_and_brake_the_world_loses_what_does_not_fit() -> None:
    """100,000 offered, 20,000 handled: four fifths are lost, critical events alike; the account is whole."""
    trace = standard(60)[1]
    trace.rate = lambda *_: 100_000.0
    figures = World(trace, Rival(), 3, brake=False).run()
    assert figures.loss == pytest.approx(0.8, abs=0.05)
    assert figures.critical_loss == pytest.approx(figures.loss, abs=0.02)
