"""Readers of the parts of procfs that tell about processes, network namespaces and their protocols.

Paths and the bytes of pseudo files flow in, plain numbers and small records flow out. What is read may vanish at any
time: then OSError (ENOENT, ESRCH, EINVAL) comes out. Formats: proc(5), and the kernel files named at each function.
"""

import fcntl
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from exporter.host.netlink_messages import Counters

_CHUNK = 1 << 15
_READ_LIMIT = 1 << 25
_TCP_LINES = 200_000
_NS_GET_ID = 0x8008B70D
"""`_IOR(0xb7, 13, __u64)` of include/uapi/linux/nsfs.h, Linux 6.18: the number that SO_NETNS_COOKIE gives too."""

TCP_STATES = {
    1: "established",
    2: "syn_sent",
    3: "syn_recv",
    4: "fin_wait1",
    5: "fin_wait2",
    6: "time_wait",
    7: "close",
    8: "close_wait",
    9: "last_ack",
    10: "listen",
    11: "closing",
    12: "new_syn_recv",
    13: "bound_inactive",
}
"""Numbers of include/net/tcp_states.h."""

_TCP_LINE = re.compile(rb"^ *\d+: [0-9A-F]+:[0-9A-F]{4} [0-9A-F]+:[0-9A-F]{4} ([0-9A-F]{2}) ", re.MULTILINE)
_NSFS_MOUNT = re.compile(rb"^\S+ \S+ \S+ net:\[(\d{1,20})\] (/\S*) ", re.MULTILINE)
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """A bind mount that keeps a network namespace alive."""

    inode: int
    path: bytes


def read(path: str) -> bytes:
    """The whole of a pseudo file, at most 32 MiB. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(_chunks(descriptor))
    finally:
        os.close(descriptor)


def _chunks(descriptor: int) -> Iterator[bytes]:
    size = 0
    while size < _READ_LIMIT and (chunk := os.read(descriptor, _CHUNK)):
        size += len(chunk)
        yield chunk


def processes(root: str) -> list[tuple[int, int]]:
    """(pid, inode of /proc/PID) of every process. An inode differs as soon as the pid is another process's."""
    with os.scandir(root) as entries:
        return [(int(entry.name), entry.inode()) for entry in entries if entry.name.isdecimal()]


def network(root: str, pid: int | str) -> int:
    """A number for the network namespace of a process: the inode of its net/stat. Raises OSError.

    Each namespace has files of its own under /proc/PID/net (fs/proc/proc_net.c), so their inodes tell living
    namespaces apart. Unlike /proc/PID/ns/net this needs no right to trace the process. net/stat is the one that struct
    net points to (`proc_net_stat`), so that the kernel side can name a namespace by the same number.
    """
    return os.stat(f"{root}/{pid}/net/stat").st_ino  # noqa: PTH116 - called per process; Path costs more than the call


def namespace_identity(descriptor: int) -> tuple[int, int]:
    """(inode, cookie) of an open nsfs file; the cookie is 0 before Linux 6.18. Raises OSError."""
    inode = os.fstat(descriptor).st_ino
    answer = bytearray(8)
    try:
        fcntl.ioctl(descriptor, _NS_GET_ID, answer)
    except OSError:
        return inode, 0
    return inode, int(struct.unpack("=Q", answer)[0])


def start_time(content: bytes) -> int:
    """Field 22 of /proc/PID/stat: start after boot in clock ticks. Raises ValueError."""
    fields = content[content.rfind(b")") + 1 :].split(None, 20)
    if len(fields) < 20:  # noqa: PLR2004 - field 22 is the 20th behind the command's name
        raise ValueError(f"/proc/PID/stat: {len(fields)} fields behind the command's name, at least 20 are needed")
    return int(fields[19])


def interfaces(content: bytes) -> dict[str, Counters]:
    """Counters by interface from /proc/PID/net/dev (net/core/net-procfs.c). Raises ValueError with the line."""
    found = {}
    for line in content.splitlines()[2:]:
        name, colon, rest = line.partition(b":")
        values = rest.split()
        if not colon or len(values) < 16:  # noqa: PLR2004 - the columns of the format
            raise ValueError(f"/proc/PID/net/dev: cannot read {line[:100]!r}")
        rx, tx = [int(value) for value in values[:4]], [int(value) for value in values[8:12]]
        counters = Counters(rx[1], tx[1], rx[0], tx[0], rx[2], tx[2], rx[3], tx[3])
        found[name.strip().decode("utf-8", "backslashreplace")] = counters
    return found


