"""A kernel, a ring and a consumer: what becomes of a trace under a controller, and the figures of it."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from exporter.load.admission import CLASSES
from exporter.load.decision import Key, Observation
from simulation.chance import binomial, multinomial, seeded
from simulation.controllers import Controller
from simulation.traces import TICK, TOLD, Tick, Trace

RING = 16_384
"""Records that the ring holds."""
CAPACITY = 20_000.0
"""Events per second that the consumer handles while it is not paused."""
_NAMES: list[Key] = [("container", f"key{n}") for n in range(TOLD)]
_LATER = {"critical": 99, "error": 2, "warning": 1, "info": 0, "debug": 0}
"""Steps of the brake by which a priority is spared."""
_RESERVE = 0.9
"""Of the ring, for events that are not critical, where there is a brake."""
_MINUTE = round(60 / TICK)


@dataclass
class Figures:
    """What came of it. Shares of one, seconds, events."""

    trace: str
    controller: str
    loss: float = 0.0
    """Share of all events for which there was no room."""
    critical_loss: float = 0.0
    adaptations: float = 0.0
    """Per minute, in the mean."""
    worst_minute: int = 0
    """Adaptations in the worst 60 s."""
    step_up: list[float] = field(default_factory=list)
    """Seconds from each step up until what ratios and rules alone let through is what the consumer can handle."""
    key_error: float = 0.0
    """Over each minute: sum of |estimate - truth| of the small keys, by the sum of the truth; mean of the minutes."""
    use: float = 0.0
    """Events handled by what could have been: the least of those offered and 80 % of the consumer's capacity."""
    bias: dict[str, float] = field(default_factory=dict)
    """Per class: estimate by truth, less one."""


