"""What the rtnetlink reader makes of good, cut, hostile and missing messages."""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.host import netlink
from exporter.host import netlink_messages as wire
from exporter.host.netlink_messages import Counters, Link, LinkReader, Message

STATS = tuple(range(2**40, 2**40 + 25))


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def message(kind: int, body: bytes, flags: int = 0, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def link_body(ifindex: int = 7, name: bytes = b"veth0", *extra: bytes, family: int = 0, flags: int = 1) -> bytes:
    head = struct.pack("=BxHiII", family, 1, ifindex, flags, 0)
    return head + attribute(3, name + b"\0") + attribute(23, struct.pack("=25Q", *STATS)) + b"".join(extra)


def veth(ifindex: int = 7, name: bytes = b"veth0", nsid: int = 3) -> bytes:
    kind = attribute(18, attribute(1, b"veth\0"))
    return link_body(ifindex, name, attribute(5, struct.pack("=I", 9)), kind, attribute(37, struct.pack("=i", nsid)))


def read(data: bytes, reader: LinkReader | None = None) -> Link:
    return (reader or LinkReader())(data, 0, len(data))


def test_reads_every_field_of_a_veth() -> None:
    """Name, kind, peer, namespace id, master and the 64-bit counters come out as the kernel wrote them."""
    body = link_body(
        7,
        b"veth0",
        attribute(5, struct.pack("=I", 9)),
        attribute(10, struct.pack("=I", 4)),
        attribute(18 | 0x8000, attribute(1, b"veth\0")),
        attribute(37, struct.pack("=i", 3)),
    )
    assert read(message(16, body)) == Link(7, "veth0", "veth", 9, 3, 4, False, Counters(*STATS[:8]))  # noqa: FBT003 - a record


def test_old_kernels_leave_equal_peer_index_out() -> None:
    """A device with a namespace id but without IFLA_LINK has a peer of its own index."""
    link = read(message(16, link_body(7, b"v", attribute(37, struct.pack("=i", 0)))))
    assert (link.peer, link.nsid) == (7, 0)


def test_known_layout_gives_the_same_as_a_fresh_reader() -> None:
    """Messages of equal length and different inner layout are never read by the wrong one."""
    bodies = [
        veth(1, b"aaaa", 1),
        veth(2, b"bbbb", 2),
        link_body(3, b"cccc", attribute(5, b"\1\0\0\0"), attribute(60, bytes(8)), attribute(10, b"\2\0\0\0")),
        link_body(3, b"cccc", attribute(5, b"\1\0\0\0"), attribute(10, b"\2\0\0\0"), attribute(60, bytes(8))),
        veth(4, b"dddd", 9),
    ]
    shared = LinkReader()
    for body in bodies * 2:
        data = message(16, body)
        assert read(data, shared) == read(data)


@pytest.mark.parametrize("cut", [1, 15, 16, 31, 32, 35, 40, 60, 200])
def test_cut_message_is_a_value_error(cut: int) -> None:
    """A message that ends in the middle of a header or an attribute is refused with its offset."""
    data = message(16, veth())[:cut]
    with pytest.raises(ValueError, match="offset"):
        list(wire.messages(data, len(data)))
    if cut not in (16 + 16 + 12,):
        with pytest.raises(ValueError, match="netlink"):
            LinkReader()(data, 0, len(data))


def test_short_counters_are_a_value_error() -> None:
    """Counters that would be read out of the next attribute are refused."""
    body = struct.pack("=BxHiII", 0, 1, 7, 0, 0) + attribute(23, bytes(32)) + attribute(3, b"x" * 64)
    with pytest.raises(ValueError, match="attribute 23"):
        read(message(16, body))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """No bytes make the walk, the link reader, the id reader or the news reader do worse than ValueError."""
    checks: list[Callable[[], object]] = [
        lambda: list(wire.messages(data, len(data))),
        lambda: LinkReader()(data, 0, len(data)),
        lambda: wire.read_nsid(data, 0, len(data)),
        *(
            lambda kind=kind: wire.read_news(LinkReader(), data, Message(kind, 0, 0, 0, len(data)))
            for kind in (16, 17, 88, 89)
        ),
    ]
    for check in checks:
        try:
            check()
        except ValueError as error:
            assert "offset" in str(error)  # noqa: PT017 - ValueError is one of two good ends


@settings(max_examples=300)
@given(st.data())
def test_garbled_real_message_is_read_or_refused(data: st.DataObject) -> None:
    """A good message with a few bytes overwritten never crashes a reader that has seen the good one."""
    good = bytearray(message(16, veth()))
    reader = LinkReader()
    read(bytes(good), reader)
    for place in data.draw(st.lists(st.integers(16, len(good) - 1), max_size=4)):
        good[place] = data.draw(st.integers(0, 255))
    try:
        garbled = read(bytes(good), reader)
    except ValueError:
        return
    assert garbled == read(bytes(good))


def test_bridge_news_are_not_about_the_device() -> None:
    """RTM_DELLINK of AF_BRIDGE means that a port left its bridge: no deletion."""
    data = message(17, link_body(family=socket.AF_BRIDGE))
    assert wire.read_news(LinkReader(), data, Message(17, 0, 0, 0, len(data))) is None


def test_move_is_told_from_deletion() -> None:
    """RTM_DELLINK with IFLA_NEW_NETNSID is a move, without it a deletion."""
    for extra, moved in ((b"", False), (attribute(45, b"\1\0\0\0"), True), (attribute(49, b"\1\0\0\0"), True)):
        data = message(17, veth() + extra)
        news = wire.read_news(LinkReader(), data, Message(17, 0, 0, 0, len(data)))
        assert news is not None
        assert news.gone
        assert news.link is not None
        assert news.link.moved is moved


class FakeSocket:
    """Plays datagrams; then behaves like a socket whose wait timed out."""

    def __init__(self, datagrams: Iterable[tuple[bytes, int, int] | OSError]) -> None:
        self.datagrams = iter(datagrams)
        self.sent: list[bytes] = []

    def sendto(self, data: bytes, _: tuple[int, int]) -> None:
        self.sent.append(data)

    def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[object], int, tuple[int, int]]:
        item = next(self.datagrams, BlockingIOError(errno.EAGAIN, "nothing"))
        if isinstance(item, OSError):
            raise item
        data, flags, sender = item
        buffers[0][: len(data)] = data
        return len(data), [], flags, (sender, 0)

    def setsockopt(self, *_: object) -> None: ...

    def close(self) -> None: ...


