"""The formats of rtnetlink that we need: links with their counters, namespace ids, and the kernel's news about both.

Bytes flow in, `Link`, `News` and requests flow out; no message can make a parser do worse than raise ValueError.
Formats: netlink(7), rtnetlink(7), the kernel's `include/uapi/linux/{netlink,rtnetlink,if_link,net_namespace}.h`.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_NEWLINK = 16
RTM_DELLINK = 17
RTM_GETLINK = 18
RTM_NEWNSID = 88
RTM_DELNSID = 89
RTM_GETNSID = 90
NLM_F_DUMP_INTR = 0x10
NETNSA_PID = 2
NETNSA_FD = 3

_NLM_F_REQUEST = 0x1
_NLM_F_DUMP = 0x300

_IFLA_IFNAME = 3
_IFLA_LINK = 5
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_STATS64 = 23
_IFLA_LINK_NETNSID = 37
_IFLA_NEW_NETNSID = 45
_IFLA_NEW_IFINDEX = 49
_WANTED = frozenset(
    (
        _IFLA_IFNAME,
        _IFLA_LINK,
        _IFLA_MASTER,
        _IFLA_LINKINFO,
        _IFLA_STATS64,
        _IFLA_LINK_NETNSID,
        _IFLA_NEW_NETNSID,
        _IFLA_NEW_IFINDEX,
    )
)
_IFLA_INFO_KIND = 1
_NETNSA_NSID = 1
_ATTRIBUTE_TYPE = 0x3FFF
"""Mask that takes the flags "nested" and "network byte order" off an attribute's type."""
_IFF_LOOPBACK = 0x8

_HEADER = struct.Struct("=IHHII")
_LINK_HEADER = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_S32 = struct.Struct("=i")
_STATS64 = struct.Struct("=8Q")
_FAMILY = 4
"""Bytes of `struct rtgenmsg`, padded."""
_ATTRIBUTES_START = _HEADER.size + _LINK_HEADER.size

_LEAST = {_IFLA_LINK: 4, _IFLA_MASTER: 4, _IFLA_LINK_NETNSID: 4, _IFLA_STATS64: _STATS64.size}
"""Least bytes of a payload, so that no read runs into the next attribute."""

_LAYOUTS = 256
"""Layouts of link messages that are remembered; a host has a few dozen."""

Buffer = bytes | bytearray


class Counters(NamedTuple):
    """The first fields of `struct rtnl_link_stats64`, in its order."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_dropped: int
    tx_dropped: int


class Link(NamedTuple):
    """One network device of this namespace."""

    ifindex: int
    name: str
    kind: str
    """`IFLA_INFO_KIND`: veth, netkit, bridge, …; empty for hardware."""
    peer: int
    """Interface index of the peer or the lower device, in the namespace `nsid`; 0 where there is none."""
    nsid: int | None
    """Id, in this namespace, of the namespace that `peer` is in; None: this one; -1: the kernel has no id for it."""
    master: int
    """Index of the bridge (or other master); 0 where there is none."""
    loopback: bool
    counters: Counters | None
    moved: bool = False
    """The message says that the device goes to another namespace."""


class Message(NamedTuple):
    """A netlink message inside a buffer; `start` is its header, `end` the byte behind it."""

    type: int
    flags: int
    sequence: int
    start: int
    end: int


class News(NamedTuple):
    """What the kernel told: a device appeared or changed (`link`, not gone), left (`gone`), or an id was freed."""

    link: Link | None
    gone: bool
    nsid: int | None = None


def messages(buffer: Buffer, size: int) -> Iterator[Message]:
    """Walk over the messages in `buffer[:size]`. Raises ValueError, with the offset, where a length is impossible."""
    offset = 0
    while offset < size:
        if size - offset < _HEADER.size:
            raise ValueError(f"netlink: {size - offset} bytes at offset {offset} are no message header")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(buffer, offset)
        if length < _HEADER.size or length > size - offset:
            raise ValueError(f"netlink: message at offset {offset} claims {length} of {size - offset} bytes")
        yield Message(kind, flags, sequence, offset, offset + length)
        offset += (length + 3) & ~3


class _Layout(NamedTuple):
    """Where the attributes of a link message lie: all their headers, to be compared, and the wanted payloads."""

    headers: struct.Struct
    expected: tuple[int, ...]
    wanted: dict[int, tuple[int, int]]
    """Start and end of a payload, from the message's start, by attribute type."""


