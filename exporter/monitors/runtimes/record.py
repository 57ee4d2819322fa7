"""What is known of one container, in the words of no runtime in particular, and what of it may be kept.

Flows in: values of any shape from a runtime's answer. Flows out: `Record`s of clean, bounded text.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice

from exporter.contract import EventSink
from exporter.load.admission import CLASSES, KeptEvent
from exporter.privacy import bounded

STATES = ("created", "running", "paused", "exited", "unknown")
LIVE = frozenset({"created", "running", "paused"})

_TEXT_LIMIT = 1024  # characters that the gate judges, of which it shows fewer
_LOOKED_AT = 1000
"""Labels or variables of a container that are looked at; whoever gives it more has other things in mind."""
_ROWS = 64
"""Labels, variables, ports, mounts or addresses of a container that are kept."""

Rows = tuple[tuple[str, ...], ...]
Shed = Callable[[int], None]
"""Called with the number of entries that were left out."""


@dataclass(frozen=True, slots=True)
class Record:
    """One container, or the sandbox that holds a pod's network."""

    container_id: str
    runtime: str
    state: str
    """One of STATES."""
    namespace: str = ""
    pod: str = ""
    container: str = ""
    """Empty for a sandbox."""
    image: str = ""
    sandbox: bool = False
    created: float = 0.0
    """Unix time; tells the newer of two containers of one name."""
    networks: Rows = ()
    """Network mode, name of the network, address."""
    ports: Rows = ()
    """Protocol, port of the container, address and port of the host."""
    mounts: Rows = ()
    """Path in the container, type, mode (ro, rw). Never the path on the host."""
    labels: Rows = ()
    """Name, value; allow-listed ones only."""
    annotations: Rows = ()
    """As labels; Kubernetes' own, which Docker does not have."""
    environment: Rows = ()
    """Name, value; the value is empty where it is not allow-listed."""


def lifecycle(runtime: str, kind: str, container_id: str, time: float) -> KeptEvent:
    """Describe a lifecycle event for those who watch; `time` in Unix seconds."""
    return KeptEvent(
        time, "container", kind, CLASSES["container"], container_id=container_id, details={"runtime": runtime}
    )


def tell(sink: EventSink, event: KeptEvent) -> None:
    """Pass a lifecycle event on, where it is to be kept."""
    attributes = {"kind": event.kind, "container_id": event.container_id, **event.details}
    if weight := sink.should_sample(event.class_, attributes):
        sink.record_event(replace(event, weight=weight))


@dataclass(frozen=True, slots=True)
class Metadata:
    """What may be kept of a container's description. Patterns are those of fnmatch, in the case as written."""

    enabled: bool = True
    """False: names, image and state only."""
    labels: tuple[str, ...] = ()
    """Labels that are kept."""
    annotations: tuple[str, ...] = ()
    """Annotations that are kept."""
    environment: tuple[str, ...] = ()
    """Variables whose values are kept."""
    environment_names: bool = False
    """Whether all other variables are kept by name, without value."""

    @property
    def wants_environment(self) -> bool:
        """Whether a runtime has to be asked for variables at all."""
        return self.enabled and (self.environment_names or bool(self.environment))

    def keep_labels(self, labels: object, shed: Shed) -> Rows:
        """Choose from a mapping of labels; anything but a mapping has none."""
        return self._keep(labels, self.labels, shed)

    def keep_annotations(self, annotations: object, shed: Shed) -> Rows:
        """Choose from a mapping of annotations, as from labels."""
        return self._keep(annotations, self.annotations, shed)

    def keep_environment(self, entries: object, shed: Shed) -> Rows:
        """Choose from a list of `NAME=value`; a value that is not allowed is not looked at, let alone kept."""
        if not self.wants_environment or not isinstance(entries, list):
            return ()
        shed(max(len(entries) - _LOOKED_AT, 0))
        return kept((row for entry in entries[:_LOOKED_AT] for row in self._variable(entry)), shed)

    def _keep(self, given: object, patterns: tuple[str, ...], shed: Shed) -> Rows:
        if not self.enabled or not patterns or not isinstance(given, Mapping):
            return ()
        shed(max(len(given) - _LOOKED_AT, 0))
        names = (name for name in islice(given, _LOOKED_AT) if isinstance(name, str) and _matches(name, patterns))
        return kept(((name, given[name]) for name in names), shed)

    def _variable(self, entry: object) -> Iterable[tuple[str, str]]:
        if not isinstance(entry, str):
            return
        name, _, value = entry.partition("=")
        if _matches(name, self.environment):
            yield name, value
        elif self.environment_names:
            yield name, ""


def kept(rows: Iterable[tuple[object, ...]], shed: Shed) -> Rows:
    """Clean rows, drop repeated ones, and keep as many as a container may have."""
    found = list(dict.fromkeys(tuple(text(value) for value in row) for row in rows))
    shed(max(len(found) - _ROWS, 0))
    return tuple(found[:_ROWS])


def text(value: object, limit: int = _TEXT_LIMIT) -> str:
    """Make a label value of what a runtime says: whole numbers and text only, bounded, without lone surrogates."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value.bit_length() <= 64 else ""  # noqa: PLR2004 - no field of any runtime is wider
    return bounded(value, limit).encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
