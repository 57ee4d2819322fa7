"""Runs of CNI plugins without eBPF: by the kernel's process events, else by looking at /proc again and again.

Flows in: netlink messages of the process connector, and /proc/PID. Flows out: the `cni_plugin_*` families, as the
kernel monitor has them where its program `cni` is attached. Both may miss short runs: a run counts only if its process
can still be looked at once it is known. Formats: include/uapi/linux/{connector,cn_proc}.h, proc(5).
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from exporter.contract import Context, Monitor, Source, Unsupported
from exporter.host import procfs

RUNS, FAILURES, DURATION = "cni_plugin_runs_total", "cni_plugin_failures_total", "cni_plugin_duration_seconds"
_COMMANDS = frozenset({"ADD", "DEL", "CHECK", "VERSION", "STATUS", "GC"})
_PLUGINS = 200  # names that are told apart
_UNDER_WAY = 4096  # runs that are watched at once
_LOOK = 0.1  # seconds between two looks at /proc
_SHARE = 0.02  # of one processor, that looking may take
_YOUNG = 1.0  # seconds in which a new process may still become a plugin by execve(2)
_CHECK = 10.0  # seconds between checks whether runs whose end was not told are over

_CONNECTOR = 11  # NETLINK_CONNECTOR
_PROCESSES = 1  # CN_IDX_PROC, CN_VAL_PROC: also the multicast group
_LISTEN, _IGNORE = 1, 2  # enum proc_cn_mcast_op
_NONE, _EXEC, _EXIT = 0, 0x2, 0x80000000  # enum proc_cn_event
_HEADERS = struct.Struct("=IHHII IIIIHH")  # struct nlmsghdr, struct cn_msg
_EVENT = struct.Struct("=IIQIIII")  # struct proc_event: what, cpu, time, and the first words of what it tells
_NLMSG_DONE = 3
_RECEIVE_BUFFER = 1 << 20
_SO_RCVBUFFORCE = 33
_ANSWER = 0.5  # seconds that the kernel gets to answer a subscription
_BATCH = 1000  # messages that are taken before anyone else gets a turn


@dataclass(frozen=True, slots=True)
class _Run:
    """A plugin that is running; `began` is in seconds of whatever clock its source uses."""

    plugin: str
    command: str
    began: float
    started: int
    """Field 22 of /proc/PID/stat: tells the process from a later one of the same PID."""


@dataclass(slots=True)
class Runs:
    """The runs under way, and the counting of those that are over."""

    context: Context
    directories: frozenset[bytes]
    running: dict[int, _Run] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def began(self, pid: int, now: float | None) -> bool:
        """Look at a process that was started: whether it is a plugin. `now` None: it began when /proc says."""
        directory = f"{self.context.paths.procfs}/{pid}"
        try:
            plugin = self._plugin(directory)
            if not plugin:
                return False
            started = procfs.start_time(procfs.read(f"{directory}/stat"))
        except (OSError, ValueError):  # gone already
            return False
        if pid in self.running:  # it replaced itself by another
            self.ended(pid, now, 0)
        if len(self.running) >= _UNDER_WAY:
            self.context.dropped()
            return False
        began = started / os.sysconf("SC_CLK_TCK") if now is None else now
        self.running[pid] = _Run(plugin, self._command(directory), began, started)
        return True

    def ended(self, pid: int, now: float | None, status: int | None) -> None:
        """Count a run that is over: `now` None: nobody knows when. `status` is as wait(2) has it; None: not known."""
        run = self.running.pop(pid, None)
        if run is None:
            return
        key = (self._bounded(run.plugin), run.command)
        self.context.families.add(RUNS, key)
        if status is not None:
            self.context.families.add(FAILURES, key, 1.0 if status else 0.0)
        if now is not None:
            self.context.families.observe(DURATION, max(0.0, now - run.began), key)

    def is_over(self, pid: int) -> bool:
        """Whether the process of a run is gone."""
        try:
            stat = procfs.read(f"{self.context.paths.procfs}/{pid}/stat")
            return procfs.start_time(stat) != self.running[pid].started
        except (OSError, ValueError):
            return True

    def _plugin(self, directory: str) -> str:
        """Give the plugin's name, empty where it is none: the path of a program or script in one of the directories.

        The command of /proc/PID/comm is the name of the file that was started (fs/exec.c, begin_new_exec), a script's
        too: so an argument that only happens to be a plugin's path is not taken for one. The path of the program itself
        takes the right to trace the process; arguments do not, and libcni gives the path as the first.
        """
        comm = procfs.read(f"{directory}/comm").rstrip(b"\n")
        paths = procfs.read(f"{directory}/cmdline")[:16384].split(b"\0")[:3]
        with suppress(OSError):
            paths.append(os.fsencode(Path(directory, "exe").readlink()))
        for path in paths:
            place, _, name = os.path.normpath(path).rpartition(b"/") if path else (b"", b"", b"")
            if place in self.directories and name[:15] == comm:
                return name.decode(errors="replace")
        return ""

    def _command(self, directory: str) -> str:
        """Read CNI_COMMAND; `unknown` where we have no right to read the environment."""
        try:
            variables = procfs.read(f"{directory}/environ").split(b"\0")
        except PermissionError:
            return "unknown"
        except OSError:
            return "other"
        found = next((one[12:] for one in variables if one.startswith(b"CNI_COMMAND=")), b"").decode(errors="replace")
        return found if found in _COMMANDS else "other"

    def _bounded(self, plugin: str) -> str:
        if plugin not in self._names and len(self._names) >= _PLUGINS:
            return "~other"
        self._names.add(plugin)
        return plugin


class _Plugins(Source):
    """What both rungs share."""

    def __init__(self, directories: Sequence[str | Path]) -> None:
        self._directories = frozenset(os.fsencode(os.path.normpath(directory)) for directory in directories)

    def open(self, context: Context) -> None:
        """Begin with nothing under way."""
        super().open(context)
        self.runs = Runs(context, self._directories)


class ProcEvents(_Plugins):
    """Hears of each exec and each end from the kernel, with its time and the exit status (CAP_NET_ADMIN)."""

    mode = "proc_events"

    def __init__(self, directories: Sequence[str | Path], clock: Callable[[], float] = time.monotonic) -> None:
        """Watch for programs of these directories; `clock` is in seconds."""
        super().__init__(directories)
        self._clock = clock
        self._connector: _Connector | None = None

    def open(self, context: Context) -> None:
        """Subscribe. Raises Unsupported where the kernel does not let us."""
        super().open(context)
        self._next = self._clock() + _CHECK
        remedy = "run with CAP_NET_ADMIN in the host's network and PID namespaces"
        try:
            self._connector = _Connector()
            answered = self._connector.subscribe()
        except OSError as error:
            raise Unsupported(f"the kernel's process events: {error.strerror}", remedy) from error
        if not answered:
            raise Unsupported("the kernel's process events: no answer to the subscription", remedy)

    def readers(self) -> Mapping[int, Callable[[], None]]:
        """Take messages as they come."""
        return {self._connector.fileno(): partial(self._receive, self._connector)} if self._connector else {}

    def update(self) -> None:
        """Count the runs whose end was lost; what is told needs no update."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + _CHECK
        for pid in [pid for pid in self.runs.running if self.runs.is_over(pid)]:
            self.runs.ended(pid, None, None)

    def close(self) -> None:
        """Unsubscribe."""
        if self._connector:
            self._connector.close()
            self._connector = None

    def _receive(self, connector: "_Connector") -> None:
        """Handle what waits. Where the kernel had to throw messages away, what is lost is said, not how much."""
        for _ in range(_BATCH):
            try:
                message = connector.receive()
            except BlockingIOError:
                return
            except OSError as error:
                self.context.dropped()
                self.context.error("lost", f"process events were lost: {error.strerror}")
                return
            if message:
                self._handle(message)

    def _handle(self, message: bytes) -> None:
        try:
            what, seconds, pid, tgid, status = _parse(message)
        except struct.error:
            self.context.error("record", f"a process event of {len(message)} bytes is too short")
            return
        if what == _EXEC:
            self.runs.began(tgid, seconds)
        elif what == _EXIT and pid == tgid:  # each thread's end is told
            self.runs.ended(tgid, seconds, status)


