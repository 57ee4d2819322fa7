"""Where the runtimes listen: their usual socket paths, and which of them is there.

Flows in: paths and the environment. Flows out: the first socket that can be connected to.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from exporter.contract import Unsupported

CRI = {
    "containerd": ("/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"),
    "cri-o": ("/run/crio/crio.sock",),
}
_DOCKER = ("/var/run/docker.sock", "/run/docker.sock")


def docker(environment: Mapping[str, str]) -> tuple[str, ...]:
    """List where Docker may listen: DOCKER_HOST alone where it is set, else the usual paths, the user's own last.

    A DOCKER_HOST that is no Unix socket is another machine's Docker: then there is none here.
    """
    host = environment.get("DOCKER_HOST", "")
    if host:
        return (host.removeprefix("unix://"),) if host.startswith("unix://") else ()
    runtime_directory = environment.get("XDG_RUNTIME_DIR", "")
    return (*_DOCKER, f"{runtime_directory}/docker.sock") if runtime_directory else _DOCKER


def find(paths: Iterable[str], runtime: str) -> str:
    """Give the first path that is a socket we may use. Raises Unsupported, with the reason and what can be done."""
    paths = tuple(paths)
    for path in paths:
        try:
            is_socket = stat.S_ISSOCK(Path(path).stat().st_mode)
        except PermissionError as error:
            raise _refused(path, runtime) from error
        except OSError:
            continue
        if is_socket:
            if not os.access(path, os.R_OK | os.W_OK):
                raise _refused(path, runtime)
            return path
    where = ", ".join(paths) or "any local path"
    raise Unsupported(f"no socket at {where}", f"start {runtime}, or name its socket in the configuration")


def _refused(path: str, runtime: str) -> Unsupported:
    return Unsupported(f"no permission for {path}", f"run as root or in the group that may use {runtime}")
