"""host/cgroups.py: every runtime's cgroup layout is told apart, hostile paths harm nobody, figures are the kernel's."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.host.cgroups import Identity, Resources, identify, lineage, read

A, B = "a1" * 32, "b2" * 32
UID = "01234567-89ab-cdef-0123-456789abcdef"
UID_ = UID.replace("-", "_")
SLICE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"

CONTAINERS = {
    "docker, cgroupfs": (f"/docker/{A}", "docker", ""),
    "docker, systemd": (f"/system.slice/docker-{A}.scope", "docker", ""),
    "docker, systemd inside": (f"/system.slice/docker-{A}.scope/init.scope", "docker", ""),
    "docker under a parent of the user's": (f"/batch/{A}", "unknown", ""),
    "docker, rootless": (f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope", "docker", ""),
    "containerd's default namespace": (f"/default/{A}", "containerd", ""),
    "containerd, k8s.io": (f"/k8s.io/{A}", "containerd", ""),
    "nerdctl, systemd": (f"/system.slice/nerdctl-{A}.scope", "containerd", ""),
    "docker's containerd namespace": (f"/moby/{A}", "docker", ""),
    "kubelet, systemd": (f"/{SLICE}/cri-containerd-{A}.scope", "containerd", UID),
    "kubelet, guaranteed": (
        f"/kubepods.slice/kubepods-pod{UID_}.slice/cri-containerd-{A}.scope",
        "containerd",
        UID,
    ),
    "kubelet, cgroupfs": (f"/kubepods/burstable/pod{UID}/{A}", "containerd", UID),
    "kubelet, static pod": (f"/kubepods/burstable/pod{'c3' * 16}/{A}", "containerd", "c3" * 16),
    "kubelet, drivers differ": (f"/kubepods.slice:cri-containerd:{A}", "containerd", ""),
    "kubelet, drivers differ, in its slice": (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{A}",
        "containerd",
        UID,
    ),
    "cri-dockerd, systemd": (f"/{SLICE}/docker-{A}.scope", "docker", UID),
    "cri-o, systemd": (f"/{SLICE}/crio-{A}.scope", "cri-o", UID),
    "cri-o, crun": (f"/{SLICE}/crio-{A}.scope/container", "cri-o", UID),
    "cri-o, cgroupfs": (f"/kubepods/besteffort/pod{UID}/crio-{A}", "cri-o", UID),
    "podman, systemd": (f"/machine.slice/libpod-{A}.scope/container", "podman", ""),
    "podman, in a pod": (f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope", "podman", ""),
    "podman, cgroupfs": (f"/libpod_parent/libpod-{A}", "podman", ""),
    "podman, split": (f"/system.slice/web.service/libpod-payload-{A}", "podman", ""),
    "kind, cgroupfs": (f"/docker/{B}/kubelet/kubepods/besteffort/pod{UID}/{A}", "containerd", UID),
    "kind, systemd": (
        f"/system.slice/docker-{B}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/"
        f"kubelet-kubepods-besteffort-pod{UID_}.slice/cri-containerd-{A}.scope",
        "containerd",
        UID,
    ),
    "k3s in docker": (f"/docker/{B}/k3s/kubepods/pod{UID}/{A}", "containerd", UID),
    "docker in docker": (f"/docker/{B}/docker/{A}", "docker", ""),
    "a conmon inside a container": (f"/docker/{A}/libpod_parent/libpod-conmon-{B}", "docker", ""),
    "outside the reader's namespace": (f"/../cri-containerd-{A}.scope", "containerd", ""),
    "outside, in another pod": (
        f"/../../kubepods-burstable-pod{UID_}.slice/cri-containerd-{A}.scope",
        "containerd",
        UID,
    ),
    "a cgroup that is gone": (f"/docker/{A} (deleted)", "docker", ""),
}
HOST = {
    "root": "/",
    "a service": "/system.slice/docker.service",
    "containerd itself": "/system.slice/containerd.service",
    "the kubelet": "/kubepods.slice/kubepods-burstable.slice",
    "a pod's own directory": f"/kubepods/burstable/pod{UID}",
    "cri-o's conmon": f"/{SLICE}/crio-conmon-{A}.scope",
    "podman's conmon": f"/machine.slice/libpod-conmon-{A}.scope",
    "podman's conmon in a pod": f"/libpod_parent/{A}/conmon",
    "podman's pod": f"/machine.slice/machine-libpod_pod_{A}.slice",
    "a longer number": f"/docker/{A}0",
    "capitals": f"/docker/{A.upper()}",
    "a name around an id": f"/docker/x{A}.service",
}


@pytest.mark.parametrize(("path", "runtime", "pod"), CONTAINERS.values(), ids=CONTAINERS.keys())
@pytest.mark.parametrize("version", ["0::{}\n", "3:cpu,cpuacct:{}\n1:name=systemd:{}\n", "4:pids:{}\n0::/\n"])
def test_containers_are_told_apart(path: str, runtime: str, pod: str, version: str) -> None:
    """Each runtime's layout gives id, runtime and pod, in cgroup v2, v1 and hybrid."""
    assert identify(version.replace("{}", path).encode()) == Identity(A, runtime, pod)


