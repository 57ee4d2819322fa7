"""The links monitor: whose veth it is, and what happens to its packets.

Flows in: rtnetlink and procfs (sysfs where rtnetlink is refused). Flows out: the `cni_veth*` and `cni_netns*` families.
"""

from functools import partial
from itertools import count

from exporter.contract import Monitor
from exporter.monitors.links.source import NetlinkSource, PollingSource, ProcfsSource


def monitor(interval: float = 10.0, *, counts_netns: bool = True, counts_veths: bool = True) -> Monitor:
    """Describe the monitor; `interval` is in seconds. Every scrape refreshes it (`max_age` is 0).

    Where somebody else counts what comes and goes, namespaces or veths, it leaves these families alone.
    """
    serials = count(1)  # shared by all sources ever opened, so that an identity of ours is never used twice
    rungs = [
        partial(source, serials, counts_netns=counts_netns, counts_veths=counts_veths)
        for source in (NetlinkSource, PollingSource, ProcfsSource)
    ]
    return Monitor(name="links", rungs=rungs, interval=interval, max_age=0.0)
