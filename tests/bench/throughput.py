"""One TCP stream over the loopback device: how long some gigabytes take, by the speed of the machine at that moment.

Flows in: bytes. Flows out: a number without a unit. One thread sends a piece and receives it again, so that the kernel
does nearly all the work and no scheduler decides who waits for whom: two processes differ by a fifth from one transfer
to the next. What is left is the machine, of which others take more at one time than at another: it copies 5 % more or
less from one second to the next. So each few milliseconds as many bytes go through a pair of Unix sockets, which no
program of the exporter's looks at, and CPU seconds of these are what the seconds of the TCP stream are divided by: to
1-2 % the same from one time to the next. Whoever takes the processor away from the stream makes it longer, and not
the other.
"""

import socket
import subprocess
import sys
import time

_PIECE = 1 << 14  # bytes
_TURN = 512  # pieces: some milliseconds
_FIRST = 20  # turns that are not counted: until windows and caches are what they will be

Ends = tuple[socket.socket, socket.socket]


def transfer_time(size: int) -> float:
    """Send `size` bytes in a process of its own; seconds that it took by CPU seconds of a Unix socket's.

    Raises CalledProcessError, TimeoutExpired.
    """
    command = [sys.executable, __file__, str(size)]
    done = subprocess.run(command, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _transfer(size: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname(), timeout=60)
        receiver, _ = listener.accept()
    watched, other = (sender, receiver), socket.socketpair()
    for one, another in (watched, other):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _PIECE)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * _PIECE)
    for _ in range(_FIRST):
        _stream(*watched)
        _stream(*other)
    seconds = machine = 0.0
    for _ in range(size // (_PIECE * _TURN)):
        began = time.perf_counter()
        _stream(*watched)
        between = time.thread_time()
        seconds += time.perf_counter() - began
        _stream(*other)
        machine += time.thread_time() - between
    print(seconds / machine)


def _stream(sender: socket.socket, receiver: socket.socket) -> None:
    piece, buffer = bytes(_PIECE), bytearray(_PIECE)
    for _ in range(_TURN):
        sender.sendall(piece)
        left = _PIECE
        while left:
            left -= receiver.recv_into(buffer, left)


if __name__ == "__main__":
    _transfer(int(sys.argv[1]))
