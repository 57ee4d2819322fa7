"""The reading half of the kernel monitor without a kernel: layouts, names, sums, bounds and bad input."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.catalog import CONNECT_DURATION, FAMILIES
from exporter.contract import Unsupported
from exporter.host import bpf
from exporter.monitors import kernel
from exporter.monitors.kernel import compiler, controls, departed, events, handover, programs, proof, source
from exporter.monitors.kernel.counts import PLACE, PLACES, WITHOUT, Counts
from exporter.monitors.kernel.drops import Drops
from exporter.monitors.kernel.reader import Tables
from exporter.monitors.kernel.tcp import Tcp

BPF = Path(__file__).parents[2] / "bpf"
EVENTS = "".join((BPF / name).read_text(encoding="utf-8") for name in ("events.h", "rules.h", "places.h"))
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "bpf").glob("*.c")}
NETNS = struct.pack("=QIxxxx", 41, 4026532001)
KEY = "4026532001:41"


class FakeMap:
    """A map of u64s with the values of two CPUs."""

    type, capacity, value_size = bpf.PERCPU_HASH, 64, 8

    def __init__(self, *entries: tuple[bytes, tuple[int, ...]]) -> None:
        self.entries = dict(entries)

    def sums(self) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        yield from self.entries.items()

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key, words in self.entries.items():
            yield key, struct.pack(f"={len(words)}Q", *words)

    def length(self) -> int:
        return len(self.entries)

    def get(self, key: bytes) -> bytes | None:
        words = self.entries.get(key)
        return struct.pack(f"={len(words)}Q", *words) if words else None

    def total(self, value: bytes) -> tuple[int, ...]:
        return struct.unpack(f"={len(value) // 8}Q", value)

    def put(self, key: bytes, value: bytes) -> None:
        self.entries[key] = struct.unpack(f"={len(value) // 8}Q", value)

    def delete(self, key: bytes) -> bool:
        return self.entries.pop(key, None) is not None


def _tables(**maps: FakeMap) -> Tables:
    manifest = handover.Manifest(reasons={3: "no_socket"}, standings=[handover.Standing("drops", attached=True)])
    return Tables(manifest, maps)  # type: ignore[arg-type] - the fakes have what is used


def _record(class_: int, body: bytes = b"", *, kind: int = 0, ratio: int = 0xFFFFFFFF, time: int = 0) -> bytes:
    size = events.HEAD.size + len(body)
    return events.HEAD.pack(time, 41, 4026532001, class_, kind, size, ratio, 77, b"curl") + body


# What is written twice, in C and in Python, must agree.


def test_event_classes_are_those_of_the_programs() -> None:
    """The classes' numbers in records mean the same on both sides."""
    names = re.search(r"enum event_class \{(.*?), CLASSES \}", EVENTS, re.DOTALL)
    assert names
    assert tuple(name.strip().lower() for name in names[1].split(",")) == programs.CLASSES


def test_filter_bits_are_those_of_the_programs() -> None:
    """A rule of a kind sets the flag that makes the programs look into its map."""
    bits = dict(re.findall(r"FILTER_(\w+) = (\d+)", EVENTS))
    assert {kind.lower(): int(bit) for kind, bit in bits.items()} == controls._BITS | {"own": controls._BOTH_SIDES}


@pytest.mark.parametrize("program", programs.PROGRAMS, ids=lambda program: program.name)
def test_a_program_and_its_description_fit(program: programs.Program) -> None:
    """Its functions are in its file, its maps have their shape checked there, its families exist, its names fit."""
    text = SOURCES[f"{program.name}.c"]
    for probe in program.probes:
        assert len(f"cni_{probe.name}") <= 15, "the kernel keeps 15 characters of a name"
        for hook in (hook for rung in probe.rungs for hook in rung.hooks):
            assert re.search(rf"\bint {hook.function}\(", text), hook.function
    for shape in program.maps:
        if shape.type != programs.RINGBUF:
            assert f"SHAPE({shape.name}," in text, shape.name
    assert set(program.families) <= FAMILIES.keys()
    assert [reader for reader in source.READERS if reader.program == program.name], "it has no reader"


