"""The loader of the kernel programs: what it leaves behind, what it says where it is refused, what it needs not.

Every test starts real processes; those that take something away do so in a mount namespace or a seccomp filter of their
own.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Running

from exporter.monitors import kernel
from exporter.monitors.kernel import loader, programs

pytestmark = pytest.mark.real("root", "ip", "bpftool")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

# What remains of a loader

LOADING = """
import sys
from pathlib import Path
from exporter.monitors import kernel
kernel._MEMORY = sys.argv[1]
print(1, flush=True)
kernel.load(kernel.Settings())
"""
MOMENTS = (0, 10, 25, 50, 75, 100, 150, 200, 400, 800)
"""Milliseconds after the call: in the loader's start, in its imports, in the compiler, in the verifier."""


def _session(leader: int) -> dict[int, str]:
    """Give the living processes of a session, with their command lines."""
    members = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone in between
            state, _, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(session) == leader and state != "Z":
                members[int(process.name)] = (process / "cmdline").read_text()
    return members


def _orphans() -> set[int]:
    """Give the exporters' programs that no process holds."""
    listing = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True, timeout=10, check=True)
    loaded = {one["id"] for one in json.loads(listing.stdout) if one.get("name", "").startswith("cni_")}
    return loaded - _held()


def _held() -> set[int]:
    """Give the numbers of all BPF programs that some process has a descriptor of, itself or by a link."""
    held = set()
    for information in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with contextlib.suppress(OSError):
            held |= {int(number) for number in re.findall(r"^prog_id:\t(\d+)$", information.read_text(), re.MULTILINE)}
    return held


def _until(holds: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_outlives_an_exporter_that_is_killed_while_loading(moment: int, tmp_path: Path) -> None:
    """SIGKILL at this moment: no process of its session, no private directory, no program without a holder."""
    before = _orphans()
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    with subprocess.Popen(command, stdout=-1, stderr=-3, env=ENVIRONMENT, start_new_session=True) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(moment / 1000)  # the moment is what this is about
        process.kill()
    assert _until(lambda: not _session(process.pid), 20), _session(process.pid)
    assert not list(tmp_path.iterdir())
    assert _until(lambda: not _orphans() - before, 10), "the kernel frees programs after a grace period"


def test_a_loader_that_is_killed_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL of the loader alone, in the midst of the compiler: the exporter goes on, with a reason, and tidies up."""
    monkeypatch.setattr(kernel, "_MEMORY", str(tmp_path))
    monkeypatch.setattr(loader.Loader, "_compile", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    found = kernel.load(kernel.Settings())
    assert "loader failed" in found.standings[0].reason
    assert not list(tmp_path.iterdir())


# What is said where it is refused

SECCOMP = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]  # bpf(2)
refused = 0x00050000 | int(sys.argv[1])  # SECCOMP_RET_ERRNO
program = ((0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, refused), (0x06, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))) == 0  # PR_SET_SECCOMP
os.execvp(sys.argv[2], sys.argv[2:])
"""


def _without(change: str) -> tuple[str, ...]:
    """Give a command that runs another where the host's files are changed for it alone."""
    return ("unshare", "--mount", "sh", "-ec", f'{change}; exec "$@"', "sh")


def _with_capabilities(*names: str) -> tuple[str, ...]:
    given = "".join(f",+{name}" for name in names)
    sets = (f"--{kind}=-all{given}" for kind in ("bounding-set", "inh-caps", "ambient-caps"))
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *sets)


