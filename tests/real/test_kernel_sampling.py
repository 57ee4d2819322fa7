"""Rules, ratios, brake and quota on the running kernel: exact where they are exact, without bias where they draw.

Most events here are system calls with numbers that no kernel has (500 and up): nobody else on the machine makes them,
so the account of class `syscall` is the test's own to the last event.
"""

import contextlib
import ctypes
import json
import math
import mmap
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netns import namespace
from recorder import Recorder

from exporter.host.bpf import Map
from exporter.monitors import kernel
from exporter.monitors.kernel import events
from exporter.monitors.kernel.controls import Controls, Counts, Rule
from exporter.monitors.kernel.counts import DROPS, PLACE, WITHOUT
from exporter.monitors.kernel.counts import Counts as CounterPlaces
from exporter.monitors.kernel.events import Event
from exporter.monitors.kernel.source import KernelSource

__all__ = ["namespace"]

pytestmark = [pytest.mark.real("root", "ip"), pytest.mark.host]

CALLS = range(500, 522)
SYSCALL = ("syscall",)
KINDS = ("netns", "comm", "prefix")
WHO = """
import ctypes, json, os, socket, sys
libc = ctypes.CDLL(None)
call = libc.syscall
def rename(name):
    libc.prctl(15, ctypes.c_char_p(name), 0, 0, 0)
def identity():
    try:
        cookie = int.from_bytes(socket.socket().getsockopt(1, 71, 8), "little")
    except OSError:  # before 5.14
        cookie = 0
    return f"{os.stat('/proc/self/ns/net').st_ino}:{cookie}"
"""

# Processes that say who they are, wait for the rules, and then make three calls each: so many as they are, so many in a
# network namespace of their own, so many in a cgroup each.
CROWD = """
plain, apart, groups = json.loads(sys.argv[1])
gate, opener = os.pipe()
told, tell = os.pipe()
children = []
for number in range(plain + apart + len(groups)):
    pid = os.fork()
    if not pid:
        os.close(opener)
        who = 0
        if plain <= number < plain + apart:
            assert not libc.unshare(0x40000000)
            who = identity()
        if number >= plain + apart:
            open(groups[number - plain - apart] + "/cgroup.procs", "w").write("0")
        os.write(tell, (json.dumps([number, os.getpid(), who]) + "\\n").encode())
        os.read(gate, 1)
        for _ in range(3):
            call(500)
        os._exit(0)
    children.append(pid)
with os.fdopen(told) as lines:
    print(json.dumps(sorted(json.loads(lines.readline()) for _ in children)), flush=True)
sys.stdin.readline()
os.close(opener)
for pid in children:
    os.waitpid(pid, 0)
"""

FLOOD = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rename(b"flood")
print(identity(), flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[1])):
    call(500)
