"""Forecast, patterns and anomalies: right on traces whose label is known because they were made so."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

import pytest
from simulation.chance import poisson, seeded

from exporter.load.forecast import Forecast, KeyForecasts
from exporter.load.patterns import LENGTH, History, Patterns

Rate = Callable[[float], float]


def _telegraph(random: Random) -> Rate:
    """Jump between two rates, at any second with a probability of a twentieth."""
    values = [1_000.0]
    for _ in range(700):
        values.append(31_000.0 - values[-1] if random.random() < 0.05 else values[-1])
    return lambda at: values[int(at)]


def _bursts(random: Random, on: float, every: float, jitter: float) -> Rate:
    starts = [0.0]
    while starts[-1] < 700:
        starts.append(starts[-1] + every * random.uniform(1 - jitter, 1 + jitter))
    return lambda at: 30_000.0 if any(start <= at < start + on for start in starts) else 1_000.0


def _sine(random: Random) -> Rate:
    period, swing = random.uniform(8, 100), random.uniform(0.3, 0.9)
    return lambda at: 5_000 * (1 + swing * math.sin(2 * math.pi * at / period))


def _sawtooth(random: Random) -> Rate:
    period = random.randint(8, 100)
    return lambda at: 8_000 + 4_000 * (at % period) / period


def _constant(random: Random) -> Rate:
    rate = random.choice((5, 50, 500, 5_000, 50_000))
    return lambda _: rate


def _line(random: Random) -> Rate:
    base, slope = random.choice((500, 5_000)), random.uniform(8, 40)
    return lambda at: base * (1 + slope * at / 500)


def _growth(random: Random) -> Rate:
    scale = random.uniform(60, 200)
    return lambda at: 1_000 * math.exp(at / scale)


LABELLED: dict[str, tuple[Callable[[Random], Rate], ...]] = {
    "steady": (_constant, lambda random: lambda _: 3_000 * random.uniform(0.85, 1.15)),
    "trending": (_line, _growth, lambda _: lambda at: 60_000 - 90 * at),
    "periodic": (
        _sine,
        _sawtooth,
        lambda random: _bursts(random, random.uniform(2, 20), random.uniform(40, 80), 0),
        lambda random: _bursts(random, 3, random.uniform(10, 20), 0),
    ),
    "bursty": (
        _telegraph,
        lambda random: lambda _: min(2_000 * random.paretovariate(1.3), 300_000),
        lambda random: _bursts(random, random.uniform(2, 5), random.uniform(20, 40), 0.8),
    ),
}


def _told(random: Random, rate: Rate, seconds: int) -> Iterator[tuple[Patterns, tuple[str, ...]]]:
    """Yield what is known after each second, and the anomalies of it."""
    patterns = Patterns(["connection", "exec"])
    for second in range(seconds):
        rates = {"connection": float(poisson(random, rate(second))), "exec": float(poisson(random, 50.0))}
        yield patterns, patterns.update(rates, 1.0)


@pytest.mark.parametrize("label", LABELLED)
def test_patterns_of_labelled_traces(label: str) -> None:
    """Five minutes of history: at least nineteen of twenty traces have their label most of the time after that."""
    found: Counter[str] = Counter()
    for seed in range(3):
        for make in LABELLED[label]:
            random = seeded(f"{label} {seed}")
            told = [one.pattern for one, _ in _told(random, make(random), 360)][300::10]
            found[Counter(told).most_common(1)[0][0]] += 1
    print(dict(found))
    assert found[label] >= 0.95 * found.total()


def test_the_period_is_the_one_that_the_trace_was_made_with() -> None:
    """To the second, for periods from 8 to 100 seconds; not a multiple of it."""
    for period in (8, 20, 45, 60, 100):
        *_, (last, _) = _told(seeded(1), lambda at, period=period: 9_000 if at % period < 4 else 1_000, 320)
        assert last.period == period


def test_there_is_no_pattern_without_history() -> None:
    """Less than half a minute: unknown."""
    assert {one.pattern for one, _ in _told(seeded(1), lambda _: 1_000, 29)} == {"unknown"}


@pytest.mark.parametrize(
    ("base", "departure"),
    [
        (lambda _: 2_000, lambda at, rate: rate * 5 if at < 303 else rate),
        (lambda _: 2_000, lambda at, rate: 0 if at < 360 else rate),
        (lambda _: 20, lambda _, rate: rate * 4),
        (lambda at: 1_000 + 50 * at, lambda _, rate: rate * 3),
        (lambda at: 3_000 + 2_000 * math.sin(at / 7), lambda at, rate: rate * 5 if at < 303 else rate),
        (lambda at: 20_000 if at % 40 < 10 else 1_000, lambda at, rate: rate + 50_000 if at < 303 else rate),
        (lambda at: 20_000 if at % 40 < 10 else 1_000, lambda at, rate: 0 if at < 360 else rate),
    ],
    ids=["spike", "silence", "few events", "on a ramp", "on a sine", "in a season", "silence in a season"],
)
def test_an_anomaly_is_told_once_when_it_begins(base: Rate, departure: Callable[[float, float], float]) -> None:
    """From 300 s on the class departs: told in that second, and not for anything before it, nor for another class."""

    def rate(at: float) -> float:
        return departure(at, base(at)) if at >= 300 else base(at)

    for seed in range(3):
        told = [(at, found) for at, (_, found) in enumerate(_told(seeded(seed), rate, 320)) if found]
        assert [found for at, found in told if 180 <= at < 303] == [("connection",)]
        assert (300, ("connection",)) in told


@pytest.mark.parametrize("label", ["steady", "trending", "bursty"])
def test_what_a_class_does_always_is_no_anomaly(label: str) -> None:
    """Two false alarms at most in all traces of a pattern, four minutes each."""
    told = 0
    for seed in range(3):
        for make in LABELLED[label]:
            random = seeded(f"{label} {seed}")
            told += sum(len(found) for _, found in list(_told(random, make(random), 420))[180:])
    assert told <= 2


def test_a_class_that_comes_in_clumps_is_not_anomalous_in_each() -> None:
    """One or two events a second, five at a time, beside a steady load: four false alarms at most in three hours."""
    random, patterns, told = seeded("clumps"), Patterns(["connection", "exec"]), 0
    for _ in range(3 * 3600):
        clumps = sum(1 + int(random.expovariate(0.25)) for _ in range(poisson(random, 0.3)))
        told += len(patterns.update({"connection": float(clumps), "exec": float(poisson(random, 50.0))}, 1.0))
    assert told <= 4


# Forecast


def _followed(rates: list[float]) -> Forecast:
    forecast = Forecast()
    for rate in rates:
        forecast.update(rate, 1.0)
    return forecast


def test_a_steady_rate_is_forecast_as_it_is() -> None:
    """After a minute, to a thousandth."""
    assert _followed([500.0] * 60).value == pytest.approx(500, rel=1e-3)


def test_a_step_up_is_planned_for_when_it_lasts() -> None:
    """The second reading of the new rate makes it the forecast; a single second that is a spike does not."""
    assert _followed([1_000.0] * 60 + [100_000.0] * 2).value >= 100_000
    assert _followed([1_000.0] * 60 + [100_000.0] + [1_000.0] * 2).value < 50_000


def test_a_peak_is_remembered_for_a_minute() -> None:
    """Bursts of ten seconds stay planned for until a minute has gone."""
    burst = [1_000.0] * 30 + [50_000.0] * 10
    assert _followed([*burst, *[1_000.0] * 45]).value > 30_000
    assert _followed([*burst, *[1_000.0] * 75]).value < 5_000


def test_no_more_keys_are_followed_than_there_is_room_for() -> None:
    """Of 200 keys the last 64 are; what made room is counted; a key that was not heavy for a minute is forgotten."""
    keys = KeyForecasts()
    for number in range(200):
        keys.update({("container", str(number)): 100.0}, 0.1)
    assert len(keys.heaviest("container", 1_000)) == 64
    assert keys.evicted == 136
    keys.update({}, 61.0)
    assert keys.heaviest("container", 1_000) == []


def test_history_has_bins_of_a_second_whatever_the_steps() -> None:
    """Steps of 0.1 to 1000 seconds: the sum of the bins is the number of events; never more than five minutes."""
    history = History(["a"])
    for dt in (0.1, 0.25, 0.65, 1.0, 3.5, 2.5):
        history.add({"a": 10.0}, dt)
    assert list(history.rates["a"]) == pytest.approx([10.0] * 8)
    history.add({"a": 5.0}, 1_000.0)
    assert len(history.rates["a"]) == LENGTH
    assert set(history.rates[""]) == {5.0}
