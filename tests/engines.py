"""A small daemon on a Unix socket that speaks the Docker Engine API, well or badly, as a test tells it.

Flows in: containers, events, silence. Flows out: answers as dockerd 20.10 gives them, as far as it is asked.
"""

import http.server
import json
import queue
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

A, B = "a" * 64, "b" * 64
ITEM = {
    "Id": A,
    "Names": ["/other/alias", "/web"],
    "Image": "busybox:1",
    "Created": 1700000000,
    "State": "running",
    "Labels": {"app.name": "shop", "token": "s3cret"},
    "HostConfig": {"NetworkMode": "default"},
    "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "172.17.0.2", "GlobalIPv6Address": "fd00::2"}}},
    "Ports": [
        {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
        {"PrivatePort": 9000, "Type": "udp"},
    ],
    "Mounts": [{"Type": "bind", "Source": "/srv/private", "Destination": "/data", "Mode": "z", "RW": False}],
}


class Daemon(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """An Engine API with the answers that a test gives it."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        super().__init__(path, Handler)
        self.path = path
        self.containers: Any = [ITEM]
        self.inspected: Any = {"Config": {"Env": ["LANG=C", "TOKEN=hunter2"]}}
        self.events: queue.Queue[bytes | None] = queue.Queue()
        self.asked: list[str] = []
        self.silent = threading.Event()
        self.over = threading.Event()

    def happen(self, action: str, container_id: str = A, kind: str = "container", **attributes: str) -> None:
        actor = {"ID": container_id, "Attributes": attributes}
        event = {"Type": kind, "Action": action, "Actor": actor, "timeNano": time.time_ns()}
        self.events.put(json.dumps(event).encode() + b"\n")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as dockerd 20.10 does, as far as it is asked."""

    server: Daemon
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.silent.is_set():
            self.server.over.wait(30)
            return
        path = self.path.partition("?")[0]
        if path.endswith("/events"):
            self._stream()
        elif path.endswith("/version"):
            self._answer({"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "20.10"})
        elif path.endswith("/_ping"):
            self._answer("OK")
        elif path.endswith("/containers/json"):
            self._answer(self.server.containers)
        else:
            self._answer(self.server.inspected)

    def _answer(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while line := self.server.events.get():
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def address_string(self) -> str:
        return "local"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    server = Daemon(str(tmp_path / "d.sock"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.events.put(None)
    server.shutdown()
    server.server_close()
    thread.join(5)
