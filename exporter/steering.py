"""The thread that steers: what happened goes to the governor, what it decides goes to the kernel and the admission.

Flows in: counts of the kernel programs and of the admission, pressure on the host, the configuration. Flows out: ratios
and rules, and the families of owner `load`. It waits for nobody but the clock.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from exporter.contract import Families, Key
from exporter.load.admission import CLASSES, Account, Admission
from exporter.load.decision import LEVELS, PATTERNS, REASONS, Decision, KeyRule, Observation
from exporter.load.governor import Governor
from exporter.load_config import KINDS, NAMES, KernelFilters
from exporter.monitors.kernel import Programs
from exporter.monitors.kernel.controls import Controls, Counts, Rule
from exporter.monitors.kernel.shapes import CLASSES as IN_KERNEL

log = logging.getLogger(__name__)

_LOOK = 0.1  # seconds between looks at the ring, and between two steps at least
_HALF = 0.5  # fill of the ring from which a step does not wait
_HUNG = 60.0  # a step that is older than this many seconds is a hung thread
_REST = 5.0  # seconds of rest after a step that failed
_SUMS = ("seen", "filtered", "sampled_out", "handled")


@dataclass(frozen=True, slots=True)
class Kernel:
    """What there is where programs are in force."""

    programs: Programs
    controls: Controls


@dataclass(frozen=True, slots=True)
class Learned:
    """A learned rule, for people."""

    kind: str
    """container, command or address."""
    subject: str
    """A command, an address, or the identity of a container's network namespace."""
    class_: str
    ratio: float
    expires_in: float
    """Seconds."""


@dataclass(slots=True)
class _Changes:
    """How far counters have come since they were looked at before, by class."""

    before: dict[str, dict[str, int]] = field(default_factory=dict)

    def of(self, accounts: Mapping[str, Account]) -> dict[str, Counter[str]]:
        """Give what each sum has grown by."""
        now = {name: {class_: int(getattr(account, name)) for class_, account in accounts.items()} for name in _SUMS}
        now["lost"] = {class_: sum(account.lost.values()) for class_, account in accounts.items()}
        grown = {name: Counter(counts) for name, counts in now.items()}
        for name, counts in self.before.items():
            grown[name].subtract(counts)
        self.before = now
        return grown


