"""HTTP/1.1 on one connection: reads request heads and sends responses, each within a total deadline.

Flows in: a connected socket. Flows out: `Request`s, or `Refused` for what is malformed, too large or no HTTP; the
caller's `Response`s, on the wire. Knows nothing of routes and of other connections.
"""

import contextlib
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import urlsplit

HEAD_LIMIT = 16 * 1024
"""Bytes of request line and headers together; Prometheus sends about 400."""
HEADER_LIMIT = 100
_LINGER = 1.0
_SMALL = 16 * 1024
_LINGER_BYTES = 64 * 1024

_TEXT = "text/plain; charset=utf-8"
_COMMON = {"Server": "cni-exporter", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
# RFC 9112, sections 3 and 5, and the token of RFC 9110, section 5.6.2.
_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~]+) HTTP/([0-9])\.([0-9])")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


class Refused(Exception):  # noqa: N818 - an answer to the client
    """A request that is answered without asking the application."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        """Say with which status, and why in a sentence for the client."""
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name; repeated ones joined by a comma."""
    keep_alive: bool
    body: bool
    """A body follows, which is never read: the connection ends, so that it is not taken for the next request."""


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back. `Content-Length` and the headers common to all are added when it is sent."""

    status: HTTPStatus
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": _TEXT})


def said(status: HTTPStatus, text: str) -> Response:
    """Make a plain-text response of one line."""
    return Response(status, f"{text}\n".encode())


def _parse_headers(lines: list[str]) -> dict[str, str]:
    """Parse header lines. Raises Refused for too many, for folded lines and for control characters."""
    if len(lines) > HEADER_LIMIT:
        raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"More than {HEADER_LIMIT} request headers.")
    headers: dict[str, str] = {}
    for line in lines:
        match = _HEADER.fullmatch(line)
        if match is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "A request header is malformed; expected 'Name: value'.")
        name, value = match[1].lower(), match[2].rstrip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def parse(head: bytes) -> Request:
    """Parse a request's head, without its empty line. Raises Refused when it is not HTTP/1.x."""
    line, *rest = head.decode("latin-1").split("\r\n")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "The request line is malformed; expected 'GET /path HTTP/1.1'.")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "Only HTTP/1.0 and HTTP/1.1 are spoken here.")
    headers = _parse_headers(rest)
    if minor != "0" and "host" not in headers:
        raise Refused(HTTPStatus.BAD_REQUEST, "HTTP/1.1 requests need a Host header.")
    try:
        path = urlsplit(target).path
    except ValueError:
        raise Refused(HTTPStatus.BAD_REQUEST, "The request target is malformed.") from None
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    persistent = "keep-alive" in options if minor == "0" else "close" not in options
    return Request(method, path, headers, persistent and not body, body)


class Connection:
    """One client. Used by its own thread; only `abort` may be called from another."""

    def __init__(self, sock: socket.socket) -> None:
        """Take a connected socket; whoever gave it closes it."""
        self.sock = sock
        self._buffer = b""

    def read_head(self, idle: float, timeout: float) -> bytes:
        """Receive a request's head; empty when the client closed or never began within `idle` seconds.

        `timeout` bounds in total the seconds from the first byte to the end of the head, at whatever pace bytes come.
        Raises TimeoutError when it is over, Refused when the head is too large or no HTTP at all.
        """
        begun = bool(self._buffer)
        deadline = time.monotonic() + (timeout if begun else idle)
        while True:
            self._buffer = self._buffer.lstrip(b"\r\n")
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            self._check(head)
            if end:
                self._buffer = rest
                return head
            try:
                chunk = self._receive(deadline)
            except TimeoutError:
                if begun:
                    raise
                return b""
            if not chunk:
                return b""
            if not begun:
                begun, deadline = True, min(deadline, time.monotonic() + timeout)
            self._buffer += chunk

    @staticmethod
    def _check(head: bytes) -> None:
        """Refuse early what can become no request."""
        if len(head) > HEAD_LIMIT:
            raise Refused(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"The request head is over {HEAD_LIMIT // 1024} KiB."
            )
        if head and not 0x21 <= head[0] <= 0x7E:  # noqa: PLR2004 - first and last visible ASCII character
            raise Refused(HTTPStatus.BAD_REQUEST, "This is not HTTP; a TLS client must use http:// here.")

    def _receive(self, deadline: float) -> bytes:
        """Receive what is there, at the latest until `deadline`. Raises TimeoutError."""
        self.sock.settimeout(_remaining(deadline))
        return self.sock.recv(4096)

    def send(self, response: Response, *, close: bool, body: bool, timeout: float) -> None:
        """Send a response within `timeout` seconds in total. Raises TimeoutError."""
        headers = {**_COMMON, **response.headers, "Date": formatdate(usegmt=True)}
        headers["Content-Length"] = str(len(response.body))
        if close:
            headers["Connection"] = "close"
        lines = [
            f"HTTP/1.1 {response.status.value} {response.status.phrase}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        deadline = time.monotonic() + timeout
        head = "\r\n".join((*lines, "", "")).encode("latin-1")
        content = response.body if body else b""
        # A large body stays apart: a hundred slow readers of the same scrape would hold a hundred copies of it.
        for data in (head + content,) if len(content) < _SMALL else (head, content):
            view = memoryview(data)
            while view:
                # Not sendall: its timeout is total on a plain socket, but counts anew for each record under TLS.
                self.sock.settimeout(_remaining(deadline))
                view = view[self.sock.send(view) :]

    def linger(self) -> None:
        """End our side and read on for a moment: closing over unread bytes would reset, and lose the response."""
        deadline, read = time.monotonic() + _LINGER, 0
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while read < _LINGER_BYTES and (chunk := self._receive(deadline)):
                read += len(chunk)

    def discard(self) -> None:
        """Make the close a reset, so that the kernel keeps no unsent bytes for a client that does not read."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def abort(self) -> None:
        """Wake the connection's thread out of any wait, to its end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


def _remaining(deadline: float) -> float:
    """Give the seconds left. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
