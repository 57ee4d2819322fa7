"""Levels of load and pressure on the host's resources, with hysteresis: up at once, down when it is sure.

Flows in: events per second, shares of resources. Flows out: a level, and what is under pressure.
"""

from collections.abc import Mapping

from exporter.load.decision import LEVELS, Level, Settings

_DOWN_SECONDS = 15.0
_DOWN_SHARE = 0.8
_PRESSED_SECONDS = 2.0
_RELEASE_MARGIN = 0.1
_ESCALATION_SECONDS = 10.0


class LoadLevel:
    """The level of the load: up at once, down once it was below 80 % of the edge for 15 s."""

    def __init__(self, thresholds: tuple[float, float, float, float]) -> None:
        """Begin low. Thresholds in events per second, ascending; the last is no edge of a level."""
        self._edges = thresholds[:3]
        self._at = 0
        self._calm = 0.0
        self._highest = 0

    @property
    def level(self) -> Level:
        """The level now."""
        return LEVELS[self._at]

    def update(self, load: float, dt: float, expected: float = 0.0) -> None:
        """Take the load of the last `dt` seconds, and what is expected soon, for which there is no going down.

        Both in events per second.
        """
        self._at = max(self._at, self._of(load))
        below = self._of(max(load, expected) / _DOWN_SHARE)
        if below >= self._at:
            self._calm, self._highest = 0.0, 0
            return
        self._calm += dt
        self._highest = max(self._highest, below)
        if self._calm > _DOWN_SECONDS:
            self._at, self._calm, self._highest = self._highest, 0.0, 0

    def _of(self, load: float) -> int:
        return sum(load >= edge for edge in self._edges)


class Switch:
    """On once a share stayed at its threshold for some seconds, off once it stayed a tenth below it for 15 s."""

    __slots__ = ("_off", "_on", "_since", "_wait", "on", "on_for")

    def __init__(self, threshold: float, seconds: float) -> None:
        """Begin off. `seconds`: how long it takes to switch on."""
        self.on = False
        self.on_for = 0.0
        """Seconds that it has been on and pressed; stands still while the share is below its threshold."""
        self._on = threshold
        self._off = threshold - min(_RELEASE_MARGIN, threshold / 8)
        self._wait = seconds
        self._since = 0.0

    def update(self, share: float, dt: float) -> None:
        """Take the share of the last `dt` seconds."""
        if self.on:
            self.on_for += dt if share >= self._on else 0.0
        changing = share < self._off if self.on else share >= self._on
        self._since = self._since + dt if changing else 0.0
        if changing and self._since >= (_DOWN_SECONDS if self.on else self._wait):
            self.on, self._since, self.on_for = not self.on, 0.0, 0.0


class Pressures:
    """Which resources are under pressure."""

    def __init__(self, settings: Settings) -> None:
        """Begin without pressure."""
        self.cpu = Switch(settings.cpu_threshold, _PRESSED_SECONDS)
        self.network = Switch(settings.network_threshold, _PRESSED_SECONDS)
        self.disk = Switch(settings.disk_threshold, _PRESSED_SECONDS)
        self.memory = Switch(settings.memory_threshold, 0.0)
        self._last = {"cpu": 0.0, "memory": 0.0, "network": 0.0, "disk": 0.0}

    def update(self, pressure: Mapping[str, float], dt: float) -> None:
        """Take the shares of the last `dt` seconds; a resource that is missing is as it was."""
        self._last.update(pressure)
        for name, share in self._last.items():
            switch: Switch = getattr(self, name)
            switch.update(share, dt)

    @property
    def on(self) -> dict[str, int]:
        """How hard each resource is pressed: 0 not, 1, and for memory 2 where turning debug off was not enough."""
        return {
            "cpu": int(self.cpu.on),
            "network": int(self.network.on),
            "disk": int(self.disk.on),
            "memory": self.memory.on + (self.memory.on and self.memory.on_for > _ESCALATION_SECONDS),
        }
