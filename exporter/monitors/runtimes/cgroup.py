"""The floor of discovery: every process's cgroup tells its container, whatever made it and whoever is asked in vain.

Flows in: /proc/PID/cgroup of all processes and the cgroup files of each container. Flows out: sightings with resources
into the table of containers. Needs no runtime and no privilege.
"""

import os
from collections.abc import Iterator

from exporter.contract import Context, Source, Unsupported
from exporter.host import cgroups
from exporter.monitors.runtimes.containers import Containers, Sighting

_READ = 16384
"""Bytes of /proc/PID/cgroup in one read; it is longer only with very long paths."""
_DELETED = b" (deleted)\n"
"""What the kernel writes behind the path of a cgroup that is gone: only a zombie is left there."""
_PAUSE = b"pause\n"
"""The process that holds a pod's namespaces, by the name of every common implementation."""


class CgroupScan(Source):
    """Reads the cgroup of every process."""

    mode = "proc"

    def __init__(self, table: Containers, *, resources: bool) -> None:
        """Read what containers use too, where `resources` says so."""
        self._table = table
        self._resources = resources

    def open(self, context: Context) -> None:
        """Raises Unsupported where the process file system is not to be had."""
        super().open(context)
        if not (context.paths.procfs / "self" / "cgroup").exists():
            raise Unsupported(f"no cgroups under {context.paths.procfs}", "mount the host's /proc and name its path")

    def update(self) -> None:
        """Scan. Raises OSError where the process file system cannot be listed."""
        shed, events = self._table.seen(dict(self._scan()))
        if shed:
            self.context.dropped(shed)
        for runtime, event in events:
            self.context.families.add("cni_container_events_total", (runtime, event))
        self._table.publish(self.context.families)

    def close(self) -> None:
        """Take the sightings back: nobody renews them."""
        self._table.unseen()
        self._table.publish(self.context.families)

    def _scan(self) -> Iterator[tuple[str, Sighting]]:
        """Give each container once, by the process of the lowest id: the others are its children as a rule."""
        procfs = os.fspath(self.context.paths.procfs)
        found: set[str] = set()
        for pid in sorted(int(name) for name in os.listdir(procfs) if name.isdigit()):  # noqa: PTH208 - a hot path
            content = _read(f"{procfs}/{pid}/cgroup")
            identity = cgroups.identify(content)
            if identity is None or identity.container_id in found or content.endswith(_DELETED):
                continue
            found.add(identity.container_id)
            sandbox = bool(identity.pod_uid) and _read(f"{procfs}/{pid}/comm") == _PAUSE
            yield identity.container_id, self._sighting(identity, content, sandbox=sandbox)

    def _sighting(self, identity: cgroups.Identity, content: bytes, *, sandbox: bool) -> Sighting:
        if not self._resources or sandbox:
            return Sighting(identity, sandbox)
        return Sighting(identity, sandbox, cgroups.read(self.context.paths.sysfs, content))


def _read(path: str) -> bytes:
    """Read a small file; empty where the process is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        content = os.read(descriptor, _READ)
        while len(content) % _READ == 0 and len(content) < cgroups.CONTENT_LIMIT:
            more = os.read(descriptor, _READ)
            if not more:
                break
            content += more
    except OSError:
        return b""
    else:
        return content
    finally:
        os.close(descriptor)
