"""The self-proof: what programs read of this very process, compared with what user space knows of it.

Flows in: the kernel's types and the slots that proof.c filled. Flows out: members of structs that are not to be
trusted, with the reason. A wrong offset gives numbers that look right; so each is checked twice: against BTF, and by
value where a value is known.
"""

import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from exporter.host.btf import Btf

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # include/linux/proc_ns.h
_LENGTH = 23
_LOOPBACK = "127.0.0.1"


class Specimen:
    """This process and a connected pair of UDP sockets on the loopback device, one datagram waiting in the second."""

    def __init__(self) -> None:
        """Open the sockets. Raises OSError (the loopback device is down)."""
        with ExitStack() as stack:
            self.sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self.receiver = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self.sender.bind((_LOOPBACK, 0))
            self.receiver.bind((_LOOPBACK, 0))
            self.receiver.connect(self.sender.getsockname())
            self.sender.connect(self.receiver.getsockname())
            self.sender.send(b"x" * _LENGTH)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the datagram, which would count as dropped otherwise, and close the sockets."""
        self.receiver.setblocking(False)  # noqa: FBT003 - the socket's own interface
        with suppress(OSError):
            self.receiver.recv(_LENGTH)
        self._stack.close()


@dataclass(frozen=True, slots=True)
class Fact:
    """A value that is known twice."""

    name: str
    slot: int
    """In enum slot of proof.c."""
    members: tuple[str, ...]
    """What is wrong if the values differ; the namespace's own identity is behind all that starts from it."""
    expected: Callable[[Specimen, tuple[int, ...]], int | None]
    """None: user space cannot tell here."""


def _cookie(specimen: Specimen, _: tuple[int, ...]) -> int | None:
    try:
        return int(struct.unpack("=Q", specimen.receiver.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])
    except OSError:
        return None


def _inode(_: Specimen, __: tuple[int, ...]) -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def _environment(_: Specimen, __: tuple[int, ...]) -> int | None:
    """Field 50 of /proc/PID/stat, proc(5); 0 where the kernel hides it."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[47]) or None


def _name(text: str) -> int:
    return int.from_bytes(text.encode().ljust(8, b"\0")[:8], "little")


_NETNS = ("task_struct.nsproxy", "nsproxy.net_ns")
_SOCKET = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk")
_CGROUP = ("task_struct.cgroups", "css_set.dfl_cgrp", "cgroup.kn", "kernfs_node.id")
_PACKET = ("sock.sk_receive_queue.next", "sk_buff.head")
_COMMON = "sock.__sk_common."

FACTS = (
    Fact("tgid", 1, ("task_struct.tgid",), lambda _, slots: slots[0]),
    Fact("env_start", 2, ("task_struct.mm", "mm_struct.env_start"), _environment),
    Fact("netns cookie", 3, (*_NETNS, "net.net_cookie"), _cookie),
    Fact("netns inode", 4, (*_NETNS, "net.ns.inum", "net.ns.ops"), _inode),
    Fact(
        "inode of /proc/self/net/stat",
        5,
        ("net.proc_net_stat", "proc_dir_entry.low_ino"),
        lambda *_: Path("/proc/self/net/stat").stat().st_ino,
    ),
    Fact("index of lo", 6, ("net.loopback_dev", "net_device.ifindex"), lambda *_: socket.if_nametoindex("lo")),
    Fact("name of lo", 7, ("net.loopback_dev", "net_device.name"), lambda *_: _name("lo")),
    Fact("netns of lo", 8, ("net_device.nd_net.net",), lambda *_: 1),
    Fact("socket's family", 9, (*_SOCKET, f"{_COMMON}skc_family"), lambda *_: socket.AF_INET),
    Fact("socket's port", 10, (f"{_COMMON}skc_num",), lambda s, _: int(s.receiver.getsockname()[1])),
    Fact("socket's peer's port", 11, (f"{_COMMON}skc_dport",), lambda s, _: int(s.sender.getsockname()[1])),
    Fact("socket's protocol", 12, ("sock.sk_protocol",), lambda *_: socket.IPPROTO_UDP),
    Fact("socket's netns", 13, (f"{_COMMON}skc_net.net",), lambda *_: 1),
    Fact(
        "socket's address",
        14,
        (f"{_COMMON}skc_daddr",),
        lambda *_: int.from_bytes(socket.inet_aton(_LOOPBACK), "little"),
    ),
    Fact("packet's length", 15, ("sk_buff.len",), lambda *_: _LENGTH + 8),
    Fact(
        "packet's port",
        16,
        (*_PACKET, "sk_buff.transport_header"),
        lambda s, _: int(s.receiver.getsockname()[1]),
    ),
    Fact(
        "packet's address",
        17,
        (*_PACKET, "sk_buff.network_header"),
        lambda *_: int.from_bytes(socket.inet_aton(_LOOPBACK), "little"),
    ),
    Fact(
        "parent's tgid",
        18,
        ("task_struct.real_parent",),
        lambda *_: os.getppid() if _own_pid_is_global() else None,
    ),
    Fact("group leader", 19, ("task_struct.group_leader", "task_struct.pid"), lambda _, slots: slots[0]),
    Fact("cgroup", 21, _CGROUP, lambda _, slots: slots[20]),
)


def _own_pid_is_global() -> bool:
    """Whether PIDs here are the kernel's own: its first PID namespace has a fixed inode."""
    return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE


def wrong_values(slots: tuple[int, ...], specimen: Specimen, read: Iterable[str]) -> dict[str, str]:
    """Compare the slots of proof.c with what is known: the members that are wrong, each with the reason.

    `read` are the members that the programs read at all: a fact about others is not asked.
    """
    wrong: dict[str, str] = {}
    asked = set(read)
    for fact in FACTS:
        if not asked.intersection(fact.members):
            continue
        expected = fact.expected(specimen, slots)
        if expected is not None and slots[fact.slot] != expected:
            reason = f"{fact.name} is {expected}, a program reads {slots[fact.slot]}"
            wrong |= dict.fromkeys(fact.members, reason)
    return wrong


def offsets_source(members: Iterable[str]) -> str:
    """Write the C function that says at which offsets the members were compiled, in this order."""
    lines = []
    for index, path in enumerate(members):
        name, _, member = path.partition(".")
        lines.append(f"        into[{index}] = __builtin_offsetof(struct {name}, {member});")
    return (
        "\nint proof_offsets(struct bpf_raw_tracepoint_args *ctx) {\n    u32 zero = 0;\n"
        "    u64 *into = map_lookup(MAP(offsets), &zero);\n    if (into) {\n"
        + "\n".join(lines)
        + "\n    }\n    return 0;\n}\n"
    )


def wrong_offsets(compiled: Mapping[str, int], types: Btf) -> dict[str, str]:
    """Compare compiled offsets with the kernel's own: the members that are wrong, each with the reason."""
    wrong = {}
    for path, offset in compiled.items():
        real = types.offset(path)
        if real is not None and real != offset:
            wrong[path] = f"{path} is at byte {real}, a program was compiled for {offset}"
    return wrong
