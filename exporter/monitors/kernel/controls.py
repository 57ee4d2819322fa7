"""What steers events in the kernel: ratios by class, rules about subjects; and what the kernel counted of them.

Flows in: decisions of whoever manages load. Flows out: entries of maps that the programs look at before they touch a
ring, and counts by class and key. Map calls by descriptor need no capability (Linux 5.19). One thread calls.
"""

import errno
import heapq
import ipaddress
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from exporter.host.bpf import Map
from exporter.monitors.kernel.events import NETNS, address, netns_key
from exporter.monitors.kernel.shapes import CLASSES, THINNED
from exporter.monitors.kernel.verdicts import Keys, Verdicts

_RULE = struct.Struct("=IIII16I")  # struct rule: masks thins, instead, learned; slot; ratios
_ALL = 0xFFFFFFFF
_WRAP = 1 << 32
_BITS = {  # enum filter of rules.h, in its order
    "pid": 1,
    "comm": 2,
    "prefix": 4,
    "port": 8,
    "syscall": 16,
    "netns": 32,
    "cgroup": 64,
}
_BOTH_SIDES = 128  # FILTER_OWN: of addresses, learned rules ask for one side alone
_SOMEBODY, _FLOW = ("pid", "comm", "netns"), ("prefix", "port")
_ASKED = {  # what events of a class have to do with: nothing else is asked about them
    "packet_drop": {"netns", *_FLOW},
    "exec": {*_SOMEBODY, "cgroup"},
    "syscall": {*_SOMEBODY, "cgroup", "syscall"},
    **{class_: {*_SOMEBODY, *_FLOW} for class_ in ("tcp_fault", "connection", "connection_close")},
}
_COUNTING = {"netns": 1 << 16, "comm": 1 << 17, "prefix": 1 << 18}  # enum counting
_COUNT_QUOTA = 1 << 19
_QUOTA = 2  # slot of the map constants
_HEAVIEST = 64  # keys of a kind and class that are told
_ACCOUNT = ("seen", "filtered", "sampled_out", "lost")  # struct account
KINDS = tuple(_BITS)
"""What a rule can be about: the map is called filter_KIND."""
COUNTED_KINDS = tuple(_COUNTING)
"""By what keys the kernel can count: the map is called load_KIND."""

Key = tuple[str, str]
"""Kind and subject, as in a rule: ("netns", "4026532001:41"), ("comm", "nginx"), ("prefix", "192.0.2.7")."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is to become of the events of these classes that have to do with the subject."""

    kind: str
    subject: str | int
    """PID, port, number of a system call, id of a cgroup (inode of its directory), network namespace (`inode:cookie`,
    as in the families), address or prefix, command (its first 15 bytes; such as are no UTF-8 as in os.fsdecode)."""
    classes: tuple[str, ...] = THINNED
    ratio: float = 0.0
    """Share that is kept, 0 to 1; 0 of a configured rule filters."""
    origin: Literal["configured", "learned"] = "configured"
    """`configured`: thins what the class' ratio leaves. `learned`: a ceiling for the class' ratio, for events of which
    no configured rule says anything. Of several that match, the lowest holds."""
    instead: bool = False
    """Configured: the ratio stands in place of the class' ratio and is not changed by it."""
    expires: float = float("inf")
    """Seconds of the clock that `apply` is called with."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened since the counts before. All of it is counted before sampling; nothing is estimated."""

    seen: Mapping[str, int]
    filtered: Mapping[str, int]
    sampled_out: Mapping[str, int]
    lost: Mapping[str, int]
    """Events per class."""
    keys: Mapping[str, Mapping[Key, int]] = field(default_factory=dict)
    """Events per class, after filters, of its heaviest keys: at most 64 of each kind. Critical classes have none."""
    ring: float = 0.0
    """How full the ring was at most, 0 to 1; 0 below an eighth."""