class World:
    """Runs one trace under one controller."""

    def __init__(self, trace: Trace, controller: Controller, seed: int, *, brake: bool) -> None:
        self.trace, self.controller, self.brake = trace, controller, brake
        self._seed = seed
        self._random = seeded(f"{trace.name} {seed} world")
        self._fill = 0.0
        self._pause = 0.0
        self._since = _Since()
        self._seen = dict.fromkeys(CLASSES, 0)
        self._lost = dict.fromkeys(CLASSES, 0.0)
        self._estimate = dict.fromkeys(CLASSES, 0.0)
        self._kept_of_small: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
        self._adapted: list[float] = []
        self._errors: list[float] = []
        self._could = self._did = 0.0
        self._figures = Figures(trace.name, controller.name)
        self._stepping: list[float] = []

    def run(self) -> Figures:
        """Return the figures."""
        for number, tick in enumerate(self.trace.ticks(self._seed)):
            now = (number + 1) * TICK
            self._offer(tick)
            self._control(now)
            self._stepping += [step for step in self.trace.steps if round(step / TICK) == number]
            self._watch_steps(now, tick)
            if (number + 1) % _MINUTE == 0:
                self._judge_small(now)
        return self._summary()

    def _offer(self, tick: Tick) -> None:
        """Take 100 ms of events through ratios, brake and ring, while the consumer works."""
        groups = self._groups(tick)
        allowed = sum(count * ratio for _, count, ratio, _ in groups)
        parts = min(max(math.ceil(allowed / (RING / 16)), 1), 40) if self.brake else 1
        before = self._did
        for part in range(parts):
            self._admit(groups, part, parts)
            self._consume(TICK / parts)
            self._since.ring = max(self._since.ring, self._fill / RING)
        offered = sum(count for _, count, _, _ in groups)
        self._could += min(offered, 0.8 * CAPACITY * TICK)
        self._since.handled += self._did - before

    def _groups(self, tick: Tick) -> list[tuple[str, int, float, bool]]:
        """Return (class, events, ratio, whether of small keys): those with a rule apart, others of a class as one."""
        found = []
        ratios, rules = self.controller.ratios, self.controller.rules
        ruled = defaultdict(list)
        for (name, key), ratio in rules.items():
            ruled[name].append((_NAMES.index(key), ratio))
        for name, small in tick.small.items():
            told = tick.told[name]
            ratio, middle = ratios[name], sum(told)
            self._seen[name] += middle + small
            self._since.count(name, told, small)
            for index, own in ruled.get(name, ()):
                found.append((name, told[index], own, False))
                middle -= told[index]
            found += [(name, middle, ratio, False), (name, small, ratio, True)]
        return found

    def _admit(self, groups: list[tuple[str, int, float, bool]], part: int, parts: int) -> None:
        kept = []
        steps = max(math.floor(self._fill / RING * 8) - 1, 0) if self.brake else 0
        for name, count, ratio, small in groups:
            events = count * (part + 1) // parts - count * part // parts
            if not events:
                continue
            probability = ratio * 0.5 ** max(steps - _LATER[CLASSES[name]], 0)
            kept.append((name, events, binomial(self._random, events, probability), probability, small))
        critical = sum(one[2] for one in kept if CLASSES[one[0]] == "critical")
        others = sum(one[2] for one in kept) - critical
        limit = RING * (_RESERVE if self.brake else 1.0)
        drained = 0.0 if self.brake or self._pause > 0 else CAPACITY * TICK  # in a long part the consumer works on
        fits = min(max(limit + drained - self._fill, 0.0) / others, 1.0) if others else 1.0
        if not self.brake:
            fits = fits_critical = min(max(limit + drained - self._fill, 0.0) / max(others + critical, 1.0), 1.0)
        else:
            room = max(RING - self._fill - others * fits, 0.0)
            fits_critical = min(room / critical, 1.0) if critical else 1.0
        for name, events, hits, probability, small in kept:
            room = fits_critical if CLASSES[name] == "critical" else fits
            self._account(name, events, hits * room, hits, probability, small=small)
        self._fill += others * fits + critical * fits_critical

    def _account(self, name: str, events: int, stored: float, hits: int, probability: float, *, small: bool) -> None:
        lost = hits - stored
        self._lost[name] += lost
        if lost:
            self._since.lost[name] = self._since.lost.get(name, 0) + math.ceil(lost)
        if probability:
            self._estimate[name] += stored / probability
        if small:
            account = self._kept_of_small[name][probability]
            account[0] += stored
            account[1] += events - stored

    def _consume(self, seconds: float) -> None:
        if self._pause > 0:
            self._pause -= seconds
            return
        if self._random.random() < seconds / 20:
            self._pause = self._random.uniform(0.1, 0.5)
        able = CAPACITY * seconds * self._random.uniform(0.9, 1.1)
        handled = min(self._fill, able)
        self._fill -= handled
        self._fill = min(self._fill, RING)
        self._did += handled
        self._since.busy += seconds * handled / able

    def _control(self, now: float) -> None:
        waited = now - self._since.start
        early = self._since.ring >= 0.5 and self.brake
        if waited + 1e-9 < self.controller.interval and not (early and waited >= TICK):
            return
        observation = self._since.observation(now)
        made = self.controller.step(observation)
        self._adapted += [now] * made
        self._since = _Since(now)

    def _watch_steps(self, now: float, tick: Tick) -> None:
        if not self._stepping:
            return
        through = sum(count * ratio for _, count, ratio, _ in self._peek(tick)) / TICK
        fits = through <= CAPACITY
        self._figures.step_up += [now - step if fits else 30.0 for step in self._stepping if fits or now - step > 30]
        self._stepping = [] if fits else [step for step in self._stepping if now - step <= 30]

    def _peek(self, tick: Tick) -> list[tuple[str, int, float, bool]]:
        seen, since = dict(self._seen), self._since
        self._since = _Since()
        groups = self._groups(tick)
        self._seen, self._since = seen, since
        return groups

    def _judge_small(self, now: float) -> None:
        """Part what was kept and what was not among the small keys, and compare estimate and truth of each."""
        shares = self.trace.shares(now)[TOLD:]
        whole = sum(shares)
        shares = [share / whole for share in shares]
        truth, estimates = [0.0] * len(shares), [0.0] * len(shares)
        for by_ratio in self._kept_of_small.values():
            for probability, (stored, other) in by_ratio.items():
                for n, hits in enumerate(multinomial(self._random, round(stored), shares)):
                    truth[n] += hits
                    estimates[n] += hits / probability if probability else 0.0
                for n, missed in enumerate(multinomial(self._random, round(other), shares)):
                    truth[n] += missed
        self._kept_of_small.clear()
        off = sum(abs(estimate - true) for estimate, true in zip(estimates, truth, strict=True))
        self._errors.append(off / max(sum(truth), 1.0))

    def _summary(self) -> Figures:
        figures, seen = self._figures, self._seen
        critical = [name for name, priority in CLASSES.items() if priority == "critical"]
        figures.loss = sum(self._lost.values()) / sum(seen.values())
        figures.critical_loss = sum(self._lost[name] for name in critical) / max(
            sum(seen[name] for name in critical), 1
        )
        figures.adaptations = len(self._adapted) / self.trace.seconds * 60
        figures.worst_minute = max(
            (sum(1 for other in self._adapted if at <= other < at + 60) for at in self._adapted), default=0
        )
        figures.key_error = sum(self._errors) / max(len(self._errors), 1)
        figures.use = self._did / self._could
        figures.bias = {name: self._estimate[name] / seen[name] - 1 for name in seen if seen[name]}
        return figures


def _sum(counts: Mapping[str, float], names: list[str]) -> float:
    return sum(counts[name] for name in names)


class _Since:
    """What the controller has not been told yet."""

    def __init__(self, start: float = 0.0) -> None:
        self.start = start
        self.seen: dict[str, int] = defaultdict(int)
        self.told: dict[str, list[int]] = {}
        self.handled = self.busy = self.ring = 0.0
        self.lost: dict[str, int] = {}

    def count(self, name: str, told: list[int], small: int) -> None:
        self.seen[name] += sum(told) + small
        have = self.told.get(name)
        self.told[name] = [a + b for a, b in zip(have, told, strict=True)] if have else told

    def observation(self, now: float) -> Observation:
        keys = {name: dict(zip(_NAMES, counts, strict=True)) for name, counts in self.told.items()}
        return Observation(now, self.seen, {}, keys, round(self.handled), self.busy, min(self.ring, 1.0), self.lost)
