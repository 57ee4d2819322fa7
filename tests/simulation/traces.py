"""Traces: what is offered, in steps of 100 ms, by class and key. Seeded: one name, length and seed is one trace.

Seven classes in the mix of a busy node and 100 keys (containers) with shares as of 1/rank. The heaviest are told to the
controllers by exact count, as kernel maps do; the others, the small ones, are what estimates are judged by.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from simulation.chance import multinomial, poisson, seeded

TICK = 0.1
"""Seconds."""
MIX = {
    "veth": 0.002,
    "cni_run": 0.008,
    "packet_drop": 0.04,
    "tcp_fault": 0.1,
    "exec": 0.05,
    "connection": 0.4,
    "connection_close": 0.4,
}
KEYS = 100
TOLD = 16
"""Keys whose exact counts controllers get."""
SHARES = [1 / rank / sum(1 / n for n in range(1, KEYS + 1)) for rank in range(1, KEYS + 1)]


@dataclass
class Tick:
    """Events of 100 ms."""

    told: dict[str, list[int]]
    """Per class, of the keys that are told."""
    small: dict[str, int]
    """Per class, of all others together."""


@dataclass
class Trace:
    """What is offered."""

    name: str
    seconds: int
    rate: Callable[[float, Random], float]
    """Events per second at a time; may draw."""
    steps: tuple[float, ...] = ()
    """Seconds at which the load steps up."""
    hog: Callable[[float], float] = lambda _: 0.0
    """Share of all events that the first key has, at a time; 0: its usual share."""
    mix: Callable[[float], Mapping[str, float]] = lambda _: MIX
    """Share of all events that each class has, at a time."""
    _ticks: dict[int, list[Tick]] = field(default_factory=dict)

    def ticks(self, seed: int) -> list[Tick]:
        """Return all of it, drawn once per seed."""
        if seed not in self._ticks:
            random = seeded(f"{self.name} {seed}")
            self._ticks = {seed: [self._tick(random, n * TICK) for n in range(round(self.seconds / TICK))]}
        return self._ticks[seed]

    def shares(self, at: float) -> list[float]:
        """Return the share of each key at a time; the sum is one."""
        hog = self.hog(at)
        if not hog:
            return SHARES
        others = 1 - SHARES[0]
        return [hog, *(share / others * (1 - hog) for share in SHARES[1:])]

    def _tick(self, random: Random, at: float) -> Tick:
        rate, shares = self.rate(at, random), self.shares(at)
        told, small = {}, {}
        for name, part in self.mix(at).items():
            *first, rest = multinomial(
                random, poisson(random, rate * part * TICK), [*shares[:TOLD], sum(shares[TOLD:])]
            )
            told[name], small[name] = first, rest
        return Tick(told, small)


def _flash(at: float, start: float) -> float:
    since = at - start
    if since < 0:
        return 2_000.0
    return 2_000.0 + 58_000.0 * min(since / 5.0, 1.0) * math.exp(-max(since - 5.0, 0.0) / 60.0)


def _bursts(on: float, period: float, high: float, random: Random, jitter: float) -> Callable[[float, Random], float]:
    """Alternate between 1k and `high`; each cycle's length varies by `jitter`."""
    starts = [period / 2]
    while starts[-1] < 4000:
        starts.append(starts[-1] + period * random.uniform(1 - jitter, 1 + jitter))

    def rate(at: float, _: Random) -> float:
        while len(starts) > 1 and starts[1] <= at:
            starts.pop(0)
        return high if 0 <= at - starts[0] < on else 1_000.0

    return rate


def _times(seconds: int, first: float, every: float) -> tuple[float, ...]:
    return tuple(first + n * every for n in range(int((seconds - first) / every) + 1))


def standard(seconds: int = 1200, seed: int = 1) -> list[Trace]:
    """Return the eight kinds; `seconds` each."""
    random = seeded(seed)
    third, quarter = seconds / 3, seconds / 4
    return [
        Trace("steady", seconds, lambda *_: 5_000.0),
        Trace(
            "step 1k to 100k",
            seconds,
            lambda at, _: 100_000.0 if quarter <= at < 2 * quarter or at >= 3 * quarter else 1_000.0,
            (quarter, 3 * quarter),
        ),
        Trace("slow ramp", seconds, lambda at, _: 1_000.0 + 59_000.0 * at / seconds),
        Trace("bursts of 3 s", seconds, _bursts(3, 10, 50_000.0, random, 0.3)),
        Trace("bursts of 20 s", seconds, _bursts(20, 60, 60_000.0, random, 0.0), _times(seconds, 30, 60)),
        Trace("flash crowd", seconds, lambda at, _: _flash(at, third), (third + 2.5,)),
        Trace(
            "one key with 95 %",
            seconds,
            lambda at, _: 5_000.0 if at < third else 100_000.0,
            (third,),
            hog=lambda at: 0.0 if at < third else 0.95,
        ),
        Trace(
            "Pareto arrivals",
            seconds,
            lambda _, random: min(3_000.0 * random.paretovariate(1.4), 500_000.0),
        ),
        Trace("sawtooth at a threshold", seconds, lambda at, _: 8_000.0 + 4_000.0 * (at % 30) / 30),
    ]
