"""Who the events are about: the addresses on the other side, estimated from the records that were kept.

Flows in: records of classes that carry addresses. Flows out: cni_top_peer_events_estimated. A record costs one look-up;
adding up waits until somebody asks.
"""

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable

from exporter.load.estimates import HeaviestEstimates
from exporter.monitors.kernel.events import HEAD, address, netns_key, weight
from exporter.monitors.kernel.reader import Snapshot
from exporter.monitors.kernel.shapes import CLASSES

_STEP, _STEPS = 10.0, 6  # seconds of a part, parts that are told: a minute
_KEYS = 2048  # addresses of a part that are followed
_NOTED = 4096  # different records noted before they are added up
_TOLD = 10  # addresses told of a class
_FLOW = HEAD.size
_PLACES = {  # where the address of the other side is: a dropped packet's sender, a socket's peer
    CLASSES.index("packet_drop"): _FLOW + 40,  # struct drop_event, which begins with 40 bytes of its own
    CLASSES.index("tcp_fault"): _FLOW + 16,
    CLASSES.index("connection"): _FLOW + 16,
    CLASSES.index("connection_close"): _FLOW + 16,
}
_COMMAND = 32  # offset in struct event, where the address is while nobody listens to the class
_CLASS, _RATIO = 20, slice(24, 28)  # offsets in struct event
_WHOSE = slice(8, 20)  # cookie, inum
_NOBODY = bytes(16)

PEERED = frozenset(CLASSES[number] for number in _PLACES)
"""Classes whose records carry addresses."""

_Peer = tuple[int, bytes, bytes]
"""Class, namespace, address."""


class Peers:
    """Adds up weights by class, namespace and address. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing; `clock` gives monotonic seconds."""
        self._clock = clock
        self._noted: Counter[tuple[bytes, _Peer]] = Counter()
        self._parts: deque[tuple[float, HeaviestEstimates[_Peer]]] = deque()

    def note(self, record: bytes) -> None:
        """Take a record of a class in PEERED in."""
        place = _PLACES[record[_CLASS]] if len(record) > HEAD.size else _COMMAND
        self._noted[record[_RATIO], (record[_CLASS], record[_WHOSE], record[place : place + 16])] += 1
        if len(self._noted) >= _NOTED:
            self._settle()

    def snapshot(self) -> Snapshot:
        """Give the largest of each class, in events of the last minute."""
        self._settle()
        total: dict[_Peer, float] = {}
        for _, part in self._parts:
            for peer, estimate in part.heaviest():
                total[peer] = total.get(peer, 0.0) + estimate.total
        told: Snapshot = {"cni_top_peer_events_estimated": {}}
        for number in _PLACES:
            of_class = ((count, peer) for peer, count in total.items() if peer[0] == number)
            for count, (_, whose, other) in heapq.nlargest(_TOLD, of_class):
                netns = netns_key(int.from_bytes(whose[:8], "little"), int.from_bytes(whose[8:], "little"))
                told["cni_top_peer_events_estimated"][netns, CLASSES[number], address(other)] = count
        return told

    def _settle(self) -> None:
        now = self._clock()
        while self._parts and self._parts[0][0] <= now - _STEP * _STEPS:
            self._parts.popleft()
        if not self._parts or self._parts[-1][0] <= now - _STEP:
            self._parts.append((now, HeaviestEstimates(_KEYS)))
        part = self._parts[-1][1]
        for (ratio, peer), count in self._noted.items():
            if peer[2] != _NOBODY and len(peer[2]) == len(_NOBODY):
                part.add(peer, weight(int.from_bytes(ratio, "little")), count)
        self._noted.clear()
