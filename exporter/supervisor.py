"""Runs the monitors: a thread each, its ladder of sources, backoff, circuit breaker, rate limit and heartbeat.

Flows in: monitors, requests for fresh data from scrapes. Flows out: the families of owner `supervisor`, health and
readiness. A monitor that fails or hangs stops no other.
"""

import contextlib
import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from exporter.contract import EventSink, Families, Monitor, Paths, Source, Unsupported
from exporter.load.admission import Admission
from exporter.privacy import bounded

log = logging.getLogger(__name__)

_BACKOFF = (0.5, 30.0)  # seconds after the first failure, and at most
_BREAKER = 5  # failures in a row that open a rung's circuit
_REST = 60.0  # seconds that an open circuit rests
_RETRY = 5.0  # seconds between looks for what was absent: a socket that appears, a permission that is given
_DUTY = 0.1  # share of one core that updates asked for by events may take in the long run
_BURST = 1.0  # seconds of such work that may be done at once
_GATHER = 0.02  # seconds between two such updates: one container's start is a dozen events
_HUNG = 60.0  # a heartbeat older than this many seconds is a hung monitor
_TICK = 1.0  # longest sleep between heartbeats, in seconds
_FAILED = "source_failed"  # the kind of error that ends a source; the other kinds are the sources' own
_REASON = 1024  # characters of a reason that are kept; the gate judges them and shows fewer