"""


class Bench:
    """Loaded programs, their controls and a reader that keeps what it is given."""

    def __init__(self, programs: kernel.Programs) -> None:
        self.programs = programs
        self.maps = programs.manifest.maps
        self.kept: list[Event] = []
        self.recorder = Recorder()
        self.source = KernelSource(programs, lambda event, _: self.kept.append(event))
        self.source.open(self.recorder)
        self.controls = Controls(self.maps)
        self.drain()
        self.kept.clear()
        self.controls.observe()

    def count(self, *kinds: str, quota: int = 0) -> None:
        """Begin to count by these kinds of keys."""
        self.controls = Controls(self.maps, kinds, quota)

    def drain(self) -> None:
        """Empty the rings."""
        for ring in self.source._rings.values():
            while self.source._consume(ring):
                pass

    def calls(self) -> list[Event]:
        """What was kept of the test's own system calls."""
        self.drain()
        return [event for event in self.kept if event.class_ == "syscall"]

    def run(self, script: str, *arguments: str, namespace: str = "") -> None:
        """Run a Python script, in a namespace or here."""
        with self.started(script, *arguments, namespace=namespace) as process:
            process.communicate("go\n", timeout=120)
            assert process.returncode == 0

    @contextlib.contextmanager
    def started(self, script: str, *arguments: str, namespace: str = "") -> Iterator[subprocess.Popen[str]]:
        """Start a Python script that waits for a line."""
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        command = [*inside, sys.executable, "-c", WHO + script, *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def close(self) -> None:
        """Leave the programs as they were."""
        Controls(self.maps).apply(dict.fromkeys(("packet_drop", "syscall"), 1.0), ())
        self.controls.apply({}, ())
        self.source.close()


@pytest.fixture(scope="module")
def programs(lacking: Callable[[str], None]) -> Iterator[kernel.Programs]:
    loaded = kernel.load(kernel.Settings(programs=("drops", "syscalls"), syscalls=tuple(CALLS), timeout=120))
    if not (loaded.serves("drops") and loaded.serves("syscalls")):
        loaded.close()
        lacking(loaded.manifest.reason or "; ".join(standing.reason for standing in loaded.standings))
    yield loaded
    loaded.close()


@pytest.fixture
def bench(programs: kernel.Programs) -> Iterator[Bench]:
    found = Bench(programs)
    yield found
    found.close()


@pytest.fixture
def cgroups() -> Iterator[list[str]]:
    """Directories of 52 control groups of version 2, whose inodes are their ids."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-t", "cgroup2", "none", directory], check=True, timeout=10)
        made = [Path(directory) / f"cni-{os.getpid()}-{number}" for number in range(52)]
        try:
            for path in made:
                path.mkdir()
            yield list(map(str, made))
        finally:
            for path in made:
                _remove(path)
            subprocess.run(["umount", directory], check=True, timeout=10)


def _remove(group: Path) -> None:
    """Remove a control group: its last process is gone from it a moment after it was waited for."""
    deadline = time.monotonic() + 5
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _estimate(kept: list[Event]) -> tuple[float, float]:
    """Horvitz-Thompson: how many events the kept stand for, and the standard error of that."""
    return sum(event.weight for event in kept), math.sqrt(sum(event.weight * (event.weight - 1) for event in kept))


def _balance(counts: Counts, kept: int, class_: str = "syscall") -> int:
    """What the account does not account for."""
    return counts.seen[class_] - counts.filtered[class_] - counts.sampled_out[class_] - counts.lost[class_] - kept


# Rules


def test_rules_of_all_kinds_at_once_hit_what_they_name(bench: Bench, namespace: str, cgroups: list[str]) -> None:
    """1,000 PIDs, 50 namespaces, 50 cgroups, 100 commands, 20 calls, 1,000 prefixes: each hit, nothing beside."""
    names = [b"c%d" % number for number in range(100)] + [b"c", b"c100", b"d1"]
    with bench.started(CROWD, json.dumps([1010, 52, cgroups])) as crowd:
        assert crowd.stdout
        people = json.loads(crowd.stdout.readline())
        pids = [pid for _, pid, _ in people[:1010]]
        apart = people[1010:1062]
        rules = [Rule("pid", pid, SYSCALL) for pid in pids[:1000]]
        rules += [Rule("netns", key, SYSCALL) for _, _, key in apart[:50]]
        rules += [Rule("cgroup", Path(path).stat().st_ino, SYSCALL) for path in cgroups[:50]]
        rules += [Rule("comm", name.decode(), SYSCALL) for name in names[:100]]
        rules += [Rule("syscall", number, SYSCALL) for number in CALLS[1:21]]
        rules += [Rule("prefix", f"127.1.{n // 256}.{n % 256}", ("packet_drop",)) for n in range(990)]
        rules += [Rule("prefix", f"127.2.{n}.0/24", ("packet_drop",)) for n in range(10)]
        rules += [Rule("prefix", "127.2.3.7", ("packet_drop",), ratio=1.0)]
        assert bench.controls.apply({}, rules) == []
        crowd.communicate("go\n", timeout=60)
    bench.run(f"for name in {names!r}:\n    rename(name)\n    for _ in range(3): call(500)")
    bench.run(f"for number in {list(CALLS)}:\n    for _ in range(7): call(number)")
    own = bench.calls()
    counts = bench.controls.observe()
    assert counts.filtered["syscall"] == 3 * (1000 + 50 + 50 + 100) + 7 * 20
    assert counts.seen["syscall"] == 3 * (1010 + 52 + 52 + 103) + 7 * 22
    assert _balance(counts, len(own)) == 0
    assert Counter(event.pid for event in own if event.pid in pids) == dict.fromkeys(pids[1000:], 3)
    assert {event.netns for event in own if event.pid in {pid for _, pid, _ in apart}} == {
        who for *_, who in apart[50:]
    }
    assert Counter(event.comm for event in own if event.comm.startswith(("c", "d"))) == {"c": 3, "c100": 3, "d1": 3}
    assert Counter(int.from_bytes(event.body, sys.byteorder) for event in own)[CALLS[21]] == 7
    matches = bench.controls.matches()
    assert all(count in {3, 7} for rule, count in matches.items() if rule.kind != "prefix")

    bench.kept.clear()
    told = [f"127.1.{n // 256}.{n % 256}" for n in range(1010)] + ["127.2.3.7", "127.2.9.9", "127.2.10.1"]
    bench.run(
        f"udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor to in {told}: udp.sendto(b'x', (to, 9))",
        namespace=namespace,
    )
    bench.drain()
    flows = [events.flow(event.body, 40) for event in bench.kept if event.class_ == "packet_drop"]
    met = {flow.destination for flow in flows if flow and flow.destination.startswith(("127.1.", "127.2."))}
    assert met == {*told[990:1010], "127.2.3.7", "127.2.10.1"}


def test_who_wins(bench: Bench) -> None:
    """A learned rule is a ceiling, a configured one silences it; `instead` beats the class' ratio, 0 filters."""
    me = {"kind": "comm", "subject": "flood", "classes": SYSCALL}
    call = {"kind": "syscall", "subject": 500, "classes": SYSCALL}
    nearly_nothing = 1e-9
    cases = [
        (1.0, [Rule(**me, ratio=nearly_nothing, origin="learned")], "sampled_out"),
        (1.0, [Rule(**me, ratio=nearly_nothing, origin="learned"), Rule(**me, ratio=1.0)], "kept"),
        (1.0, [Rule(**me, ratio=nearly_nothing, origin="learned"), Rule(**call, ratio=1.0)], "kept"),
        (nearly_nothing, [Rule(**me, ratio=1.0, origin="learned")], "sampled_out"),
        (nearly_nothing, [Rule(**me, ratio=1.0)], "sampled_out"),
        (nearly_nothing, [Rule(**me, ratio=1.0, instead=True)], "kept"),
        (1.0, [Rule(**me, ratio=1.0, instead=True), Rule(**call, ratio=nearly_nothing)], "sampled_out"),
        (0.0, [Rule(**me, ratio=1.0, instead=True), Rule(**call, ratio=0.0)], "filtered"),
        (1.0, [Rule(**me, ratio=0.0, expires=5.0)], "kept"),
        (0.0, [], "sampled_out"),
    ]
    for ratio, rules, expected in cases:
        assert bench.controls.apply({"syscall": ratio}, rules, now=5.0) == []
        bench.controls.observe()
        bench.kept.clear()
        bench.run(FLOOD, "23")
        counts, kept = bench.controls.observe(), len(bench.calls())
        found = {"kept": kept, "sampled_out": counts.sampled_out["syscall"], "filtered": counts.filtered["syscall"]}
        assert found == {"kept": 0, "sampled_out": 0, "filtered": 0} | {expected: 23}, (ratio, rules)


# What is drawn


def test_weights_are_unbiased_whatever_thins(bench: Bench) -> None:
    """Ratio, learned rule, configured rule, quota and a reader that pauses: what is kept stands for what was sent."""
    sent = 300_000
    for counted, quota, rules in (
        ((), 0, []),
        (KINDS, 0, [Rule("comm", "flood", SYSCALL, 0.25, "learned")]),
        (KINDS, 500, [Rule("syscall", 500, SYSCALL, 0.8)]),
        (KINDS, 500, [Rule("pid", 1, SYSCALL, 0.5), Rule("comm", "flood", SYSCALL, 0.3, instead=True)]),
    ):
        bench.count(*counted, quota=quota)
        bench.controls.apply({"syscall": 0.5}, rules)
        bench.kept.clear()
        bench.programs.tally.settle()
        before = bench.programs.tally.weights.get("syscall", 0.0)
        with bench.started(FLOOD, str(sent)) as flood:
            assert flood.stdin
            assert flood.stdout
            key = flood.stdout.readline().strip()
            flood.stdin.write("go\n")
            flood.stdin.close()
            pauses = random.Random(7)  # noqa: S311 - not a secret
            while flood.poll() is None:
                time.sleep(pauses.choice((0.001, 0.03, 0.1)))
                bench.drain()
        kept, counts = bench.calls(), bench.controls.observe()
        estimate, error = _estimate(kept)
        assert counts.seen["syscall"] == sent
        assert _balance(counts, len(kept)) == 0
        assert counts.lost["syscall"] == 0
        assert len(kept) < sent / 2
        assert abs(estimate - sent) < 5 * error, (counted, quota, rules)
        bench.programs.tally.settle()
        assert bench.programs.tally.weights["syscall"] - before == pytest.approx(estimate)
        if counted:
            keys = counts.keys["syscall"]
            assert keys.keys() == {("netns", key), ("comm", "flood")}
            assert set(keys.values()) == {sent}


def test_a_quota_tames_a_heavy_hitter_in_the_same_second(bench: Bench) -> None:
    """Of 64,000 events of a namespace with a quota of 100 few are kept; of the 90 of another all are."""
    bench.count(quota=100)
    bench.run(FLOOD, "64000")
    heavy = bench.calls()
    assert 100 <= len(heavy) < 8000, "64,000 in one second would be some 1,700"
    assert max(event.weight for event in heavy) == 64
    bench.kept.clear()
    bench.run("assert not libc.unshare(0x40000000)\nfor _ in range(90): call(500)")
    assert [event.weight for event in bench.calls()] == [1.0] * 90


def test_a_reader_that_stands_still_loses_nothing(bench: Bench, namespace: str) -> None:
    """Floods of a debug class and of drops against a ring that nobody reads: thinned, not lost, never full; no bias."""
    sent = 400_000
    bench.run(FLOOD, str(sent))
    counts = bench.controls.observe()
    assert 0.8 < counts.ring < 1
    assert counts.lost["syscall"] == 0
    kept = bench.calls()
    assert _balance(counts, len(kept)) == 0
    assert {event.weight for event in kept} > {1.0, 2.0, 4.0, 8.0, 16.0, 32.0}
    estimate, error = _estimate(kept)
    assert abs(estimate - sent) < 5 * error
    assert 0 in [bench.controls.observe().ring for _ in range(20)], "a fill is told once, unless others send meanwhile"

    bench.run(
        "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "for _ in range(60000): udp.sendto(b'x', ('127.0.0.1', 9))",
        namespace=namespace,
    )
    counts = bench.controls.observe()
    assert counts.seen["packet_drop"] >= 60_000
    assert counts.lost["packet_drop"] == 0
    assert 0.5 < counts.ring < 1, "errors are thinned later than debug"


# Hostile


def test_a_hundred_thousand_commands_are_counted_within_bounds(bench: Bench, programs: kernel.Programs) -> None:
    """Names of any bytes, each used once: the maps keep their size, say what they put out; a heavy name is counted."""
    bench.count(*KINDS)
    bench.controls.apply({"syscall": 0.01}, ())
    before = _inserts(programs, "load_comm")
    bench.run(
        "for number in range(100_000):\n"
        "    rename(b'\\xff\\xc3\\n\"' + b'%x' % number)\n    call(500)\n"
        "    if number % 10 == 0:\n        rename(b'\\xffheavy')\n        call(500)\n"
    )
    counts = bench.controls.observe()
    assert counts.seen["syscall"] == 110_000
    keys = counts.keys["syscall"]
    assert keys["comm", "\udcffheavy"] == 10_000
    assert len([kind for kind, _ in keys if kind == "comm"]) <= 64
    load = Map(programs.manifest.maps["load_comm"])
    assert len(list(load.items())) <= load.capacity == 1024
    assert _inserts(programs, "load_comm") - before >= 100_001 - WITHOUT * (os.cpu_count() or 1), (
        "the last of each place are not in the map yet"
    )
    bench.controls.apply({"syscall": 1.0}, [Rule("comm", "\udcffheavy", SYSCALL)])
    bench.run("rename(b'\\xffheavy')\nfor _ in range(23): call(500)")
    assert bench.controls.observe().filtered["syscall"] == 23
    bench.source.update()
    assert bench.recorder.families.value("cni_bpf_map_evictions_total", ("load_comm",)) >= 96_000
    assert bench.recorder.errors == []


def _inserts(programs: kernel.Programs, name: str) -> int:
    number = programs.manifest.map_numbers[name].to_bytes(4, sys.byteorder)
    inserts = Map(programs.manifest.maps["inserts"])
    return inserts.total(inserts.get(number) or b"")[0]


SENDERS = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
for last, times in json.loads(sys.argv[1]):
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((f'127.9.9.{last}', 0))
    for _ in range(times):
        udp.sendto(b'x', ('127.0.0.1', 9))
"""


def test_addresses_are_counted(bench: Bench, namespace: str) -> None:
    """What each of three senders had dropped, by its address: all of it, at once."""
    bench.count(*KINDS)
    bench.run(SENDERS, "[[1, 23], [2, 48], [3, 179]]", namespace=namespace)
    keys = bench.controls.observe().keys["packet_drop"]
    assert [keys["prefix", f"127.9.9.{last}"] for last in (1, 2, 3)] == [23, 48, 179]


def test_a_counter_that_takes_a_place_keeps_the_events_of_the_one_before(bench: Bench, namespace: str) -> None:
    """Events that wait at a place for their keys, when its namespace goes and another's counter comes: none is lost."""
    bench.count(*KINDS)
    bench.run(SENDERS, "[[1, 23]]", namespace=namespace)
    assert bench.controls.observe().keys["packet_drop"]["prefix", "127.9.9.1"] == 23
    capacity, sender = Map(bench.maps["places"]).capacity, socket.inet_aton("127.9.9.1")
    with mmap.mmap(bench.maps["places"], capacity * PLACE.size) as memory:
        noted = enumerate(PLACE.iter_unpack(memory[:]))
        at, place = next((at, place) for at, place in noted if place[5] == DROPS and place[2].endswith(sender))
        cookie, inode, pending = place[0], place[1] & 0xFFFFFFFF, place[6]
        CounterPlaces(bench.maps["places"], capacity).forget({(cookie, inode)})
        # As if it was another namespace's: with another cookie.
        memory[at * PLACE.size : at * PLACE.size + 8] = (1).to_bytes(8, sys.byteorder)
    bench.run(SENDERS, "[[1, 10]]", namespace=namespace)
    keys = bench.controls.observe().keys["packet_drop"]
    assert keys["prefix", "127.9.9.1"] == 10
    assert keys["netns", f"{inode}:1"] == pending


def test_a_bell_that_rings_once_is_answered_later(bench: Bench) -> None:
    """The source takes records out in batches: some time after the first, or at once where the ring fills."""
    bench.drain()
    listeners = bench.source.readers()
    bell = bench.source._bell
    assert bell
    listen = listeners[bell.fileno()]
    bench.kept.clear()
    ctypes.CDLL(None).syscall(500)  # the programs leave their exporter's own calls out
    bench.run("call(500)")
    listen()
    assert bench.kept == [], "it gathers"
    deadline = time.monotonic() + 10
    while not bench.kept and time.monotonic() < deadline:
        time.sleep(0.01)
        listen()
    assert len([event for event in bench.kept if event.class_ == "syscall"]) == 1
    bench.run(FLOOD, "3000")
    listen()
    listen()
    assert len(bench.calls()) == 3001