class LinkReader:
    """Reads RTM_NEWLINK and RTM_DELLINK.

    Messages of one kind of device are laid out alike. So the attributes are walked over once for each layout; a message
    whose headers are all the same as those of a known layout is read in a few steps.
    """

    def __init__(self) -> None:
        """Begin without any layout."""
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def __call__(self, buffer: Buffer, start: int, end: int) -> Link:
        """Read `buffer[start:end]`. Raises ValueError, with the offset, for a message that is cut short or garbled."""
        if end - start < _ATTRIBUTES_START + _U32.size:
            raise ValueError(f"netlink: link message at offset {start} is cut short")
        _, _, ifindex, flags, _ = _LINK_HEADER.unpack_from(buffer, start + _HEADER.size)
        found = self._find(buffer, start, end)
        place = found.get(_IFLA_LINK_NETNSID)
        nsid = _S32.unpack_from(buffer, start + place[0])[0] if place else None
        place = found.get(_IFLA_LINK)
        peer = _U32.unpack_from(buffer, start + place[0])[0] if place else 0
        place = found.get(_IFLA_MASTER)
        master = _U32.unpack_from(buffer, start + place[0])[0] if place else 0
        place = found.get(_IFLA_STATS64)
        counters = Counters._make(_STATS64.unpack_from(buffer, start + place[0])) if place else None
        place = found.get(_IFLA_IFNAME)
        name = _text(buffer, start + place[0], start + place[1]) if place else ""
        place = found.get(_IFLA_LINKINFO)
        kind = _info_kind(buffer, start + place[0], start + place[1]) if place else ""
        if nsid is not None and peer == 0:
            peer = ifindex  # kernels before 5.16 leave IFLA_LINK out where both indexes are equal
        moved = _IFLA_NEW_NETNSID in found or _IFLA_NEW_IFINDEX in found
        return Link(ifindex, name, kind, peer, nsid, master, bool(flags & _IFF_LOOPBACK), counters, moved)

    def _find(self, buffer: Buffer, start: int, end: int) -> dict[int, tuple[int, int]]:
        """Places of the wanted attributes, from the message's start."""
        first = start + _ATTRIBUTES_START
        key = (end - start, _U32.unpack_from(buffer, first)[0])
        layout = self._layouts.get(key)
        if layout is None or layout.headers.unpack_from(buffer, first) != layout.expected:
            layout = _layout(buffer, start, end)
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = layout
        return layout.wanted


def _layout(buffer: Buffer, start: int, end: int) -> _Layout:
    """Walk over the attributes of a link message. That no read runs out of its attribute is checked here."""
    form, wanted = ["="], {}
    begin = start + _ATTRIBUTES_START
    behind = begin
    for kind, payload, stop in _attributes(buffer, begin, end):
        form.append(f"{payload - _ATTRIBUTE.size - behind}xI")
        behind = payload
        if kind in _WANTED:
            if stop - payload < _LEAST.get(kind, 0):
                raise ValueError(f"netlink: attribute {kind} at offset {payload - 4} has only {stop - payload} bytes")
            wanted[kind] = (payload - start, stop - start)
    headers = struct.Struct("".join(form))
    return _Layout(headers, headers.unpack_from(buffer, begin), wanted)


def _attributes(buffer: Buffer, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of the payload of each attribute. Raises ValueError where a length is impossible."""
    while offset < end:
        if end - offset < _ATTRIBUTE.size:
            raise ValueError(f"netlink: {end - offset} bytes at offset {offset} are no attribute header")
        length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
        if length < _ATTRIBUTE.size or length > end - offset:
            raise ValueError(f"netlink: attribute at offset {offset} claims {length} of {end - offset} bytes")
        yield kind & _ATTRIBUTE_TYPE, offset + _ATTRIBUTE.size, offset + length
        offset += (length + 3) & ~3


def _info_kind(buffer: Buffer, start: int, end: int) -> str:
    """IFLA_INFO_KIND inside IFLA_LINKINFO."""
    for kind, payload, stop in _attributes(buffer, start, end):
        if kind == _IFLA_INFO_KIND:
            return _text(buffer, payload, stop)
    return ""


def _text(buffer: Buffer, start: int, end: int) -> str:
    """A string attribute without its closing NUL. A device's name may be any bytes; odd ones are shown escaped."""
    return bytes(buffer[start:end]).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def read_nsid(buffer: Buffer, start: int, end: int) -> int:
    """NETNSA_NSID of an RTM_{NEW,DEL}NSID message; -1 where it has none. Raises ValueError for a bad message."""
    for kind, payload, stop in _attributes(buffer, start + _HEADER.size + _FAMILY, end):
        if kind == _NETNSA_NSID and stop - payload >= _S32.size:
            return int(_S32.unpack_from(buffer, payload)[0])
    return -1


def read_news(reader: LinkReader, buffer: Buffer, message: Message) -> News | None:
    """Read one message of the multicast groups; None for one that says nothing to us. Raises ValueError."""
    start, end = message.start, message.end
    if message.type in (RTM_NEWLINK, RTM_DELLINK):
        if end - start > _HEADER.size and buffer[start + _HEADER.size] != socket.AF_UNSPEC:
            return None  # AF_BRIDGE: a port joined or left a bridge, the device itself stays
        return News(reader(buffer, start, end), message.type == RTM_DELLINK)
    if message.type in (RTM_NEWNSID, RTM_DELNSID):
        return News(None, message.type == RTM_DELNSID, read_nsid(buffer, start, end))
    return None


def raise_error(buffer: Buffer, message: Message, what: str) -> None:
    """Raise the OSError that an NLMSG_ERROR or NLMSG_DONE message carries, if it carries one."""
    if message.end - message.start < _HEADER.size + _S32.size:
        return
    number = -_S32.unpack_from(buffer, message.start + _HEADER.size)[0]
    if number > 0:
        raise OSError(number, f"netlink {what}: {os.strerror(number)}")


def link_request(sequence: int) -> bytes:
    """Ask for all links (a dump), without VF details."""
    return _request(RTM_GETLINK, _NLM_F_DUMP, sequence, _LINK_HEADER.pack(socket.AF_UNSPEC, 0, 0, 0, 0))


def nsid_request(sequence: int, attribute: int, value: int) -> bytes:
    """Ask for the id of a namespace, named by `NETNSA_PID` or `NETNSA_FD`."""
    body = bytes(_FAMILY) + _ATTRIBUTE.pack(_ATTRIBUTE.size + _U32.size, attribute) + _U32.pack(value)
    return _request(RTM_GETNSID, 0, sequence, body)


def _request(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, sequence, 0) + body
