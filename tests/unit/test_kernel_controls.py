"""What steers events and what takes them out, without a kernel: layouts, precedence, bounds, differences, gathering."""

import ctypes
import errno
import mmap
import os
import re
import select
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.host.timer import Timer
from exporter.monitors.kernel import consumer, controls, counts, events, programs
from exporter.monitors.kernel.consumer import Bell, Tally
from exporter.monitors.kernel.controls import Controls, Rule
from exporter.monitors.kernel.shapes import CLASSES, THINNED

BPF = Path(__file__).parents[2] / "bpf"
EVENTS = "".join((BPF / name).read_text(encoding="utf-8") for name in ("common.h", "places.h", "rules.h", "events.h"))
CPUS = 2
KEY = "4026532001:41"
DROP = CLASSES.index("packet_drop")
LEARNED = "learned"
PLACES = 4


class FakeMap:
    """A map of two CPUs, as its shape says; a full hash refuses, as the kernel does."""

    def __init__(self, shape: programs.MapShape) -> None:
        self.name, self.value_size = shape.name, shape.value
        self.descriptor: Any = shape.name  # stands for one, but for memory that is mapped
        self.capacity = shape.entries if isinstance(shape.entries, int) else 1 << 20
        per_cpu = shape.type in {programs.PERCPU_ARRAY, programs.PERCPU_HASH, programs.LRU_PERCPU_HASH}
        self.width = shape.value * (CPUS if per_cpu else 1)
        self.array = shape.type in {programs.ARRAY, programs.PERCPU_ARRAY}
        self.entries: dict[bytes, bytes] = {}
        self.writes = 0

    def get(self, key: bytes) -> bytes | None:
        return self.entries.get(key, bytes(self.width) if self.array else None)

    def put(self, key: bytes, value: bytes) -> None:
        assert len(value) == self.width
        if key not in self.entries and len(self.entries) >= self.capacity:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        self.entries[key] = value
        self.writes += 1

    def delete(self, key: bytes) -> bool:
        return self.entries.pop(key, None) is not None

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        yield from self.entries.items()

    def total(self, value: bytes) -> tuple[int, ...]:
        words, width = memoryview(value).cast("Q"), self.value_size // 8
        return tuple(sum(words[word::width]) for word in range(width))


class Places:
    """Memory of the map `places`, into which a program says what it likes."""

    def __init__(self, count: int) -> None:
        self.descriptor = os.memfd_create("places")
        os.truncate(self.descriptor, count * counts.PLACE.size)
        self.memory = mmap.mmap(self.descriptor, 0)

    def say(
        self,
        place: int,
        about: Sequence[Rule],
        pending: int,
        class_: int = DROP,
        *,
        busy: int = 0,
        slots: Sequence[int] = (),
    ) -> None:
        """Write a place about events of these subjects, by all of which they are counted."""
        keys = {rule.kind: controls._key(rule) for rule in about}
        cookie, inum = events.NETNS.unpack(keys.get("netns", bytes(16)))
        what = inum | class_ << 32 | sum(controls._COUNTING[kind] for kind in keys) << 40
        self.memory[place * counts.PLACE.size : (place + 1) * counts.PLACE.size] = counts.PLACE.pack(
            *(cookie, what, keys["prefix"][4:] if "prefix" in keys else keys.get("comm", b"")),
            *(0, 0, 0, pending, 1, controls._ALL, busy, 0, len(slots), len(slots), keys.get("comm", b"")),
            *(slot << 1 | 1 for slot in slots),
            *[0] * (8 - len(slots)),
        )

    @property
    def generations(self) -> list[int]:
        """Of each place; 0: it is to be decided anew."""
        return [place[7] for place in counts.PLACE.iter_unpack(self.memory)]


@pytest.fixture
def places() -> Iterator[Places]:
    made = Places(PLACES)
    yield made
    os.close(made.descriptor)


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch, places: Places) -> dict[str, FakeMap]:
    found = {shape.name: FakeMap(shape) for shape in programs.COMMON.maps}
    found["places"].capacity = PLACES
    found["places"].descriptor = places.descriptor
    by_descriptor = {one.descriptor: one for one in found.values()}
    monkeypatch.setattr(controls, "Map", by_descriptor.__getitem__)
    return found


