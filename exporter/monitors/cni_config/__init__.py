"""CNI configurations: which files there are, whether they are valid, which is active, what changed; plugins and pools.

Flows in: the configuration directories, the plugins' directories, host-local's leases. Flows out: the families of
owner `cni_config`. What may be told of a file is decided in `configuration`: the name of its network, the plugins'
types, the version; beside it the file's path and checksum. All else of it, such as tokens and keys, stays there.
"""

from exporter.contract import Monitor
from exporter.monitors.cni_config.inotify import InotifySource, Refusal
from exporter.monitors.cni_config.polling import PollingSource
from exporter.monitors.cni_config.records import Records, Settings

__all__ = ["Settings", "monitor"]


def monitor(settings: Settings, *, use_inotify: bool = True) -> Monitor:
    """Describe the monitor."""
    records, refusal = Records(settings), Refusal()
    rungs = [lambda: PollingSource(records)]
    if use_inotify:
        return Monitor("cni_config", [lambda: InotifySource(records, refusal), *rungs], settings.poll_interval)
    return Monitor("cni_config", rungs, settings.poll_interval)
