"""The governor: observations in, decisions out. Pure: time and numbers come from the caller, nothing is read.

Each step makes a plan from forecasts, as if nothing were in force; what is in force changes only where the plan differs
enough, and not too often. What comes in between is held by the brake of the ring.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from exporter.load import pacing, plan
from exporter.load.decision import RESOURCES, Decision, Observation, Reason, Settings
from exporter.load.forecast import Forecast, KeyForecasts
from exporter.load.intake import Intake, Reading
from exporter.load.learned import Learned
from exporter.load.patterns import Patterns
from exporter.load.pressure import LoadLevel, Pressures

_HOT = 0.5
"""Occupancy of the ring that nothing which fits can keep up for long."""
_WARM = 0.25
"""Occupancy from which the brake works: the next step is wanted early, and cuts do not wait for long."""
_STRAINED_SECONDS = 0.5
"""Seconds that the brake works before that is more than a burst which the ring can take."""
_STRAINED_SHARE = 0.8
"""Of what would be planned for otherwise, while the ring has to be emptied too."""
_EARLY_INTERVAL = 0.25
"""Seconds to the next step while the brake works, or where the load may have stepped up."""
_HORIZON = 4
"""Seconds that season and trend are looked ahead: an interval, and what a cut may have to wait."""
_SOON = 45
"""Seconds within which a season's return forbids a raise."""
_MUCH = 1.1
_ENOUGH_WORK = 0.05
_MOST_GROWTH = 1.5
"""Factor that a trend may add at most."""


class Capacity:
    """How many events per second user space can handle, as measured while it works."""

    def __init__(self) -> None:
        """Begin without a measurement."""
        self.value = 0.0
        """Events per second; 0 while there was less than a twentieth of a second of work to tell it from."""
        self._trust = 1.0
        self._handled = 0.0
        self._busy = 0.0
        self._strained = 0.0
        self._ring = 0.0

    def update(self, reading: Reading) -> None:
        """Take events handled and seconds busy; what counts is the last second of work, however long that took.

        A ring that stays half full for 3 s although the plan would fit tells that the measurement is too high.
        """
        fading = math.exp(-reading.busy)
        self._handled = self._handled * fading + reading.handled
        self._busy = self._busy * fading + reading.busy
        self._strained = self._strained + reading.dt if _HOT <= reading.ring >= self._ring - 0.02 else 0.0
        self._ring = reading.ring
        if self._strained >= 3.0:  # noqa: PLR2004 - seconds, as the docstring says
            self._trust, self._strained = max(self._trust * 0.75, 0.25), 0.0
        elif reading.ring < _WARM:
            self._trust = min(self._trust + 0.01 * reading.dt, 1.0)
        self.value = self._handled / self._busy * self._trust if self._busy >= _ENOUGH_WORK else 0.0


class Governor:
    """Decides how many events of which class and key are kept. Not safe from several threads: step it from one."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Begin with everything kept."""
        self.settings = settings or Settings()
        classes = self.settings.classes
        self._intake = Intake(self.settings)
        self._total = Forecast()
        self._forecasts = {name: Forecast() for name in classes}
        self._keys = {name: KeyForecasts() for name in classes}
        self._level = LoadLevel(self.settings.thresholds)
        self._pressures = Pressures(self.settings)
        self._patterns = Patterns(classes)
        self._capacity = Capacity()
        self._pacing = pacing.Pacing()
        self._rules = Learned(self.settings)
        self._now = 0.0
        self._braked_since = math.inf
        ratios = {
            name: 1.0 if priority == "critical" else self.settings.max_ratio for name, priority in classes.items()
        }
        self._last = Decision(0.0, ratios, next=self.settings.interval)

    def step(self, observation: Observation) -> Decision:
        """Take what happened since the step before; return what to do until the next. Never raises for bad numbers."""
        reading = self._intake.read(observation)
        if reading is None:
            self._last = replace(self._last, reasons=(), anomalies=(), ignored=self._intake.ignored)
            return self._last
        self._now += reading.dt
        anomalies = self._follow(reading)
        rates = self._planned_for(reading)
        capacity = self._capacity.value * (_STRAINED_SHARE if self._strained else 1.0)
        outlook = plan.Outlook(rates, self._keys, self._level.level, self._total.peak, self._pressures.on, capacity)
        wanted = plan.make(outlook, self._rules.ratios, self.settings)
        reasons = self._adapt(wanted, sum(rates.values()))
        ratios = wanted.ratios if reasons else self._last.ratios
        self._last = Decision(
            observation.time,
            ratios,
            self._rules.as_decided(observation.time - self._now),
            self._level.level,
            sum(reading.rates.values()),
            sum(rates.values()),
            wanted.budget,
            self._capacity.value,
            self._patterns.pattern,
            float(self._patterns.period),
            anomalies,
            reasons,
            wanted.yielded,
            tuple(name for name, ratio in ratios.items() if not ratio),
            self._until_next(reading),
            self._intake.evicted + sum(keys.evicted for keys in self._keys.values()),
            self._intake.ignored,
        )
        return self._last

    def _follow(self, reading: Reading) -> tuple[str, ...]:
        """Bring up to date all that has a memory; return the anomalies."""
        self._braked_since = min(self._braked_since, self._now) if reading.ring >= _WARM else math.inf
        strained = self._strained
        for name, rate in reading.rates.items():
            self._forecasts[name].update(rate, reading.dt, strained=strained)
            self._keys[name].update(reading.keys.get(name, {}), reading.dt, strained=strained)
        load = sum(reading.rates.values())
        self._total.update(load, reading.dt)
        level, pressed = self._level.level, self._pressures.on
        self._level.update(load, reading.dt, self._patterns.ahead("", _SOON))
        self._pressures.update(reading.pressure, reading.dt)
        self._capacity.update(reading)
        changed: list[Reason] = [name for name in RESOURCES if self._pressures.on[name] != pressed[name]]
        if self._level.level != level and self.settings.strategy == "thresholds":
            changed.append("level")
        if self._total.stepped:
            changed.append("forecast")
        self._pacing.note(changed)
        return self._patterns.update(reading.rates, reading.dt)

    def _planned_for(self, reading: Reading) -> Mapping[str, float]:
        """Return events per second to plan for, per class: forecast, season and trend, or what was just seen."""
        if not self.settings.forecast:
            return reading.rates
        trend = min(1.0 + max(self._patterns.growth, 0.0) * _HORIZON, _MOST_GROWTH)
        return {
            name: max(forecast.value * trend, self._patterns.ahead(name, _HORIZON))
            for name, forecast in self._forecasts.items()
        }

    def _adapt(self, wanted: plan.Plan, planned: float) -> tuple[Reason, ...]:
        """Bring the plan into force if it is time; return why. `planned`: events per second that it is made for."""
        change = pacing.change(self._last.ratios, wanted)
        if change > 0 and self._patterns.ahead("", _SOON) > _MUCH * planned:
            change = 0  # it would be taken back when the season returns
        reasons = self._pacing.reasons(self._now, change, strained=self._strained, heavy=wanted.urgent)
        self._rules.renew(wanted, self._now, apply=bool(reasons))
        return reasons

    def _until_next(self, reading: Reading) -> float:
        early = reading.ring >= _WARM or self._total.suspected
        return min(self.settings.interval, _EARLY_INTERVAL) if early else self.settings.interval

    @property
    def _strained(self) -> bool:
        return self._now - self._braked_since >= _STRAINED_SECONDS