def test_names_of_maps_and_probes_are_used_once() -> None:
    """Two programs never share a map or a name by accident."""
    everything = (programs.COMMON, programs.PROOF, *programs.PROGRAMS)
    maps = [shape.name for program in everything for shape in program.maps]
    probes = [probe.name for program in everything for probe in program.probes]
    assert len(maps) == len(set(maps))
    assert len(probes) == len(set(probes))


def test_facts_have_a_slot_each() -> None:
    """A fact is compared with the value that its name promises: slots of proof.c are counted the same way."""
    slots = re.search(r"enum slot \{(.*?),\s+SLOTS\s+\}", SOURCES["proof.c"], re.DOTALL)
    assert slots
    names = [name.strip() for name in slots[1].split(",")]
    assert all(fact.slot < len(names) for fact in proof.FACTS)
    assert len({fact.slot for fact in proof.FACTS}) == len(proof.FACTS)
    by_name = {fact.name: names[fact.slot] for fact in proof.FACTS}
    assert by_name["netns cookie"] == "COOKIE"
    assert by_name["socket's peer's port"] == "SK_PEER_PORT"
    assert by_name["group leader"] == "LEADER_PID"


# Counters


def test_drops_by_reason_and_namespace() -> None:
    """Counters become series keyed by inode and cookie; a reason without a name keeps its number."""
    key = struct.Struct("=16sII")
    counted = FakeMap(
        (key.pack(NETNS, 3, 1), (23,)),
        (key.pack(NETNS, 0x20001, 1), (29,)),
        (key.pack(bytes(16), 0xFFFFFFFE, 1), (31,)),
        (key.pack(NETNS, 3, 2), (37,)),
    )
    assert Drops(_tables(counted=counted)).snapshot() == {
        "cni_packet_drops_total": {
            (KEY, "no_socket"): 23.0,
            (KEY, "reason_0x20001"): 29.0,
            ("", "not_specified"): 31.0,
        }
    }


def test_tcp_counters_go_to_their_families() -> None:
    """Each number of enum tcp_count is the family and label that it stands for."""
    key = struct.Struct("=16sII")
    counted = FakeMap(*((key.pack(NETNS, what, 2), (what + 1,)) for what in range(6)))
    assert Tcp(_tables(counted=counted)).snapshot() == {
        "cni_tcp_connections_opened_total": {(KEY, "outgoing"): 1.0, (KEY, "incoming"): 2.0},
        "cni_tcp_connection_failures_total": {(KEY, "outgoing"): 3.0, (KEY, "incoming"): 4.0},
        "cni_tcp_faults_total": {(KEY, "retransmit"): 5.0, (KEY, "reset_sent"): 6.0},
    }


def test_connect_times_are_in_seconds() -> None:
    """The kernel's buckets are passed on, its sum of nanoseconds becomes seconds."""
    width = len(FAMILIES[CONNECT_DURATION].buckets) + 1
    times = FakeMap((NETNS, (*range(width), 1_500_000_000)))
    found = Tcp(_tables(tcp_connect=times)).histograms()[CONNECT_DURATION][KEY,]
    assert tuple(found) == (*map(float, range(width)), 1.5)


def test_an_entry_is_summed_over_the_cpus() -> None:
    """A per-CPU value with several u64s is summed word by word."""
    map_ = object.__new__(bpf.Map)
    map_._stride = 16
    assert map_.total(struct.pack("=6Q", 1, 2, 10, 20, 100, 200)) == (111, 222)
    map_._stride = 8
    assert map_.total(struct.pack("=3Q", 1, 2, 3)) == (6,)


# Records


