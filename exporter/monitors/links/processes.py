"""Processes by network namespace: who lives where, oldest first, and which container each belongs to.

Flows in: /proc/PID directories. Flows out: groups of `Process`, keyed by the number of `procfs.network`. What is known
of a process is kept while it lives, so a pass costs one stat() per process. Needs no privilege.
"""

from collections.abc import Callable

from exporter.host import cgroups, procfs

SETTLING_SECONDS = 30.0
"""A young process is asked again for its cgroup: a runtime starts it first and moves it into the container then."""


class Process:
    """One process. The same object stands for it as long as it lives; another process is another object."""

    __slots__ = ("container", "inode", "met", "network", "pid", "started")

    def __init__(self, pid: int, inode: int, met: float) -> None:
        """Note a process that was first met at `met` (seconds of the monotonic clock)."""
        self.pid = pid
        self.inode = inode
        self.met = met
        self.network = 0
        self.container = ""
        """Container id, empty for a process of the host."""
        self.started = -1
        """Start in clock ticks after boot; -1 while nobody needed it."""


class ProcessTable:
    """All visible processes; bounded by what the kernel runs."""

    def __init__(self, root: str, clock: Callable[[], float]) -> None:
        """Take the path of procfs and a monotonic clock."""
        self._root = root
        self._clock = clock
        self._known: dict[int, Process] = {}

    def own_network(self) -> int:
        """Number of our own network namespace, the host's. Raises OSError where procfs shows neither us nor init."""
        try:
            return procfs.network(self._root, "self")
        except OSError:
            return procfs.network(self._root, 1)

    def groups(self, host: int) -> dict[int, list[Process]]:
        """Processes by network namespace, oldest first. Of the host's own processes the age is not asked."""
        now = self._clock()
        known: dict[int, Process] = {}
        groups: dict[int, list[Process]] = {}
        for pid, inode in procfs.processes(self._root):
            try:
                network = procfs.network(self._root, pid)
                process = self._known.get(pid)
                if process is None or process.inode != inode:
                    process = self._meet(process, pid, inode, now)
                if process.network != network or now - process.met < SETTLING_SECONDS:
                    self._ask(process, network, host)
            except OSError:
                continue  # gone, a zombie, or hidden from us
            known[pid] = process
            groups.setdefault(network, []).append(process)
        self._known = known
        for network, members in groups.items():
            if network != host:
                members.sort(key=lambda process: (process.started, process.pid))
        return groups

    def _meet(self, last: Process | None, pid: int, inode: int, now: float) -> Process:
        """Tell a new process from one whose /proc inode was merely evicted: that one started at the same time."""
        if last is not None and last.started >= 0 and self._started(pid) == last.started:
            last.inode = inode
            return last
        return Process(pid, inode, now)

    def _ask(self, process: Process, network: int, host: int) -> None:
        process.network = network
        identity = cgroups.identify(procfs.read(f"{self._root}/{process.pid}/cgroup"))
        process.container = identity.container_id if identity else ""
        if process.started < 0 and network != host:
            process.started = self._started(process.pid)

    def _started(self, pid: int) -> int:
        try:
            return procfs.start_time(procfs.read(f"{self._root}/{pid}/stat"))
        except ValueError:
            return 0  # unreadable: it counts as the oldest of all and as nobody's continuation
