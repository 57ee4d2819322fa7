"""Random counts in plain Python: exact for small ones, normal for large ones, unbiased in both."""

import math
from collections.abc import Sequence
from random import Random


def seeded(name: object) -> Random:
    """Return the generator of a name: the same numbers each time."""
    return Random(str(name))  # noqa: S311 - a simulation has no secrets


_EXACT = 12.0
"""Expected counts below are drawn exactly."""


def binomial(random: Random, count: int, share: float) -> int:
    """Draw how many of `count` events are hit, each with probability `share`."""
    if count <= 0 or share <= 0:
        return 0
    if share >= 1:
        return count
    if share > 0.5:
        return count - binomial(random, count, 1 - share)
    if count * share >= _EXACT:
        drawn = round(random.gauss(count * share, math.sqrt(count * share * (1 - share))))
        return min(max(drawn, 0), count)
    hits, at, scale = -1, 0, math.log1p(-share)
    while at <= count:  # the distance from hit to hit is geometric
        at += int(math.log(1.0 - random.random()) / scale) + 1
        hits += 1
    return hits


def poisson(random: Random, mean: float) -> int:
    """Draw the number of independent arrivals of which `mean` are expected."""
    if mean >= _EXACT * 4:
        return max(round(random.gauss(mean, math.sqrt(mean))), 0)
    left, drawn = random.random(), 0
    floor = math.exp(-mean)
    while left > floor:
        left *= random.random()
        drawn += 1
    return drawn


def multinomial(random: Random, count: int, shares: Sequence[float]) -> list[int]:
    """Part `count` events among shares that sum up to one."""
    drawn, left = [], 1.0
    for share in shares:
        hit = binomial(random, count, min(share / left, 1.0) if left > 0 else 0.0)
        drawn.append(hit)
        count -= hit
        left -= share
    if drawn:
        drawn[-1] += count  # what rounding of the shares left over
    return drawn