def interface_indexes(root: str, pid: int) -> dict[int, str]:
    """Names by interface index, as far as protocol files give both. Raises nothing: what is missing is unknown.

    Files: net/igmp (net/ipv4/igmp.c), net/dev_mcast (net/core/net-procfs.c), net/if_inet6 (net/ipv6/addrconf.c).
    """
    found: dict[int, str] = {}
    for file, columns, base in (("igmp", (0, 1), 10), ("dev_mcast", (0, 1), 10), ("if_inet6", (1, 5), 16)):
        try:
            content = read(f"{root}/{pid}/net/{file}")
        except OSError:
            continue
        for line in content.splitlines():
            fields = line.split()
            if len(fields) > columns[1] and not line.startswith((b"\t", b"Idx")):
                try:
                    found[int(fields[columns[0]], base)] = fields[columns[1]].decode("utf-8", "backslashreplace")
                except ValueError:
                    continue
    return found


class Columns:
    """Reads chosen columns of net/snmp or net/netstat: pairs of lines, names and values (net/ipv4/proc.c)."""

    def __init__(self, wanted: Sequence[tuple[bytes, bytes]]) -> None:
        """Choose (protocol, column) pairs, such as (b"Tcp", b"RetransSegs")."""
        self._wanted = tuple(wanted)
        self._protocols = {protocol for protocol, _ in wanted}
        self._places: dict[bytes, dict[bytes, int]] = {}

    def __call__(self, content: bytes) -> list[int | None]:
        """Values in the order of the choice; None for a column this kernel does not have. Raises ValueError."""
        found: dict[tuple[bytes, bytes], int] = {}
        lines = content.split(b"\n")
        for names, values in zip(lines[::2], lines[1::2], strict=False):
            protocol = names.partition(b":")[0]
            if protocol not in self._protocols:
                continue
            places, row = self._header(names), values.split()
            if not values.startswith(protocol + b":"):
                raise ValueError(f"net/snmp, net/netstat: no values behind the names of {protocol[:32]!r}")
            for wanted in self._wanted:
                place = places.get(wanted[1], len(row))
                if wanted[0] == protocol and place < len(row):
                    found[wanted] = int(row[place])
        return [found.get(wanted) for wanted in self._wanted]

    def _header(self, names: bytes) -> dict[bytes, int]:
        """Column numbers by name; the same few header lines come from every namespace, so they are kept."""
        places = self._places.get(names)
        if places is None:
            if len(self._places) >= 16:  # noqa: PLR2004 - kernels have two headers here; more is odd input
                self._places.clear()
            places = self._places[names] = {name: place for place, name in enumerate(names.split())}
        return places


def line_value(content: bytes, name: bytes) -> int:
    """A value of net/snmp6 (net/ipv6/proc.c): lines of name and number; 0 where the name is missing."""
    found = re.search(rb"^" + re.escape(name) + rb"[ \t]+(\d{1,20})", content, re.MULTILINE)
    return int(found[1]) if found else 0


def sockets(content: bytes) -> tuple[int, int, int]:
    """(TCP in use, TCP in TIME_WAIT, UDP in use) of one namespace, from net/sockstat or net/sockstat6.

    Other columns of these files (alloc, orphan, mem) are the whole machine's (net/ipv4/proc.c). Raises ValueError.
    """
    values: dict[bytes, dict[bytes, bytes]] = {b"TCP": {}, b"UDP": {}}
    for line in content.splitlines():
        name = line.partition(b":")[0].rstrip(b"6")
        if name in values:
            fields = line.split()
            values[name] = dict(zip(fields[1::2], fields[2::2], strict=False))
    tcp, udp = values[b"TCP"], values[b"UDP"]
    return int(tcp.get(b"inuse", 0)), int(tcp.get(b"tw", 0)), int(udp.get(b"inuse", 0))


def count_tcp_states(path: str, counts: Counter[str], expired: Callable[[], bool]) -> bool:
    """Add the sockets of net/tcp or net/tcp6 to `counts` by state (net/ipv4/tcp_ipv4.c). Raises OSError.

    False where it stopped early: `expired()` came true, or the table has more than 200,000 lines.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    lines, rest = 0, b""
    try:
        while chunk := os.read(descriptor, _CHUNK):
            complete, newline, rest = (rest + chunk).rpartition(b"\n")
            found = _TCP_LINE.findall(complete + newline)
            for state, count in Counter(found).items():
                counts[TCP_STATES.get(int(state, 16), "unknown")] += count
            lines += len(found)
            if lines > _TCP_LINES or len(rest) > _CHUNK or expired():
                return False
    finally:
        os.close(descriptor)
    return True


def namespace_mounts(content: bytes) -> list[Mount]:
    """Bind-mounted network namespaces in /proc/PID/mountinfo (fs/proc_namespace.c), each namespace once."""
    found: dict[int, Mount] = {}
    for inode, path in _NSFS_MOUNT.findall(content):
        plain = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), path)
        found.setdefault(int(inode), Mount(int(inode), plain))
    return list(found.values())
