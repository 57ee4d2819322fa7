"""Estimates from weights: right in the mean, with a standard error that is one, in bounded memory."""

import math
from random import Random

import pytest
from simulation.chance import seeded

from exporter.load.estimates import Estimate, HeaviestEstimates


def _sampled(random: Random, counts: dict[float, int]) -> Estimate:
    """Keep each event with its ratio, by a coin of its own."""
    estimate = Estimate()
    for ratio, count in counts.items():
        for _ in range(count):
            if random.random() < ratio:
                estimate.add(1 / ratio)
    return estimate


def test_estimates_are_unbiased_and_their_standard_error_is_the_spread() -> None:
    """400 samples with mixed ratios: the mean is the truth, errors are as wide as told, 95 % within two of them."""
    random, truth = seeded(23), {1.0: 50, 0.5: 200, 0.1: 400, 0.01: 1_000}
    estimates = [_sampled(random, truth) for _ in range(400)]
    total = sum(truth.values())
    spread = math.sqrt(sum(count * (1 / ratio - 1) for ratio, count in truth.items()))
    assert sum(one.total for one in estimates) / 400 == pytest.approx(total, abs=3 * spread / 20)
    assert math.sqrt(sum(one.variance for one in estimates) / 400) == pytest.approx(spread, rel=0.1)
    assert sum(abs(one.total - total) <= 2 * one.standard_error for one in estimates) >= 0.9 * 400


def test_what_was_kept_whole_has_no_error() -> None:
    """Weight 1: the count itself."""
    estimate = Estimate()
    estimate.add(1.0, 23)
    assert (estimate.kept, estimate.total, estimate.standard_error) == (23, 23.0, 0.0)


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_is_refused(weight: float) -> None:
    """An estimate is not spoiled by one bad record."""
    with pytest.raises(ValueError, match="1 or more"):
        Estimate().add(weight)


def test_the_heaviest_keys_are_found_among_many_in_bounded_memory() -> None:
    """100,000 light keys and ten heavy ones: the ten come first, right to the event; others are forgotten."""
    estimates: HeaviestEstimates[str] = HeaviestEstimates(20)
    largest = 0
    for number in range(100_000):
        estimates.add(f"light {number}", 2.0)
        if number % 100 == 0:
            for heavy in range(10):
                estimates.add(f"heavy {heavy}", 2.0, 1 + heavy)
        largest = max(largest, len(estimates))
    found = estimates.heaviest()
    assert [key for key, _ in found[:10]] == [f"heavy {heavy}" for heavy in range(9, -1, -1)]
    assert found[0][1].total == 20_000.0
    assert largest <= 40
    assert estimates.evicted > 99_000
    assert estimates.forgotten > 0


def test_at_least_one_key_is_held() -> None:
    """A limit of 0 holds nothing."""
    with pytest.raises(ValueError, match="give 1 or more"):
        HeaviestEstimates(0)