def _made(maps: dict[str, FakeMap], *counted: str, quota: int = 0) -> Controls:
    return Controls({name: one.descriptor for name, one in maps.items()}, counted, quota)


def _flags(maps: dict[str, FakeMap], class_: str = "packet_drop") -> tuple[int, int]:
    """What the programs are told of a class: kinds of rules and of counts, generation."""
    word = maps["filters"].get(controls._u32(CLASSES.index(class_))) or b""
    return divmod(int.from_bytes(word, sys.byteorder), 1 << 32)[::-1]


def _rule(maps: dict[str, FakeMap], kind: str) -> tuple[int, ...]:
    (value,) = maps[f"filter_{kind}"].entries.values()
    return struct.unpack("=IIII16I", value)


# What is written twice, in C and in Python, must agree.


def test_bits_of_counting_are_those_of_the_programs() -> None:
    """A kind of key that is counted sets the flag that makes the programs count it."""
    bits = {name.lower(): 1 << int(bit) for name, bit in re.findall(r"COUNT_(\w+) = 1 << (\d+)", EVENTS)}
    assert bits == controls._COUNTING | {"quota": controls._COUNT_QUOTA}
    assert int(re.findall(r"#define QUOTA (\d+)", EVENTS)[0]) == controls._QUOTA


def test_critical_classes_come_first_and_are_not_counted_by_key() -> None:
    """The first class with a place in struct key_load is the same on both sides."""
    first = re.findall(r"#define FIRST_COUNTED (\w+)", EVENTS)[0].lower()
    assert CLASSES[CLASSES.index(first) :] == THINNED
    assert len(THINNED) <= 6


# Rules


def test_a_rule_is_written_for_its_classes(maps: dict[str, FakeMap]) -> None:
    """Masks and ratios are where struct rule has them; the flag of the kind is up as long as there is a rule."""
    made = _made(maps)
    assert made.apply({"exec": 0.5}, [Rule("netns", KEY, ("packet_drop",), 0.25, LEARNED)]) == []
    thins, instead, learned, _, *ratios = _rule(maps, "netns")
    assert (thins, instead, learned) == (0, 0, 1 << DROP)
    assert ratios[DROP] == 1 << 30
    assert _flags(maps)[0] == 32
    assert _flags(maps, "exec")[0] == 0, "there is no rule for it"
    assert made.ratio("exec") == 0.5
    made.apply({}, ())
    assert _flags(maps)[0] == 0
    assert not maps["filter_netns"].entries


def test_what_the_programs_said_holds_until_something_changes(maps: dict[str, FakeMap]) -> None:
    """The generation is another one after a change of a configured rule, or of a ratio beside one, else the same."""
    made, rule = _made(maps), Rule("netns", KEY, ("packet_drop",), 0.25)
    seen = [_flags(maps)[1]]

    def changes(act: Callable[[], object]) -> bool:
        act()
        seen.append(_flags(maps)[1])
        assert _flags(maps, "syscall")[1] == seen[-1]
        return seen[-1] not in seen[:-1]

    assert seen[0] > 0, "0 is what no program has said anything for"
    assert changes(lambda: made.apply({"exec": 0.5}, [rule]))
    assert not changes(lambda: made.apply({"exec": 0.5}, [rule]))
    assert changes(lambda: made.apply({"exec": 0.25}, [rule]))
    assert changes(lambda: made.apply({}, [replace(rule, ratio=0.5)]))
    assert changes(lambda: made.set_ratio("exec", 1.0))
    assert changes(lambda: made.apply({}, ()))
    assert not changes(lambda: made.set_ratio("exec", 0.5)), "what a program says is a ceiling for it"
    assert not changes(lambda: made.apply({}, [replace(rule, origin=LEARNED)]))
    assert not changes(lambda: made.apply({}, ()))
    assert changes(lambda: made.apply({}, [Rule("prefix", "10.0.0.0/8", ratio=0.5, origin=LEARNED)])), "no key"
    assert changes(lambda: _made(maps))
    last = (1 << 64) - 1
    made.apply({}, ())
    maps["filters"].put(controls._u32(DROP), last.to_bytes(8, sys.byteorder))
    made.apply({}, [rule])
    assert _flags(maps)[1] == 1, "0 again is left out"