def test_a_record_is_decoded() -> None:
    """The head's fields are where the programs write them; a ratio of a quarter weighs four."""
    event = events.decode(_record(4, b"body", kind=2, ratio=1 << 30, time=99))
    assert (event.time, event.netns, event.class_, event.kind) == (99, KEY, "tcp_fault", 2)
    assert (event.weight, event.pid, event.comm, event.body) == (4.0, 77, "curl", b"body")
    assert events.decode(_record(0)).weight == 1.0


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_decoded(raw: bytes) -> None:
    """No record makes the reader fail in any other way than the one that is counted."""
    try:
        event = events.decode(raw)
    except ValueError:
        return
    assert event.class_ in programs.CLASSES


def test_addresses_are_shown_as_people_write_them() -> None:
    """IPv4 is carried inside IPv6 and shown as IPv4; a record without addresses has no flow."""
    mapped = b"\0" * 10 + b"\xff\xff" + socket.inet_aton("192.0.2.7")
    six = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    raw = events.FLOW.pack(mapped, six, 1025, 443, socket.AF_INET, 6)
    assert events.flow(raw) == events.Flow("192.0.2.7", 1025, "2001:db8::1", 443, 6)
    assert events.flow(bytes(events.FLOW.size)) is None


def test_details_of_a_drop_and_of_a_connection() -> None:
    """The bodies' fields are where the programs write them."""
    flow = events.FLOW.pack(
        *(b"\0" * 10 + b"\xff\xff" + bytes((127, 0, 0, n)) for n in (1, 2)), 1025, 53, socket.AF_INET, 17
    )
    drop = struct.pack("=QII16sHxxxxxx", 0xFFFF, 3, 5, b"eth0", 0x0800) + flow
    shown = Drops(_tables()).details(events.decode(_record(3, drop)))
    assert (shown["reason"], shown["device"], shown["ifindex"]) == ("no_socket", "eth0", 5)
    assert (shown["source"], shown["destination"], shown["destination_port"]) == ("127.0.0.1", "127.0.0.2", 53)
    closed = flow + struct.pack("=QQQII", 2_000_000_000, 11, 13, 1, 1)
    shown = Tcp(_tables()).details(events.decode(_record(7, closed, kind=5)))
    assert (shown["what"], shown["direction"], shown["duration"]) == ("closed", "outgoing", 2.0)
    assert (shown["sent_bytes"], shown["received_bytes"]) == (11, 13)


# The self-proof


def _slots(**values: int) -> tuple[int, ...]:
    with proof.Specimen() as specimen:
        slots = [0] * 32
        slots[0] = 4711
        for fact in proof.FACTS:
            slots[fact.slot] = fact.expected(specimen, tuple(slots)) or 0
    for name, value in values.items():
        slots[next(fact.slot for fact in proof.FACTS if fact.name == name.replace("_", " "))] = value
    return tuple(slots)


def test_a_wrong_value_condemns_its_members_alone() -> None:
    """A cookie that is not the socket's own condemns what leads to it, not the index of lo."""
    with proof.Specimen() as specimen:
        slots = list(_slots(netns_cookie=12345))
        for fact in proof.FACTS:  # ports are this specimen's
            if "port" in fact.name:
                slots[fact.slot] = fact.expected(specimen, tuple(slots)) or 0
        read = [member for fact in proof.FACTS for member in fact.members]
        wrong = proof.wrong_values(tuple(slots), specimen, read)
    assert "net.net_cookie" in wrong
    assert "12345" in wrong["net.net_cookie"]
    assert "net_device.ifindex" not in wrong


def test_what_nobody_reads_is_not_asked() -> None:
    """A kernel without a member is not condemned for it."""
    with proof.Specimen() as specimen:
        assert proof.wrong_values((0,) * 32, specimen, []) == {}


def test_a_wrong_offset_is_found() -> None:
    """An offset that differs from the kernel's own condemns the member, with both offsets in the reason."""

    class Types:
        def offset(self, path: str) -> int | None:
            return {"net.ns.inum": 176, "sk_buff.dev": 16}.get(path)

    wrong = proof.wrong_offsets({"net.ns.inum": 168, "sk_buff.dev": 16, "gone.member": 1}, Types())  # type: ignore[arg-type]
    assert list(wrong) == ["net.ns.inum"]
    assert "176" in wrong["net.ns.inum"]
    assert "168" in wrong["net.ns.inum"]


