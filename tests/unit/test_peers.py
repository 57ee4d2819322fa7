"""The largest peers: estimated from weights, for a minute, however many addresses there are."""

import ipaddress

import pytest

from exporter.monitors.kernel.events import FLOW, HEAD
from exporter.monitors.kernel.peers import PEERED, Peers
from exporter.monitors.kernel.shapes import CLASSES

FAMILY = "cni_top_peer_events_estimated"


def record(class_: str, peer: str, ratio: float = 1.0, inum: int = 7) -> bytes:
    """A record as the kernel writes it, to or, where it is a dropped packet, from this peer."""
    packed = ipaddress.ip_address(peer).packed.rjust(16, b"\0")
    mapped = b"\0" * 10 + b"\xff\xff" + packed[12:] if "." in peer else packed
    ends = (mapped, b"\1" * 16) if class_ == "packet_drop" else (b"\1" * 16, mapped)
    body = (bytes(40) if class_ == "packet_drop" else b"") + FLOW.pack(*ends, 1, 2, 2, 6)
    written = 0xFFFFFFFF if ratio == 1 else round(ratio * 2**32)
    return HEAD.pack(1, 41, inum, CLASSES.index(class_), 0, HEAD.size + len(body), written, 9, b"curl") + body


def brief(class_: str, peer: str) -> bytes:
    """A record while nobody listens: its head, with the address where the command would be."""
    whole = record(class_, peer)
    place = HEAD.size + (40 if class_ == "packet_drop" else 16)
    return whole[: HEAD.size - 16] + whole[place : place + 16]


def told(peers: Peers) -> dict[tuple[str, ...], float]:
    return peers.snapshot()[FAMILY]


@pytest.mark.parametrize("class_", sorted(PEERED))
def test_records_count_for_the_other_side_by_their_weight(class_: str) -> None:
    """23 whole ones and 23 that were kept with a quarter are 115 of the peer, and 7 brief ones."""
    peers = Peers(lambda: 0.0)
    for _ in range(23):
        peers.note(record(class_, "192.0.2.7"))
        peers.note(record(class_, "192.0.2.7", 0.25))
        peers.note(record(class_, "2001:db8::7", inum=8))
    for _ in range(7):
        peers.note(brief(class_, "192.0.2.7"))
    assert told(peers) == {
        ("7:41", class_, "192.0.2.7"): pytest.approx(122),
        ("8:41", class_, "2001:db8::7"): 23,
    }


def test_a_minute_is_told_and_no_more() -> None:
    """What is older than a minute falls out; what is younger stays."""
    now = [0.0]
    peers = Peers(lambda: now[0])
    for now[0] in (0.0, 15.0, 30.0):
        peers.note(record("connection", "192.0.2.7"))
        told(peers)
    counts = {}
    for now[0] in (59.0, 61.0, 200.0):
        counts[now[0]] = sum(told(peers).values())
    assert counts == {59.0: 3, 61.0: 2, 200.0: 0}


def test_a_flood_of_addresses_takes_bounded_room_and_hides_no_heavy_one() -> None:
    """20,000 addresses of one event each and one of 5,000: ten are told, the heavy one first; memory has a bound."""
    peers = Peers(lambda: 0.0)
    for number in range(20_000):
        peers.note(record("tcp_fault", str(ipaddress.ip_address(0x0A000000 + number))))
        if number % 4 == 0:
            peers.note(record("tcp_fault", "192.0.2.7"))
    found = told(peers)
    assert len(found) == 10
    assert found["7:41", "tcp_fault", "192.0.2.7"] == 5000
    assert len(peers._parts[-1][1]) <= 4096  # twice what is followed


def test_records_without_addresses_and_short_ones_are_nobody_s() -> None:
    """An address that was not read is no peer; neither is what is missing of a record."""
    peers = Peers(lambda: 0.0)
    peers.note(record("connection", "::"))
    peers.note(record("connection", "192.0.2.7")[:70])
    assert told(peers) == {}
