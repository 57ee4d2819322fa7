"""Network namespaces and veth devices on the running kernel, on each rung by itself: known numbers in, the same out.

Others may make namespaces on this machine at the same time: what is ours is known by PIDs and device names, and the
counters must agree with all events, whose ring loses none.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from recorder import Recorder

from exporter.catalog import NETNS_LIFETIME
from exporter.host.netlink import Route, Subscription
from exporter.monitors import kernel
from exporter.monitors.kernel import loader
from exporter.monitors.kernel.events import Details, Event
from exporter.monitors.kernel.programs import LIFECYCLE
from exporter.monitors.kernel.reader import Reader
from exporter.monitors.kernel.shapes import Program
from exporter.monitors.kernel.source import KernelSource
from exporter.monitors.links.devices import Devices

pytestmark = pytest.mark.real("root", "ip", "unshare")

COUNTERS = ("created", "destroyed")
VETH = ("created", "deleted", "moved")
_RUNGS = max(len(probe.rungs) for probe in LIFECYCLE.probes)

# Five processes with namespaces of their own by clone (3) and clone3 (2), one that has none, two calls that fail.
CLONES = """
import ctypes, os, struct
libc = ctypes.CDLL(None)
clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
def new(flags):
    pid = libc.syscall(clone, flags | 17, None, None, None, None)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
def new3(flags):
    arguments = ctypes.create_string_buffer(struct.pack("=11Q", flags, 0, 0, 0, 17, *[0] * 6))
    pid = libc.syscall(435, arguments, 88)
    if pid == 0:
        os._exit(0)
    if pid > 0:
        os.waitpid(pid, 0)
for _ in range(3): new(0x40000000)
new(0)
new(0x40000000 | 0x100000)  # CLONE_PARENT_SETTID at address 0: it exists all the same
new3(0x40000000)
new3(0x40000000 | 0x800 | 0x200)  # CLONE_SIGHAND without CLONE_VM: refused
"""

# As container runtimes do it: a thread makes a namespace, holds it by a descriptor or not, and goes back.
HOPS = """
import ctypes, os
libc = ctypes.CDLL(None)
home = os.open("/proc/self/ns/net", os.O_RDONLY)
for _ in range(11):
    assert libc.unshare(0x40000000) == 0
    assert libc.setns(home, 0) == 0
assert libc.unshare(0x1) != 0
"""

HELD = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
link = socket.socket(fileno=int(sys.argv[1]))
assert libc.unshare(0x40000000) == 0
by_file = os.open("/proc/self/ns/net", os.O_RDONLY)
assert libc.unshare(0x40000000) == 0
by_socket = socket.socket()
socket.send_fds(link, [b"x"], [by_file, by_socket.fileno()])
"""


class Watch:
    """The lifecycle program on one rung, and all that it told."""

    def __init__(self, programs: kernel.Programs) -> None:
        self.programs = programs
        self.recorder = Recorder()
        self.told: list[tuple[Event, Details]] = []
        self.source = KernelSource(programs, self._tell)
        self.source.open(self.recorder)
        self.source.update()
        self.told.clear()  # what came before

    def _tell(self, event: Event, reader: Reader | None) -> None:
        self.told.append((event, reader.details(event) if reader else {}))

    def update(self) -> None:
        """Twice: what is noticed in the first is told in the second."""
        self.source.update()
        self.source.update()

    def counters(self, subject: str, names: tuple[str, ...]) -> dict[str, float]:
        return {name: self.recorder.families.snapshots[f"cni_{subject}_{name}_total"][()] for name in names}

    def events(self, class_: str, *what: str) -> list[tuple[Event, Details]]:
        return [(event, shown) for event, shown in self.told if event.class_ == class_ and shown["what"] in what]

    def wait_for_ends(self, netns: list[str]) -> None:
        """The kernel takes namespaces apart when it has time."""
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            self.update()
            if Counter(netns) <= Counter(event.netns for event, _ in self.events("netns", "destroyed")):
                return
            time.sleep(0.2)
        raise AssertionError("namespaces that ended are not told of")


def _stands_on(programs: kernel.Programs, number: int) -> bool:
    """Whether the ladder of namespaces stands on a rung."""
    rungs = next(probe.rungs for probe in LIFECYCLE.probes if probe.name == "netns")
    hooks = ",".join(dict.fromkeys(hook.symbols[0] for hook in rungs[number].hooks))
    return any((one.program, one.hook, one.attached) == ("netns", hooks, True) for one in programs.standings)


