"""What steers events in the kernel: ratios by class, and filter rules.

Flows in: decisions of whoever manages load. Flows out: entries of maps that the programs look at before they touch a
ring. Map updates by descriptor need no capability (Linux 5.19).
"""

import ipaddress
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.host.bpf import Map
from exporter.monitors.kernel.shapes import CLASSES

_RULE = struct.Struct("=IIQ")  # struct rule: classes, ratio, matches
_ALL = 0xFFFFFFFF
_BITS = {  # enum filter of common.h, in its order
    "pid": 1,
    "comm": 2,
    "prefix": 4,
    "port": 8,
    "syscall": 16,
    "netns": 32,
    "cgroup": 64,
}
KINDS = tuple(_BITS)
"""What a rule can be about: the map is called filter_KIND."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Events of these classes that have to do with the subject are thinned to a share; 0 leaves all out."""

    kind: str
    subject: str | int
    """PID, port, number of a system call, inode of a network namespace, id of a cgroup, command, or address prefix."""
    classes: tuple[str, ...] = CLASSES
    ratio: float = 0.0


class Controls:
    """Writes ratios and rules. One thread writes."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        """Open the maps of a manifest by their descriptors. Raises OSError."""
        self._ratios, self._filters = Map(maps["ratios"]), Map(maps["filters"])
        self._maps = {kind: Map(maps[f"filter_{kind}"]) for kind in KINDS}
        self._rules: dict[tuple[str, bytes], Rule] = {}

    def set_ratio(self, class_: str, ratio: float) -> None:
        """Keep this share (0 to 1) of a class' events. Raises ValueError for an unknown class or share."""
        self._ratios.put(_u32(_class(class_)), _u32(_in_32_bits(ratio)))

    def ratio(self, class_: str) -> float:
        """Give the share of a class' events that is kept."""
        raw = int.from_bytes(self._ratios.get(_u32(_class(class_))) or bytes(4), sys.byteorder)
        return 1.0 if raw == _ALL else raw / 2**32

    def add(self, rule: Rule) -> None:
        """Put a rule in force, in place of one about the same subject.

        Raises ValueError for a malformed rule, OSError where its map is full (1,024 rules of a kind).
        """
        key = _key(rule)
        mask = sum(1 << _class(class_) for class_ in set(rule.classes))
        self._maps[rule.kind].put(key, _RULE.pack(mask, _in_32_bits(rule.ratio), 0))
        self._rules[rule.kind, key] = rule
        self._flag()

    def remove(self, rule: Rule) -> None:
        """Take a rule out of force; one that is not in force is no error."""
        key = _key(rule)
        self._maps[rule.kind].delete(key)
        self._rules.pop((rule.kind, key), None)
        self._flag()

    def matches(self) -> dict[Rule, int]:
        """Give the rules in force, each with how many events it met."""
        found = {}
        for (kind, key), rule in self._rules.items():
            value = self._maps[kind].get(key)
            found[rule] = _RULE.unpack(value)[2] if value else 0
        return found

    def _flag(self) -> None:
        """Tell the programs which maps are worth a look."""
        bits = sum(_BITS[kind] for kind in {kind for kind, _ in self._rules})
        self._filters.put(bytes(4), _u32(bits))


def _u32(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _class(name: str) -> int:
    if name not in CLASSES:
        raise ValueError(f"{name} is no class of events: {', '.join(CLASSES)}")
    return CLASSES.index(name)


def _in_32_bits(ratio: float) -> int:
    """Write a share in units of 1/2^32; 1 is a number of its own, kept without a coin."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"a ratio is between 0 and 1, not {ratio}")
    return min(_ALL, round(ratio * 2**32))


def _key(rule: Rule) -> bytes:
    """Write a rule's subject as its map's key. Raises ValueError."""
    if rule.kind not in KINDS:
        raise ValueError(f"{rule.kind} is no kind of rule: {', '.join(KINDS)}")
    if rule.kind == "comm":
        return str(rule.subject).encode()[:15].ljust(16, b"\0")
    if rule.kind == "prefix":
        network = ipaddress.ip_network(str(rule.subject), strict=False)
        if isinstance(network, ipaddress.IPv4Network):
            address = b"\0" * 10 + b"\xff\xff" + network.network_address.packed
            return _u32(network.prefixlen + 96) + address
        return _u32(network.prefixlen) + network.network_address.packed
    width = 8 if rule.kind == "cgroup" else 4
    number = int(rule.subject)
    if not 0 <= number < 1 << 8 * width:
        raise ValueError(f"{rule.subject} is no {rule.kind}")
    return number.to_bytes(width, sys.byteorder)