class Controls:
    """Writes ratios and rules, reads counts."""

    def __init__(self, maps: Mapping[str, int], counted: Iterable[str] = (), quota: int = 0) -> None:
        """Open the maps of a manifest by their descriptors and begin to count by these kinds of keys.

        `quota`: events per second of a network namespace and CPU from which on the namespace is thinned in the same
        second, to half, a quarter, …, 1/64 as it sends twice, four times, … as many; 0: no such limit; else `netns` is
        counted. Raises OSError, ValueError for a kind that is not in COUNTED_KINDS.
        """
        self._ratios, self._filters = Map(maps["ratios"]), Map(maps["filters"])
        self._account, self._fullest = Map(maps["account"]), Map(maps["fullest"])
        self._maps = {kind: Map(maps[f"filter_{kind}"]) for kind in KINDS}
        self._matches = Map(maps["rule_matches"])
        self._ring = Map(maps["events"]).capacity
        self._entries: dict[tuple[str, bytes], bytes] = {}
        self._slots: dict[tuple[str, bytes], int] = {}
        self._free = list(range(self._matches.capacity))
        self._verdicts = Verdicts(maps["places"], Map(maps["places"]).capacity)
        self._met: dict[int, int] = {}
        self._forgotten: set[tuple[str, bytes]] = set()
        self._rules: tuple[Rule, ...] = ()
        kinds = dict.fromkeys((*counted, *(["netns"] if quota else [])))
        if not kinds.keys() <= _COUNTING.keys():
            raise ValueError(f"keys are counted by {', '.join(COUNTED_KINDS)}, not by {', '.join(kinds)}")
        self._loads = {kind: _Loads(kind, Map(maps[f"load_{kind}"])) for kind in kinds}
        self._gained()  # what was counted for somebody before
        self._totals = self._read_account()
        Map(maps["constants"]).put(_u32(_QUOTA), quota.to_bytes(8, sys.byteorder))
        self._counting = sum(_COUNTING[kind] for kind in kinds)
        if quota:
            self._counting += _COUNT_QUOTA
        self._publish(anew=True)

    # What is written.

    def set_ratio(self, class_: str, ratio: float) -> None:
        """Keep this share (0 to 1) of a class' events. Raises ValueError for an unknown class or share."""
        if self._put_ratio(class_, ratio):
            self._renew(self._entries, ratios=True)

    def ratio(self, class_: str) -> float:
        """Give the share of a class' events that is kept."""
        raw = _int(self._ratios.get(_u32(_class(class_))))
        return 1.0 if raw == _ALL else raw / 2**32

    def apply(self, ratios: Mapping[str, float], rules: Iterable[Rule], now: float = 0.0) -> list[tuple[Rule, str]]:
        """Put ratios by class in force, and these rules in place of all others, but for those that have expired.

        The answer is the rules that could not be put in force, each with the reason: it is malformed, or 1,024 of its
        kind are in force already. Raises ValueError for a class that is not known, OSError.
        """
        before = dict(self._entries)
        changed = [class_ for class_, ratio in ratios.items() if self._put_ratio(class_, ratio)]
        refused: list[tuple[Rule, str]] = []
        rules = list(rules)
        wanted: dict[tuple[str, bytes], list[Rule]] = defaultdict(list)
        for rule in rules:
            if rule.expires <= now or (rule.origin == "learned" and _is_spoken_of(rule, rules)):
                continue
            try:
                _in_32_bits(rule.ratio)
                all(map(_class, rule.classes))
                wanted[rule.kind, _key(rule)].append(rule)
            except ValueError as error:
                refused.append((rule, str(error)))
        ended = self._slots.keys() - wanted.keys()
        for entry in ended:
            self._drop(entry)
        if ended:
            self._renew(before)  # before others have their slots
        self._find_slots(wanted.keys() - self._slots.keys())
        for entry, about in wanted.items():
            try:
                self._write(entry, about)
            except OSError as error:
                refused += [(rule, f"there are too many rules of kind {rule.kind}: {error.strerror}") for rule in about]
                self._drop(entry)
        self._rules = tuple(rule for entry in self._slots for rule in wanted[entry])
        if changed or self._entries != before:
            self._renew(before, ratios=bool(changed))
        return refused

    def _put_ratio(self, class_: str, ratio: float) -> bool:
        """Write a class' ratio; the answer is whether it was another one."""
        key, value = _u32(_class(class_)), _u32(_in_32_bits(ratio))
        changed = self._ratios.get(key) != value
        if changed:
            self._ratios.put(key, value)
        return changed

    def _write(self, entry: tuple[str, bytes], rules: Iterable[Rule]) -> None:
        """Write what is said about one subject, where it is news. Raises OSError where there is no room."""
        if entry not in self._slots:
            raise OSError(errno.E2BIG, f"{self._matches.capacity} rules are in force")
        value = _packed(rules, self._slots[entry])
        if self._entries.get(entry) != value:
            self._maps[entry[0]].put(entry[1], value)
            self._entries[entry] = value

    def _find_slots(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """Give subjects a slot each, as far as there are any: those first of which no event is pending."""
        if entries:
            _, pending = self._verdicts.pending()
            self._free.sort(key=pending.__contains__, reverse=True)
        for entry in entries:
            if self._free:
                self._slots[entry] = slot = self._free.pop()
                _clear(self._matches, slot)
                self._met.pop(slot, None)

    def _drop(self, entry: tuple[str, bytes]) -> None:
        if self._entries.pop(entry, None):
            self._maps[entry[0]].delete(entry[1])
        if entry in self._slots:
            self._free.append(self._slots.pop(entry))

    def _renew(self, before: Mapping[tuple[str, bytes], bytes], *, ratios: bool = False) -> None:
        """Have the programs decide anew on events that have to do with what has changed: last, when all is written.

        A learned rule has to do with what is counted by its key; of configured ones, all is decided anew, with another
        generation: what a program says meanwhile has the one before, and is not used again.
        """
        changed = {entry for entry, _ in before.items() ^ self._entries.items()}
        values = [rules.get(entry) for rules in (before, self._entries) for entry in changed]
        if ratios:
            values += self._entries.values()
        anew = any(map(_is_configured, values)) or not all(map(_is_counted, changed))
        self._publish(anew=anew)
        if not anew:
            self._verdicts.forget(changed)
            self._forgotten |= changed

    def _publish(self, *, anew: bool) -> None:
        """Tell the programs which maps are worth a look; and that nothing that they said of events holds any longer."""
        kinds: dict[str, set[str]] = {class_: set() for class_ in THINNED}
        both = dict.fromkeys(THINNED, False)
        for rule in self._rules:
            for class_ in (class_ for class_ in rule.classes if rule.kind in _ASKED.get(class_, ())):
                kinds[class_].add(rule.kind)
                both[class_] |= rule.kind == "prefix" and rule.origin == "configured"
        generation = (_int(self._filters.get(_u32(CLASSES.index(THINNED[0])))) >> 32) + anew
        for class_, about in kinds.items():
            bits = self._counting | sum(map(_BITS.__getitem__, about)) | both[class_] * _BOTH_SIDES
            bits |= (generation % _WRAP or 1) << 32
            self._filters.put(_u32(_class(class_)), bits.to_bytes(8, sys.byteorder))

    # What is read.

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in force."""
        return self._rules

    def matches(self) -> dict[Rule, int]:
        """Give the rules in force, each with how many events its subject's rules of its origin met."""
        found = {}
        _, pending = self._verdicts.pending()
        for rule in self._rules:
            slot = self._slots[rule.kind, _key(rule)]
            configured, learned = self._matches.total(self._matches.get(_u32(slot)) or b"")
            self._met[slot] = learned = max(learned + pending[slot], self._met.get(slot, 0))
            found[rule] = configured if rule.origin == "configured" else learned
        return found

    def fill(self) -> float:
        """Say how full the ring was at most since the last `observe`, 0 to 1; 0 below an eighth."""
        value = self._fullest.get(bytes(4)) or bytes(8)
        used = max(memoryview(value).cast("Q").tolist())
        return min(1.0, float(used / self._ring))

    def observe(self) -> Counts:
        """Say what happened since it was asked last; the first time, since the controls were made."""
        before, self._totals = self._totals, self._read_account()
        account = {
            name: {class_: total[number] - before[class_][number] for class_, total in self._totals.items()}
            for number, name in enumerate(_ACCOUNT)
        }
        self._verdicts.forget(self._forgotten)
        self._forgotten.clear()
        keys, ring = self._gained(), self.fill()
        _clear(self._fullest, 0)
        return Counts(**account, keys=keys, ring=ring)

    def _gained(self) -> dict[str, dict[Key, int]]:
        """Say what keys sent since the last call; what is pending is read before the counts that it is added to."""
        keys: dict[str, dict[Key, int]] = {class_: {} for class_ in THINNED}
        pending, _ = self._verdicts.pending()
        for kind, loads in self._loads.items():
            for class_, heaviest in loads.gained(pending[kind]).items():
                keys[class_] |= heaviest
        return keys

    def _read_account(self) -> dict[str, tuple[int, ...]]:
        return {
            class_: self._account.total(self._account.get(_u32(number)) or b"") for number, class_ in enumerate(CLASSES)
        }


class _Loads:
    """Reads the counts by one kind of key. They wrap at 32 bits, and begin anew for a key that was put out."""

    def __init__(self, kind: str, map_: Map) -> None:
        self._kind, self._map = kind, map_
        self._before: dict[bytes, _Load] = {}

    def gained(self, pending: Keys) -> dict[str, dict[Key, int]]:
        """Give what each class' heaviest keys sent since the last call. What has not changed is not even added up.

        What a program moved from pending to the map between two readings was read twice: then less is told next time.
        """
        gains: list[list[tuple[int, bytes]]] = [[] for _ in THINNED]
        entries, read = dict(self._map.items()), {}
        for key in entries.keys() | pending.keys():
            before, value, here = self._before.get(key, _NO_LOAD), entries.get(key, b""), pending.get(key, _NOTHING)
            if before.value == value and before.pending == here:
                read[key] = before
                continue
            counts, told = self._counts(value) if value else _NOTHING, before.told
            if any(_decrease(new, old) for new, old in zip(counts, before.counts, strict=True)):  # it was put out
                told = [(amount - old) % _WRAP for amount, old in zip(told, before.counts, strict=True)]
            total = [(counted + more) % _WRAP for counted, more in zip(counts, here, strict=True)]
            for number, (new, old) in enumerate(zip(total, told, strict=True)):
                if key in self._before and _decrease(new, old):
                    total[number] = old
                elif new != old:
                    gains[number].append(((new - old) % _WRAP, key))
            read[key] = _Load(value, counts, here, total)
        self._before = read
        return {
            class_: {(self._kind, _subject(self._kind, key)): amount for amount, key in heapq.nlargest(_HEAVIEST, gain)}
            for class_, gain in zip(THINNED, gains, strict=True)
        }

    def _counts(self, value: bytes) -> list[int]:
        words = memoryview(value).cast("I")
        return [sum(words[number :: self._map.value_size // 4]) % _WRAP for number in range(len(THINNED))]


class _Load(NamedTuple):
    """What was read of a key: its entry, the counts in there, what was pending, and what was told of it in all."""

    value: bytes
    counts: list[int]
    pending: list[int]
    told: list[int]


_NOTHING = [0] * len(THINNED)
_NO_LOAD = _Load(b"", _NOTHING, _NOTHING, _NOTHING)


def _decrease(new: int, old: int) -> bool:
    """Compare two counts that wrap: no key sends 2^31 events in between."""
    return (new - old) % _WRAP >= _WRAP // 2


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _int(value: bytes | None) -> int:
    return int.from_bytes(value or b"", sys.byteorder)


def _clear(array: Map, slot: int) -> None:
    """Write zeros for every CPU."""
    array.put(_u32(slot), bytes(len(array.get(_u32(slot)) or b"")))


def _class(name: str) -> int:
    if name not in CLASSES:
        raise ValueError(f"{name} is no class of events: {', '.join(CLASSES)}")
    return CLASSES.index(name)


def _in_32_bits(ratio: float) -> int:
    """Write a share in units of 1/2^32; 1 is a number of its own, kept without a coin."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"a ratio is between 0 and 1, not {ratio}")
    return min(_ALL, round(ratio * 2**32))


def _packed(rules: Iterable[Rule], slot: int) -> bytes:
    """Write struct rule: per class the lowest of the configured rules, else of the learned ones."""
    masks = {"thins": 0, "instead": 0, "learned": 0}
    ratios = [0] * 16
    # The last one written holds: so learned before configured, and of each the lowest last.
    for rule in sorted(rules, key=lambda rule: (rule.origin == "configured", -rule.ratio)):
        sort = "learned" if rule.origin == "learned" else "instead" if rule.instead else "thins"
        for number in map(_class, rule.classes):
            masks = {name: mask & ~(1 << number) for name, mask in masks.items()}
            masks[sort] |= 1 << number
            ratios[number] = _in_32_bits(rule.ratio)
    return _RULE.pack(*masks.values(), slot, *ratios)


def _is_configured(value: bytes | None) -> bool:
    """Say whether a struct rule has configured rules in it."""
    return any((value or b"")[:8])


def _is_counted(entry: tuple[str, bytes]) -> bool:
    """Say whether it is a key that events are counted by: a container, a command, one address."""
    kind, key = entry
    return kind in _COUNTING and (kind != "prefix" or key[:4] == _u32(128))


def _is_spoken_of(rule: Rule, rules: Iterable[Rule]) -> bool:
    """Say whether an address has configured rules as part of a wider prefix: the longest alone is looked up."""
    if rule.kind != "prefix":
        return False
    about = {one for one in rules if one.kind == "prefix" and one.origin == "configured"}
    return any(set(one.classes) & set(rule.classes) and _contains(one.subject, rule.subject) for one in about)


def _contains(prefix: str | int, address_: str | int) -> bool:
    try:
        return ipaddress.ip_address(str(address_)) in ipaddress.ip_network(str(prefix), strict=False)
    except ValueError:
        return False


def _key(rule: Rule) -> bytes:
    """Write a rule's subject as its map's key. Raises ValueError."""
    if rule.kind not in KINDS:
        raise ValueError(f"{rule.kind} is no kind of rule: {', '.join(KINDS)}")
    if rule.kind == "comm":
        return str(rule.subject).encode(errors="surrogateescape")[:15].ljust(16, b"\0")
    if rule.kind == "prefix":
        network = ipaddress.ip_network(str(rule.subject), strict=False)
        if isinstance(network, ipaddress.IPv4Network):
            mapped = b"\0" * 10 + b"\xff\xff" + network.network_address.packed
            return _u32(network.prefixlen + 96) + mapped
        return _u32(network.prefixlen) + network.network_address.packed
    if rule.kind == "netns":
        inode, _, cookie = str(rule.subject).partition(":")
        return NETNS.pack(_number(rule, cookie, 8), _number(rule, inode, 4))
    width = 8 if rule.kind == "cgroup" else 4
    return _number(rule, rule.subject, width).to_bytes(width, sys.byteorder)


def _number(rule: Rule, text: str | int, width: int) -> int:
    if not str(text).isdecimal() or int(text) >= 1 << 8 * width:
        raise ValueError(f"{rule.subject} is no {rule.kind}{' (inode:cookie)' if rule.kind == 'netns' else ''}")
    return int(text)


def _subject(kind: str, key: bytes) -> str:
    """Read a map's key as a rule has it."""
    if kind == "netns":
        return netns_key(*NETNS.unpack(key))
    if kind == "comm":
        return key.partition(b"\0")[0].decode(errors="surrogateescape")
    return address(key[4:])