@dataclass(slots=True)
class _Rung:
    """A step of the ladder and when it may be tried again."""

    make: Callable[[], Source]
    failures: int = 0
    retry_at: float = 0.0
    reason: str = ""
    remedy: str = ""
    unsupported: bool = False

    @property
    def resting(self) -> bool:
        return self.failures >= _BREAKER

    def refuse(self, error: Exception, now: float) -> None:
        """Note why the rung cannot be stood on, and when to look again."""
        self.unsupported = isinstance(error, Unsupported)
        self.reason = bounded(" ".join(str(error).split()), _REASON) or type(error).__name__
        self.remedy = error.remedy if isinstance(error, Unsupported) else ""
        if self.unsupported:
            self.failures, self.retry_at = 0, now + _RETRY
            return
        self.failures += 1
        first, longest = _BACKOFF
        wait = _REST if self.resting else min(longest, first * 2 ** (self.failures - 1))
        self.retry_at = now + wait * random.uniform(0.75, 1.25)  # noqa: S311 - jitter, not a secret


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a monitor stands, for people: `check`, health pages and the log."""

    monitor: str
    mode: str
    up: bool | None
    """None where there is nothing to observe."""
    fallback: bool
    reason: str
    remedy: str
    circuit_open: bool
    hung: bool
    seen: bool
    """Whether a first pass is over, well or not."""


class Runner:
    """One monitor's thread. It is its source's context."""

    def __init__(  # noqa: PLR0913 - what its source may touch, one by one
        self,
        monitor: Monitor,
        families: Families,
        own: Families,
        events: EventSink,
        paths: Paths,
        changed: Callable[[], None],
    ) -> None:
        """Prepare; `own` is the writer for the supervisor's families, `changed` is called after each pass."""
        self.monitor = monitor
        self.families = families
        self.events = events
        self.paths = paths
        self.slowdown = 1.0
        self.beat = time.monotonic()
        self.updated_at = 0.0
        """Unix time at which the last good update ended; 0 before the first."""
        self.duration = 0.0
        self.passed = False
        self._own = own
        self._changed = changed
        self._rungs = [_Rung(make) for make in monitor.rungs]
        self._source: Source | None = None
        self._rung = len(self._rungs)
        self._mode = "starting"
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._turn = threading.Condition()
        self._asked = 0
        self._served = 0
        self._events = False
        self._fresh_at = float("-inf")
        self._debt = 0.0
        """Seconds of work done for events and not yet paid back by time gone by."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=monitor.name, daemon=True)
        own.add("cni_exporter_monitor_restarts_total", (monitor.name,), 0)
        own.add("cni_exporter_monitor_queue_dropped_total", (monitor.name,), 0)
        own.add("cni_exporter_monitor_errors_total", (monitor.name, _FAILED), 0)

    # What a source sees.

    def error(self, kind: str, message: str) -> None:
        """Count and log bad input."""
        self._own.add("cni_exporter_monitor_errors_total", (self.monitor.name, kind))
        log.warning("%s: %s: %s", self.monitor.name, kind, message)

    def dropped(self, count: int = 1) -> None:
        """Count what a queue shed."""
        self._own.add("cni_exporter_monitor_queue_dropped_total", (self.monitor.name,), count)

    def wake(self) -> None:
        """Ask for an update soon."""
        self._events = True
        self._signal()

    # What the supervisor and scrapes see.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End the thread, waiting at most `timeout` seconds; False where it hangs."""
        self._stopping = True
        self._signal()
        if self._thread.ident:
            self._thread.join(max(timeout, 0))
        if self._thread.is_alive():
            return False
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        return True

    @property
    def awaits_update(self) -> bool:
        """Whether an event has come in that no update has followed yet."""
        return self._events

    def ask(self) -> int:
        """Ask for fresh data; the answer is a ticket for `wait`, 0 where none is needed or to be had."""
        age = self.monitor.max_age
        with self._turn:
            fresh = age is None or time.monotonic() - self._fresh_at <= age
            if self._source is None or (fresh and not self._events):
                return 0
            self._asked += 1
            ticket = self._asked
        self._signal()
        return ticket

    def wait(self, ticket: int, deadline: float) -> bool:
        """Wait until a ticket is served or the monotonic `deadline` is over; False where it is over."""
        with self._turn:
            return self._turn.wait_for(lambda: self._served >= ticket, max(deadline - time.monotonic(), 0))

    def standing(self) -> Standing:
        """Say where the monitor stands."""
        better = self._rungs[: self._rung]
        refused = next((rung for rung in better if not rung.unsupported), better[0] if better else None)
        down = self._source is None and self.passed
        absent = down and self.monitor.optional and all(rung.unsupported for rung in self._rungs)
        return Standing(
            monitor=self.monitor.name,
            mode="absent" if absent else "down" if down else self._mode,
            up=None if absent else self._source is not None and self.updated_at > 0,
            fallback=self._source is not None and self._rung > 0,
            reason=refused.reason if refused else "",
            remedy=refused.remedy if refused else "",
            circuit_open=any(rung.resting for rung in self._rungs),
            hung=time.monotonic() - self.beat > _HUNG,
            seen=self.passed,
        )

    # The thread.

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._step()
            except Exception:
                log.exception("%s: unexpected failure, starting its source again", self.monitor.name)
                self._drop_source()
                time.sleep(_BACKOFF[0])
        self._drop_source()

    def _step(self) -> None:
        self.beat = time.monotonic()
        self._climb()
        if self._source is None:
            self._finish_pass(good=False)
            self._sleep(min(rung.retry_at for rung in self._rungs) - time.monotonic())
            return
        self._sleep(self._due() - time.monotonic())
        if self._source and not self._stopping and time.monotonic() >= self._due():
            self._update()

    def _due(self) -> float:
        """Monotonic time of the next update."""
        if self._asked > self._served:
            return 0.0
        due = self._fresh_at + self.monitor.interval * self.slowdown
        if self._events:
            rest = max((self._debt - _BURST) / _DUTY, _GATHER)
            due = min(due, self._fresh_at + rest * self.slowdown)
        return due

    def _climb(self) -> None:
        """Stand on the best rung that holds; try better ones again when their time has come."""
        for index, rung in enumerate(self._rungs[: self._rung]):
            if rung.retry_at <= time.monotonic() and self._open(index, rung):
                return

    def _open(self, index: int, rung: _Rung) -> bool:
        source = rung.make()
        try:
            source.open(self)
            self._attempt(source)
        except Exception as error:  # noqa: BLE001 - any failure of a client library is the rung's reason
            self._refuse(rung, error)
            _close(source, self.monitor.name)
            return False
        rung.reason = rung.remedy = ""
        self._drop_source()
        self._adopt(index, source)
        return True

    def _adopt(self, index: int, source: Source) -> None:
        self._source, self._rung, self._mode = source, index, source.mode
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        for descriptor in source.readers():
            self._poll.register(descriptor, select.POLLIN)
        log.info("%s: observes by %s", self.monitor.name, source.mode)
        self._finish_pass(good=True)

    def _update(self) -> None:
        source, rung = self._source, self._rungs[self._rung]
        if source is None:
            return
        try:
            self._attempt(source)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(rung, error)
        else:
            rung.failures = 0
            self._finish_pass(good=True)

    def _attempt(self, source: Source) -> None:
        """Run one update and serve the tickets that were there when it began."""
        with self._turn:
            tickets = self._asked
        by_event, self._events = self._events, False
        started, worked = time.monotonic(), time.thread_time()
        source.update()
        ended = time.monotonic()
        self.duration = ended - started
        self._debt = max(0.0, self._debt - (ended - self._fresh_at) * _DUTY)
        if by_event:
            self._debt += time.thread_time() - worked
        with self._turn:
            self._fresh_at = ended
            self._served = max(self._served, tickets)
        self.updated_at = time.time()

    def _fail(self, rung: _Rung, error: Exception) -> None:
        """Leave a rung whose source failed; the next step looks for another."""
        self._own.add("cni_exporter_monitor_restarts_total", (self.monitor.name,))
        self._own.add("cni_exporter_monitor_errors_total", (self.monitor.name, _FAILED))
        self._refuse(rung, error)
        self._drop_source()

    def _refuse(self, rung: _Rung, error: Exception) -> None:
        known = {each.reason for each in self._rungs}  # rungs that ask the same socket are refused in the same words
        rung.refuse(error, time.monotonic())
        if rung.reason not in known:
            level = logging.INFO if rung.unsupported else logging.WARNING
            hint = f" ({rung.remedy})" if rung.remedy else ""
            log.log(level, "%s: %s%s", self.monitor.name, rung.reason, hint)

    def _drop_source(self) -> None:
        source, self._source = self._source, None
        self._rung = len(self._rungs)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        if source:
            _close(source, self.monitor.name)

    def _finish_pass(self, *, good: bool) -> None:
        self.passed = True
        with self._turn:
            if not good:
                self._served = self._asked
            self._turn.notify_all()
        self._changed()

    def _sleep(self, seconds: float) -> None:
        """Wait for a descriptor, a signal or the time; call what the descriptors ask for."""
        timeout = min(max(seconds, 0.0), _TICK)
        handlers = self._source.readers() if self._source else {}
        for descriptor, _ in self._poll.poll(timeout * 1000):
            if descriptor == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            try:
                handlers[descriptor]()
            except Exception as error:  # noqa: BLE001 - as in _update
                self._fail(self._rungs[self._rung], error)
                return

    def _signal(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)