# Handing over


def test_descriptors_and_manifest_arrive() -> None:
    """The other side has working descriptors of its own under the right names, closed on exec."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with ours, theirs:
        sent = handover.Manifest(
            [handover.Standing("drops", "kfree_skb", "tp_btf", attached=True, fallback=False)],
            maps={"drops": 1},
            programs={"drops": [0]},
            reasons={3: "no_socket"},
        )
        handover.send(theirs, sent, [reading, writing])
        got = handover.receive(ours)
    assert got.standings == sent.standings
    assert got.reasons == {3: "no_socket"}
    os.write(got.maps["drops"], b"x")
    assert os.read(got.programs["drops"][0], 1) == b"x"
    assert not os.get_inheritable(got.maps["drops"])
    for descriptor in (reading, writing, got.maps["drops"], got.programs["drops"][0]):
        os.close(descriptor)


@pytest.mark.parametrize("cut", [0, 3, 8, 20])
def test_a_loader_that_dies_in_the_middle_is_an_error(cut: int) -> None:
    """Whatever part of the answer is missing, the exporter does not wait and does not take half of it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            text = b'{"reasons": {}}' + b" " * 10
            theirs.send(
                (struct.pack("=II", len(text), 2) + text)[:cut] if cut < 20 else struct.pack("=II", 25, 2) + text
            )
        with pytest.raises((EOFError, ValueError)):
            handover.receive(ours)


def test_an_absurd_length_is_refused() -> None:
    """No announced size makes the exporter allocate without bound."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(struct.pack("=II", 1 << 31, 0))
        with pytest.raises(ValueError, match="announces"):
            handover.receive(ours)


# Load and monitor without support


def test_a_kernel_without_types_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """No BTF: nothing is started, every probe has a reason and a remedy, and the monitor is Unsupported."""
    monkeypatch.setattr(kernel.btf, "available", lambda: "no BTF here")
    found = kernel.load(kernel.Settings())
    assert not found.attached
    assert {standing.reason for standing in found.standings} == {"no BTF here"}
    assert all("CONFIG_DEBUG_INFO_BTF" in standing.remedy for standing in found.standings)
    with pytest.raises(Unsupported, match="no BTF here"):
        kernel.monitor(found).rungs[0]().open(Recorder())
    found.close()


def test_a_loader_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung loader costs its time-out and leaves no process."""
    monkeypatch.setattr(kernel.btf, "available", lambda: "")
    monkeypatch.setattr(kernel, "_GRACE", 0.1)
    monkeypatch.setattr(kernel, "_serve", lambda _: time.sleep(60))
    found = kernel.load(kernel.Settings(timeout=0.2))
    assert "longer than 0.2 s" in found.standings[0].reason


def test_a_loader_that_dies_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that ends at once is told from one that has nothing to offer."""
    monkeypatch.setattr(kernel.btf, "available", lambda: "")
    monkeypatch.setattr(kernel, "_serve", lambda _: None)
    assert "loader failed" in kernel.load(kernel.Settings()).standings[0].reason


def test_a_loader_is_a_fork_with_little_of_the_exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No descriptor but standard output, error and its socket; no input; signals end it; it stands at the root."""

    def note(link: socket.socket) -> None:
        numbers = map("/proc/self/fd/{}".format, range(link.fileno() + 1))
        held = {Path(one).name: str(Path(one).readlink()) for one in numbers if os.path.lexists(one)}
        state = {"held": held, "ends": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "place": str(Path.cwd())}
        (tmp_path / "state").write_text(json.dumps({**state, "link": str(link.fileno())}))

    monkeypatch.setattr(kernel.btf, "available", lambda: "")
    monkeypatch.setattr(kernel, "_serve", note)
    with (tmp_path / "secret").open("w"), socket.socket():
        found = kernel.load(kernel.Settings())
    assert "loader failed" in found.standings[0].reason
    state = json.loads((tmp_path / "state").read_text())
    assert state["held"].keys() == {"0", "1", "2", state["link"]}
    assert state["held"]["0"] == os.devnull
    assert state["held"][state["link"]].startswith("socket:")
    assert state["ends"]
    assert state["place"] == "/"


