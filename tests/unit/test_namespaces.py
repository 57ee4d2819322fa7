"""The namespaces monitor on a /proc of plain files, and on this host's own."""

import os
import subprocess
from pathlib import Path

import pytest
from recorder import Recorder

from exporter.contract import Paths, Unsupported
from exporter.monitors.namespaces import TYPES, CgroupSource, ProcSource

CID = "a" * 64


def process(proc: Path, pid: int, *, container: str = "", started: int = 100, namespaces: str = "host") -> Path:
    """Lay a process out as /proc shows it."""
    directory = proc / str(pid)
    (directory / "ns").mkdir(parents=True)
    for kind in TYPES:
        shared = proc / f"{namespaces}-{kind}"
        shared.touch()
        os.link(shared, directory / "ns" / kind)
    (directory / "cgroup").write_text(f"0::/docker/{container}\n" if container else "0::/init.scope\n")
    (directory / "stat").write_text(f"{pid} (a ) b) S {' '.join(['0'] * 18)} {started} 0\n")
    (directory / "status").write_text(f"Name:\tx\nNSpid:\t{pid}\t1\n")
    (directory / "uid_map").write_text("         0     100000      65536\n")
    return directory


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    process(tmp_path, 1)
    process(tmp_path, 40, container=CID, started=300, namespaces="box")
    process(tmp_path, 50, container=CID, started=200, namespaces="box")
    return tmp_path


def test_namespaces_are_counted_and_a_container_is_described_by_its_first_process(proc: Path) -> None:
    context = Recorder(Paths(proc, proc))
    source = ProcSource()
    source.open(context)
    source.update()
    found = context.families.snapshots
    assert found["cni_namespaces"] == {(kind,): 2.0 for kind in TYPES}
    assert found["cni_container_process_info"] == {(CID, "50", "1", "0:100000:65536"): 1.0}
    assert found["cni_container_processes"] == {(CID,): 2.0}
    inode = str((proc / "50" / "ns" / "net").stat().st_ino)
    assert (CID, "net", inode, "false") in found["cni_container_namespace_info"]


def test_a_process_that_vanishes_in_the_middle_is_passed_over(proc: Path) -> None:
    (proc / "50" / "stat").unlink()
    (proc / "60").mkdir()
    context = Recorder(Paths(proc, proc))
    source = ProcSource()
    source.open(context)
    source.update()
    assert context.families.snapshots["cni_container_process_info"] == {(CID, "40", "1", "0:100000:65536"): 1.0}


def test_without_the_permission_processes_are_left(proc: Path) -> None:
    context = Recorder(Paths(proc, proc))
    source = CgroupSource()
    source.open(context)
    source.update()
    assert context.families.snapshots["cni_container_processes"] == {(CID,): 2.0}
    assert context.families.snapshots["cni_namespaces"] == {}


def test_an_empty_proc_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is not there"):
        ProcSource().open(Recorder(Paths(tmp_path, tmp_path)))
    with pytest.raises(Unsupported, match="no processes"):
        CgroupSource().open(Recorder(Paths(tmp_path, tmp_path)))


def counts() -> dict[str, float]:
    """Give the namespaces of this host by type."""
    context = Recorder(Paths())
    source = ProcSource()
    source.open(context)
    source.update()
    return {kind: value for (kind,), value in context.families.snapshots["cni_namespaces"].items()}


def rise() -> dict[str, float]:
    """Give by how much a process with namespaces of its own raises each count."""
    before = counts()
    script = ["sh", "-c", "echo; exec sleep 20"]
    with subprocess.Popen(["unshare", "-n", "-m", "-i", "-u", "-C", *script], stdout=-1) as child:
        try:
            assert child.stdout
            child.stdout.readline()
            return {kind: value - before[kind] for kind, value in counts().items()}
        finally:
            child.kill()


@pytest.mark.real
def test_a_new_namespace_of_each_type_is_counted() -> None:
    """Once each. Somebody else's process may come or go in between: one of a few tries must be undisturbed."""
    made = dict.fromkeys(("net", "mnt", "ipc", "uts", "cgroup"), 1.0)
    assert made | {"pid": 0.0, "user": 0.0} in [rise() for _ in range(5)]
