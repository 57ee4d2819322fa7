"""The kernel monitor: drops by reason, TCP, namespaces, CNI plugin runs, as BPF programs see them.

Flows in: settings, and descriptors from a child that loads the programs and ends. Flows out: the `cni_bpf_*`,
`cni_tcp_*`, `cni_packet_*`, `cni_plugin_*` and `cni_events_*` families.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.contract import Monitor, Source
from exporter.host import btf
from exporter.monitors.kernel.handover import PREFIX, Manifest, Standing, keep_only, receive
from exporter.monitors.kernel.programs import PROGRAMS
from exporter.monitors.kernel.shapes import Settings

if TYPE_CHECKING:
    from exporter.monitors.kernel.consumer import Tally

__all__ = ["Programs", "Settings", "Standing", "load", "monitor"]

_MEMORY = "/dev/shm"  # noqa: S108 - a private directory is made in it
_GRACE = 2.0  # seconds that the loader gets to exit by itself


def _tally() -> "Tally":
    from exporter.monitors.kernel.consumer import Tally  # noqa: PLC0415 - the loader, which starts here, has none

    return Tally()


@dataclass(slots=True)
class Programs:
    """What is in force in the kernel: it ends when this is closed or the process ends, however it ends."""

    manifest: Manifest
    started: float = 0.0
    """Seconds from the call of `load` until everything was attached."""
    tally: "Tally" = field(default_factory=_tally)
    """What became of the events so far."""
    closed: bool = False

    @property
    def standings(self) -> list[Standing]:
        """Where each probe stands."""
        return self.manifest.standings

    @property
    def attached(self) -> bool:
        """Whether anything is in force."""
        return any(standing.attached for standing in self.standings)

    def serves(self, probe: str) -> bool:
        """Whether a probe is attached (then its families are the kernel monitor's to count)."""
        return any(standing.attached for standing in self.standings if standing.program == probe)

    def close(self) -> None:
        """Detach everything and free the maps. May be called twice."""
        if self.closed:
            return
        self.closed = True
        manifest = self.manifest
        groups = manifest.programs.values()
        for descriptor in (*manifest.links, *(fd for group in groups for fd in group), *manifest.maps.values()):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def load(settings: Settings) -> Programs:
    """Load and attach what this machine allows, by a child that ends before the answer.

    Call it before capabilities are given up. It never raises for lack of support: each probe's standing has the reason.
    """
    start = time.monotonic()
    reason = btf.available()
    if reason:
        return _nothing(reason, "a kernel with BTF (CONFIG_DEBUG_INFO_BTF=y) and the package libbpf1", start)
    try:
        manifest = _ask(settings)
    except TimeoutError:
        return _nothing(f"the loader took longer than {settings.timeout:g} s", "", start)
    except (OSError, EOFError, ValueError) as error:
        return _nothing(f"the loader failed: {error}", "see the log for its last words", start)
    if manifest.reason:
        return _nothing(manifest.reason, manifest.remedy, start)
    return Programs(manifest, time.monotonic() - start)


def _ask(settings: Settings) -> Manifest:
    """Have a child load, and take over what it made. Raises OSError (TimeoutError), EOFError, ValueError."""
    place = _MEMORY if os.access(_MEMORY, os.W_OK) else tempfile.gettempdir()
    order = json.dumps({"settings": asdict(settings), "place": place, "asked": time.monotonic()}).encode()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            child = _start(theirs)
        try:
            ours.settimeout(settings.timeout)
            ours.sendall(len(order).to_bytes(4, sys.byteorder) + order)
            return receive(ours)
        finally:
            _end(child, ours, Path(place))


def _start(theirs: socket.socket) -> int:
    """Fork the loader: most of what it needs is in the exporter's memory already. The answer is its PID."""
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        keep_only(theirs.fileno())
        os.chdir("/")
        _serve(theirs)
    except Exception:
        logging.getLogger(__name__).exception("the loader failed")
    finally:
        os._exit(0)  # all that is left would be freed piece by piece


def _serve(link: socket.socket) -> None:
    from exporter.monitors.kernel import loader  # noqa: PLC0415 - the exporter has no use for it

    loader.main(link)


def _end(child: int, ours: socket.socket, place: Path) -> None:
    """Have the child gone, with its directory: it exits by itself once it has answered, or hears no more of us."""
    ours.settimeout(_GRACE)
    try:
        ours.shutdown(socket.SHUT_WR)
        while ours.recv(4096):  # until its end is closed
            pass
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
    except OSError:
        pass  # it is gone
    os.waitpid(child, 0)
    for directory in place.glob(f"{PREFIX}{child}-*"):  # someone may have killed it
        shutil.rmtree(directory, ignore_errors=True)


def _nothing(reason: str, remedy: str, start: float) -> Programs:
    standings = [Standing(probe.name, reason=reason, remedy=remedy) for p in PROGRAMS for probe in p.probes]
    return Programs(Manifest(standings, reason=reason, remedy=remedy), time.monotonic() - start)


def monitor(programs: Programs, interval: float = 10.0, share: float = 1.0) -> Monitor:
    """Describe the monitor; `programs` stays the caller's and must outlive it.

    `interval` is in seconds; `share` is what reading events may cost, of one processor.
    """
    from exporter.monitors.kernel.source import KernelSource, Standings  # noqa: PLC0415 - only where it runs

    def ebpf() -> Source:
        return KernelSource(programs, share=share)

    def nothing() -> Source:
        return Standings(programs)

    return Monitor(name="kernel", rungs=[ebpf, nothing], interval=interval, max_age=0.0)
