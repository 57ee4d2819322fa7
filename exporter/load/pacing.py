"""When what is in force may change: cuts soon, raises late, small differences not at all, never more than 10 a minute.

Flows in: what is in force, the plan, what has changed around. Flows out: the reasons to change now; none: wait.
"""

from collections import deque
from collections.abc import Iterable, Mapping

from exporter.load.decision import RESOURCES, Reason
from exporter.load.plan import Plan

_DEAD_BAND = 2**0.4
"""Factor between planned and present ratio that is left alone."""
_NEARLY = 0.95
"""Share of its ceiling to which a ratio may come without being raised to it."""
_CUT_SECONDS = 6.0
_HOT_CUT_SECONDS = 2.0
"""After a cut, the ring needs this long to empty, whatever the next plan says."""
_RAISE_SECONDS = 10.0
_WINDOW_SECONDS = 60.0
_PER_WINDOW = 10
_KEPT_FREE = 2
"""Of these, for pressure on the host's resources alone."""


def differs(present: float, planned: float, ceiling: float) -> int:
    """Return 1 where a ratio is to be raised, -1 where it is to be cut, 0 where it is near enough."""
    if present > planned * _DEAD_BAND or present > ceiling * 1.001:
        return -1
    if planned > present * _DEAD_BAND or (planned >= ceiling and present < planned * _NEARLY):
        return 1
    return 0


class Pacing:
    """Remembers what waits to be done and when something was done."""

    def __init__(self) -> None:
        """Begin with nothing done."""
        self._done: deque[float] = deque()
        self._raise_wanted = 0.0
        self._waiting: dict[Reason, None] = {}  # a set in the order of arrival

    def note(self, reasons: Iterable[Reason]) -> None:
        """Something changed that ratios are to follow at once."""
        self._waiting.update(dict.fromkeys(reasons))

    def reasons(self, now: float, change: int, *, strained: bool, heavy: bool) -> tuple[Reason, ...]:
        """Return why what is in force is to change now; empty where it is to stay.

        `now`: seconds; `change`: below 0 where the plan cuts anything, above 0 where it only raises, 0 where it agrees
        with what is in force; `strained`: whether the brake of the ring goes on; `heavy`: whether a key is to be cut.
        """
        if change <= 0:
            self._raise_wanted = now
        if not change:
            self._waiting.clear()
            return ()
        since = now - self._done[-1] if self._done else _WINDOW_SECONDS
        due = since >= (_HOT_CUT_SECONDS if strained else _CUT_SECONDS)
        if change > 0:
            due = now - self._raise_wanted >= _RAISE_SECONDS and since >= _RAISE_SECONDS
        if not self._waiting and not due:
            return ()
        other: Reason = "heavy_hitter" if heavy else "ring" if strained else "forecast"
        around = tuple(reason for reason in self._waiting if reason != "forecast")
        return self._within_limit(now, around or (other,))

    def _within_limit(self, now: float, found: tuple[Reason, ...]) -> tuple[Reason, ...]:
        while self._done and now - self._done[0] >= _WINDOW_SECONDS:
            self._done.popleft()
        room = _PER_WINDOW - len(self._done)
        if not set(found).intersection(RESOURCES):
            room -= _KEPT_FREE
        found = found[: max(room, 0)]
        if found:
            self._done.extend(now for _ in found)
            self._waiting.clear()
        return found


def change(ratios: Mapping[str, float], plan: Plan) -> int:
    """Return -1 where the plan cuts any of the ratios in force by more than the dead band, else 1 where it raises any.

    A heavy key that is to be cut counts as a cut; rules follow what the plan says whenever anything changes.
    """
    found = [differs(ratios[name], ratio, plan.ceilings.get(name, ratio)) for name, ratio in plan.ratios.items()]
    return -1 if plan.urgent or -1 in found else max(found)
