"""What Docker says, in the words of the table: items of its list, and events.

Flows in: decoded JSON of the Engine API (/containers/json, /events), of any shape. Flows out: records and events.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.monitors.runtimes.record import Metadata, Record, Shed, kept, text

RUNTIME = "docker"

# Engine API, "Monitor events": what changes a container, and the state that it is in afterwards.
STATE_AFTER = {"create": "created", "start": "running", "die": "exited", "pause": "paused", "unpause": "running"}
ACTIONS = (*STATE_AFTER, "stop", "oom", "destroy", "rename", "update", "connect", "disconnect")
"""The events that are asked for."""

_STATES = {"created": "created", "running": "running", "paused": "paused"} | dict.fromkeys(
    ("exited", "dead", "removing", "restarting"), "exited"
)

_POD, _NAMESPACE, _CONTAINER = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace", "io.kubernetes.container.name"
_SANDBOX = "POD"
"""cri-dockerd's name for the container that holds a pod's namespaces."""


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a container."""

    action: str
    container_id: str
    nanoseconds: int
    """Unix time by the daemon's clock."""
    record: Record | None
    """As far as the event describes the container; None for events of networks."""


def read_event(event: Any) -> Event | None:  # noqa: ANN401 - a decoded JSON text
    """Read one event. None for what concerns no container; raises ValueError, TypeError or AttributeError."""
    actor = event.get("Actor") or {}
    attributes: Mapping[str, Any] = actor.get("Attributes") or {}
    action, nanoseconds = text(event.get("Action")), event.get("timeNano")
    if event.get("Type") == "network":
        container_id, record = text(attributes.get("container")), None
    else:
        container_id = text(actor.get("ID"))
        record = _record(container_id, "created", attributes.get("name"), attributes.get("image"), attributes)
    if not container_id or action not in ACTIONS:
        return None
    return Event(action, container_id, nanoseconds if isinstance(nanoseconds, int) else 0, record)


def read_container(item: Any, metadata: Metadata, shed: Shed) -> Record:  # noqa: ANN401 - a decoded JSON text
    """Read an item of /containers/json. Raises ValueError, TypeError or AttributeError where it is malformed."""
    container_id = text(item.get("Id"))
    if not container_id:
        raise ValueError("it has no Id")
    names = [name[1:] for name in item.get("Names") or () if isinstance(name, str) and name.count("/") == 1]
    labels = item.get("Labels") or {}
    state = _STATES.get(text(item.get("State")), "unknown")
    record = _record(container_id, state, names[0] if names else "", item.get("Image"), labels)
    created = item.get("Created")
    record = replace(record, created=float(created) if isinstance(created, int) else 0.0)
    if not metadata.enabled:
        return record
    return replace(
        record,
        networks=kept(_networks(item), shed),
        ports=kept(_ports(item), shed),
        mounts=kept(_mounts(item), shed),
        labels=metadata.keep_labels(labels, shed),
    )


def _record(container_id: str, state: str, name: object, image: object, labels: Mapping[str, Any]) -> Record:
    """Name a container: by Docker's name, or by the pod where the kubelet made it."""
    pod = text(labels.get(_POD))
    container = text(labels.get(_CONTAINER)) if pod else text(name) or container_id[:12]
    sandbox = bool(pod) and container == _SANDBOX
    return Record(
        container_id,
        RUNTIME,
        state,
        namespace=text(labels.get(_NAMESPACE)) if pod else "",
        pod=pod,
        container="" if sandbox else container,
        image=text(image),
        sandbox=sandbox,
    )


def _networks(item: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    """Give a row per network and address; one without address for a mode that has none of its own."""
    mode, _, _ = text((item.get("HostConfig") or {}).get("NetworkMode")).partition(":")
    mode = "bridge" if mode == "default" else mode
    networks = (item.get("NetworkSettings") or {}).get("Networks") or {}
    for name, network in networks.items():
        addresses = [network.get("IPAddress"), network.get("GlobalIPv6Address")]
        for address in [one for one in addresses if one] or [""]:
            yield mode, name, address
    if not networks:
        yield mode, "", ""


def _ports(item: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for port in item.get("Ports") or ():
        if port.get("PublicPort"):
            yield port.get("Type"), port.get("PrivatePort"), port.get("IP"), port.get("PublicPort")


def _mounts(item: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for mount in item.get("Mounts") or ():
        yield mount.get("Destination"), mount.get("Type"), "rw" if mount.get("RW") else "ro"
