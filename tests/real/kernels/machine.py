"""One virtual machine, emulated in software: boots a kernel, shows its console, brings back what its command said.

Flows in: a kernel, disks, a limit in seconds. Flows out: console lines as they come, the exit status of the command,
and its report.
"""

import re
import secrets
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kernels.debian import Unavailable

QEMU = "qemu-system-x86_64"
_MEMORY_MIB = 1024
# In software a fifth level of page tables is one more step for each address, and string instructions go byte by byte.
_CPU = "max,la57=off,erms=off,fsrm=off"
# Mitigations cost time in an emulator and protect nothing there; a panic ends the machine (with -no-reboot).
_COMMAND_LINE = "rootwait rw init=/init console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check"
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    status: int | None
    """Exit status of the command; None where the machine ended, or was stopped, before it could say."""
    report: str
    """What the command left in $REPORT, the empty string where nothing."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What is switched on: a kernel image and disks, on one of which is the root partition (by its PARTUUID)."""

    image: Path
    disks: Sequence[Path]
    root: str
    processors: int = 1

    def run(self, limit: float, console: Callable[[str], None]) -> Outcome:
        """Run until the machine switches itself off or `limit` seconds are over; `console` gets each line it prints.

        Nothing that it writes reaches the disks. Raises Unavailable where the emulator is missing.
        """
        start = time.monotonic()
        marker = f"result-{secrets.token_hex(8)}"
        with tempfile.TemporaryDirectory() as directory:
            results = Path(directory, "results")
            for line in _console(self._call(results, marker), start + limit):
                console(line)
            status, report = _parse(results.read_text(errors="replace") if results.exists() else "", marker)
        return Outcome(status, report, time.monotonic() - start)

    def _call(self, results: Path, marker: str) -> list[str]:
        disks = ["-device", "nvme,id=nvme,serial=disks"]
        for number, path in enumerate(self.disks, start=1):
            disks += ["-drive", f"file={path},if=none,id=disk{number},format=raw,snapshot=on"]
            disks += ["-device", f"nvme-ns,drive=disk{number},bus=nvme,nsid={number}"]
        parameters = f"root=PARTUUID={self.root} guest.marker={marker} {_COMMAND_LINE}"
        return [
            # The emulator dies with the thread that started it, also where that is killed.
            *("setpriv", "--pdeathsig", "KILL", QEMU),
            # Never KVM: a nested one may hang without an error, and speed is not what is measured here.
            *("-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", str(self.processors), "-m", f"{_MEMORY_MIB}M"),
            *("-nodefaults", "-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console", "-serial", f"file:{results}"),
            *disks,
            *("-kernel", str(self.image), "-append", parameters),
        ]


def _console(call: list[str], deadline: float) -> Iterator[str]:
    """Start the emulator and give the lines that it prints; stop it at the deadline."""
    try:
        process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except FileNotFoundError as error:
        raise Unavailable(f"{error.filename} is missing; as root: apt install qemu-system-x86") from error
    try:
        assert process.stdout is not None
        yield from _lines(process.stdout, deadline)
    finally:
        process.kill()  # at the end of its output it has ended by itself
        process.wait(_END_SECONDS)


def _lines(stream: IO[bytes], deadline: float) -> Iterator[str]:
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            chunk = stream.read1(65536)  # type: ignore[attr-defined]  # a BufferedReader
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (_plain(line) for line in lines)
        else:
            yield "stopped: the machine did not end in time"
    if rest:
        yield _plain(rest)


def _plain(line: bytes) -> str:
    """Take the terminal's control sequences off a line."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|c)|[\r\x00]", "", line.decode(errors="replace"))


def _parse(text: str, marker: str) -> tuple[int | None, str]:
    """Split what came over the second port: 'MARKER status N', the report, 'MARKER end'."""
    found = re.search(rf"^{marker} status (\d+)\n(.*)\n{marker} end$", text, re.DOTALL | re.MULTILINE)
    return (int(found[1]), found[2].strip()) if found else (None, "")
