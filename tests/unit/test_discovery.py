"""What feeds the table of containers: the policy of metadata, the cgroup scan, the monitors and their sockets."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.contract import Paths, Unsupported
from exporter.monitors.runtimes import Settings, monitors, sockets
from exporter.monitors.runtimes.cgroup import CgroupScan
from exporter.monitors.runtimes.containers import Containers
from exporter.monitors.runtimes.record import Metadata, kept, text

A, B, C = "a" * 64, "b" * 64, "c" * 64
UID = "01234567-89ab-cdef-0123-456789abcdef"


# Metadata


def test_only_allowed_metadata_is_kept() -> None:
    """Labels and values by their lists; other variables by name, and only if asked; no value of theirs anywhere."""
    policy = Metadata(labels=("app.*",), environment=("LANG*",), environment_names=True)
    shed: list[int] = []
    assert policy.keep_labels({"app.name": "x", "secret": "y", 5: "z"}, shed.append) == (("app.name", "x"),)
    rows = policy.keep_environment(["LANG=C", "PASSWORD=hunter2", "EMPTY", 7], shed.append)
    assert rows == (("LANG", "C"), ("PASSWORD", ""), ("EMPTY", ""))
    assert "hunter2" not in repr(rows)
    assert Metadata(environment=("LANG*",)).keep_environment(["LANG=C", "X=1"], shed.append) == (("LANG", "C"),)
    assert Metadata().keep_environment(["LANG=C"], shed.append) == ()
    assert Metadata(enabled=False, labels=("*",), environment=("*",)).keep_labels({"a": "b"}, shed.append) == ()
    assert sum(shed) == 0


def test_metadata_is_bounded_and_loss_counted() -> None:
    """Ten megabytes of labels cost little and leave a bounded rest; what is left out is counted."""
    shed: list[int] = []
    labels = {f"app.{index}": "v" * 100 for index in range(100_000)}
    rows = Metadata(labels=("app.*",)).keep_labels(labels, shed.append)
    assert len(rows) == 64
    assert sum(shed) == 100_000 - 64
    assert len(text("x" * 10_000_000)) <= 1024


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text(st.characters()), st.lists(st.text()), st.booleans()))
def test_text_is_always_encodable(value: object) -> None:
    """Whatever a runtime says becomes bounded text that UTF-8 can carry, lone surrogates included."""
    text(value).encode()
    kept([(value, value)], lambda _: None)
    assert text("\ud800") == "?"


# The scan


def host(root: Path, processes: dict[int, tuple[str, str]]) -> Paths:
    for pid, (path, comm) in {0: ("/", "self"), **processes}.items():
        directory = root / "proc" / (str(pid) if pid else "self")
        directory.mkdir(parents=True)
        (directory / "cgroup").write_text(f"0::{path}\n")
        (directory / "comm").write_text(f"{comm}\n")
    (root / "proc" / "uptime").write_text("1 1\n")
    return Paths(root / "proc", root / "sys")


def test_the_scan_finds_every_container(tmp_path: Path) -> None:
    """Each container once, with resources; pause processes as sandboxes; zombies and the host's own not at all."""
    processes = {
        5: ("/system.slice/docker.service", "dockerd"),
        70: (f"/docker/{A}", "sh"),
        8: (f"/docker/{A}", "init"),
        90: (f"/kubepods/pod{UID}/{B}", "pause"),
        91: (f"/kubepods/pod{UID}/{C}", "app"),
        92: (f"/docker/{'d' * 64} (deleted)", "zombie"),
    }
    recorder = Recorder(paths=host(tmp_path, processes))
    pids = tmp_path / "sys" / "fs" / "cgroup" / "docker" / A / "pids.current"
    pids.parent.mkdir(parents=True)
    pids.write_text("2\n")
    (tmp_path / "sys" / "fs" / "cgroup" / "cgroup.controllers").write_text("")
    scan = CgroupScan(Containers(), resources=True)
    scan.open(recorder)
    scan.update()
    info = recorder.families.snapshots["cni_container_info"]
    assert {(key[0], key[2], key[3], key[5]) for key in info} == {
        (A, "", A[:12], "docker"),
        (B, UID, "", "containerd"),
        (C, UID, C[:12], "containerd"),
    }
    assert recorder.families.value("cni_containers", ("docker", "running")) == 1
    assert recorder.families.value("cni_containers", ("containerd", "running")) == 1
    assert recorder.families.snapshots["cni_container_pids"] == {(A,): 2.0}
    scan.close()
    assert recorder.families.snapshots["cni_container_info"] == {}


def test_the_scan_without_processes_is_unsupported(tmp_path: Path) -> None:
    """A /proc that is not there is an answer with a remedy, not a failure."""
    with pytest.raises(Unsupported) as refused:
        CgroupScan(Containers(), resources=False).open(Recorder(paths=Paths(tmp_path, tmp_path)))
    assert refused.value.remedy


def test_the_scan_reads_long_texts_whole(tmp_path: Path) -> None:
    """A container at the end of a text longer than one read is found."""
    paths = host(tmp_path, {7: ("/" + "x" * 16380, "sh")})
    with (paths.procfs / "7" / "cgroup").open("a") as content:
        content.write(f"1:cpu:/docker/{A}\n")
    scan = CgroupScan(Containers(), resources=False)
    recorder = Recorder(paths=paths)
    scan.open(recorder)
    scan.update()
    assert {key[0] for key in recorder.families.snapshots["cni_container_info"]} == {A}


# Monitors and sockets


def test_monitors_by_configuration() -> None:
    """Each runtime is a monitor of its own, optional; the floor is always there; an unknown name is refused."""
    assert [one.name for one in monitors(Settings())] == ["docker", "containerd", "cri-o", "cgroup"]
    assert [one.optional for one in monitors(Settings())] == [True, True, True, False]
    assert [one.name for one in monitors(Settings(runtimes=()))] == ["cgroup"]
    with pytest.raises(ValueError, match="rocket"):
        monitors(Settings(runtimes=("rocket",)))


@pytest.mark.parametrize("name", ["docker", "containerd", "cri-o"])
def test_without_a_socket_every_rung_is_unsupported(name: str, tmp_path: Path) -> None:
    """A runtime that is not there is an answer on each rung, which names the path."""
    nowhere = (str(tmp_path / "none.sock"),)
    settings = Settings(docker_sockets=nowhere, cri_sockets={"containerd": nowhere, "cri-o": nowhere})
    monitor = next(one for one in monitors(settings) if one.name == name)
    for make in monitor.rungs:
        source = make()
        with pytest.raises(Unsupported, match=r"none\.sock"):
            source.open(Recorder())
        source.close()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("/var/run/docker.sock", "/run/docker.sock")),
        ({"DOCKER_HOST": "unix:///x.sock"}, ("/x.sock",)),
        ({"DOCKER_HOST": "tcp://10.0.0.1:2375"}, ()),
        (
            {"XDG_RUNTIME_DIR": "/run/user/5"},
            ("/var/run/docker.sock", "/run/docker.sock", "/run/user/5/docker.sock"),
        ),
    ],
)
def test_where_docker_is_looked_for(environment: dict[str, str], expected: tuple[str, ...]) -> None:
    """DOCKER_HOST decides where it is set; another machine's Docker is none of ours."""
    assert sockets.docker(environment) == expected


def test_a_plain_file_is_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a socket is passed over; one that we may not use says who may."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unsupported, match="no socket"):
        sockets.find([str(tmp_path / "file")], "docker")

    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(Unsupported, match="no permission"):
        sockets.find(["/run/x.sock"], "docker")
