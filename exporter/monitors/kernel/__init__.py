"""The kernel monitor: drops by reason, TCP, namespaces, CNI plugin runs, as BPF programs see them.

Flows in: settings, and descriptors from a child that loads the programs and ends. Flows out: the `cni_bpf_*`,
`cni_tcp_*`, `cni_packet_*`, `cni_plugin_*` and `cni_events_*` families.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from exporter.contract import Monitor, Source
from exporter.host import btf
from exporter.monitors.kernel.consumer import Tally
from exporter.monitors.kernel.handover import PREFIX, Manifest, Standing, receive
from exporter.monitors.kernel.programs import PROGRAMS
from exporter.monitors.kernel.shapes import Settings

__all__ = ["Programs", "Settings", "Standing", "load", "monitor"]

_ROOT = Path(__file__).parents[3]
_MEMORY = "/dev/shm"  # noqa: S108 - a private directory is made in it
_GRACE = 2.0  # seconds that the loader gets to exit by itself


@dataclass(slots=True)
class Programs:
    """What is in force in the kernel: it ends when this is closed or the process ends, however it ends."""

    manifest: Manifest
    started: float = 0.0
    """Seconds from the call of `load` until everything was attached."""
    tally: Tally = field(default_factory=Tally)
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
    with theirs:
        child = _start(theirs)
    try:
        with ours:
            ours.settimeout(settings.timeout)
            ours.sendall(len(order).to_bytes(4, sys.byteorder) + order)
            return receive(ours)
    finally:
        _end(child, Path(place))


def _start(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Start the loader. It takes no module from where it stands (-P): it is privileged. Our paths it has (-S)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(_ROOT), *sys.path) if p)}
    command = _command(theirs.fileno())
    return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, cwd="/")


def _command(descriptor: int) -> list[str]:
    return [sys.executable, "-P", "-S", "-m", "exporter.monitors.kernel.loader", str(descriptor)]


def _end(child: subprocess.Popen[bytes], place: Path) -> None:
    """Have the child gone, with its directory: it exits by itself once our end is closed."""
    try:
        child.wait(_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(5)
    for directory in place.glob(f"{PREFIX}{child.pid}-*"):  # someone may have killed it
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
