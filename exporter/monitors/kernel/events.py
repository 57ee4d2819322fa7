"""Records of the rings as typed events. The layout is struct event of events.h; a body is its program's own.

Flows in: bytes of one record. Flows out: an `Event`, its body decoded when it is asked for.
"""

import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.monitors.kernel.shapes import CLASSES

NETNS = struct.Struct("=QIxxxx")
"""struct netns_id of common.h: cookie, inum."""
HEAD = struct.Struct("=QQIBBHII16s")
"""time, cookie, inum, class, kind, size, ratio, pid, comm: 48 bytes."""
FLOW = struct.Struct("=16s16sHHHBx")
"""source, destination, their ports, family, protocol: 40 bytes."""
_ALL = 0xFFFFFFFF
_MAPPED = b"\0" * 10 + b"\xff\xff"  # IPv4 in IPv6, RFC 4291 section 2.5.5.2


@dataclass(frozen=True, slots=True)
class Event:
    """One record."""

    time: int
    """CLOCK_MONOTONIC in nanoseconds."""
    netns: str
    """The namespace's key in the families: inode:cookie."""
    class_: str
    kind: int
    """What happened; numbers of the program's own."""
    weight: float
    """How many events the record stands for."""
    pid: int
    """Who did it; 0 where nobody is behind it."""
    comm: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Flow:
    """Addresses and ports."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    protocol: int
    """IPPROTO_x; 0: not known."""


def netns_key(cookie: int, inum: int) -> str:
    """Write a namespace's key as the families have it; empty where no namespace was found."""
    return f"{inum}:{cookie}" if inum else ""


def decode(record: bytes) -> Event:
    """Read a record. Raises ValueError where it is none."""
    if len(record) < HEAD.size:
        raise ValueError(f"a record of {len(record)} bytes has no head")
    time, cookie, inum, class_, kind, size, ratio, pid, comm = HEAD.unpack_from(record)
    if class_ >= len(CLASSES) or size != len(record):
        raise ValueError(f"a record of class {class_} says {size} bytes and has {len(record)}")
    netns = netns_key(cookie, inum)
    return Event(time, netns, CLASSES[class_], kind, weight(ratio), pid, text(comm), record[HEAD.size :])


def weight(ratio: int) -> float:
    """Give how many events a record with this ratio (of the head) stands for."""
    return 1.0 if ratio in (_ALL, 0) else 2**32 / ratio


def text(raw: bytes) -> str:
    """Read a C string of fixed width."""
    return raw.partition(b"\0")[0].decode(errors="replace")


def flow(raw: bytes, offset: int = 0) -> Flow | None:
    """Read struct flow; None where there were no addresses to read."""
    source, destination, source_port, destination_port, family, protocol = FLOW.unpack_from(raw, offset)
    if not family:
        return None
    return Flow(address(source), source_port, address(destination), destination_port, protocol)


def address(raw: bytes) -> str:
    """Write an address; IPv4 in its own form."""
    if raw.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


Details = Mapping[str, str | int | float]
"""A body for people and the feed: field names in order."""