class ProcfsLooks(_Plugins):
    """Looks at /proc: no right is needed. Runs between two looks are missed, failures are not known."""

    mode = "procfs"

    def __init__(
        self,
        directories: Sequence[str | Path],
        clock: Callable[[], float] | None = None,
        cost: Callable[[], float] = time.thread_time,
    ) -> None:
        """Watch for programs of these directories; `clock` is in seconds since boot, `cost` in seconds of CPU."""
        super().__init__(directories)
        self._clock = clock or partial(time.clock_gettime, time.CLOCK_BOOTTIME)
        self._cost = cost

    def open(self, context: Context) -> None:
        """Take those who are there already for what they are: no plugins. Raises OSError."""
        super().open(context)
        self._next = 0.0
        self._known = set(procfs.processes(str(context.paths.procfs)))
        self._young: dict[tuple[int, int], float] = {}

    def update(self) -> None:
        """Look, unless the last look was a moment ago or so dear that it must rest longer."""
        now, spent = self._clock(), self._cost()
        if now < self._next:
            return
        current = set(procfs.processes(str(self.context.paths.procfs)))
        pids = {pid for pid, _ in current}
        for pid in [pid for pid in self.runs.running if pid not in pids or self.runs.is_over(pid)]:
            self.runs.ended(pid, now, None)
        self._young.update(dict.fromkeys(current - self._known, now))
        self._known = current
        for process, seen in list(self._young.items()):
            if process not in current or self.runs.began(process[0], None) or now - seen > _YOUNG:
                del self._young[process]
        self._next = now + max(_LOOK, (self._cost() - spent) / _SHARE) * 0.99  # the supervisor's own beat is no clock