class Steering:
    """Owns the governor and its thread."""

    def __init__(  # noqa: PLR0913 - all that load management joins
        self,
        governor: Governor | None,
        admission: Admission,
        families: Families,
        kernel: Kernel | None,
        filters: KernelFilters,
        pressure: Callable[[], Mapping[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            governor: decides; None: everything is kept, only the account is told.
            admission: decides on events of sources without a kernel side.
            families: writer of owner `load`.
            kernel: the programs and their controls; None: there are none.
            filters: the user's rules for the kernel.
            pressure: shares of the host's resources in use, by name.
            clock: monotonic seconds.
        """
        self._governor, self._admission, self._families, self._kernel = governor, admission, families, kernel
        self._filters, self._pressure, self._clock = filters, pressure, clock
        self._changes = _Changes()
        self._changes.of(admission.stats())
        self._taken = (0, 0.0)
        self._kept = dict[str, float]()
        self._matched: dict[tuple[str, ...], int] = {}
        self._refused = ""
        self._telling = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steering", daemon=True)
        self.decision: Decision | None = None
        """The last one."""
        self.beat = time.monotonic()
        """When a step last ended well, in monotonic seconds."""
        for reason in REASONS:
            families.add("cni_load_adaptations_total", (reason,), 0)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End the thread, waiting at most `timeout` seconds; False where it hangs."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def hung(self) -> bool:
        """Whether the thread has not come to an end of a step for long."""
        return time.monotonic() - self.beat > _HUNG

    def learned(self) -> list[Learned]:
        """Give the learned rules in force; the heaviest first."""
        decision, now = self.decision, self._clock()
        if not decision:
            return []
        return [
            Learned(NAMES.get(rule.key[0], rule.key[0]), rule.key[1], rule.class_, rule.ratio, rule.expires - now)
            for rule in decision.rules
            if rule.expires > now
        ]

    # The thread.

    def _run(self) -> None:
        pause = 0.0
        while not self._stop.wait(min(pause, _LOOK)):
            pause -= _LOOK
            if pause > 0 and not (self._kernel and self._kernel.controls.fill() >= _HALF):
                continue
            try:
                pause = self.step()
            except Exception:
                log.exception("load management: a step failed, ratios and rules stay as they are")
                pause = _REST

    def step(self) -> float:
        """Observe, decide, apply, tell. The answer is seconds until the next step. Raises OSError."""
        counts = self._kernel.controls.observe() if self._kernel else None
        grown = self._changes.of(self._admission.stats())
        if counts:
            for name in ("seen", "filtered", "sampled_out", "lost"):
                grown[name].update(getattr(counts, name))
        decision = self._governor.step(self._observation(grown, counts)) if self._governor else None
        self._apply(decision)
        self.decision = decision
        self._tell(grown, decision)
        self.refresh()
        self.beat = time.monotonic()
        return decision.next if decision else 1.0

    def _observation(self, grown: Mapping[str, Counter[str]], counts: Counts | None) -> Observation:
        handled, busy = self._capacity()
        return Observation(
            self._clock(),
            seen=+grown["seen"],
            filtered=+grown["filtered"],
            keys=counts.keys if counts else {},
            handled=handled,
            busy=busy,
            ring=counts.ring if counts else 0.0,
            lost=+grown["lost"],
            pressure=self._pressure(),
        )

    def _capacity(self) -> tuple[int, float]:
        """Events taken out of the rings since they were last added up, and seconds for them with the share we have."""
        if not self._kernel:
            return 0, 0.0
        tally = self._kernel.programs.tally
        now = sum(tally.handled.values()), tally.busy / tally.share
        if now[0] == self._taken[0]:
            return 0, 0.0
        (handled, busy), self._taken = self._taken, now
        return now[0] - handled, now[1] - busy

    def _apply(self, decision: Decision | None) -> None:
        ratios = decision.ratios if decision else dict.fromkeys(CLASSES, 1.0)
        self._admission.steer(ratios)
        if not self._kernel:
            return
        rules = self._filters.rules()
        if decision:
            rules += [_learned(rule) for rule in decision.rules]
        in_kernel = {class_: ratio for class_, ratio in ratios.items() if class_ in IN_KERNEL}
        refused = self._kernel.controls.apply(in_kernel, rules, self._clock())
        reasons = "; ".join(f"{rule.kind} {rule.subject}: {reason}" for rule, reason in refused[:3])
        if reasons != self._refused and reasons:
            log.warning("load management: %d rule(s) not in force: %s", len(refused), reasons)
        self._refused = reasons

    # What is told.

    def _tell(self, grown: Mapping[str, Counter[str]], decision: Decision | None) -> None:
        rules, matches = self._count_rules()
        gauges: dict[str, dict[Key, float]] = {"cni_filter_rules": {key: float(n) for key, n in rules.items()}}
        for key in rules:
            self._families.add("cni_filter_rule_matches_total", key, matches[key])
        if decision:
            gauges |= self._decided(grown, decision)
            for reason in decision.reasons:
                self._families.add("cni_load_adaptations_total", (reason,))
            for class_ in CLASSES:
                self._families.add("cni_load_anomalies_total", (class_,), class_ in decision.anomalies)
        self._families.replace(gauges)

    def _decided(self, grown: Mapping[str, Counter[str]], decision: Decision) -> dict[str, dict[Key, float]]:
        """Say what was decided, and what share was kept since the step before."""
        offered = {class_: seen - grown["filtered"][class_] for class_, seen in grown["seen"].items()}
        out = {class_: grown["sampled_out"][class_] + grown["lost"][class_] for class_ in offered}
        self._kept |= {class_: 1 - out[class_] / count for class_, count in offered.items() if count > 0}
        total = sum(offered.values())
        return {
            "cni_sampling_target_ratio": {(class_,): ratio for class_, ratio in decision.ratios.items()},
            "cni_sampling_ratio": {
                (class_,): self._kept.get(class_, ratio) for class_, ratio in decision.ratios.items()
            },
            "cni_drop_ratio": {(): sum(out.values()) / total if total > 0 else 0.0},
            "cni_load_events_per_second": {(): decision.load},
            "cni_load_forecast_events_per_second": {(): decision.forecast},
            "cni_load_level": {(level,): float(level == decision.level) for level in LEVELS},
            "cni_load_pattern": {(pattern,): float(pattern == decision.pattern) for pattern in PATTERNS},
        }

    def _count_rules(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """Count the rules in force, and what they have met since this was last asked, by kind and origin."""
        now: dict[tuple[str, ...], int] = {}
        rules: Counter[tuple[str, str]] = Counter({(kind, "learned"): 0 for kind in KINDS})
        for rule, count in self._kernel.controls.matches().items() if self._kernel else ():
            kind = NAMES.get(rule.kind, rule.kind)
            rules[kind, rule.origin] += 1
            now[kind, rule.origin, str(rule.subject)] = count  # rules about one subject share a count
        for name, count in self._admission.matches().items():
            rules["pattern", "configured"] += 1
            now["pattern", "configured", name] = count
        matches: Counter[tuple[str, str]] = Counter()
        for (kind, origin, *subject), count in now.items():
            before = self._matched.get((kind, origin, *subject), 0)
            matches[kind, origin] += count - before if count >= before else count
        self._matched = now
        return rules, matches

    def refresh(self) -> None:
        """Tell the account as it is now; from any thread."""
        with self._telling:
            accounts = self._admission.stats()
            families: dict[str, dict[Key, float]] = {
                f"cni_events_{name}_total": {(c,): float(getattr(a, name)) for c, a in accounts.items()}
                for name in _SUMS
            }
            families["cni_events_lost_total"] = {
                (class_, stage): float(count)
                for class_, account in accounts.items()
                for stage, count in ({"queue": 0} | account.lost).items()
            }
            self._families.replace(families | self._estimates(accounts))

    def _estimates(self, accounts: Mapping[str, Account]) -> dict[str, dict[Key, float]]:
        estimated = Counter({class_: account.estimate.total for class_, account in accounts.items()})
        variance = Counter({class_: account.estimate.variance for class_, account in accounts.items()})
        if self._kernel:
            estimated.update(self._kernel.programs.tally.weights)
            variance.update(self._kernel.programs.tally.variances)
        return {
            "cni_events_estimated_total": {(class_,): float(number) for class_, number in estimated.items()},
            "cni_events_estimate_standard_error": {(c,): math.sqrt(number) for c, number in variance.items()},
        }


def _learned(rule: KeyRule) -> Rule:
    kind, subject = rule.key
    return Rule(kind, subject, (rule.class_,), rule.ratio, origin="learned", expires=rule.expires)