def test_a_machine_without_bcc_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No bcc is an answer that names the package."""
    monkeypatch.setitem(sys.modules, "bcc", None)
    job = compiler.Job(tmp_path)
    job.begin("", [])
    with pytest.raises(Unsupported) as caught:
        job.wait()
    assert "python3-bpfcc" in caught.value.remedy


def test_compilers_that_have_nothing_to_do_are_ended(tmp_path: Path) -> None:
    """In any order, and the first does not wait for the second, which was born with a copy of its other end."""
    jobs = [compiler.Job(tmp_path) for _ in range(2)]
    for job in jobs:
        job.end()
        with pytest.raises(ChildProcessError):
            os.waitpid(job._child, os.WNOHANG)


def test_a_compiler_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    """Of its parent's descriptors it has standard output and error, and its own socket."""

    def held() -> dict[str, str]:
        found = {}
        for one in Path(f"/proc/{job._child}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it reads its modules
                found[one.name] = str(one.readlink())
        return found

    with (tmp_path / "secret").open("w") as secret, socket.socket():
        job = compiler.Job(tmp_path)
        deadline = time.monotonic() + 5
        while secret.name in held().values() and time.monotonic() < deadline:
            time.sleep(0.01)
        found = held()
        job.end()
    assert secret.name not in found.values()
    assert found["0"] == os.devnull
    assert sum(target.startswith("socket:") for number, target in found.items() if int(number) > 2) == 1


# Rules


def test_rules_are_written_as_the_maps_read_them() -> None:
    """Keys have the maps' widths; IPv4 prefixes are IPv6's, 96 bits longer."""
    rule = controls.Rule
    widths = {shape.name.removeprefix("filter_"): shape.key for shape in programs.COMMON.maps}
    subjects = {"pid": 1, "comm": "curl", "prefix": "10.0.0.0/8", "port": 53, "syscall": 59, "cgroup": 1}
    for kind, subject in {**subjects, "netns": KEY}.items():
        assert len(controls._key(rule(kind, subject))) == widths[kind]
    assert controls._key(rule("netns", KEY)) == NETNS
    four = controls._key(rule("prefix", "10.1.2.3/8"))
    assert four == struct.pack("=I", 104) + bytes(10) + b"\xff\xff\x0a\0\0\0"
    six = controls._key(rule("prefix", "2001:db8::/32"))
    assert six == struct.pack("=I", 32) + socket.inet_pton(socket.AF_INET6, "2001:db8::")


@pytest.mark.parametrize(
    "rule",
    [
        controls.Rule("colour", 1),
        controls.Rule("prefix", "10.0.0.0/99"),
        controls.Rule("port", -1),
        controls.Rule("pid", 1 << 32),
        controls.Rule("netns", 4026532001),
        controls.Rule("netns", "4026532001:x"),
    ],
)
def test_a_malformed_rule_is_refused(rule: controls.Rule) -> None:
    """A rule that cannot be meant raises ValueError before anything is written."""
    with pytest.raises(ValueError, match=r".+"):
        controls._key(rule)


def test_ratios_are_exact_at_their_ends() -> None:
    """Nothing and everything are exact; a half is a half; anything outside is refused."""
    assert controls._in_32_bits(0.0) == 0
    assert controls._in_32_bits(0.5) == 1 << 31
    assert controls._in_32_bits(1.0) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="between 0 and 1"):
        controls._in_32_bits(1.5)


# Namespaces that are gone