def route(
    monkeypatch: pytest.MonkeyPatch, *datagrams: tuple[bytes, int, int] | OSError
) -> tuple[netlink.Route, FakeSocket]:
    fake = FakeSocket(datagrams)
    monkeypatch.setattr(netlink, "_open", lambda _: fake)
    return netlink.Route(), fake


def done(sequence: int, flags: int = 0, error: int = 0) -> bytes:
    return message(3, struct.pack("=i", error), flags, sequence)


def test_silent_kernel_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request without an answer ends in TimeoutError, not in a hang."""
    with pytest.raises(TimeoutError):
        route(monkeypatch)[0].links()


def test_endless_answer_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that never says it is over ends after its time."""
    now = iter(range(0, 10_000, 3))
    monkeypatch.setattr(netlink.time, "monotonic", lambda: next(now))
    endless = [(message(16, veth()), 0, 0)] * 1000
    with pytest.raises(TimeoutError):
        route(monkeypatch, *endless)[0].links()


def test_interrupted_dump_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLM_F_DUMP_INTR leads to a second dump, whose result counts."""
    first = message(16, veth(1), 0x10, 1) + done(1)
    second = message(16, veth(2), 0, 2) + done(2)
    source, fake = route(monkeypatch, (first, 0, 0), (second, 0, 0))
    dump = source.links()
    assert [link.ifindex for link in dump.links] == [2]
    assert not dump.interrupted
    assert len(fake.sent) == 2


def test_always_interrupted_dump_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that changes all the time is taken as it is after three tries, and says so."""
    source, fake = route(monkeypatch, *((done(number, 0x10), 0, 0) for number in range(1, 9)))
    assert source.links().interrupted
    assert len(fake.sent) == 3


def test_one_bad_message_does_not_spoil_the_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    """A garbled link among good ones is reported; the others are there."""
    bad = message(16, link_body()[:20] + b"\xff\xff\0\0")
    data = message(16, veth(1)) + bad + message(16, veth(2)) + done(1)
    dump = route(monkeypatch, (data, 0, 0))[0].links()
    assert [link.ifindex for link in dump.links] == [1, 2]
    assert len(dump.malformed) == 1


def test_other_senders_and_old_answers_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernel (port 0) is heard, and only about the last request."""
    forged = message(16, veth(66)) + done(1)
    stale = message(16, veth(77), sequence=0)
    source, _ = route(monkeypatch, (forged, 0, 4711), (stale, 0, 0), (message(16, veth(1)) + done(1), 0, 0))
    assert [link.ifindex for link in source.links().links] == [1]


def test_impossible_length_and_truncation_are_os_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A datagram that cannot be walked over, or did not fit, fails the request with a reason."""
    for datagram in ((b"\xff" * 40, 0, 0), (done(1), socket.MSG_TRUNC, 0)):
        with pytest.raises(OSError, match="netlink"):
            route(monkeypatch, datagram)[0].links()


def test_error_number_of_the_kernel_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLMSG_ERROR and a failed NLMSG_DONE become the OSError of their number."""
    refused = message(2, struct.pack("=i", -errno.EPERM) + bytes(16))
    with pytest.raises(PermissionError):
        route(monkeypatch, (refused, 0, 0))[0].links()
    with pytest.raises(PermissionError):
        route(monkeypatch, (done(1, error=-errno.EPERM), 0, 0))[0].links()


def test_lost_news_are_enobufs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's ENOBUFS reaches the caller, and the socket can be read on."""
    fake = FakeSocket([OSError(errno.ENOBUFS, "full"), (message(16, veth()), 0, 0)])
    monkeypatch.setattr(netlink, "_open", lambda _: fake)
    subscription = netlink.Subscription()
    with pytest.raises(OSError, match="full") as caught:
        subscription.receive()
    assert caught.value.errno == errno.ENOBUFS
    assert len(subscription.receive() or []) == 1
    assert subscription.receive() is None


def test_bad_news_are_errors_beside_good_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read before the bad bytes is kept; the bad bytes are one error; forged news are nothing."""
    data = message(16, veth()) + b"\1\2\3"
    fake = FakeSocket([(data, 0, 0), (data, 0, 99)])
    monkeypatch.setattr(netlink, "_open", lambda _: fake)
    subscription = netlink.Subscription()
    good, bad = subscription.receive() or []
    assert isinstance(good, wire.News)
    assert isinstance(bad, ValueError)
    assert subscription.receive() == []


def test_this_kernel_answers() -> None:
    """The running kernel's loopback device comes out, and a process that does not exist is ESRCH."""
    source = netlink.Route()
    try:
        loopback = next(link for link in source.links().links if link.loopback)
        assert (loopback.name, loopback.ifindex) == ("lo", 1)
        assert loopback.counters is not None
        assert source.nsid_of_pid(os.getpid()) >= -1
        with pytest.raises(ProcessLookupError):
            source.nsid_of_pid(2**22 + 1)
    finally:
        source.close()
