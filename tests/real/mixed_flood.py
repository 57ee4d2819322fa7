"""Events of many classes in network namespaces, four fifths of them in the first: a program for tests, run beside them.

`namespaces` makes these, `senders` runs the program.

Flows in: phases as RATE:SECONDS, then the namespaces' names. Flows out: one line of JSON when all is ready, for which
a line is expected; then the phases, with when each began and ended (CLOCK_MONOTONIC), and what was made in which
namespace. What is not made in its time is not made up for.
"""

import contextlib
import ctypes
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

GETPPID = {"x86_64": 110, "aarch64": 173}[os.uname().machine]
"""The call that is made."""

HEAVY = 0.8
"""Share of the first namespace; of the others the n-th has 1/n of what the second has."""
_TICK, _VISITS = 0.01, 4  # seconds; light namespaces that one tick goes to
_DROPS = 0.1  # share of datagrams among the events; connections and programs come beside, all else is calls
_CLONE_NEWNET = 0x40000000
_AT_ONCE = 256  # datagrams a call
_CALLS = 500  # calls between two looks at the clock
_PORT = 7
_MOST = {"refused": (0.01, 400.0), "connections": (0.005, 200.0), "programs": (0.005, 50.0)}
"""Of the rate, and per second at most: these cost the processor tens to hundreds of microseconds each."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class Made:
    """What was done in one namespace."""

    drops: int = 0
    """Datagrams to the broadcast address of loopback, for which there is no socket: dropped without an answer."""
    refused: int = 0
    """Connections to a port that nobody listens on."""
    connections: int = 0
    """Opened and closed; both ends are here."""
    programs: int = 0
    """Started, and ended."""
    calls: int = 0
    """Of getppid(2)."""


class _Datagrams:
    """Many datagrams in one call: struct mmsghdr, all alike."""

    def __init__(self) -> None:
        address = struct.pack("=H2s4s8x", socket.AF_INET, b"\0\x09", socket.inet_aton("127.255.255.255"))
        self._kept = ctypes.create_string_buffer(address, 16), ctypes.create_string_buffer(b"x")
        to, data = map(ctypes.addressof, self._kept)
        self._parts = ctypes.create_string_buffer(struct.pack("=QQ", data, 1))
        message = struct.pack("=QI4xQQ16xI4xI4x", to, 16, ctypes.addressof(self._parts), 1, 0, 0)
        self._messages = ctypes.create_string_buffer(message * _AT_ONCE)

    def send(self, descriptor: int, count: int) -> None:
        while count > 0:
            sent = _libc.sendmmsg(descriptor, self._messages, min(count, _AT_ONCE), 0)
            assert sent > 0, os.strerror(ctypes.get_errno())
            count -= sent


class _Place:
    """A namespace."""

    def __init__(self, name: str) -> None:
        self.made, self.credit, self.drops = Made(), 0.0, 0.0
        self._descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
        self.enter()
        self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = self._listener.getsockname()

    def enter(self) -> None:
        if _libc.setns(self._descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    def refused(self) -> None:
        with socket.socket() as one:
            one.connect_ex(("127.0.0.1", _PORT))

    def connections(self) -> None:
        with socket.create_connection(self._address), self._listener.accept()[0]:
            pass

    def programs(self) -> None:
        os.waitpid(os.posix_spawn(_PROGRAM, [_PROGRAM], {}), 0)


_PROGRAM = shutil.which("true") or "true"


class _Flood:
    def __init__(self, names: list[str]) -> None:
        self.places = [_Place(name) for name in names]
        ranks = [1 / rank for rank in range(1, len(names))]
        self._shares = [HEAVY, *((1 - HEAVY) * rank / sum(ranks) for rank in ranks)]
        self._datagrams = _Datagrams()
        self._due = {(what, heavy): 0.0 for what in _MOST for heavy in (False, True)}

    def phase(self, rate: float, seconds: float) -> tuple[float, float]:
        """Make events; give when it began and ended."""
        began = end = time.monotonic()
        while end < began + seconds:
            end += _TICK
            self._tick(rate * _TICK, end)
            time.sleep(max(0.0, end - time.monotonic()))
            end = max(end, time.monotonic() - _TICK)
        return began, time.monotonic()

    def _tick(self, events: float, end: float) -> None:
        for (what, heavy), due in self._due.items():
            share, most = _MOST[what]
            self._due[what, heavy] = due + min(events * share, most * _TICK) * (HEAVY if heavy else 1 - HEAVY)
        for place, share in zip(self.places, self._shares, strict=True):
            place.credit += events * share
        lights = sorted(self.places[1:], key=lambda place: -place.credit)[:_VISITS]
        for place in (*lights, self.places[0]):
            amount, place.credit = int(place.credit), place.credit % 1
            if amount:
                self._visit(place, amount, end)

    def _visit(self, place: _Place, amount: int, end: float) -> None:
        heavy = place is self.places[0]
        place.enter()
        for what in _MOST:
            do = getattr(place, what)
            while self._due[what, heavy] >= 1:
                self._due[what, heavy] -= 1
                do()
                setattr(place.made, what, getattr(place.made, what) + 1)
        place.drops += amount * _DROPS
        drops, place.drops = int(place.drops), place.drops % 1
        self._datagrams.send(place.sender.fileno(), drops)
        place.made.drops += drops
        calls = amount - drops
        while calls > 0 and (time.monotonic() < end or not heavy):
            some = min(calls, _CALLS)
            for _ in range(some):
                os.getppid()
            place.made.calls += some
            calls -= some


@contextlib.contextmanager
def namespaces(prefix: str, count: int) -> Iterator[list[str]]:
    """Make namespaces, each with its loopback up; give their names."""
    from netns import ip  # noqa: PLC0415 - the program itself does without pytest

    names = [f"{prefix}{number}" for number in range(count)]
    with contextlib.ExitStack() as made:
        for name in names:
            ip("netns", "add", name)
            made.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        yield names


@contextlib.contextmanager
def senders(
    count: int, phases: Sequence[tuple[float, float]], names: Sequence[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run the program so often; they share the rates of the phases (events per second, seconds). Give them ready."""
    command = [sys.executable, __file__, *(f"{rate / count}:{seconds}" for rate, seconds in phases), *names]
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for one in running:
            assert one.stdout
            assert "ready" in one.stdout.readline()
        yield running


def begin(running: Sequence[subprocess.Popen[str]]) -> None:
    """Let them begin."""
    for one in running:
        assert one.stdin
        one.stdin.write("\n")
        one.stdin.flush()


def main() -> None:
    """Make what the command line says."""
    phases = [tuple(map(float, one.split(":"))) for one in sys.argv[1:] if ":" in one]
    flood = _Flood(names := sys.argv[1 + len(phases) :])
    print(json.dumps({"ready": os.getpid()}), flush=True)
    sys.stdin.readline()
    times = [flood.phase(rate, seconds) for rate, seconds in phases]
    made = {name: asdict(place.made) for name, place in zip(names, flood.places, strict=True)}
    print(json.dumps({"phases": times, "made": made}), flush=True)


if __name__ == "__main__":
    main()