def test_a_learned_rule_has_its_own_keys_decided_anew(maps: dict[str, FakeMap], places: Places) -> None:
    """And once more later, for what a program was deciding meanwhile; what is about others is left alone."""
    made = _made(maps)
    mine, other = Rule("netns", KEY, ratio=0.5, origin=LEARNED), Rule("netns", "4026532001:42")
    command, address = Rule("comm", "nginx", ratio=0.5, origin=LEARNED), Rule("prefix", "10.0.0.1", origin=LEARNED)
    for place, about in enumerate(([mine, command], [other], [other, command], [other, address])):
        places.say(place, about, 0)
    made.apply({}, [mine])
    assert places.generations == [0, 1, 1, 1]
    made.apply({}, [mine, replace(address, ratio=0.5)])
    assert places.generations == [0, 1, 1, 0]
    places.say(3, [other, address], 0)
    made.observe()
    assert places.generations == [0, 1, 1, 0]
    places.say(3, [other, address], 0)
    made.observe()
    assert places.generations == [0, 1, 1, 1]
    made.apply({}, [replace(command, ratio=0.25)])
    assert places.generations == [0, 1, 0, 0], "what has no rule any more, too"


def test_of_addresses_learned_rules_ask_for_one_side(maps: dict[str, FakeMap]) -> None:
    """A configured rule is about both sides; one that is learned within its prefix would hide it, and is left out."""
    made = _made(maps)
    learned = Rule("prefix", "10.1.2.3", ("packet_drop",), 0.5, LEARNED)
    made.apply({}, [learned])
    assert _flags(maps)[0] == 4
    wider = Rule("prefix", "10.0.0.0/8", ("packet_drop",), 0.5)
    assert made.apply({}, [learned, wider]) == []
    assert (_flags(maps)[0], made.rules) == (4 | 128, (wider,))
    made.apply({}, [learned, replace(wider, classes=("connection",)), replace(wider, subject="2001:db8::/32")])
    assert learned in made.rules


def test_events_are_asked_for_what_they_have(maps: dict[str, FakeMap]) -> None:
    """A rule for all classes by PID concerns no packet, one by address no system call."""
    _made(maps).apply({}, [Rule("pid", 1), Rule("prefix", "10.0.0.1"), Rule("syscall", 3), Rule("cgroup", 7)])
    found = {class_: _flags(maps, class_)[0] for class_ in ("packet_drop", "tcp_fault", "exec", "syscall")}
    assert found == {"packet_drop": 4 | 128, "tcp_fault": 1 | 4 | 128, "exec": 1 | 64, "syscall": 1 | 16 | 64}


def test_per_class_the_configured_rule_wins_and_of_several_the_lowest(maps: dict[str, FakeMap]) -> None:
    """About one subject: configured before learned for each class by itself, then the lowest ratio."""
    made = _made(maps)
    made.apply(
        {},
        [
            Rule("port", 53, ("exec", "syscall"), 0.5),
            Rule("port", 53, ("exec",), 0.25, instead=True),
            Rule("port", 53, ("exec", "packet_drop"), 0.125, LEARNED),
            Rule("port", 53, ("packet_drop",), 0.0625, LEARNED),
        ],
    )
    thins, instead, learned, _, *ratios = _rule(maps, "port")
    number = {class_: CLASSES.index(class_) for class_ in ("exec", "syscall", "packet_drop")}
    assert (thins, instead, learned) == (1 << number["syscall"], 1 << number["exec"], 1 << number["packet_drop"])
    assert {class_: ratios[n] / 2**32 for class_, n in number.items()} == {
        "exec": 0.25,
        "syscall": 0.5,
        "packet_drop": 0.0625,
    }


def test_a_rule_that_has_expired_is_taken_out(maps: dict[str, FakeMap]) -> None:
    """A rule is in force until its time, and not a moment longer once that is known."""
    made = _made(maps)
    rules = [Rule("pid", 1, ratio=0.5, origin=LEARNED, expires=10.0), Rule("pid", 2)]
    made.apply({}, rules, now=9.9)
    assert len(made.rules) == 2
    made.apply({}, rules, now=10.0)
    assert [rule.subject for rule in made.rules] == [2]


