"""What becomes of the host's veth and netkit devices, counted exactly: appeared, deleted, moved to another namespace.

Flows in: the kernel's news about links, and dumps. Flows out: three counters, and the events that the news tell. News
are believed; after a loss of news (and where there are none) the difference between dumps counts, which takes a moved
device for a deleted one.
"""

import time
from collections.abc import Iterable

from exporter.contract import EventSink, Families
from exporter.host.netlink_messages import Link, News
from exporter.load.admission import CLASSES, Admission, KeptEvent

KINDS = frozenset(("veth", "netkit"))

CREATED = "cni_veth_created_total"
DELETED = "cni_veth_deleted_total"
MOVED = "cni_veth_moved_total"


class Devices:
    """The devices that are known to be on the host; bounded by what the kernel has."""

    def __init__(self, families: Families | None, links: Iterable[Link], events: EventSink | None = None) -> None:
        """Begin with what a dump shows: none of it counts as created. Without families nothing is counted or told."""
        self._families = families
        self._events = events or Admission()
        self._known = _places(links)
        for family in (CREATED, DELETED, MOVED):
            self._count(family, 0)

    def hear(self, news: News) -> bool:
        """Count what the news say. True where an update should follow."""
        link = news.link
        if link is None:
            return True  # a namespace got an id, or is gone
        known = self._known.get(link.ifindex)
        if news.gone:
            if known is None:
                return False
            del self._known[link.ifindex]
            self._count(MOVED if link.moved else DELETED)
            self._tell("moved" if link.moved else "deleted", link)
            return True
        if link.kind not in KINDS:
            return False
        place = self._known[link.ifindex] = _place(link)
        if known is None:
            self._count(CREATED)
            self._tell("created", link)
        return known != place

    def _tell(self, kind: str, link: Link) -> None:
        """Pass an event on to those who watch."""
        if not self._families:
            return
        device: dict[str, str | int | float] = {"device": link.name, "ifindex": link.ifindex}
        if weight := self._events.should_sample("veth", {"kind": kind, **device}):
            event = KeptEvent(time.time(), "veth", kind, CLASSES["veth"], weight=weight, details=device)
            self._events.record_event(event)

    def compare(self, links: Iterable[Link]) -> None:
        """Count the difference between what is known and a dump."""
        places = _places(links)
        created, deleted = places.keys() - self._known.keys(), self._known.keys() - places.keys()
        self._count(CREATED, len(created))
        self._count(DELETED, len(deleted))
        self._known = places

    def _count(self, family: str, amount: int = 1) -> None:
        if self._families:
            self._families.add(family, (), amount)


def _place(link: Link) -> tuple[str, int, int | None, int]:
    """What matters to topology; a change of anything else needs no update."""
    return link.name, link.peer, link.nsid, link.master


def _places(links: Iterable[Link]) -> dict[int, tuple[str, int, int | None, int]]:
    return {link.ifindex: _place(link) for link in links if link.kind in KINDS}