def _of_rung(number: int) -> Program:
    """Give the program with that rung of each ladder alone."""
    only = [replace(probe, rungs=probe.rungs[number : number + 1]) for probe in LIFECYCLE.probes]
    return replace(LIFECYCLE, probes=tuple(probe for probe in only if probe.rungs))


@pytest.fixture(scope="module", params=range(_RUNGS), ids=lambda number: f"rung{number}")
def rung(request: pytest.FixtureRequest, programs: kernel.Programs) -> Iterator[kernel.Programs]:
    if _stands_on(programs, request.param):
        yield programs
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "PROGRAMS", (_of_rung(request.param),))
        found = kernel.load(kernel.Settings(programs=("lifecycle",), timeout=300))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture
def watch(rung: kernel.Programs) -> Iterator[Watch]:
    assert not rung.manifest.reason, "the loader itself must not fail where it could load the whole ladder"
    if not rung.serves("netns"):
        pytest.skip("; ".join(standing.reason for standing in rung.standings))
    found = Watch(rung)
    try:
        yield found
    finally:
        found.source.close()


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Names for `ip netns`; those that are left are removed."""
    names = [f"cnil{os.getpid()}x{number}" for number in range(7)]
    yield names
    for name in names:
        if Path("/run/netns", name).exists():
            _ip("netns", "del", name)


def _ip(*arguments: str) -> int:
    """Run ip; the answer is its PID."""
    with subprocess.Popen(["ip", *arguments]) as process:
        assert process.wait(20) == 0, arguments
    return process.pid


def _python(script: str) -> int:
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        assert process.wait(30) == 0
    return process.pid


def _unshare() -> int:
    with subprocess.Popen(["unshare", "-n", "true"]) as process:
        assert process.wait(20) == 0
    return process.pid


def test_at_least_one_rung_serves_namespaces(programs: kernel.Programs) -> None:
    """The whole ladder, as the exporter climbs it, stands on one of its rungs, which is among those tested below."""
    assert any(_stands_on(programs, number) for number in range(_RUNGS)), programs.standings


def test_namespaces_are_counted_exactly(watch: Watch, namespaces: list[str]) -> None:
    """23 by unshare, 7 by ip, 3 by clone and 2 more, 11 left again at once: each once, with who made it; all end."""
    before = watch.counters("netns", COUNTERS)
    lives = sum(watch.recorder.families.histograms[NETNS_LIFETIME][()][:-1])
    for name in namespaces:
        Path("/run/netns", name).parent.mkdir(parents=True, exist_ok=True)
    made = {
        "unshare": ({_unshare() for _ in range(23)}, 23),
        "ip": ({_ip("netns", "add", name) for name in namespaces}, 7),
        "clone": ({_python(CLONES)}, 5),
        "hop": ({_python(HOPS)}, 11),
    }
    watch.update()
    created = watch.events("netns", "created")
    for how, (pids, expected) in made.items():
        assert len([event for event, _ in created if event.pid in pids]) == expected, how
    pids = set().union(*(pids for pids, _ in made.values()))
    ours = [event.netns for event, _ in created if event.pid in pids]
    cookies = tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 12)
    if cookies:  # of Linux 5.12; before, one is an inode, which is used again
        assert not any(netns.endswith(":0") for netns in ours)
        assert len(set(ours)) == 46, "each is another namespace"
    for name in namespaces:
        _ip("netns", "del", name)
    watch.wait_for_ends(ours)
    told = {what: watch.events("netns", what) for what in COUNTERS}
    ended = [event.netns for event, _ in told["destroyed"] if event.netns in ours]
    if cookies:  # else another's, which had the inode before, may have ended as well
        assert sorted(ended) == sorted(ours), "each ends once"
    after = watch.counters("netns", COUNTERS)
    assert {what: after[what] - before[what] for what in COUNTERS} == {what: len(told[what]) for what in COUNTERS}
    known = [float(shown["lifetime"]) for _, shown in told["destroyed"] if "lifetime" in shown]
    assert len(known) >= 46
    assert sum(watch.recorder.families.histograms[NETNS_LIFETIME][()][:-1]) - lives == len(known)
    assert all(0 < lifetime < 120 for lifetime in known)
    assert watch.recorder.errors == []


def test_a_namespace_that_only_a_descriptor_holds_lives(watch: Watch) -> None:
    """One is held by its file, one by a socket; no process is in them: they end when the descriptors close."""
    import socket  # noqa: PLC0415 - for this test

    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", HELD, str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as process:
            assert process.wait(30) == 0
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 2)
    watch.update()
    held = [event.netns for event, _ in watch.events("netns", "created") if event.pid == process.pid]
    assert len(held) == 2
    for netns, descriptor in zip(held, descriptors, strict=True):
        time.sleep(0.5)
        watch.update()
        assert netns not in {event.netns for event, _ in watch.events("netns", "destroyed")}
        os.close(descriptor)
        watch.wait_for_ends([netns])


def test_nothing_is_left_behind(watch: Watch) -> None:
    """The kernel's programs are the exporter's only: their descriptors are all that holds them."""
    assert watch.programs.manifest.programs["netns"]
    assert not any(Path("/sys/fs/bpf").glob("cni*"))


class Netlink:
    """The link monitor's own count of the host's devices, from the kernel's news."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.news = Subscription()
        route = Route()
        self.devices = Devices(self.recorder.families, route.links().links)
        route.close()

    def counters(self) -> dict[str, float]:
        while (heard := self.news.receive()) is not None:
            for item in heard:
                assert not isinstance(item, ValueError), item
                self.devices.hear(item)
        return {name: self.recorder.families.value(f"cni_veth_{name}_total") for name in VETH}