@pytest.mark.parametrize("path", HOST.values(), ids=HOST.keys())
def test_what_is_no_container_is_none(path: str) -> None:
    """Daemons, monitors of containers and pods' own directories are not containers."""
    assert identify(f"0::{path}\n".encode()) is None


def test_the_deepest_container_of_all_lines_counts() -> None:
    """Where a controller is not delegated, its line shows the outer container: the inner one counts."""
    content = f"2:devices:/docker/{B}\n1:cpu:/docker/{B}/docker/{A}\n0::/docker/{B}\n".encode()
    found = identify(content)
    assert found
    assert found.container_id == A


@given(st.binary(max_size=2000), st.sampled_from(list(CONTAINERS.values())), st.binary(max_size=200))
def test_any_bytes_are_accepted(before: bytes, container: tuple[str, str, str], behind: bytes) -> None:
    """Whatever stands before or behind a path, nothing is raised, and what is found is well-formed."""
    for content in (before, before + container[0].encode() + behind, b"0::" + container[0].encode() + behind):
        found = identify(content)
        assert found is None or (len(found.container_id) == 64 and set(found.container_id) <= set("0123456789abcdef"))


@given(st.lists(st.text(st.sampled_from("/:-_.\0\n 0af" + "podkublice"), max_size=80), max_size=40))
def test_text_of_the_right_alphabet_is_accepted(parts: list[str]) -> None:
    """Text that is near to the real thing raises nothing."""
    identify(("0::/" + A.join(parts)).encode())


