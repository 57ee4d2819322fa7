"""Which container a process belongs to, and what that container uses, from control groups alone.

Flows in: the text of /proc/PID/cgroup and the files under /sys/fs/cgroup. Flows out: an `Identity` and `Resources`. No
runtime is asked, no privilege is needed. Formats: cgroups(7); Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

CONTENT_LIMIT = 65536
"""Bytes of a /proc/PID/cgroup that are looked at: 16 hierarchies with paths of PATH_MAX."""

_CACHED = 4096
"""Longer texts are parsed each time: the cache of parsed texts must stay small."""

_ID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_CONTAINER = re.compile(rb"(?:(?P<prefix>[^/]*)[-:])?(?P<id>[0-9a-f]{64})(?:\.scope)?")
_POD = re.compile(rb"(?:^|[-:])pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?(?:$|:)")

_PREFIXES = {b"docker": "docker", b"cri-containerd": "containerd", b"nerdctl": "containerd", b"crio": "cri-o"}
_PARENTS = {b"docker": "docker", b"moby": "docker", b"k8s.io": "containerd", b"default": "containerd"}
_NOT_A_CONTAINER = (b"conmon", b"libpod_parent")
"""conmon watches a container from outside; a bare id directly under libpod_parent is podman's pod, not a container."""

_V1_CONTROLLERS = {"cpu", "cpuacct", "memory", "blkio", "pids"}