def test_a_namespace_is_forgotten_when_nobody_lives_there_and_nothing_counts() -> None:
    """Three looks, 30 s apart, without process, mount or new count; a count starts anew."""
    now = [0.0]
    watch = departed.Departed(lambda: now[0], lambda: {7, 99})
    counted: dict[str, dict[tuple[str, ...], float]] = {"drops": {("1:1",): 1.0, ("2:2",): 1.0, ("3:3",): 1.0}}
    known = {"1:1": 7, "2:2": 8, "3:3": 9, "99:9": 10}

    def look() -> list[str]:
        now[0] += 31
        return watch.find(known, counted)

    assert watch.find(known, counted) == []
    assert look() == []
    counted["drops"][("3:3",)] = 2.0
    assert look() == []
    assert look() == ["2:2"]
    assert sorted(look()) == ["2:2", "3:3"]


def test_inhabited_namespaces_are_those_of_the_processes(tmp_path: Path) -> None:
    """The inode of each process' net/stat is found; what is no process, or is gone, is passed over."""
    for pid in ("1", "22"):
        (tmp_path / pid / "net/stat").mkdir(parents=True)
    (tmp_path / "33").mkdir()
    (tmp_path / "sys/net/stat").mkdir(parents=True)
    expected = {(tmp_path / pid / "net/stat").stat().st_ino for pid in ("1", "22")} | {4026532009}
    (tmp_path / "self").mkdir()
    line = "36 25 0:4 net:[4026532009] /run/netns/a rw shared:1 - nsfs nsfs rw\n"
    (tmp_path / "self/mountinfo").write_text(line)
    assert departed.inhabited(tmp_path) == expected


# The source as a whole


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[source.KernelSource, Recorder, dict[str, FakeMap]]]:
    key = struct.Struct("=16sII")
    maps = {shape.name: FakeMap() for program in (programs.COMMON, *programs.PROGRAMS) for shape in program.maps}
    maps["counted"] = FakeMap((key.pack(NETNS, 3, 1), (4,)), (key.pack(NETNS, 3, 2), (9,)))
    maps["namespaces"] = FakeMap((NETNS, (0, 4026531999)))
    maps["account"] = FakeMap(*((n.to_bytes(4, "little"), (10, 1, 2, 3, 4)) for n in range(len(programs.CLASSES))))
    names = dict(enumerate(maps))

    class FakeRing:
        def __init__(self, fd: int, handle: object = None) -> None:
            self.fd, self.handle = fd, handle

        def fileno(self) -> int:
            return self.fd

        def consume(self, _: int) -> int:
            return 0

        def close(self) -> None:
            pass

    places = os.memfd_create("places")
    os.truncate(places, PLACE.size * PLACES)
    for at, (counter, count) in enumerate(((0, 0), (1, 19), (2, 5))):
        place = PLACE.pack(*struct.unpack("=QIxxxx", NETNS), b"", count, 3, counter, *[0] * 7, b"", *[0] * 8)
        os.pwrite(places, place, PLACE.size * (WITHOUT + at))
    monkeypatch.setattr(source, "Counts", lambda *_: Counts(places, PLACES))
    monkeypatch.setattr(bpf, "Map", lambda fd: maps[names[fd]])
    monkeypatch.setattr(bpf, "Ring", FakeRing)
    monkeypatch.setattr(bpf, "cpus", lambda: 1)
    monkeypatch.setattr(source, "Bell", FakeRing)
    manifest = handover.Manifest(
        [handover.Standing("drops", "kfree_skb", "tp_btf", attached=True, fallback=False)],
        maps={name: number for number, name in names.items()},
        map_numbers={name: number for number, name in names.items()},
        reasons={3: "no_socket"},
    )
    recorder = Recorder()
    opened = source.KernelSource(kernel.Programs(manifest))
    opened.open(recorder)
    yield opened, recorder, maps
    opened.close()
    os.close(places)


def _take(opened: source.KernelSource, record: bytes) -> None:
    buffer = ctypes.create_string_buffer(record, len(record))
    opened._take(ctypes.addressof(buffer), len(record))


