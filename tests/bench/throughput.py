"""One TCP stream over the loopback device: how long some gigabytes take.

Flows in: bytes. Flows out: seconds. One thread sends a piece and receives it again, so that the kernel does nearly all
the work and no scheduler decides who waits for whom: two processes differ by a fifth from one transfer to the next.
"""

import socket
import subprocess
import sys
import time

_BUFFER = 1 << 18
_FIRST = 1 << 28  # bytes that are not timed: until windows and caches are what they will be


def transfer_seconds(size: int) -> float:
    """Send `size` bytes in a process of its own; seconds on the clock. Raises CalledProcessError, TimeoutExpired."""
    command = [sys.executable, __file__, str(size)]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _transfer(size: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname(), timeout=60)
        receiver, _ = listener.accept()
    with sender, receiver:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _BUFFER)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * _BUFFER)
        _stream(sender, receiver, _FIRST)
        began = time.perf_counter()
        _stream(sender, receiver, size)
        print(time.perf_counter() - began)


def _stream(sender: socket.socket, receiver: socket.socket, size: int) -> None:
    piece, buffer = bytes(_BUFFER), bytearray(_BUFFER)
    for _ in range(size // _BUFFER):
        sender.sendall(piece)
        left = _BUFFER
        while left:
            left -= receiver.recv_into(buffer, left)


if __name__ == "__main__":
    _transfer(int(sys.argv[1]))