class _Connector:
    """A socket in the group of process events."""

    def __init__(self) -> None:
        """Join. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _CONNECTOR)
        try:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            self._socket.bind((0, _PROCESSES))
            self._socket.connect((0, 0))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Descriptor to poll."""
        return self._socket.fileno()

    def subscribe(self) -> bool:
        """Ask for exec and exit (6.6), else in the older form for all; whether the kernel answered. Raises OSError."""
        try:
            return any(self._ask(form) for form in ("=II", "=I"))
        finally:
            self._socket.setblocking(False)  # noqa: FBT003 - the socket's own interface

    def receive(self) -> bytes:
        """Give a message, empty where it is not the kernel's. Raises OSError (BlockingIOError: none waits)."""
        message, _, _, sender = self._socket.recvmsg(512)
        return message if sender[0] == 0 else b""

    def close(self) -> None:
        """Unsubscribe: before Linux 6.6 the kernel would go on making messages for nobody."""
        with suppress(OSError):
            self._socket.send(_request(struct.pack("=I", _IGNORE)))
        self._socket.close()

    def _ask(self, form: str) -> bool:
        words = (_LISTEN, _EXEC | _EXIT)[: len(form) - 1]
        self._socket.send(_request(struct.pack(form, *words)))
        deadline = time.monotonic() + _ANSWER
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                what, _, error, _, _ = _parse(self.receive())
            except TimeoutError:
                return False
            except struct.error:  # somebody else's
                continue
            if what == _NONE and error:
                raise OSError(error, os.strerror(error))
            if what == _NONE:
                return True
        return False


def _request(body: bytes) -> bytes:
    length = _HEADERS.size + len(body)
    own = (_PROCESSES, _PROCESSES, os.getpid() & 0x7FFFFFFF, 0, len(body), 0)
    return _HEADERS.pack(length, _NLMSG_DONE, 0, 0, 0, *own) + body


def _parse(message: bytes) -> tuple[int, float, int, int, int]:
    """Read an event: what, when (CLOCK_MONOTONIC in seconds), PID (or an answer's error), process, status.

    Raises struct.error where it is too short.
    """
    what, _, moment, pid, tgid, status, _ = _EVENT.unpack_from(message, _HEADERS.size)
    return what, moment / 1e9, pid, tgid, status


def monitor(directories: Sequence[str | Path]) -> Monitor:
    """Describe the monitor, for where the kernel program `cni` is not attached. Its families are of owner `kernel`."""
    return Monitor(
        name="plugins",
        rungs=[lambda: ProcEvents(directories), lambda: ProcfsLooks(directories)],
        interval=_LOOK,
    )
