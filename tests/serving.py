"""A server with an application that tests steer, and clients to treat it badly.

Flows in: options of the server. Flows out: a running `Served` on loopback.
"""

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from exporter.web import Server

TOPOLOGY = {"node": "n", "bridges": []}


class Application:
    """Answers from fields that a test may change."""

    def __init__(self) -> None:
        self.body = b"cni_veths 3\n"
        self.asked: list[tuple[str, str]] = []
        self.good = True
        self.hold = threading.Event()
        self.hold.set()

    def metrics(self, accept: str, accept_encoding: str) -> tuple[dict[str, str], bytes]:
        self.asked.append((accept, accept_encoding))
        self.hold.wait(10)
        return {"Content-Type": "text/plain; version=0.0.4", "Vary": "Accept"}, self.body

    def healthy(self) -> tuple[bool, str]:
        return self.good, "links: netlink\ndocker: api\n"

    ready = healthy

    def page(self) -> str:
        return "<!DOCTYPE html><p>caf\N{LATIN SMALL LETTER E WITH ACUTE}</p>"


class Served:
    """A running server, its application and what it dropped."""

    def __init__(self, address: str = "127.0.0.1:0", **options: float) -> None:
        self.application = Application()
        self.dropped: Counter[str] = Counter()
        self.answered: list[tuple[str, str, int, int]] = []
        """Client, path, status, bytes of each request that was answered."""
        self.server = Server(
            address,
            self.application,
            dropped=lambda reason: self.dropped.update([reason]),
            topology=lambda: TOPOLOGY,
            answered=lambda client, request, response: self.answered.append(
                (client, request.path, int(response.status), len(response.body))
            ),
            **options,  # type: ignore[arg-type] - numbers by name
        )
        self.server.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.server.address, timeout=10)

    def raw(self, data: bytes) -> bytes:
        """Send bytes, end our side, read to the end."""
        with self.connect() as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def get(self, path: str = "/metrics", method: str = "GET") -> http.client.HTTPResponse:
        client = http.client.HTTPConnection(*self.server.address, timeout=10)
        client.request(method, path, headers={"Connection": "close"})
        return client.getresponse()

    def drops(self, reason: str, count: int = 1) -> bool:
        """Wait for drops that another thread counts."""
        return until(lambda: self.dropped[reason] >= count)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