@pytest.mark.parametrize("unit", [b"/" + A.encode(), b"0::/docker/" + A.encode() + b"\n", b"a", b"\0", b"\n", b"-"])
def test_a_megabyte_is_read_in_bounded_time(unit: bytes) -> None:
    """A hostile megabyte costs milliseconds."""
    content = b"0::" + unit * (1_000_000 // len(unit))
    started = time.process_time()
    identify(content)
    assert time.process_time() - started < 0.25


def test_an_embedded_nul_names_no_file() -> None:
    """A path with a NUL is no container, and reading its figures raises nothing."""
    content = f"0::/x\0/docker/{A}\n".encode()
    assert identify(content) is None
    assert read(Path("/nonexistent"), content) == Resources()


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = {
    f"cpu,cpuacct/docker/{A}/cpuacct.usage": "123000000000\n",
    f"cpu,cpuacct/docker/{A}/cpu.cfs_quota_us": "150000\n",
    f"cpu,cpuacct/docker/{A}/cpu.cfs_period_us": "100000\n",
    f"memory/docker/{A}/memory.usage_in_bytes": "1000\n",
    f"memory/docker/{A}/memory.stat": "cache 5\ninactive_file 7\ntotal_inactive_file 300\n",
    f"memory/docker/{A}/memory.limit_in_bytes": "4096\n",
    f"blkio/docker/{A}/blkio.throttle.io_service_bytes": "8:0 Read 10\n8:0 Write 20\n8:16 Read 1\nTotal 31\n",
    f"pids/docker/{A}/pids.current": "4\n",
}
V1_TEXT = (
    f"5:pids:/docker/{A}\n4:blkio:/docker/{A}\n3:memory:/docker/{A}\n2:cpu,cpuacct:/docker/{A}\n"
    f"1:name=systemd:/docker/{A}\n0::/docker/{A}\n"
).encode()
FIGURES = Resources(123.0, 1.5, 700.0, 4096.0, 11.0, 20.0, 4.0)


def test_figures_of_v1_and_hybrid(tmp_path: Path) -> None:
    """Each controller is read from its own hierarchy, co-mounted or not, beside a unified tree without figures."""
    _write(tmp_path / "fs" / "cgroup", V1)
    _write(tmp_path / "fs" / "cgroup" / "unified", {"cgroup.controllers": "", f"docker/{A}/cpu.stat": "usage_usec 1\n"})
    assert read(tmp_path, V1_TEXT) == FIGURES


def test_figures_of_v1_in_single_mounts(tmp_path: Path) -> None:
    """A mount for each controller, and the recursive count of block input and output where the kernel has it."""
    files = {name.replace("cpu,cpuacct", name.rpartition("/")[2].partition(".")[0]): text for name, text in V1.items()}
    files[f"blkio/docker/{A}/blkio.throttle.io_service_bytes_recursive"] = "8:0 Read 12\n8:0 Write 22\n"
    _write(tmp_path / "fs" / "cgroup", files)
    figures = read(tmp_path, V1_TEXT)
    assert (figures.cpu_seconds, figures.cpu_limit_cores) == (123.0, 1.5)
    assert (figures.disk_read_bytes, figures.disk_written_bytes) == (12.0, 22.0)


V2 = {
    "cgroup.controllers": "cpu memory\n",
    f"docker/{A}/cpu.stat": "usage_usec 123000000\nuser_usec 5\n",
    f"docker/{A}/cpu.max": "150000 100000\n",
    f"docker/{A}/memory.current": "1000\n",
    f"docker/{A}/memory.stat": "anon 1\ninactive_file 300\n",
    f"docker/{A}/memory.max": "4096\n",
    f"docker/{A}/io.stat": "8:0 rbytes=10 wbytes=20 rios=1\n8:16 rbytes=1 wbytes=0\n",
    f"docker/{A}/pids.current": "4\n",
}


def test_figures_of_v2(tmp_path: Path) -> None:
    """The one directory is read, that of the container and not of a cgroup inside it."""
    _write(tmp_path / "fs" / "cgroup", V2)
    assert read(tmp_path, f"0::/docker/{A}\n".encode()) == FIGURES
    assert read(tmp_path, f"0::/docker/{A}/init.scope\n".encode()) == FIGURES


def test_figures_outside_our_own_cgroup_namespace(tmp_path: Path) -> None:
    """A path that leaves our cgroup namespace is found in the host's tree from where we ourselves are in it."""
    root = tmp_path / "fs" / "cgroup"
    _write(root, {name.replace("docker/", "pods/other/"): text for name, text in V2.items()})
    _write(root, {"pods/own/me/cgroup.procs": f"1\n{os.getpid()}\n"})
    assert read(tmp_path, f"0::/../../other/{A}\n".encode()) == FIGURES
    assert read(tmp_path, f"0::/../../../../../../pods/other/{A}\n".encode()) == FIGURES


def test_no_limits_and_missing_files_are_none(tmp_path: Path) -> None:
    """`max`, -1, the v1 word for no limit, and files that are not there give no figure; an idle disk gives 0."""
    root = tmp_path / "fs" / "cgroup"
    _write(root, {"cgroup.controllers": "", f"docker/{A}/cpu.max": "max 100000\n", f"docker/{A}/memory.max": "max\n"})
    _write(root, {f"docker/{A}/io.stat": ""})
    text = f"0::/docker/{A}\n".encode()
    assert read(tmp_path, text) == Resources(disk_read_bytes=0.0, disk_written_bytes=0.0)
    _write(root, {f"memory/docker/{A}/memory.limit_in_bytes": "9223372036854771712\n"})
    _write(root, {f"cpu/docker/{A}/cpu.cfs_quota_us": "-1\n", f"cpu/docker/{A}/cpu.cfs_period_us": "100000\n"})
    text = f"2:cpu:/docker/{A}\n1:memory:/docker/{A}\n".encode()
    assert read(tmp_path, text) == Resources()


def test_the_hosts_own_figures_are_never_a_containers(tmp_path: Path) -> None:
    """A controller that is not delegated shows the root: it is left out and not read as the container's."""
    root = tmp_path / "fs" / "cgroup"
    _write(root, {"memory/memory.usage_in_bytes": "77\n", f"pids/docker/{A}/pids.current": "4\n"})
    assert read(tmp_path, f"2:memory:/\n1:pids:/docker/{A}\n".encode()) == Resources(pids=4.0)


@given(st.binary(max_size=300))
def test_garbage_in_the_files_raises_nothing(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    """Whatever a file holds, the answer is a figure >= 0 or none."""
    root = tmp_path_factory.mktemp("garbage")
    for name in V2:
        path = root / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(garbage)
    figures = read(root, f"0::/docker/{A}\n".encode())
    for figure in (getattr(figures, name) for name in Resources.__slots__):
        assert figure is None or figure >= 0


@pytest.mark.parametrize("garbage", [b"", b"\n", b"0::\n", b"0\n", b"::::\n", b"\xff:\xff:/\xff\n", b"1:cpu:\n"])
def test_a_lineage_of_garbage_is_of_groups_that_say_nothing(tmp_path: Path, garbage: bytes) -> None:
    """Whatever /proc/PID/cgroup holds, the answer is figures that are not known."""
    assert set(lineage(tmp_path, garbage)) == {Resources()}


def test_a_lineage_goes_up_to_the_root(tmp_path: Path) -> None:
    """Each group with its own figures, the nearest first; the root has none of its own here."""
    _write(tmp_path / "fs" / "cgroup", {"cgroup.controllers": "", "a/pids.current": "9\n", "a/b/pids.current": "4\n"})
    assert [group.pids for group in lineage(tmp_path, b"0::/a/b\n")] == [4.0, 9.0, None]
