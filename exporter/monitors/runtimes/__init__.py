"""Discovery of containers: Docker, containerd and CRI-O by their own interfaces, and the cgroup scan under them all.

Flows in: settings. Flows out: a monitor for each, so that one that hangs stops no other. They share one table of
containers and with it the families of owner `runtimes`; all four are given a writer for that owner.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from exporter.contract import Monitor, Source
from exporter.monitors.runtimes import sockets
from exporter.monitors.runtimes.cgroup import CgroupScan
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.cri import CriEvents, CriList
from exporter.monitors.runtimes.docker import DockerEvents
from exporter.monitors.runtimes.record import Metadata

__all__ = ["RUNTIMES", "SOCKETS", "Metadata", "Settings", "monitors"]

SOCKETS = sockets.CRI
"""Where runtimes with a CRI usually listen."""

RUNTIMES = ("docker", "containerd", "cri-o")
"""Runtimes with an interface of their own; where two know a container, the earlier one's word counts."""

_DOCKER_INTERVAL = 10.0
"""Seconds between looks whether the daemon still answers; its events come in between."""
_CRI_INTERVAL = 1.0
"""Seconds between two lists of a runtime without events; with events nothing is asked in between."""
_CRI_MAX_AGE = 0.1
"""A scrape lists anew what is older, so that a runtime without events shows a container as soon as one looks."""
_SCAN_MAX_AGE = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says about discovery."""

    runtimes: tuple[str, ...] = RUNTIMES
    """Runtimes whose own interfaces are asked; the cgroup scan sees the containers of all others too."""
    interval: float = 30.0
    """Seconds between two cgroup scans when nobody scrapes."""
    metadata: Metadata = field(default_factory=Metadata)
    resources: bool = True
    """Whether CPU, memory, disk and pids of each container are read."""
    docker_sockets: tuple[str, ...] = ()
    """Paths in place of Docker's usual ones."""
    cri_sockets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Paths in place of the usual ones, by runtime (containerd, cri-o)."""


def monitors(config: Settings) -> list[Monitor]:
    """List the monitors: `cgroup`, and one named after each runtime. Raises ValueError for an unknown runtime."""
    unknown = set(config.runtimes) - set(RUNTIMES)
    if unknown:
        raise ValueError(f"unknown container runtimes: {', '.join(sorted(unknown))}; known are {', '.join(RUNTIMES)}")
    asked = [runtime for runtime in RUNTIMES if runtime in config.runtimes]
    table = Containers(asked)
    scan = Monitor(
        "cgroup", [partial(CgroupScan, table, resources=config.resources)], config.interval, max_age=_SCAN_MAX_AGE
    )
    return [*(_docker(config, table) if one == "docker" else _cri(one, config, table) for one in asked), scan]


def _docker(config: Settings, table: Containers) -> Monitor:
    paths = config.docker_sockets or sockets.docker(os.environ)
    cursor: dict[str, int] = {}
    return Monitor(
        "docker", [partial(DockerEvents, table, config.metadata, paths, cursor)], _DOCKER_INTERVAL, optional=True
    )


def _cri(runtime: str, config: Settings, table: Containers) -> Monitor:
    paths: Iterable[str] = config.cri_sockets.get(runtime) or sockets.CRI[runtime]
    probed: dict[str, float] = {}
    rungs: list[Callable[[], Source]] = [
        partial(CriEvents, runtime, table, config.metadata, paths, probed),
        partial(CriList, runtime, table, config.metadata, paths),
    ]
    return Monitor(runtime, rungs, _CRI_INTERVAL, max_age=_CRI_MAX_AGE, optional=True)