def test_what_is_in_force_is_not_written_again(maps: dict[str, FakeMap]) -> None:
    """A decision that changes nothing writes no rule; one that changes a ratio keeps what the rule met."""
    made = _made(maps)
    rules = [Rule("comm", f"c{number}", ratio=0.5) for number in range(20)]
    made.apply({}, rules)
    writes = maps["filter_comm"].writes
    made.apply({}, rules)
    assert maps["filter_comm"].writes == writes == 20
    (slot,) = {controls._RULE.unpack(value)[3] for key, value in maps["filter_comm"].items() if key[:3] == b"c7\0"}
    maps["rule_matches"].put(controls._u32(slot), struct.pack("=4Q", 3, 0, 20, 0))
    changed = [Rule("comm", "c7", ratio=0.25)]
    made.apply({}, changed)
    assert made.matches() == {changed[0]: 23}
    made.apply({}, ())
    made.apply({}, [Rule("comm", "other")])
    assert list(made.matches().values()) == [0]


def test_rules_that_cannot_be_are_told_and_harm_no_other(maps: dict[str, FakeMap]) -> None:
    """Malformed rules, bad ratios, unknown classes, and more than a map holds: each comes back with a reason."""
    made = _made(maps)
    wrong = [Rule("prefix", "10.0.0.0/99"), Rule("colour", 1), Rule("pid", 1, ratio=2.0), Rule("pid", 1, ("no class",))]
    refused = made.apply({}, [*wrong, Rule("pid", 3)])
    assert [rule for rule, _ in refused] == wrong
    assert all(reason for _, reason in refused)
    assert [rule.subject for rule in made.rules] == [3]
    refused = made.apply({}, [Rule("pid", number) for number in range(1100)])
    assert len(refused) == 1100 - 1024
    assert "too many rules of kind pid" in refused[0][1]
    assert len(made.rules) == len(made.matches()) == 1024
    with pytest.raises(ValueError, match="no class of events"):
        made.apply({"no class": 0.5}, ())


@given(st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name))
def test_a_command_of_any_bytes_can_be_named(name: bytes) -> None:
    """What the kernel counts under a name can be written as a rule about just that name."""
    raw = name.ljust(16, b"\0")
    assert controls._key(Rule("comm", controls._subject("comm", raw))) == raw


# Counts


