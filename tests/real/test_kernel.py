"""BPF programs on the running kernel: known numbers of drops and connections in, the same numbers out.

Each test makes its own network namespace and looks at that one's counters alone.
"""

import contextlib
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from netns import ip, namespace
from recorder import Recorder

from exporter.catalog import CONNECT_DURATION
from exporter.contract import Unsupported
from exporter.host.bpf import Map
from exporter.host.btf import Btf
from exporter.monitors import kernel
from exporter.monitors.kernel import headers
from exporter.monitors.kernel.consumer import Tally
from exporter.monitors.kernel.controls import Controls, Rule
from exporter.monitors.kernel.counts import COUNTER, PLACE, PLACES, WITHOUT, WORDS
from exporter.monitors.kernel.events import HEAD
from exporter.monitors.kernel.programs import COMMON, PROGRAMS, PROOF
from exporter.monitors.kernel.source import KernelSource

__all__ = ["namespace"]

pytestmark = pytest.mark.real("root", "ip", "bpftool")
ROOT = Path(__file__).parents[2]
_PROBES = ("drops", "tcp_state", "tcp_retrans", "tcp_reset")

DROPS = """
import socket
lo = ("127.0.0.1", 0)
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(23):
    sender.sendto(b"x", ("127.0.0.1", 9))
deaf = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
deaf.bind(lo)
import ctypes, struct
refuse = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0))  # BPF_RET | BPF_K, 0: take nothing
deaf.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(refuse)))
for _ in range(29):
    sender.sendto(b"x", deaf.getsockname())
full = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
full.bind(lo)
full.setblocking(False)
sender.connect(full.getsockname())
for _ in range(31):
    sender.send(b"x" * 1000)
taken = 0
try:
    while full.recv(2000):
        taken += 1
except BlockingIOError:
    pass
print(31 - taken)
"""

TCP = """
import socket, struct
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(64)
for number in range(23):
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    if number < 5:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
    client.close()
    server.close()
for _ in range(7):
    try:
        socket.create_connection(("127.0.0.1", 9))
    except ConnectionRefusedError:
        pass
"""

RETRANSMITS = """
import select, socket
def sent_again():
    header, values = [l.split() for l in open("/proc/self/net/snmp") if l.startswith("Tcp:")]
    return int(values[header.index("RetransSegs")])
before = sent_again()
asking = []
for _ in range(3):
    one = socket.socket()
    one.setblocking(False)
    one.connect_ex(("192.0.2.9", 80))
    asking.append(one)
select.select([], [], [], 1.5)
for one in asking:
    one.close()
print(sent_again() - before)
"""


