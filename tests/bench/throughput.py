"""One TCP stream over a veth pair between two network namespaces: how long a gigabyte takes.

Flows in: nothing; root makes the namespaces. Flows out: seconds per transfer. Sender and receiver are processes of this
file's own (`throughput.py send|receive ADDRESS BYTES`), with buffers so large that the kernel does nearly all the work.
"""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

_PORT = 5001
_BUFFER = 1 << 20


@contextlib.contextmanager
def pair() -> Iterator[tuple[str, str]]:
    """Make two namespaces with a veth pair between them, up and with addresses; give their names. Needs root and ip."""
    names = (f"cnib{os.getpid()}a", f"cnib{os.getpid()}b")
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", "v0", "netns", names[0], "type", "veth", "peer", "name", "v0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"192.0.2.{number}/24", "dev", "v0")
            _ip("-n", name, "link", "set", "v0", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30, stderr=subprocess.DEVNULL)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def transfer_cpu_seconds(namespaces: tuple[str, str], size: int) -> float:
    """Do the same; CPU seconds of sender and receiver, the kernel's work for them included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    transfer_seconds(namespaces, size)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def transfer_seconds(namespaces: tuple[str, str], size: int) -> float:
    """Send `size` bytes from the first namespace to the second; seconds between the first and the last received."""
    sender, receiver = namespaces
    command = ["ip", "netns", "exec", receiver, sys.executable, __file__, "receive", "192.0.2.2", str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()  # it listens
        sending = ["ip", "netns", "exec", sender, sys.executable, __file__, "send", "192.0.2.2", str(size)]
        subprocess.run(sending, check=True, timeout=120)
        return float(process.stdout.readline())


def _receive(address: str, size: int) -> None:
    buffer = bytearray(_BUFFER)
    with socket.create_server((address, _PORT)) as listener:
        print("listening", flush=True)
        with listener.accept()[0] as stream:
            left, began = size, 0.0
            while left > 0 and (count := stream.recv_into(buffer)):
                began = began or time.monotonic()
                left -= count
            print(time.monotonic() - began, flush=True)


def _send(address: str, size: int) -> None:
    piece = memoryview(bytes(_BUFFER))
    with socket.create_connection((address, _PORT), timeout=60) as stream:
        for _ in range(size // _BUFFER):
            stream.sendall(piece)


if __name__ == "__main__":
    {"receive": _receive, "send": _send}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