def _close(source: Source, name: str) -> None:
    try:
        source.close()
    except Exception:
        log.exception("%s: closing its source failed", name)


@dataclass(slots=True)
class Supervisor:
    """All runners."""

    own: Families
    """Writer for the families of owner `supervisor`."""
    events: EventSink = field(default_factory=Admission)
    """Where the monitors' events go."""
    runners: list[Runner] = field(default_factory=list)
    _publishing: threading.Lock = field(default_factory=threading.Lock)

    def add(self, monitor: Monitor, families: Families, paths: Paths) -> None:
        """Take a monitor in; `families` is the writer for its owner."""
        self.runners.append(Runner(monitor, families, self.own, self.events, paths, self._publish))

    def start(self) -> None:
        """Start every thread."""
        for runner in self.runners:
            runner.start()

    def stop(self, timeout: float) -> list[str]:
        """End every thread within `timeout` seconds in all; the answer names those that hang."""
        deadline = time.monotonic() + timeout
        for runner in self.runners:
            runner.stop(0)
        return [runner.monitor.name for runner in self.runners if not runner.stop(deadline - time.monotonic())]

    def refresh(self, timeout: float) -> None:
        """Bring what is older than its `max_age` up to date, waiting at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for late in (False, True):  # the second round is for events that came in during the first
            runners = [runner for runner in self.runners if runner.awaits_update or not late]
            for runner, ticket in [(runner, runner.ask()) for runner in runners]:
                if ticket and not runner.wait(ticket, deadline):
                    name = runner.monitor.name
                    log.warning("%s: no fresh data within %s s, the scrape goes on without", name, timeout)

    def standings(self) -> list[Standing]:
        """Say where each monitor stands."""
        return [runner.standing() for runner in self.runners]

    def slow_down(self, factor: float) -> None:
        """Stretch every interval by `factor` >= 1, but for monitors that are to be steady."""
        for runner in self.runners:
            runner.slowdown = 1.0 if runner.monitor.steady else factor

    def _publish(self) -> None:
        with self._publishing:
            pairs = [(runner, runner.standing()) for runner in self.runners if runner.passed]
            names: Iterable[tuple[Runner, Standing, tuple[str]]] = [(r, s, (s.monitor,)) for r, s in pairs]
            self.own.replace(
                {
                    "cni_exporter_monitor_up": {n: float(s.up) for _, s, n in names if s.up is not None},
                    "cni_exporter_monitor_mode_info": {(s.monitor, s.mode, s.reason): 1.0 for _, s, _ in names},
                    "cni_exporter_monitor_fallback": {n: float(s.fallback) for _, s, n in names},
                    "cni_exporter_monitor_circuit_open": {n: float(s.circuit_open) for _, s, n in names},
                    "cni_exporter_monitor_last_update_timestamp_seconds": {
                        n: r.updated_at for r, _, n in names if r.updated_at
                    },
                    "cni_exporter_monitor_update_duration_seconds": {
                        n: r.duration for r, _, n in names if r.updated_at
                    },
                }
            )
