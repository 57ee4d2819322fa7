"""Protocol health, once per network namespace: TCP retransmissions, resets, listen overflows, states; UDP overflows.

Flows in: /proc/PID/net/{snmp,netstat,snmp6,sockstat,sockstat6,tcp,tcp6}. Flows out: the families
`cni_netns_{tcp,udp}_*`. Of TCP states `established` and `listen` are always written, others where there are any.
Reading is dear (the kernel sums up all CPUs, or walks its whole hash table), so what cannot have changed is not read.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from exporter.contract import Context
from exporter.host import procfs
from exporter.monitors.links.namespaces import Inventory, Namespace
from exporter.monitors.links.traffic import Snapshots, read_somewhere

RETRANSMITTED = "cni_netns_tcp_retransmitted_segments_total"
RESETS = "cni_netns_tcp_resets_sent_total"
LISTEN_OVERFLOWS = "cni_netns_tcp_listen_overflows_total"
UDP_ERRORS = "cni_netns_udp_receive_buffer_errors_total"
CONNECTIONS = "cni_netns_tcp_connections"

FAMILIES = (RETRANSMITTED, RESETS, LISTEN_OVERFLOWS, UDP_ERRORS, CONNECTIONS)

_ACTIVITY = (b"InSegs", b"OutSegs", b"RetransSegs", b"OutRsts", b"ActiveOpens", b"PassiveOpens", b"CurrEstab")
_SNMP = (*((b"Tcp", column) for column in _ACTIVITY), (b"Udp", b"RcvbufErrors"))
_RETRANSMITTED, _RESETS, _ESTABLISHED, _UDP = 2, 3, 6, 7
_NETSTAT = ((b"TcpExt", b"ListenOverflows"),)

TABLE_SECONDS = 0.05
"""Spent on TCP tables in one pass. A table takes 2-5 ms with a quarter of a million buckets, however few sockets it
shows. What does not fit waits for the next pass, oldest first."""
ONE_TABLE_SECONDS = 0.5
"""A table that takes longer is given up: no figures for that namespace, and an error is counted."""


class _State:
    """What is remembered of one namespace between passes."""

    __slots__ = ("activity", "counted", "counted_at", "counts", "overflows", "pid", "sockets", "udp6")

    def __init__(self) -> None:
        self.pid = 0
        self.sockets: tuple[int, ...] = (1, 1, 1, 1)
        """TCP in use, TIME_WAIT, TCP over IPv6 in use, UDP over IPv6 in use. At first unknown, so not 0."""
        self.activity: tuple[int | None, ...] = ()
        """Moves with every segment and every opened or closed socket: while it rests, so do the states."""
        self.counted: tuple[int | None, ...] | None = None
        """The activity when the states were last counted."""
        self.counted_at = float("-inf")
        self.counts: Counter[str] | None = Counter()
        """Sockets by state; None where the table was too large."""
        self.overflows: int | None = None
        self.udp6 = 0


class Health:
    """Reads the counters of every namespace in each pass, and the TCP tables as far as time allows."""

    def __init__(self, context: Context, clock: Callable[[], float]) -> None:
        """Take the context (procfs, errors) and a monotonic clock, which bounds the time spent on tables."""
        self._root = str(context.paths.procfs)
        self._error = context.error
        self._clock = clock
        self._snmp = procfs.Columns(_SNMP)
        self._netstat = procfs.Columns(_NETSTAT)
        self._states: dict[str, _State] = {}

    def write(self, inventory: Inventory, out: Snapshots) -> None:
        """Write the families of all namespaces that have a process."""
        states: dict[str, _State] = {}
        for namespace in inventory.all:
            values = read_somewhere(namespace, self._read_counters, self._error)
            if values is None:
                continue
            for family, value in zip(FAMILIES, values, strict=False):
                if value is not None:
                    out[family][(namespace.netns_id,)] = value
            states[namespace.netns_id] = self._states[namespace.netns_id]
        self._states = states
        self._read_tables()
        for netns_id, state in states.items():
            _write_states(netns_id, state, out)

    def _read_counters(self, namespace: Namespace, pid: int) -> tuple[int | None, ...]:
        """Values in the order of FAMILIES. Raises OSError where the process is gone, ValueError for odd content."""
        state = self._states.setdefault(namespace.netns_id, _State())
        base = f"{self._root}/{pid}/net"
        tcp, waiting, _ = procfs.sockets(procfs.read(f"{base}/sockstat"))
        tcp6 = udp6 = 0
        with suppress(FileNotFoundError):  # a kernel without IPv6
            tcp6, _, udp6 = procfs.sockets(procfs.read(f"{base}/sockstat6"))
        snmp = self._snmp(procfs.read(f"{base}/snmp"))
        if tcp or tcp6 or state.sockets[0] or state.sockets[2]:
            (state.overflows,) = self._netstat(procfs.read(f"{base}/netstat"))
        if udp6 or state.sockets[3]:
            with suppress(FileNotFoundError):
                state.udp6 = procfs.line_value(procfs.read(f"{base}/snmp6"), b"Udp6RcvbufErrors")
        state.pid, state.sockets = pid, (tcp, waiting, tcp6, udp6)
        state.activity = (tcp, waiting, tcp6, *snmp[:_UDP])
        return snmp[_RETRANSMITTED], snmp[_RESETS], state.overflows, (snmp[_UDP] or 0) + state.udp6

    def _read_tables(self) -> None:
        """Count the states anew where something happened: what was not counted for the longest time comes first."""
        due = [state for state in self._states.values() if state.activity != state.counted]
        began = now = self._clock()
        for state in sorted(due, key=lambda state: state.counted_at):
            if now - began >= TABLE_SECONDS:
                break
            with suppress(OSError):  # gone: the next pass asks another process
                state.counts = self._count(state, now + ONE_TABLE_SECONDS)
                state.counted = state.activity
            state.counted_at = now
            now = self._clock()

    def _count(self, state: _State, deadline: float) -> Counter[str] | None:
        counts: Counter[str] = Counter()
        tcp, waiting, tcp6, _ = state.sockets
        for table, sockets in (("tcp", tcp), ("tcp6", tcp6)):
            path = f"{self._root}/{state.pid}/net/{table}"
            with suppress(FileNotFoundError):  # a kernel without IPv6
                if (sockets or waiting) and not procfs.count_tcp_states(path, counts, lambda: self._clock() > deadline):
                    self._error(
                        "tcp_table_too_large", f"{path}: counting its lines takes too long, no states are shown"
                    )
                    return None
        return counts


def _write_states(netns_id: str, state: _State, out: Snapshots) -> None:
    """Write the states as last counted; nothing but `established` where they were not counted yet.

    The kernel's own count of ESTABLISHED and CLOSE_WAIT sockets (RFC 4022, tcpCurrEstab) is newer than the table.
    """
    counts = state.counts
    if counts is None:
        return
    current = state.activity[3 + _ESTABLISHED] if state.activity else None
    if state.counted is not None:
        for name in counts.keys() | {"established", "listen"}:
            out[CONNECTIONS][(netns_id, name)] = counts[name]
    if current is not None and state.counted != state.activity:
        out[CONNECTIONS][(netns_id, "established")] = max(0, current - counts["close_wait"])
