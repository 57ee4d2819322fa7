"""A node full of containers, as far as the kernel is concerned: namespaces, veths on bridges, control groups.

Flows in: how many. Flows out: processes in network namespaces of their own, each in a control group named as Docker
names them, each with veths to the host. Everything is gone when the block ends.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "cnisc"
_CHILD = """
import ctypes, os, sys, time
for line in sys.stdin:
    groups = line.split()
    pid = os.fork()
    if pid == 0:
        for group in groups:
            open(group + "/cgroup.procs", "w").write("0")
        assert ctypes.CDLL(None).unshare(0x40000000) == 0
        os.write(1, b'%d\\n' % os.getpid())
        time.sleep(600)
        os._exit(0)
time.sleep(600)
"""


def _hierarchies() -> list[Path]:
    """Give the control group hierarchies that containers would be in."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    return [path for name in ("pids", "memory", "cpuacct", "blkio", "systemd") if (path := root / name).is_dir()]


@contextmanager
def crowded(containers: int = 250, veths: int = 4) -> Iterator[list[str]]:
    """Make containers with `veths` veths each; the value is their ids."""
    ids = [hashlib.sha256(f"{_PREFIX}{number}".encode()).hexdigest() for number in range(containers)]
    groups = {cid: [hierarchy / "docker" / cid for hierarchy in _hierarchies()] for cid in ids}
    for paths in groups.values():
        for path in paths:
            path.mkdir(parents=True)
    keeper = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=-1, stdout=-1, text=True, start_new_session=True)
    pids: list[int] = []
    try:
        assert keeper.stdin
        assert keeper.stdout
        keeper.stdin.write("".join(" ".join(map(str, paths)) + "\n" for paths in groups.values()))
        keeper.stdin.close()
        pids = [int(keeper.stdout.readline()) for _ in ids]
        _ip([f"link add {_PREFIX}-br type bridge"])
        _ip(
            f"link add {_PREFIX}{number}x{link} master {_PREFIX}-br type veth peer name eth{link} netns {pid}"
            for number, pid in enumerate(pids)
            for link in range(veths)
        )
        yield ids
    finally:
        _end(keeper, pids)
        _remove([path for paths in groups.values() for path in paths])


def _ip(commands: Iterator[str] | list[str]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True, timeout=120)


def _end(keeper: subprocess.Popen[str], pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    keeper.kill()
    keeper.wait(10)
    subprocess.run(["ip", "link", "del", f"{_PREFIX}-br"], capture_output=True, timeout=60, check=False)
    deadline = time.monotonic() + 120
    while any(path.name.startswith(_PREFIX) for path in Path("/sys/class/net").iterdir()):
        assert time.monotonic() < deadline, "veths are still there"
        time.sleep(0.2)


def _remove(paths: list[Path]) -> None:
    deadline = time.monotonic() + 20
    for path in paths:
        while path.exists():
            try:
                path.rmdir()
            except OSError:
                assert time.monotonic() < deadline, f"{path} is still in use"
                time.sleep(0.05)
    for hierarchy in _hierarchies():
        with suppress(OSError):
            (hierarchy / "docker").rmdir()