_NO_LIMIT = 1 << 60
"""cgroup v1 writes "no limit" as the largest multiple of the page size below 2^63."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The innermost container that a process belongs to."""

    container_id: str
    """64 lower-case hexadecimal digits."""
    runtime: str
    """docker, containerd, cri-o, podman, or unknown where the path does not tell."""
    pod_uid: str
    """UID of the Kubernetes pod (with dashes; 32 digits for a static pod); empty outside Kubernetes."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a container has used since its start and what it may use; None where the kernel does not say."""

    cpu_seconds: float | None = None
    cpu_limit_cores: float | None = None
    memory_working_set_bytes: float | None = None
    memory_limit_bytes: float | None = None
    disk_read_bytes: float | None = None
    disk_written_bytes: float | None = None
    pids: float | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of /proc/PID/cgroup that names a container: its controllers and the path up to the container."""

    controllers: bytes
    path: bytes
    depth: int
    identity: Identity


def identify(content: bytes) -> Identity | None:
    """Tell the container of a process from the text of its /proc/PID/cgroup; None for a process of the host.

    Any bytes are accepted. Where the lines disagree, the deepest container counts: it is the one that runs inside.
    """
    places = _places(content)
    return max(places, key=lambda place: place.depth).identity if places else None


def read(sysfs: Path, content: bytes) -> Resources:
    """Read what the container of a process uses. `sysfs` is where the host's /sys is mounted.

    A file that is missing or unreadable leaves its figure None; a process outside containers gets only None.
    """
    root = os.fspath(sysfs / "fs" / "cgroup")
    unified = _unified(root)
    v2, v1 = "", {}
    for place in _places(content):
        path = os.fsdecode(place.path)
        if not place.controllers:
            v2 = unified + _resolve(unified, path)
            continue
        for controller in place.controllers.decode("ascii", "replace").split(","):
            v1[controller] = _mount(root, place.controllers.decode("ascii", "replace"), controller) + path
    # A hybrid host has its controllers in v1; the unified tree there knows processes but counts nothing of these.
    return _read_v1(v1) if v1.keys() & _V1_CONTROLLERS else _read_v2(v2) if v2 else Resources()


def lineage(sysfs: Path, content: bytes) -> list[Resources]:
    """Read what the control group of a process, and each one above it, uses and may use; nearest first.

    `content` is the process's /proc/PID/cgroup. Where `sysfs` shows only the group itself, as in most containers, it is
    the last of the list.
    """
    root = os.fspath(sysfs / "fs" / "cgroup")
    v1: dict[str, tuple[str, str]] = {}
    v2 = ""
    for line in content[:CONTENT_LIMIT].split(b"\n"):
        _, _, rest = line.decode("utf-8", "replace").partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            v2 = path or v2
        for controller in controllers.split(","):
            v1[controller] = _mount(root, controllers, controller), path
    if v1.keys() & _V1_CONTROLLERS:
        steps = range(max(path.count("/") for _, path in v1.values()) + 1)
        return [_read_v1({name: mount + _above(path, step) for name, (mount, path) in v1.items()}) for step in steps]
    return [_read_v2(_unified(root) + _above(v2, step)) for step in range(v2.count("/") + 1)]


def _above(path: str, steps: int) -> str:
    """Go up from a control group by so many steps; the root is empty."""
    parts = [part for part in path.split("/") if part]
    return "".join(f"/{part}" for part in parts[: max(len(parts) - steps, 0)])


def _places(content: bytes) -> tuple[_Place, ...]:
    """Find the lines that name a container. The first look is cheap: most processes of a host are in none."""
    if not _ID.search(content, 0, CONTENT_LIMIT):
        return ()
    return _parse(content) if len(content) <= _CACHED else _parse.__wrapped__(content[:CONTENT_LIMIT])


@lru_cache(maxsize=1024)
def _parse(content: bytes) -> tuple[_Place, ...]:
    return tuple(place for line in content.split(b"\n") if (place := _parse_line(line)))


def _parse_line(line: bytes) -> _Place | None:
    """Read `hierarchy:controllers:path`."""
    _, _, rest = line.partition(b":")
    controllers, _, path = rest.partition(b":")
    if not path.startswith(b"/") or b"\0" in path or not _ID.search(path):
        return None
    segments = path.removesuffix(b" (deleted)").split(b"/")
    for depth in range(len(segments) - 1, 0, -1):
        parent, found = segments[depth - 1], _CONTAINER.fullmatch(segments[depth])
        if not found or _outside(found["prefix"] or b"", parent):
            continue
        pod = _pod_uid(segments[depth]) or _pod_uid(parent)
        runtime = _runtime(found["prefix"] or b"", parent, in_pod=bool(pod))
        identity = Identity(found["id"].decode("ascii"), runtime, pod)
        return _Place(controllers, b"/".join(segments[: depth + 1]), depth, identity)
    return None


def _outside(prefix: bytes, parent: bytes) -> bool:
    """Tell whether the segment looks like a container but holds only what watches or groups containers."""
    return _NOT_A_CONTAINER[0] in prefix or (not prefix and parent == _NOT_A_CONTAINER[1])


def _runtime(prefix: bytes, parent: bytes, *, in_pod: bool) -> str:
    """Name the runtime: from the systemd unit's prefix, else from the parent directory.

    runc's `slice:prefix:name` form turns up as a plain directory where a runtime uses cgroupfs by mistake.
    """
    word = prefix.rpartition(b":")[2]
    if word.startswith(b"libpod"):
        return "podman"
    if word in _PREFIXES:
        return _PREFIXES[word]
    if not prefix and parent in _PARENTS:
        return _PARENTS[parent]
    return "containerd" if in_pod and not prefix else "unknown"


def _pod_uid(segment: bytes) -> str:
    """Read the pod's UID from a kubelet's directory or slice; systemd needs dashes written as underscores."""
    found = _POD.search(segment)
    return found[1].decode("ascii").replace("_", "-") if found else ""


def _unified(root: str) -> str:
    """Find the v2 hierarchy: the whole tree, or the `unified` mount of a hybrid host."""
    return root if os.path.exists(f"{root}/cgroup.controllers") else f"{root}/unified"  # noqa: PTH110 - a hot path


@lru_cache(maxsize=256)
def _mount(root: str, controllers: str, controller: str) -> str:
    """Find where a v1 controller is mounted: co-mounted ones share a directory, mostly with a link for each name."""
    shared = f"{root}/{controllers}"
    return shared if "/" not in controllers and os.path.isdir(shared) else f"{root}/{controller}"  # noqa: PTH112 - text


def _resolve(root: str, path: str) -> str:
    """Turn a path relative to our own cgroup namespace into one of the host's tree.

    A process above the root of the reader's namespace is shown with leading `/..` (cgroup_namespaces(7)); `sysfs` may
    be the host's, mounted into our container.
    """
    if not path.startswith("/../"):
        return path
    base = _own_root(root, os.getpid()).split("/")
    parts = path.split("/")[1:]
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return "/".join([*base[: max(len(base) - up, 1)], *parts[up:]])


@lru_cache(maxsize=4)
def _own_root(root: str, pid: int) -> str:
    """Find the cgroup that holds our own process in the host's tree, as an absolute path; empty if it is not there.

    Container runtimes start the process right at the root of its cgroup namespace.
    """
    wanted = str(pid).encode()
    for directory, _, files in os.walk(root):
        if "cgroup.procs" in files and wanted in (_file(f"{directory}/cgroup.procs") or b"").split():
            return directory.removeprefix(root)
    return ""


def _read_v1(directories: dict[str, str]) -> Resources:
    """Read the figures of cgroup v1, each controller from its own hierarchy."""
    cpu, memory, blkio = (directories.get(name, "") for name in ("cpu", "memory", "blkio"))
    used = _number(f"{directories.get('cpuacct', '')}/cpuacct.usage")
    limit = _number(f"{memory}/memory.limit_in_bytes")
    blocks = _file(f"{blkio}/blkio.throttle.io_service_bytes_recursive")
    blocks = blocks if blocks is not None else _file(f"{blkio}/blkio.throttle.io_service_bytes")
    return Resources(
        used / 1e9 if used is not None else None,
        _cores(_number(f"{cpu}/cpu.cfs_quota_us"), _number(f"{cpu}/cpu.cfs_period_us")),
        _working_set(
            _number(f"{memory}/memory.usage_in_bytes"), _field(_file(f"{memory}/memory.stat"), b"total_inactive_file")
        ),
        limit if limit is not None and limit < _NO_LIMIT else None,
        _transferred(blocks, b" Read "),
        _transferred(blocks, b" Write "),
        _number(f"{directories.get('pids', '')}/pids.current"),
    )


def _read_v2(directory: str) -> Resources:
    """Read the figures of cgroup v2 from the one directory."""
    used = _field(_file(f"{directory}/cpu.stat"), b"usage_usec")
    quota, _, period = (_file(f"{directory}/cpu.max") or b"").strip().partition(b" ")
    blocks = _file(f"{directory}/io.stat")
    return Resources(
        used / 1e6 if used is not None else None,
        _cores(_parse_number(quota), _parse_number(period)),
        _working_set(
            _number(f"{directory}/memory.current"), _field(_file(f"{directory}/memory.stat"), b"inactive_file")
        ),
        _number(f"{directory}/memory.max"),
        _transferred(blocks, b" rbytes="),
        _transferred(blocks, b" wbytes="),
        _number(f"{directory}/pids.current"),
    )


def _file(path: str) -> bytes | None:
    """Read a small file with three system calls; None where it is missing. Kernel files are read whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        return os.read(descriptor, CONTENT_LIMIT)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _number(path: str) -> float | None:
    return _parse_number(_file(path) or b"")


def _parse_number(text: bytes) -> float | None:
    """Read a whole number >= 0; words such as `max`, and the -1 of "no limit", are None."""
    text = text.strip()
    return float(text) if text.isdigit() else None


def _cores(quota: float | None, period: float | None) -> float | None:
    return quota / period if quota is not None and period else None


def _working_set(usage: float | None, inactive: float | None) -> float | None:
    return max(usage - (inactive or 0.0), 0.0) if usage is not None else None


def _field(text: bytes | None, name: bytes) -> float | None:
    """Read one of the file's `name value` lines."""
    start = (b"\n" + text).find(b"\n" + name + b" ") if text else -1
    return _parse_number(text[start + len(name) :].split(b"\n", 1)[0]) if text and start >= 0 else None


def _transferred(text: bytes | None, mark: bytes) -> float | None:
    """Add up what follows `mark` over all devices: `8:0 rbytes=1 …` of v2, `8:0 Read 1` of v1; an idle one has none."""
    if text is None:
        return None
    counts = (_parse_number(rest.split(maxsplit=1)[0]) for rest in text.split(mark)[1:] if rest.strip())
    return sum((count or 0.0 for count in counts), 0.0)
