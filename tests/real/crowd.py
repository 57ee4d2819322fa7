"""Bad clients for a test: 500 that say nothing, one that takes a byte a second, 32 that scrape without a pause.

Flows in: a port of loopback. Flows out: "ready" on standard output once all are connected. Ends by itself after 60 s.
"""

import socket
import sys
import threading
import time

IDLE, SCRAPERS, SECONDS = 500, 32, 60
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def scrape_on(address: tuple[str, int], end: float) -> None:
    while time.monotonic() < end:
        try:
            with socket.create_connection(address, 10) as client:
                client.sendall(REQUEST)
                while client.recv(65536):
                    pass
        except OSError:
            time.sleep(0.05)


def sip(address: tuple[str, int], end: float) -> None:
    with socket.create_connection(address, 10) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.sendall(REQUEST)
        while time.monotonic() < end and client.recv(1):
            time.sleep(1)


def main() -> None:
    address, end = ("127.0.0.1", int(sys.argv[1])), time.monotonic() + SECONDS
    idle = [socket.create_connection(address, 10) for _ in range(IDLE)]
    for target in (sip, *[scrape_on] * SCRAPERS):
        threading.Thread(target=target, args=(address, end), daemon=True).start()
    time.sleep(0.5)
    print("ready", flush=True)
    time.sleep(max(end - time.monotonic(), 0))
    del idle


main()