def _load(*counts: int) -> bytes:
    """Write an entry of struct key_load in which each CPU has counted half."""
    halves = [count // 2 for count in counts] + [0] * (8 - len(counts))
    others = [count - half for count, half in zip((*counts, *[0] * (8 - len(counts))), halves, strict=True)]
    return struct.pack("=16I", *(number % 2**32 for number in (*halves, *others)))


def test_counts_by_key_are_differences(maps: dict[str, FakeMap]) -> None:
    """What was counted before is not told, what wraps is, and a key that was put out begins at nothing."""
    key = controls._key(Rule("netns", KEY))
    maps["load_netns"].put(key, _load(2**32 - 10, 7))
    made = _made(maps, "netns")
    maps["load_netns"].put(key, _load(2**32 + 13, 7))
    counts = made.observe()
    assert counts.keys["packet_drop"] == {("netns", KEY): 23}
    assert counts.keys["tcp_fault"] == {}
    maps["load_netns"].put(key, _load(5))
    assert made.observe().keys["packet_drop"] == {("netns", KEY): 5}
    assert made.observe().keys["packet_drop"] == {}


def test_what_is_pending_counts_and_is_told_once(maps: dict[str, FakeMap], places: Places) -> None:
    """In places of two CPUs; when a program moves it to the map, or is about to; when the key is put out of that."""
    rule = Rule("netns", KEY)
    key, told = controls._key(rule), []
    places.say(0, [rule], 5)
    made = _made(maps, "netns")

    def gained() -> int:
        return made.observe().keys["packet_drop"].get(("netns", KEY), 0)

    assert gained() == 0, "what was pending before is not told"
    places.say(0, [rule], 25)
    places.say(3, [rule], 3)
    assert gained() == 23
    places.say(0, [Rule("netns", "1:1")], 999, busy=1)
    assert gained() == 0, "a program is at work in it: it counts as it was"
    maps["load_netns"].put(key, _load(25))
    assert gained() == 25, "there and here: it is read twice, so what is to come is told before"
    places.say(0, [Rule("netns", "1:1")], 1)
    places.say(3, [rule], 28)
    assert gained() == 0
    places.say(3, [rule], 30)
    assert gained() == 2
    maps["load_netns"].delete(key)
    assert gained() == 0, "put out"
    maps["load_netns"].put(key, _load(4))
    told += [gained(), gained()]
    places.say(3, [rule], 31)
    assert [*told, gained()] == [4, 0, 1]


def test_places_are_read_by_all_that_they_are_counted_by(maps: dict[str, FakeMap], places: Places) -> None:
    """One place counts for its namespace, command and address; an address that is not there is none."""
    made = _made(maps, *controls.COUNTED_KINDS)
    about = [Rule("netns", KEY), Rule("comm", "nginx"), Rule("prefix", "192.0.2.7")]
    places.say(1, about, 23)
    places.say(2, [Rule("prefix", "::")], 7)
    keys = made.observe().keys
    assert keys["packet_drop"] == {("netns", KEY): 23, ("comm", "nginx"): 23, ("prefix", "192.0.2.7"): 23}
    places.say(1, about, 30, CLASSES.index("syscall"))
    assert made.observe().keys["syscall"]["comm", "nginx"] == 30


def test_what_a_learned_rule_met_is_never_taken_back(maps: dict[str, FakeMap], places: Places) -> None:
    """Counted and pending together; and no other rule gets a slot that is still mentioned."""
    made, rule = _made(maps), Rule("netns", KEY, ("packet_drop",), 0.25, LEARNED)
    made.apply({}, [rule])
    slot = _rule(maps, "netns")[3]
    places.say(0, [rule], 20, slots=[slot])
    assert made.matches() == {rule: 20}
    maps["rule_matches"].put(controls._u32(slot), struct.pack("=4Q", 0, 2, 0, 1))
    assert made.matches() == {rule: 23}
    places.say(0, [rule], 2, slots=[slot])
    assert made.matches() == {rule: 23}
    places.say(0, [rule], 22, slots=[slot])
    assert made.matches() == {rule: 25}
    made.apply({}, ())
    others = [Rule("pid", number) for number in range(1000)]
    assert made.apply({}, others) == []
    assert slot not in {controls._RULE.unpack(value)[3] for _, value in maps["filter_pid"].items()}


def test_of_many_keys_the_heaviest_are_told(maps: dict[str, FakeMap]) -> None:
    """Of 1,024 addresses the 64 that sent most."""
    made = _made(maps, "prefix")
    for number in range(1024):
        address = controls._key(Rule("prefix", f"10.0.{number // 256}.{number % 256}"))
        maps["load_prefix"].put(address, _load(number))
    told = made.observe().keys["packet_drop"]
    assert sorted(told.values()) == list(range(1024 - 64, 1024))
    assert told["prefix", "10.0.3.255"] == 1023


def test_the_account_and_the_fill_are_told_since_last_time(maps: dict[str, FakeMap]) -> None:
    """Each part of the account per class; the fullest of the CPUs' readings, once."""
    made = _made(maps)
    maps["account"].put(controls._u32(DROP), struct.pack("=16Q", 20, 1, 2, 3, 14, 7, 5, 6, 3, 0, 0, 0, 3, 9, 5, 6))
    maps["fullest"].put(bytes(4), struct.pack("=2Q", 1 << 19, 1 << 18))
    assert made.fill() == 0.5
    counts = made.observe()
    found = (counts.seen, counts.filtered, counts.sampled_out, counts.lost)
    assert [part["packet_drop"] for part in found] == [23, 1, 2, 3]
    assert counts.ring == 0.5
    again = made.observe()
    assert (again.seen["packet_drop"], again.ring) == (0, 0.0)


def test_what_cannot_be_counted_is_refused(maps: dict[str, FakeMap]) -> None:
    """A kind of key without a map is an error; a quota needs the counts of namespaces."""
    with pytest.raises(ValueError, match="netns, comm, prefix"):
        _made(maps, "pid")
    _made(maps, quota=500)
    assert maps["constants"].get(controls._u32(2)) == struct.pack("=Q", 500)
    assert _flags(maps)[0] == 1 << 19 | 1 << 16


# Records


def _record(ratio: int, time: int = 0, class_: int = DROP) -> ctypes.Array[ctypes.c_char]:
    raw = events.HEAD.pack(time, 41, 4026532001, class_, 0, events.HEAD.size, ratio, 77, b"curl")
    return ctypes.create_string_buffer(raw, len(raw))


def test_a_tally_knows_what_records_stand_for() -> None:
    """Weights and their variance by class; lags in the buckets of the family, their sum in seconds."""
    tally = Tally()
    for ratio, times in ((0xFFFFFFFF, 5), (1 << 31, 3), (1 << 30, 2)):
        record = _record(ratio, time=1_000)
        for _ in range(times):
            assert tally.count(ctypes.addressof(record), len(record), 2_001_000) == "packet_drop"
    assert not tally.handled
    tally.settle()
    tally.settle()
    assert tally.handled == {"packet_drop": 10}
    assert tally.weights == dict.fromkeys(CLASSES, 0) | {"packet_drop": 5 + 6 + 8}
    assert tally.variances == dict.fromkeys(CLASSES, 0) | {"packet_drop": 3 * 2 + 2 * 12}
    *counts, total = tally.lags["packet_drop"]
    assert sum(counts) == 10
    assert total == pytest.approx(0.02)
    early = _record(1 << 31, time=2**63)
    tally.count(ctypes.addressof(early), len(early), 0)
    tally.settle()
    assert tally.lags["packet_drop"][0] == 1, "a clock that seems to step back is no lag"


def test_garbage_is_no_record() -> None:
    """A record that is too short, of no class or of another length than it says is refused before it is counted."""
    tally = Tally()
    record, foreign = _record(1), _record(1, class_=200)
    for address, size in ((record, 47), (record, 49), (foreign, 48)):
        with pytest.raises(ValueError, match="a record of"):
            tally.count(ctypes.addressof(address), size, 0)
    tally.settle()
    assert not tally.handled


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_a_bell_gathers_until_its_time_or_a_second_ring(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ring starts the clock, a second one is answered at once; what is left has another turn soon."""
    reading, writing = pipe
    bell = Bell(reading)
    try:
        assert not bell.due()
        monkeypatch.setattr(consumer, "GATHER", 3600.0)
        os.write(writing, b"x")
        assert not bell.due()
        assert not bell.due()
        os.write(writing, b"x")
        assert bell.due()
        bell.emptied(wholly=False)
        assert select.select([bell], [], [], 10)[0]
        assert bell.due()
        bell.emptied(wholly=True)
        assert not select.select([bell], [], [], 0)[0]
        monkeypatch.setattr(consumer, "GATHER", 0.001)
        os.write(writing, b"x")
        assert not bell.due()
        assert select.select([bell], [], [], 10)[0]
        assert bell.due()
    finally:
        bell.close()


def test_a_bell_rests_after_work_whatever_rings(pipe: tuple[int, int]) -> None:
    """At a tenth of a processor, two seconds of work are followed by eighteen of rest; then what came has its turn."""
    reading, writing = pipe
    now = [0.0]
    bell = Bell(reading, 0.1, lambda: now[0])
    try:
        os.write(writing, b"x")
        assert not bell.due()
        os.write(writing, b"x")
        assert bell.due()
        bell.emptied(wholly=True, spent=2.0)
        for now[0] in (0.0, 9.0, 17.9):
            os.write(writing, b"x")
            assert not bell.due()
        now[0] = 18.1
        os.write(writing, b"x")
        assert bell.due()
        bell.emptied(wholly=False, spent=0.001)
        assert not bell.due()
        now[0] = 20.0
        assert select.select([bell], [], [], 10)[0]
        assert bell.due()
    finally:
        bell.close()


def test_a_timer_is_over_once_and_can_be_stopped() -> None:
    """It is readable from its end on until it is started or stopped; it may be closed twice."""
    timer = Timer()
    ready: Callable[[float], bool] = lambda wait: bool(select.select([timer], [], [], wait)[0])  # noqa: E731 - one line
    assert not ready(0)
    timer.start(0)
    assert ready(10)
    assert ready(0)
    timer.start(3600)
    assert not ready(0)
    timer.start(0.001)
    assert ready(10)
    timer.stop()
    assert not ready(0)
    timer.close()
    timer.close()
