"""Linux namespaces of every type: how many there are, and which ones each container's first process is in.

Flows in: `/proc/PID/ns/*`, `/proc/PID/status`, `/proc/PID/uid_map`, `/proc/PID/cgroup`. Flows out: the families of
owner `namespaces`. Reading another user's namespaces takes CAP_SYS_PTRACE; without it the kernel's view by cgroup is
left: processes and PIDs per container.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from exporter.contract import Context, Key, Monitor, Source, Unsupported
from exporter.host import cgroups

TYPES = ("pid", "net", "mnt", "user", "ipc", "uts", "cgroup")
_UID_MAPS = 8  # extents of a UID mapping that are told; the kernel allows 340 (user_namespaces(7))


@dataclass(slots=True)
class _Member:
    """A container as its processes show it."""

    first: int
    started: int
    processes: int = 0


@dataclass(slots=True)
class _Inventory:
    """What one pass over /proc found."""

    inodes: dict[str, set[int]] = field(default_factory=lambda: {kind: set() for kind in TYPES})
    containers: dict[str, _Member] = field(default_factory=dict)
    refused: int = 0


class ProcSource(Source):
    """Passes over /proc."""

    mode = "procfs"

    def open(self, context: Context) -> None:
        """Check that another process's namespaces may be read.

        Raises Unsupported where they may not.
        """
        super().open(context)
        self._proc = context.paths.procfs
        self._host = _reference(self._proc)

    def update(self) -> None:
        """Count namespaces and describe containers."""
        found = _Inventory()
        for pid in pids(self._proc):
            self._visit(pid, found)
        host = {kind: _inode(self._host / "ns" / kind) for kind in TYPES}
        self.context.families.replace(
            {
                "cni_namespaces": {(kind,): float(len(inodes)) for kind, inodes in found.inodes.items()},
                **_processes(self._proc, found),
                "cni_container_namespace_info": {
                    (container_id, kind, str(inode), "true" if inode == host[kind] else "false"): 1.0
                    for container_id, member in found.containers.items()
                    for kind in TYPES
                    if (inode := _inode(self._proc / str(member.first) / "ns" / kind))
                },
            }
        )

    def _visit(self, pid: str, found: _Inventory) -> None:
        _note_container(self._proc, pid, found)
        base = f"{self._proc}/{pid}/ns/"
        for kind, inodes in found.inodes.items():
            with contextlib.suppress(OSError):  # the process ended, or is another user's in a nested user namespace
                inodes.add(os.stat(base + kind).st_ino)  # noqa: PTH116 - a Path for each costs more than the call


class CgroupSource(Source):
    """Without the permission to look into namespaces: processes per container."""

    mode = "cgroup"

    def open(self, context: Context) -> None:
        """Check that /proc is readable. Raises Unsupported where it is not."""
        super().open(context)
        self._proc = context.paths.procfs
        if next(pids(self._proc), None) is None:
            raise Unsupported(f"no processes in {self._proc}", "give the host's /proc with --path.procfs")

    def update(self) -> None:
        """Describe containers."""
        found = _Inventory()
        for pid in pids(self._proc):
            _note_container(self._proc, pid, found)
        self.context.families.replace(
            {"cni_namespaces": {}, "cni_container_namespace_info": {}, **_processes(self._proc, found)}
        )


def _reference(proc: Path) -> Path:
    """Give a process that is in the host's own namespaces and may be looked into: init, or the kernel's kthreadd.

    Some machines shield init even from root. Raises Unsupported where neither may be looked into.
    """
    refused = False
    for pid in ("1", "2"):
        try:
            (proc / pid / "ns" / "pid").stat()
        except PermissionError:
            refused = True
        except OSError:
            continue
        else:
            return proc / pid
    if refused:
        raise Unsupported("namespaces of other processes cannot be read", "run as root, or grant CAP_SYS_PTRACE")
    raise Unsupported(f"{proc}/1/ns is not there", "give the host's /proc with --path.procfs")


def pids(procfs: Path) -> Iterator[str]:
    """Give the processes of /proc."""
    return (name for name in os.listdir(procfs) if name.isdecimal())  # noqa: PTH208 - thousands of names, no Paths


def _note_container(proc: Path, pid: str, found: _Inventory) -> None:
    with contextlib.suppress(OSError):
        identity = cgroups.identify((proc / pid / "cgroup").read_bytes())
        if identity is None:
            return
        started = _started(proc / pid)
        member = found.containers.setdefault(identity.container_id, _Member(int(pid), started))
        member.processes += 1
        if (started, int(pid)) < (member.started, member.first):
            member.first, member.started = int(pid), started


def _started(directory: Path) -> int:
    """Give a process's start in clock ticks since boot: field 22 of /proc/PID/stat (proc(5))."""
    fields = (directory / "stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19]) if len(fields) > 19 else 0  # noqa: PLR2004 - field 22 counted behind the command's name


def _processes(proc: Path, found: _Inventory) -> dict[str, dict[Key, float]]:
    infos: dict[Key, float] = {}
    for container_id, member in found.containers.items():
        inside, mapping = _inside(proc / str(member.first))
        infos[container_id, str(member.first), inside, mapping] = 1.0
    return {
        "cni_container_process_info": infos,
        "cni_container_processes": {(cid,): float(member.processes) for cid, member in found.containers.items()},
    }


def _inside(directory: Path) -> tuple[str, str]:
    """Give a process's PID in its innermost namespace (NSpid of proc(5)) and its UID mapping."""
    inside = mapping = ""
    with contextlib.suppress(OSError):
        for line in (directory / "status").read_bytes().splitlines():
            if line.startswith(b"NSpid:"):
                inside = line.split()[-1].decode("ascii", "replace")
        extents = (directory / "uid_map").read_text("ascii", "replace").splitlines()
        mapping = ",".join(":".join(extent.split()) for extent in extents[:_UID_MAPS])
    return inside, mapping


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def monitor(interval: float = 15.0) -> Monitor:
    """Describe the monitor; `interval` in seconds."""
    return Monitor("namespaces", (ProcSource, CgroupSource), interval, max_age=2.0)
