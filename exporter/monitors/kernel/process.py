"""Reads process.c and syscalls.c: processes of containers, and system calls that the configuration names.

Flows in: records of the classes exec and syscall. Flows out: their details for the feed; nothing is counted here beyond
the account of events.
"""

import struct

from exporter.monitors.kernel.cni import outcome
from exporter.monitors.kernel.events import Details, Event, text
from exporter.monitors.kernel.reader import Reader, Snapshot

_PROCESS = struct.Struct("=QII64s")  # struct process_event behind its head
_SYSCALL = struct.Struct("=Q")  # struct syscall_event behind its head
_STARTED = 1  # enum process_kind


class Process(Reader):
    """Starts and ends of processes in containers."""

    program = "process"
    classes = ("exec",)

    def snapshot(self) -> Snapshot:
        """Nothing is counted."""
        return {}

    def details(self, event: Event) -> Details:
        """Give what happened; at the start the path, at the end how it ended and the seconds it took."""
        duration, status, parent, file = _PROCESS.unpack_from(event.body)
        if event.kind == _STARTED:
            return {"what": "started", "file": text(file), "parent": parent}
        return {"what": "ended", "duration": duration / 1e9, **outcome(status), "parent": parent}


class Syscalls(Reader):
    """System calls by number."""

    program = "syscalls"
    classes = ("syscall",)

    def snapshot(self) -> Snapshot:
        """Nothing is counted."""
        return {}

    def details(self, event: Event) -> Details:
        """Give the call's number."""
        return {"syscall": _SYSCALL.unpack_from(event.body)[0]}
