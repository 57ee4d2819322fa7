"""Sockets to rtnetlink: requests for links and namespace ids, and the kernel's news about both.

Bytes of `AF_NETLINK` sockets flow in, `Link` and `News` records flow out. Needs no capability. Protocol: netlink(7).
"""

import errno
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from exporter.host import netlink_messages as wire
from exporter.host.netlink_messages import Link, LinkReader, Message, News

_SOL_NETLINK = 270
_ADD_MEMBERSHIP = 1
_EXT_ACK = 11
_GET_STRICT_CHK = 12
_SO_RCVBUFFORCE = 33
_GROUP_LINK = 1
_GROUP_NSID = 28

_BUFFER_BYTES = 1 << 17
"""More than any datagram of a dump: the kernel fills at most 32 KiB (net/netlink/af_netlink.c, netlink_dump)."""
_EVENT_BUFFER_BYTES = 8 << 20
_DUMP_TRIES = 3
_ANSWER_SECONDS = 10.0
"""For a whole answer, however many datagrams it has."""


class Dump(NamedTuple):
    """The links of a dump, and what was wrong with it."""

    links: list[Link]
    malformed: list[str]
    """One text for each message that could not be read."""
    interrupted: bool
    """True where the device list changed during every try: a device may be missing or there twice."""


class Route:
    """Requests to rtnetlink, one at a time, for the network namespace of the thread that makes it."""

    def __init__(self, timeout: float = 2.0) -> None:
        """Open the socket; `timeout` seconds bound each wait. Raises OSError where the machine refuses it."""
        self._socket = _open(timeout)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._reader = LinkReader()
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def links(self) -> Dump:
        """Every device with its 64-bit counters. Raises OSError, TimeoutError among them.

        A dump that the kernel marks as inconsistent (NLM_F_DUMP_INTR) is made again, three times in all.
        """
        for _ in range(_DUMP_TRIES):
            dump = self._dump()
            if not dump.interrupted:
                break
        return dump

    def nsid_of_pid(self, pid: int) -> int:
        """Id of the network namespace of process `pid`, -1 where it has none. Raises OSError (ESRCH: gone)."""
        return self._nsid(wire.NETNSA_PID, pid)

    def nsid_of_fd(self, descriptor: int) -> int:
        """Id of the network namespace behind an open nsfs file, -1 where it has none. Raises OSError."""
        return self._nsid(wire.NETNSA_FD, descriptor)

    def _ask(self, request: bytes) -> Iterator[Message]:
        """Send a request and give the messages that answer it. Raises TimeoutError where the answer has no end."""
        self._socket.sendto(request, (0, 0))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            yield from self._receive()
        raise TimeoutError(errno.ETIMEDOUT, f"netlink: an answer did not end within {_ANSWER_SECONDS:.0f} s")

    def _receive(self) -> Iterator[Message]:
        """Take one datagram: the messages in it that answer the last request."""
        try:
            size, _, flags, sender = self._socket.recvmsg_into([self._buffer])
        except BlockingIOError as error:
            raise TimeoutError(errno.ETIMEDOUT, "netlink: the kernel did not answer in time") from error
        if sender[0] != 0:
            return  # another process: only the kernel has port 0
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EMSGSIZE, f"netlink: a datagram does not fit into {_BUFFER_BYTES} bytes")
        try:
            for message in wire.messages(self._buffer, size):
                if message.sequence == self._sequence:
                    yield message
        except ValueError as error:
            raise OSError(errno.EBADMSG, str(error)) from error

    def _next(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def _dump(self) -> Dump:
        dump = Dump([], [], interrupted=False)
        for message in self._ask(wire.link_request(self._next())):
            if message.flags & wire.NLM_F_DUMP_INTR:
                dump = dump._replace(interrupted=True)
            if message.type == wire.RTM_NEWLINK:
                try:
                    dump.links.append(self._reader(self._buffer, message.start, message.end))
                except ValueError as error:
                    dump.malformed.append(str(error))
            elif message.type in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
                wire.raise_error(self._buffer, message, "RTM_GETLINK")
                break
        return dump

    def _nsid(self, attribute: int, value: int) -> int:
        for message in self._ask(wire.nsid_request(self._next(), attribute, value)):
            if message.type == wire.RTM_NEWNSID:
                return wire.read_nsid(self._buffer, message.start, message.end)
            if message.type == wire.NLMSG_ERROR:
                wire.raise_error(self._buffer, message, "RTM_GETNSID")
        return -1


class Subscription:
    """The groups RTNLGRP_LINK and RTNLGRP_NSID: what happens to devices and namespace ids of this namespace."""

    def __init__(self) -> None:
        """Join both groups. Raises OSError where the machine refuses it."""
        self._socket = _open(None)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._reader = LinkReader()
        try:
            _enlarge(self._socket)
            for group in (_GROUP_LINK, _GROUP_NSID):
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    def close(self) -> None:
        """Leave the groups."""
        self._socket.close()

    def receive(self) -> list[News | ValueError] | None:
        """What one datagram says, unreadable messages as errors; None where nothing waits.

        Raises OSError with ENOBUFS where the kernel had to throw messages away: compare with a dump then.
        """
        try:
            size, _, flags, sender = self._socket.recvmsg_into([self._buffer])
        except BlockingIOError:
            return None
        if sender[0] != 0:
            return []
        news: list[News | ValueError] = []
        if flags & socket.MSG_TRUNC:
            return [ValueError(f"netlink: a message does not fit into {_BUFFER_BYTES} bytes")]
        try:
            for message in wire.messages(self._buffer, size):
                item = wire.read_news(self._reader, self._buffer, message)
                if item is not None:
                    news.append(item)
        except ValueError as error:
            news.append(error)
        return news


def _open(timeout: float | None) -> socket.socket:
    """Open a bound NETLINK_ROUTE socket: blocking with a bound on each wait, or (None) non-blocking."""
    blocking = socket.SOCK_NONBLOCK if timeout is None else 0
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | blocking
    endpoint = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        for option in (_EXT_ACK, _GET_STRICT_CHK):  # since Linux 4.12 and 4.20; without them requests work as well
            with suppress(OSError):
                endpoint.setsockopt(_SOL_NETLINK, option, 1)
        if timeout is not None:  # in the kernel, not settimeout(): that costs a poll() in front of each receive
            seconds = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        endpoint.bind((0, 0))
    except OSError:
        endpoint.close()
        raise
    return endpoint


def _enlarge(endpoint: socket.socket) -> None:
    """Ask for a big receive buffer; without CAP_NET_ADMIN the kernel gives up to net.core.rmem_max."""
    try:
        endpoint.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
    except OSError:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _EVENT_BUFFER_BYTES)
