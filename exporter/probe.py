"""What `cni-exporter check` finds: each feature tried for real, rung by rung, as `run` would.

Flows in: a configuration. Flows out: findings, a line each.
"""

import os
from dataclasses import dataclass, field, replace

from exporter import privileges, selection, web
from exporter.config import Config
from exporter.config.models import Feed as FeedSection
from exporter.contract import EventSink, Families, Monitor, Paths, Source, Unsupported
from exporter.feed_protocol import default_socket
from exporter.load.admission import Admission
from exporter.metrics import Store
from exporter.monitors import kernel


@dataclass(frozen=True, slots=True)
class Finding:
    """How one feature can be had here."""

    feature: str
    rung: str
    """The mode that works, `absent` where there is nothing to observe, `none` where it cannot be had."""
    reason: str = ""
    """Why not better."""
    remedy: str = ""
    """What would raise it."""
    usable: bool = True


@dataclass(slots=True)
class _Trial:
    """The context of a source that is tried once."""

    families: Families
    paths: Paths
    events: EventSink = field(default_factory=Admission)
    problem: str = ""

    def error(self, kind: str, message: str) -> None:
        self.problem = self.problem or f"{kind}: {message}"

    def dropped(self, count: int = 1) -> None:
        """Nothing is kept of a trial."""

    def wake(self) -> None:
        """A trial updates once."""


def findings(config: Config) -> list[Finding]:
    """Try the listening address and every monitor. What is said of them has passed the gate."""
    safe = selection.privacy_rules(config).safe_label
    return [replace(one, reason=safe(one.reason), remedy=safe(one.remedy)) for one in _found(config)]


def _found(config: Config) -> list[Finding]:
    store = Store()
    found = [_listening(config.web.listen_address), _capabilities(), _feed(config.feed)]
    programs = selection.load_programs(config)
    try:
        for monitor, owners in selection.monitors(config, programs):
            trial = _Trial(store.owned(*owners), Paths(config.paths.procfs, config.paths.sysfs))
            found.append(_try(monitor, trial))
        found += [_program(standing) for standing in (programs.standings if programs else [])]
    finally:
        if programs:
            programs.close()
    return found


def _program(standing: kernel.Standing) -> Finding:
    """Say how a kernel program stands; without one the exporter runs all the same."""
    reason = standing.reason or standing.cannot_see
    return Finding(f"ebpf {standing.program}", standing.rung if standing.attached else "none", reason, standing.remedy)


def as_text(found: list[Finding]) -> str:
    """Lay the findings out in columns."""
    width = max(len(finding.feature) for finding in found)
    rung = max(len(finding.rung) for finding in found)
    rows = []
    for finding in found:
        mark = "ok  " if finding.usable else "FAIL"
        why = f"{finding.reason}{f' -> {finding.remedy}' if finding.remedy else ''}"
        rows.append(f"{mark}  {finding.feature:{width}}  {finding.rung:{rung}}  {why}".rstrip())
    return "\n".join(rows)


def _listening(address: str) -> Finding:
    try:
        web.bind(address).close()
    except (OSError, ValueError) as error:
        return Finding("listen address", "none", str(error), "choose another with --web.listen-address", usable=False)
    return Finding("listen address", address)


def _capabilities() -> Finding:
    if privileges.SYS_PTRACE in privileges.held():
        return Finding("privileges", "cap_sys_ptrace")
    return Finding("privileges", "none", "other users' namespaces cannot be looked into", "run as root")


def _feed(section: FeedSection) -> Finding:
    """Say where the live feed would be; without it the exporter runs all the same."""
    if not section.enabled:
        return Finding("live feed", "none", "feed.enabled is false")
    try:
        path = section.socket or default_socket()
    except OSError as error:
        return Finding("live feed", "none", str(error.strerror))
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("live feed", "none", f"no socket can be made below {place}", "set feed.socket")
    return Finding("live feed", str(path))


def _try(monitor: Monitor, trial: _Trial) -> Finding:
    refused: list[Exception] = []
    for make in monitor.rungs:
        source = make()
        error = _attempt(source, trial)
        if error is None:
            return Finding(monitor.name, source.mode, *_why(refused[0] if refused else None, trial.problem))
        refused.append(error)
    absent = monitor.optional and all(isinstance(error, Unsupported) for error in refused)
    return Finding(monitor.name, "absent" if absent else "none", *_why(refused[0], ""), usable=monitor.optional)


def _attempt(source: Source, trial: _Trial) -> Exception | None:
    try:
        source.open(trial)
        source.update()
    except Exception as error:  # noqa: BLE001 - whatever a client library raises is the finding
        return error
    else:
        return None
    finally:
        source.close()


def _why(error: Exception | None, problem: str) -> tuple[str, str]:
    if isinstance(error, Unsupported):
        return error.reason, error.remedy
    return (" ".join(str(error).split()) if error else problem), ""
