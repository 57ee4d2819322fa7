"""Estimates of what was offered, from what was kept: each kept event stands for as many as its weight says.

Flows in: weights, the inverse of the probability that an event was kept with. Flows out: totals that are right in the
mean (Horvitz and Thompson, 1952), each with its standard error. Not safe from several threads.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True)
class Estimate:
    """How many events there were."""

    kept: int = 0
    """Events that were kept."""
    total: float = 0.0
    """Events that there were, estimated: the sum of the weights."""
    variance: float = 0.0
    """Of `total`, estimated without bias: the sum of weight (weight - 1), as each event has a coin of its own."""

    def add(self, weight: float, count: int = 1) -> None:
        """Count `count` kept events of a weight. Raises ValueError for a weight below 1: a probability is at most 1."""
        if not 1.0 <= weight < math.inf:
            raise ValueError(f"weight {weight!r}: give the inverse of the probability of being kept, 1 or more")
        self.kept += count
        self.total += weight * count
        self.variance += weight * (weight - 1.0) * count

    @property
    def standard_error(self) -> float:
        """Events by which `total` is off, as one standard deviation; 0 where all were kept."""
        return math.sqrt(self.variance)


class HeaviestEstimates(Generic[T]):
    """Estimates for the heaviest keys of many, in bounded memory: at most twice `limit` keys are held.

    A key that is light for long is forgotten, and counts from 0 when it comes back; so a key's total is right or too
    low, and by no more than `forgotten`.
    """

    def __init__(self, limit: int) -> None:
        """Hold `limit` keys. Raises ValueError below 1."""
        if limit < 1:
            raise ValueError(f"limit {limit}: give 1 or more")
        self.evicted = 0
        """Keys that were forgotten, each time it happened."""
        self.forgotten = 0.0
        """The largest total that a forgotten key may have had, all its returns added up: events, estimated."""
        self._limit = limit
        self._estimates: dict[T, Estimate] = {}

    def __len__(self) -> int:
        """Return the number of keys held."""
        return len(self._estimates)

    def add(self, key: T, weight: float, count: int = 1) -> None:
        """Count kept events of a key. Raises ValueError for a weight below 1."""
        estimate = self._estimates.get(key)
        if estimate is None:
            estimate = Estimate()
            estimate.add(weight, count)
            if len(self._estimates) >= 2 * self._limit:
                self._forget()
            self._estimates[key] = estimate
        else:
            estimate.add(weight, count)

    def heaviest(self) -> list[tuple[T, Estimate]]:
        """Return at most `limit` keys, heaviest first, with their estimates."""
        return sorted(self._estimates.items(), key=lambda item: -item[1].total)[: self._limit]

    def _forget(self) -> None:
        kept = self.heaviest()
        self.evicted += len(self._estimates) - len(kept)
        held = dict(kept)
        self.forgotten += max(one.total for key, one in self._estimates.items() if key not in held)
        self._estimates = held