STEPS: tuple[tuple[str, dict[str, int]], ...] = (
    ("link add cnila type veth peer name cnilb", {"created": 2}),
    ("link set cnilb netns {0}", {"moved": 1}),
    ("link add cnilc type veth peer name cnild netns {0}", {"created": 1}),
    ("link add cnile netns {0} type veth peer name cnilf netns {0}", {}),
    ("link add cnilg netns {0} type veth peer name cnilh netns {1}", {}),
    ("-n {0} link set cnild netns {1}", {}),
    ("-n {1} link set cnild netns {2}", {"created": 1}),
    ("link set cnild name cnilz", {}),
    ("link add cnili type bridge", {}),
    ("link del cnili", {}),
    ("link add cnilj type veth peer name cnilk netns {1}", {"created": 1}),
    ("link set cnilj up", {}),
    ("netns del {1}", {"deleted": 1}),
    ("link del cnilz", {"deleted": 2}),
    ("-n {0} link del cnilb", {"deleted": 1}),
)


def test_devices_are_counted_as_netlink_counts_them(watch: Watch, namespaces: list[str]) -> None:
    """Made here, there and across, moved out, on and in, deleted from either end and with a namespace: the same."""
    if not watch.programs.serves("veth"):
        pytest.skip("; ".join(s.reason for s in watch.programs.standings if s.program == "veth") or "no such rung")
    netlink = Netlink()
    for name in namespaces[:2]:
        _ip("netns", "add", name)
    places = (*namespaces[:2], str(os.getpid()))
    expected = dict.fromkeys(VETH, 0)
    before = watch.counters("veth", VETH)
    start = netlink.counters()
    for step, change in STEPS:
        _ip(*step.format(*places).split())
        for name, count in change.items():
            expected[name] += count
        limit = time.monotonic() + 10
        while True:
            watch.update()
            now, heard = watch.counters("veth", VETH), netlink.counters()
            seen = {name: now[name] - before[name] for name in VETH}
            if seen == expected or time.monotonic() > limit:
                break
            time.sleep(0.1)
        assert seen == expected, step
        assert {name: heard[name] - start[name] for name in VETH} == expected, step
    netlink.news.close()
    moved = [(shown["device"], shown["what"]) for _, shown in watch.events("veth", "moved", "arrived")]
    assert moved == [("cnilb", "moved"), ("cnild", "moved"), ("cnild", "arrived")]
    event, shown = watch.events("veth", "created")[0]
    assert (event.comm, shown["kind"]) == ("ip", "veth")
    assert event.netns.startswith(f"{Path('/proc/self/ns/net').stat().st_ino}:")
    assert all(event.pid for event, shown in watch.events("veth", "created"))
