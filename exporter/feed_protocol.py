"""What is said on the live feed's socket: the reader's request, and the lines that it gets.

Flows in: a line of JSON from a reader, events with the names of their workloads. Flows out: a `Filter`; JSON lines in
which no secret is left.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from exporter.load.admission import CLASSES, KeptEvent

_DETAILS = 64  # details of an event that are shown


def default_socket() -> Path:
    """Say where the feed is when nothing else is configured. Raises OSError where this user has no place for it."""
    if os.geteuid() == 0:
        return Path("/run/cni-exporter/events.sock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise OSError(errno.ENOENT, "XDG_RUNTIME_DIR is not set: set feed.socket")
    return Path(runtime, "cni-exporter", "events.sock")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events a reader wants; an empty text excludes nothing."""

    classes: frozenset[str] = frozenset(CLASSES)
    pod: str = ""
    """NAMESPACE/NAME."""
    container: str = ""

    def admits(self, event: "Named") -> bool:
        """Tell whether an event is wanted."""
        namespace, pod, container = event.names
        return (
            event.event.class_ in self.classes
            and (not self.pod or self.pod == f"{namespace}/{pod}")
            and (not self.container or self.container == container)
        )


def parse_filter(line: bytes) -> Filter:
    """Read a request: a JSON object with `class` (list), `pod`, `container`, each optional. Raises ValueError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict) or request.keys() - {"class", "pod", "container"}:
        raise ValueError('expected one line of JSON: {"class": [...], "pod": "NAMESPACE/NAME", "container": "NAME"}')
    classes = request.get("class", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) and name in CLASSES for name in classes):
        raise ValueError(f"class: expected a list of {', '.join(CLASSES)}")
    pod, container = request.get("pod", ""), request.get("container", "")
    if not isinstance(pod, str) or (pod and pod.count("/") != 1):
        raise ValueError("pod: expected NAMESPACE/NAME")
    if not isinstance(container, str):
        raise ValueError("container: expected a name")  # noqa: TRY004 - wrong input, not a wrong call
    return Filter(frozenset(classes or CLASSES), pod, container)


@dataclass(slots=True)
class Named:
    """An event with its workload, encoded when the first reader sends it."""

    event: KeptEvent
    names: tuple[str, str, str]
    """Namespace, pod, container."""
    clean: Callable[[str], str]
    _line: bytes = b""

    def line(self) -> bytes:
        """Give the line of the feed."""
        if not self._line:
            self._line = encoded(self._record())
        return self._line

    def _record(self) -> Mapping[str, object]:
        event, clean = self.event, self.clean
        namespace, pod, container = map(clean, self.names)
        return {
            "time": round(event.time, 6),
            "class": clean(event.class_),
            "priority": clean(event.priority),
            "kind": clean(event.kind),
            "namespace": namespace,
            "pod": pod,
            "container": container,
            "netns": clean(event.netns),
            "container_id": clean(event.container_id),
            "pid": event.pid,
            "command": clean(event.command),
            "weight": event.weight,
            "details": {
                clean(name): clean(value) if isinstance(value, str) else value
                for name, value in islice(event.details.items(), _DETAILS)
            },
        }


def encoded(record: Mapping[str, object]) -> bytes:
    """Write a line of the feed."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