class Running:
    """Loaded programs, their source and a namespace for traffic."""

    def __init__(self, programs: kernel.Programs, namespace: str) -> None:
        self.programs, self.namespace = programs, namespace
        self.recorder = Recorder()
        self.source = KernelSource(programs)
        self.source.open(self.recorder)
        self.controls = Controls(programs.manifest.maps)
        cookie = (
            "import socket\ntry: print(int.from_bytes(socket.socket().getsockopt(1,71,8),'little'))\n"
            "except OSError: print(0)"  # before 5.14
        )
        self.key = self._key(cookie)
        for _ in range(2):  # without a cookie (5.10) it is taken for an earlier one, whose counters go first
            self.source.update()
        counters = [name for name in self.recorder.families.snapshots if name.endswith("_total")]
        self.before = defaultdict(dict, {name: self._own(name) for name in counters})

    def _key(self, cookie: str) -> str:
        inode = self.run("import os;print(os.stat('/proc/self/ns/net').st_ino)").strip()
        return f"{inode}:{self.run(cookie).strip()}"

    def run(self, script: str) -> str:
        """Run a Python script in the namespace; the answer is what it printed."""
        command = ["ip", "netns", "exec", self.namespace, sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def counted(self, family: str) -> dict[tuple[str, ...], float]:
        """Series of the test's namespace, without its key, since the test began."""
        self.source.update()
        series = self._own(family)
        return {key: gain for key, value in series.items() if (gain := value - self.before[family].get(key, 0))}

    def _own(self, family: str) -> dict[tuple[str, ...], float]:
        series = self.recorder.families.snapshots.get(family, {})
        return {key[1:]: value for key, value in series.items() if key[:1] == (self.key,)}

    def reason(self, name: str) -> str:
        """Give a drop reason as this kernel tells it: one without reasons says so and has one name for all."""
        blind = any("reason" in standing.cannot_see for standing in self.programs.standings)
        return "not_specified" if blind else name

    def unaccounted(self) -> dict[str, float]:
        """Read the account: what is missing or too much, by class."""
        self.source.update()
        parts = [self.events(what) for what in ("filtered", "sampled_out", "lost", "handled")]
        seen = self.events("seen")
        return {c: n - sum(part[c] for part in parts) for c, n in seen.items() if n != sum(part[c] for part in parts)}

    def events(self, what: str) -> dict[str, float]:
        """One part of the account, by class."""
        series = self.recorder.families.snapshots[f"cni_events_{what}_total"]
        return {key[0]: value for key, value in series.items()}


@pytest.fixture
def running(programs: kernel.Programs, namespace: str, lacking: Callable[[str], None]) -> Iterator[Running]:
    if not all(map(programs.serves, _PROBES)):
        lacking("; ".join(f"{one.program}: {one.reason}" for one in programs.standings if not one.attached))
    found = Running(programs, namespace)
    yield found
    found.controls.apply({"packet_drop": 1.0}, ())
    found.source.close()


def _program_ids(names: str = "cni_") -> set[int]:
    listing = subprocess.run(["bpftool", "-j", "prog"], capture_output=True, text=True, timeout=10, check=True)
    return {program["id"] for program in json.loads(listing.stdout) if program.get("name", "").startswith(names)}


def test_the_verifier_takes_every_program(programs: kernel.Programs) -> None:
    """A rung may be forbidden or not there; but where the kernel looks at a program, it finds nothing wrong with it."""
    refused = "the kernel refuses to load it: "
    found = [f"{one.program}: {one.reason}" for one in programs.standings if refused in one.reason]
    forbidden = f"{refused}Operation not permitted"
    assert [reason for reason in found if reason.count(refused) > reason.count(forbidden)] == []


# Exact counts


def test_drops_are_counted_by_reason(running: Running) -> None:
    """23 datagrams to a closed port, 29 refused by a socket's filter, those to a full socket that did not arrive.

    A kernel without reasons counts as many, and says that it has none.
    """
    full = float(running.run(DROPS).strip())
    assert full > 0
    counted = running.counted("cni_packet_drops_total")
    if running.reason("") == "not_specified":
        assert counted == {("not_specified",): 23.0 + 29.0 + full}
        return
    assert counted == {("no_socket",): 23.0, ("socket_filter",): 29.0, ("socket_rcvbuff",): full}


def test_connections_are_counted_by_direction(running: Running) -> None:
    """23 connections opened, each seen from both ends; 7 refused; 5 resets by linger and 7 by closed ports.

    Where the kernel shows no resets without a socket, the standing says so.
    """
    running.run(TCP)
    assert running.counted("cni_tcp_connections_opened_total") == {("outgoing",): 23.0, ("incoming",): 23.0}
    assert running.counted("cni_tcp_connection_failures_total") == {("outgoing",): 7.0}
    blind = any("closed port" in standing.cannot_see for standing in running.programs.standings)
    assert running.counted("cni_tcp_faults_total") == {("reset_sent",): 5.0 if blind else 12.0}
    times = running.recorder.families.histograms[CONNECT_DURATION][running.key,]
    assert sum(times[:-1]) == 23
    assert 0 < times[-1] < 23


def test_retransmits_equal_the_kernels_own_count(running: Running) -> None:
    """SYNs that nobody answers are sent again as often as /proc/net/snmp says, and fail when given up."""
    name = running.namespace
    ip("-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    ip("-n", name, "addr", "add", "192.0.2.1/24", "dev", "v0")
    ip("-n", name, "link", "set", "v0", "up")
    ip("-n", name, "link", "set", "v1", "up")
    ip("-n", name, "neigh", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", "v0")
    again = float(running.run(RETRANSMITS).strip())
    assert again >= 3
    assert running.counted("cni_tcp_faults_total") == {("retransmit",): again}
    assert running.counted("cni_tcp_connection_failures_total") == {("outgoing",): 3.0}
    assert running.counted("cni_packet_drops_total")[running.reason("otherhost"),] >= again + 3


def test_a_namespace_is_found_by_its_inode_in_proc(running: Running) -> None:
    """The alias of a namespace is the inode of /proc/PID/net/stat, which an exporter without rights can see."""
    running.run(DROPS)
    inode = running.run("import os;print(os.stat('/proc/self/net/stat').st_ino)").strip()
    assert running.counted("cni_netns_alias") == {(f"proc-{inode}",): 1.0}


# Events


def test_the_account_is_exact_under_flood(running: Running) -> None:
    """At half the ratio, with a rule, and more than the ring holds: nothing is unaccounted for, and nothing is lost."""
    lost = running.events("lost")["packet_drop"]
    running.controls.apply({"packet_drop": 0.5}, [Rule("port", 19, ("packet_drop",))])
    running.run(
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "for n in range(10007): s.sendto(b'x',('127.0.0.1',19 if n%3 == 0 else 9))"
    )
    assert running.counted("cni_packet_drops_total") == {(running.reason("no_socket"),): 10007.0}
    gaps = [running.unaccounted() for _ in range(50)]
    assert {} in gaps, gaps[-1]  # an event of someone else's may come between two reads
    assert running.events("filtered")["packet_drop"] >= 3336
    assert running.events("sampled_out")["packet_drop"] / 6671 > 0.55, "the brake thins further"
    assert running.events("lost")["packet_drop"] == lost
    assert sum(running.controls.matches().values()) == running.events("filtered")["packet_drop"]
    assert running.recorder.errors == []


def test_an_event_says_who_talked_to_whom(running: Running) -> None:
    """A kept event of a drop and of a failed connection carries addresses, ports, reason and weight."""
    shown: list[dict[str, object]] = []
    running.source._tap = lambda event, reader: shown.append(
        {
            "class": event.class_,
            "netns": event.netns,
            "weight": event.weight,
            "pid": event.pid,
            **(reader.details(event) if reader else {}),
        }
    )
    running.run(TCP)
    running.run(
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('127.0.0.1',1031))\n"
        "s.sendto(b'x',('127.0.0.1',9))\ns=socket.socket(socket.AF_INET6,socket.SOCK_DGRAM)\n"
        "s.bind(('::1',1033))\ns.sendto(b'x',('::1',9))\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('127.0.0.1',1035))\n"
        "s.setsockopt(0,4,b'\\x01'*12)\ns.sendto(b'x',('127.0.0.3',9))\n"  # IP_OPTIONS: nothing, twelve times
        "s=socket.socket(socket.AF_INET6)\ns.bind(('::1',1037))\ns.connect_ex(('::1',9))\n"
    )
    running.source.update()
    own = [event for event in shown if event["netns"] == running.key]
    four = next(event for event in own if event.get("source_port") == 1031)
    assert (four["reason"], four["device"]) == (running.reason("no_socket"), "lo")
    assert (four["source"], four["protocol"]) == ("127.0.0.1", 17)
    assert (four["destination"], four["destination_port"], four["weight"]) == ("127.0.0.1", 9, 1.0)
    six = next(event for event in own if event.get("source_port") == 1033)
    assert (six["source"], six["destination"], six["destination_port"]) == ("::1", "::1", 9)
    long = next(event for event in own if event.get("source_port") == 1035)
    assert (long["source"], long["destination"], long["destination_port"]) == ("127.0.0.1", "127.0.0.3", 9)
    *failed, last = [event for event in own if event.get("what") == "failed"]
    assert (last["local"], last["local_port"], last["remote"], last["remote_port"]) == ("::1", 1037, "::1", 9)
    assert len(failed) == 7
    assert {(event["remote"], event["remote_port"], event["direction"]) for event in failed} == {
        ("127.0.0.1", 9, "outgoing")
    }
    assert all(event["pid"] for event in failed), "who asked for a connection is known"
    assert four["pid"] == 0, "who was running when a packet was dropped means nothing"


def test_records_are_brief_while_nobody_listens(running: Running) -> None:
    """They are their heads then, and drops count for the other side all the same; else they are whole."""
    drops = (
        "import socket\nsender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for _ in range({}): sender.sendto(b'x', ('127.0.0.1', 9))"
    )
    tally, noted, sizes, whole = running.programs.tally, Tally.count, Counter[int](), HEAD.size + 80

    def count(address: int, size: int, now: int) -> str:
        sizes[size] += 1
        return noted(tally, address, size, now)

    running.source._listened_to(frozenset(("exec",)))
    with patch.object(Tally, "count", staticmethod(count)):
        running.run(drops.format(23))
        running.source.update()
        assert sizes[HEAD.size] >= 23
        before = sizes[whole]
        running.source._listened_to(frozenset(("packet_drop",)))
        running.run(drops.format(29))
        running.source.update()
        assert sizes[whole] >= before + 29
    peers = running.recorder.families.snapshots["cni_top_peer_events_estimated"]
    assert peers[running.key, "packet_drop", "127.0.0.1"] == 52


# Trust


def _header(path: Path, struct: str, before: str) -> Path:
    """Write the kernel's types with one member too many in a struct: everything behind it moves."""
    with Btf() as types:
        members = [m for p in (COMMON, PROOF, *PROGRAMS) for m in (*p.members, *p.optional)]
        headers.write(path, types, dict.fromkeys(m.partition(".")[0] for m in members))
    text = (path / "include/kernel_types.h").read_text()
    wrong, count = re.subn(
        rf"(\nstruct {struct} \{{\n(?:(?!\n\}};).)*?)(\n\t[^\n]*\b{before};)",
        r"\1\n\tlong too_many;\2",
        text,
        count=1,
        flags=re.DOTALL,
    )
    assert count == 1
    target = path / "wrong.h"
    target.write_text(wrong)
    return target


def test_a_wrong_offset_is_caught_and_nothing_is_exported(tmp_path: Path) -> None:
    """A header in which net_cookie lies 8 bytes too far: the proof names what differs, nothing is attached."""
    header = _header(tmp_path, "net", "net_cookie")
    found = kernel.load(kernel.Settings(programs=("process",), types=str(header), timeout=100))
    try:
        assert not found.attached
        told = re.compile("self-proof: (netns cookie is|net.net_cookie is at byte)")  # user space knows it from 5.14 on
        assert all(told.match(standing.reason) for standing in found.standings), found.standings
        assert not found.manifest.programs
        assert not found.manifest.links
        with pytest.raises(Unsupported, match="self-proof"):
            kernel.monitor(found).rungs[0]().open(Recorder())
    finally:
        found.close()


@pytest.mark.host
def test_a_wrong_offset_refuses_only_who_reads_it(tmp_path: Path) -> None:
    """A member of struct tcp_sock in the wrong place is no reason not to count drops."""
    header = _header(tmp_path, "tcp_sock", "bytes_acked")
    found = kernel.load(kernel.Settings(programs=("drops", "tcp"), types=str(header)))
    try:
        standings = {standing.program: standing for standing in found.standings}
        assert standings["drops"].attached
        assert not standings["tcp_state"].attached
        assert "tcp_sock.bytes_acked is at byte" in standings["tcp_state"].reason
    finally:
        found.close()


@pytest.mark.host
def test_a_header_that_does_not_compile_is_a_reason(tmp_path: Path) -> None:
    """What the compiler says reaches the user, with file and line."""
    header = tmp_path / "broken.h"
    header.write_text("struct sk_buff { no such thing };\n")
    found = kernel.load(kernel.Settings(types=str(header)))
    assert not found.attached
    assert re.search(r"kernel_types\.h:\d+: ", found.standings[0].reason)


# Life and death


CHILD = """
import os, sys, time
from exporter import privileges
from exporter.monitors import kernel
from exporter.monitors.kernel.source import KernelSource
from recorder import Recorder
def resident():
    return [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")][0]
import exporter.monitors.kernel.source
bare = resident()
programs = kernel.load(kernel.Settings(programs=("drops", "tcp")))
privileges.keep(frozenset() if programs.manifest.unprivileged else frozenset({39}))  # CAP_BPF
recorder = Recorder()
source = KernelSource(programs)
source.open(recorder)
source.update()
effective = [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")][0]
lines = [l for fds in programs.manifest.programs.values() for fd in fds for l in open(f"/proc/self/fdinfo/{fd}")]
identities = ",".join(l.split()[1] for l in lines if l.startswith("prog_id:"))
print(effective, resident() - bare, programs.manifest.unprivileged, identities, flush=True)
for line in sys.stdin:
    source.update()
    drops = recorder.families.snapshots["cni_packet_drops_total"]
    print(sum(v for k, v in drops.items() if k[0].startswith(line.strip() + ":")), flush=True)
"""


READER = """
import sys
from exporter import privileges
from exporter.host.bpf import Map
from exporter.monitors.kernel.counts import Counts
map_, places = Map(int(sys.argv[1])), int(sys.argv[2])
privileges.keep(frozenset())
print([l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")][0])
print(sum(count for _, (count,) in map_.sums()) + Counts(places, Map(places).capacity).read(1).total())
"""


def test_counters_are_read_without_any_capability(running: Running) -> None:
    """From 5.19 on: with CapEff 0, a process that has only the map's descriptor reads the drops just made."""
    if not running.programs.manifest.unprivileged:
        assert tuple(map(int, os.uname().release.split(".")[:2])) < (5, 19)
        pytest.skip("this kernel lets nobody read BPF maps without CAP_BPF (before 5.19)")
    running.run(DROPS)
    manifest = running.programs.manifest
    map_, places = manifest.maps["counted"], manifest.maps["places"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READER, str(map_), str(places)]
    answer = subprocess.check_output(command, text=True, timeout=60, pass_fds=[map_, places], env=environment)
    effective, counted = answer.split()
    assert int(effective, 16) == 0
    assert int(counted) > 52


def test_what_finds_no_place_is_counted_all_the_same(running: Running) -> None:
    """With every place taken by others, counters are in the map; where there are places again, counted is both."""
    manifest = running.programs.manifest
    places = mmap.mmap(manifest.maps["places"], Map(manifest.maps["places"]).capacity * PLACE.size)
    before = len(Map(manifest.maps["counted"]).keys())
    with places, memoryview(places) as memory, memory.cast("I") as words:
        counters = [place * WORDS + COUNTER for place in range(len(words) // WORDS) if place % PLACES >= WITHOUT]
        free = [word for word in counters if not words[word]]
        for word in free:
            words[word] = 0xFFFFFFFF
        try:
            expected = 23 + 29 + int(running.run(DROPS))
            assert sum(running.counted("cni_packet_drops_total").values()) == expected
            assert len(Map(manifest.maps["counted"]).keys()) > before
        finally:
            for word in free:
                words[word] = 0
        expected += 23 + 29 + int(running.run(DROPS))
        assert sum(running.counted("cni_packet_drops_total").values()) == expected


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.host
def test_numbers_move_without_any_capability(child: subprocess.Popen[str], namespace: str) -> None:
    """After CapEff is 0 the exporter still reads: 23 more drops are 23 more."""
    assert child.stdin
    assert child.stdout
    effective, grown, unprivileged, _ = child.stdout.readline().split()
    if unprivileged != "True":
        pytest.skip("this kernel lets nobody read BPF maps without CAP_BPF (before 5.19)")
    assert int(effective, 16) == 0
    assert int(grown) < 15 * 1024, "KiB over the same process without programs"
    scripts = ("import os;print(os.stat('/proc/self/ns/net').st_ino)", DROPS)
    inode, _ = (
        subprocess.run(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()
        for script in scripts
    )
    child.stdin.write(f"{inode}\n")
    child.stdin.flush()
    assert float(child.stdout.readline()) > 52


@pytest.mark.host
def test_sigkill_leaves_no_program(child: subprocess.Popen[str]) -> None:
    """When the exporter dies of SIGKILL, its programs are gone from the kernel."""
    assert child.stdout
    loaded = set(map(int, child.stdout.readline().split()[3].split(",")))
    assert len(loaded) == 4
    assert loaded <= _program_ids()
    child.send_signal(signal.SIGKILL)
    child.wait(5)
    deadline = time.monotonic() + 5
    while _program_ids() & loaded and time.monotonic() < deadline:
        time.sleep(0.05)  # the kernel frees programs after a grace period
    assert not _program_ids() & loaded


SCRIPT = "from exporter.monitors import kernel\nprint(1, flush=True)\nkernel.load(kernel.Settings())"


def _leavings() -> set[str]:
    """Private directories of loaders, and processes that look as one who loads does: a loader is a fork of it."""
    found = set(map(str, Path("/dev/shm").glob("cni-exporter-*")))
    ours = Path("/proc/self/cmdline").read_bytes()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone in between
            command = (process / "cmdline").read_bytes()
            if os.getsid(int(process.name)) == os.getsid(0) and (command == ours or SCRIPT.encode() in command):
                found.add(process.name)
    return found


def _nothing_left(before: set[str]) -> bool:
    """Wait until nothing new is there; the compiler looks at signals only when it is done."""
    deadline = time.monotonic() + 30
    while _leavings() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _leavings() - before


@pytest.mark.host
def test_the_loader_is_gone_when_it_has_handed_over() -> None:
    """No process and no file of the loader's stay, and its parts were timed."""
    before = _leavings()
    found = kernel.load(kernel.Settings(programs=("drops",)))
    found.close()
    assert _nothing_left(before)
    assert {"headers", "maps", "compile", "proof", "attach"} <= found.manifest.seconds.keys()


@pytest.mark.host
def test_a_loader_that_is_too_slow_leaves_nothing_behind() -> None:
    """Ended in the middle of its work, it leaves no file and no process."""
    before = _leavings()
    found = kernel.load(kernel.Settings(timeout=0.3))
    assert "longer than 0.3 s" in found.standings[0].reason
    assert _nothing_left(before)


@pytest.mark.host
def test_an_exporter_that_is_killed_while_loading_leaves_nothing_behind() -> None:
    """SIGKILL at any moment of loading: the loader sees that it is alone and takes everything with it."""
    before = _leavings()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.3)  # in the midst of the compiler, on a machine of today
        process.kill()
    assert _nothing_left(before)


@pytest.mark.host
def test_without_permission_there_is_a_reason() -> None:
    """A process without capabilities starts, and every probe says what is missing."""
    script = (
        "from exporter import privileges\nfrom exporter.monitors import kernel\nprivileges.keep(frozenset())\n"
        "p=kernel.load(kernel.Settings())\nprint(p.attached, p.standings[0].reason, '|', p.standings[0].remedy)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.startswith("False no permission: ")
    assert "CAP_BPF" in done.stdout
    assert not done.stderr