def _bcc() -> str:
    """Where the bindings are."""
    done = subprocess.run(
        [sys.executable, "-c", "import bcc; print(bcc.__path__[0])"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.strip()


REFUSALS = {
    "no BTF": (lambda: _without("mount -t tmpfs none /sys/kernel/btf"), "built without BTF -> .*DEBUG_INFO_BTF"),
    "another BTF": (
        lambda: _without("mount --bind /dev/null /sys/kernel/btf/vmlinux"),
        r"vmlinux is not a kernel's types \(BTF\).* -> .*/sys",
    ),
    "no bcc": (lambda: _without(f"mount -t tmpfs none {_bcc()}"), "is not the BPF compiler.* -> .*python3-bpfcc"),
    "no permission": (lambda: _with_capabilities(), "no permission: .* -> .*CAP_BPF and CAP_PERFMON"),
    "half a permission": (lambda: _with_capabilities("bpf"), "not permitted.* -> .*CAP_PERFMON"),
    "bpf denied": (lambda: (sys.executable, "-c", SECCOMP, "1"), r"no permission: .* -> .*seccomp must allow bpf"),
    "bpf hidden": (lambda: (sys.executable, "-c", SECCOMP, "38"), r"seccomp.*Function not implemented -> allow bpf"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_check_tells_why_and_what_helps(case: str) -> None:
    """Each probe is `none` with a reason and, behind the arrow, a remedy; the command ends well: `run` would work."""
    command, told = REFUSALS[case]
    done = subprocess.run(
        [*command(), sys.executable, "-m", "exporter", "check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok    ebpf ")]
    assert len(lines) >= len(programs.PROGRAMS)
    assert all(re.search(rf" none +.*{told}", line) for line in lines), done.stdout
    assert re.search(rf"(?m)^ok    kernel +none +.*{told}", done.stdout)


@pytest.mark.parametrize("case", REFUSALS)
def test_the_exporter_runs_without_programs(case: str, exporter: Callable[..., Running]) -> None:
    """It is ready, serves the links, says that nothing is attached, and why."""
    command, told = REFUSALS[case]
    running = exporter(command=command())
    scrape = running.until(lambda scrape: scrape.all("cni_exporter_monitor_mode_info", monitor="kernel"))
    reason = told.partition(" -> ")[0].removesuffix(".*")
    ((labels, _),) = scrape.all("cni_exporter_monitor_mode_info", monitor="kernel")
    assert labels["mode"] == "none"
    assert re.search(reason, labels["reason"])
    attached = scrape.all("cni_bpf_program_attached")
    assert len(attached) >= len(programs.PROGRAMS)
    assert not any(value for _, value in attached)
    assert all(re.search(reason, labels["reason"]) for labels, _ in scrape.all("cni_bpf_program_info"))
    assert scrape.value("cni_exporter_monitor_up", monitor="links") == 1
    assert scrape.all("cni_netns_created_total"), "the link monitor counts instead"


def test_nothing_needs_tracefs(exporter: Callable[..., Running]) -> None:
    """Without it every probe stands where it stands with it."""
    hidden = "umount --lazy /sys/kernel/tracing 2>&1 || true; umount --lazy /sys/kernel/debug 2>&1 || true"
    rungs = [
        {labels["program"]: labels["rung"] for labels, _ in exporter(command=command).scrape().all(ATTACHED)}
        for command in ((), _without(hidden))
    ]
    assert rungs[0] == rungs[1]
    assert any(rungs[0].values())


ATTACHED = "cni_bpf_program_attached"

# Without a capability


@pytest.fixture
def network() -> Iterator[str]:
    """Make a network namespace with a loopback device."""
    name = f"cnil{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=10)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)


@pytest.mark.parametrize("kept", [None, []], ids=["default", "none"])
def test_the_daemon_counts_without_capabilities(
    kept: list[str] | None, exporter: Callable[..., Running], network: str
) -> None:
    """With keep_capabilities empty CapEff is 0, and drops and connections of a namespace go on being counted."""
    running = exporter({"general": {"keep_capabilities": kept}} if kept is not None else {})
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    effective = int(re.findall(r"^CapEff:\t(\w+)$", status, re.MULTILINE)[0], 16)
    assert bool(effective) == (kept is None)
    before = running.scrape()
    traffic = (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for _ in range(2111): s.sendto(b'x', ('127.0.0.1', 9))\n"
        "l = socket.create_server(('127.0.0.1', 0))\n"
        "for _ in range(211): socket.create_connection(l.getsockname()).close(); l.accept()[0].close()"
    )
    subprocess.run(["ip", "netns", "exec", network, sys.executable, "-c", traffic], check=True, timeout=60)

    def grown(name: str, **labels: str) -> float:
        return sum(v for _, v in running.scrape().all(name, **labels)) - sum(v for _, v in before.all(name, **labels))

    assert _until(lambda: grown("cni_packet_drops_total") >= 2111, 15)
    assert _until(lambda: grown("cni_tcp_connections_opened_total", direction="outgoing") >= 211, 15)