def test_update_writes_families_that_the_catalogue_knows(
    opened: tuple[source.KernelSource, Recorder, dict[str, FakeMap]],
) -> None:
    """Counters, account and standings are written under their names; only attached programs are read.

    A counter is what is at its places and in its map.
    """
    kernel_source, recorder, _ = opened
    kernel_source.update()
    assert recorder.families.value("cni_packet_drops_total", (KEY, "no_socket")) == 23
    assert recorder.families.value("cni_events_seen_total", ("exec",)) == 10
    assert recorder.families.value("cni_events_lost_total", ("exec", "kernel_reserve")) == 3
    assert recorder.families.value("cni_bpf_program_attached", ("drops", "kfree_skb", "tp_btf")) == 1
    assert recorder.families.value("cni_netns_alias", (KEY, "proc-4026531999")) == 1
    assert "cni_tcp_faults_total" not in recorder.families.snapshots


def test_handled_events_are_counted_and_passed_on(
    opened: tuple[source.KernelSource, Recorder, dict[str, FakeMap]],
) -> None:
    """A record is counted in its class and goes to the tap with its reader; garbage is counted as an error.

    One that is its head alone, since nobody listened when it was written, is counted.
    """
    kernel_source, recorder, _ = opened
    passed: list[tuple[str, str]] = []
    kernel_source._tap = lambda event, reader: passed.append((event.class_, reader.program if reader else ""))
    _take(kernel_source, _record(3, b"body", time=1))
    _take(kernel_source, _record(8, b"body"))
    _take(kernel_source, _record(3))
    _take(kernel_source, b"garbage")
    kernel_source.update()
    assert passed == [("packet_drop", "drops"), ("syscall", "")]
    assert recorder.families.value("cni_events_handled_total", ("packet_drop",)) == 2
    assert recorder.error_kinds() == ["record"]
    assert sum(recorder.families.histograms["cni_events_lag_seconds"]["packet_drop",][:-1]) == 1, "one has no time"


def test_programs_know_which_classes_are_listened_to(
    opened: tuple[source.KernelSource, Recorder, dict[str, FakeMap]],
) -> None:
    """A bit for each class; where that cannot be written, it is an error and no end."""
    kernel_source, recorder, maps = opened
    listened = (3).to_bytes(4, "little")
    kernel_source._listened_to(frozenset(("packet_drop", "syscall", "container")))
    assert maps["constants"].entries[listened] == (1 << 3 | 1 << 8,)
    kernel_source._listened_to(frozenset())
    assert maps["constants"].entries[listened] == (0,)

    def refused(key: bytes, value: bytes) -> None:
        raise PermissionError(1, "Operation not permitted", key, value)

    maps["constants"].put = refused  # type: ignore[method-assign]
    kernel_source._listened_to(frozenset(("exec",)))
    assert recorder.error_kinds() == ["map"]


def test_what_is_handled_shows_at_once_to_whoever_measures_the_capacity(
    opened: tuple[source.KernelSource, Recorder, dict[str, FakeMap]],
) -> None:
    """Each time that the ring was emptied, not only where families are updated; and what share may be used for it."""
    kernel_source, _, _ = opened
    tally = kernel_source._programs.tally
    _take(kernel_source, _record(3))
    bell: Any = SimpleNamespace(due=lambda: True, emptied=lambda **_: None)
    kernel_source._listen(bell)
    assert tally.handled == {"packet_drop": 1}
    source.KernelSource(kernel_source._programs, share=0.25)
    assert tally.share == 0.25


def test_a_namespace_that_is_gone_leaves_with_its_last_counts(
    opened: tuple[source.KernelSource, Recorder, dict[str, FakeMap]],
) -> None:
    """What it counted is in one more snapshot; then its entries are gone from the kernel's maps."""
    kernel_source, recorder, maps = opened
    kernel_source._tables.forget(4026532001, 41)
    kernel_source.update()
    assert recorder.families.value("cni_packet_drops_total", (KEY, "no_socket")) == 23
    assert not maps["counted"].entries
    assert not maps["namespaces"].entries
    assert kernel_source._counts
    assert not any(counter for *_, counter in PLACE.iter_unpack(kernel_source._counts._memory[:]))
    kernel_source.update()
    assert recorder.families.snapshots["cni_packet_drops_total"] == {}
