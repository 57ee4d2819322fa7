"""HTTP: answers scrapers and people from an application, and stays answerable beside slow, idle and hostile clients.

Flows in: an address and an `Application` (what to say). Flows out: HTTP/1.1 responses; what had to be dropped is
counted. One thread per connection, every wait on a client has a total deadline, every number of things has a bound.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Protocol

from exporter.http1 import Connection, Refused, Request, Response, parse, said

_LOG = logging.getLogger(__name__)

IDLE_TIMEOUT = 120.0
"""Seconds that a connection may rest between two requests: longer than the usual scrape intervals."""
_STOP_GRACE = 2.0
_STOP_LIMIT = 5.0

_PAGE = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_REMEDIES = {
    errno.EADDRINUSE: "another program listens there; stop it or choose another address",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE; choose a higher port",
    errno.EADDRNOTAVAIL: "that is not an address of this host; leave the host part empty to listen on every address",
}


class Application(Protocol):
    """What is served. Every method is called from several threads at once."""

    def metrics(self, accept: str, accept_encoding: str) -> tuple[dict[str, str], bytes]:
        """Give headers (Content-Type, Content-Encoding, Vary) and body of a scrape for the two request headers."""

    def healthy(self) -> tuple[bool, str]:
        """Say whether every monitor's heartbeat is young, and explain it in plain text, a line per monitor."""

    def ready(self) -> tuple[bool, str]:
        """Say whether every monitor had its first full pass, and explain it in plain text, a line per monitor."""

    def page(self) -> str:
        """Give the landing page as HTML."""


class _Client(Connection):
    """A live connection, its thread and its place in the queue of those that may be ended."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        super().__init__(sock)
        self.address = address.removeprefix("::ffff:")
        self.thread: threading.Thread | None = None
        # Both are guarded by the lock of _Connections. None: a request is being answered.
        self.waiting_since: float | None = time.monotonic()
        self.evicted = False


class _Connections:
    """The live connections, at most `limit`: the longest waiting for a request makes room for a new one."""

    def __init__(self, limit: int, dropped: Callable[[str], None]) -> None:
        self._limit = limit
        self._dropped = dropped
        self._live: set[_Client] = set()
        self._changed = threading.Condition()

    def admit(self, connection: _Client) -> bool:
        """Register a connection; False when every place is taken by one that is being answered."""
        deadline = time.monotonic() + 1.0
        with self._changed:
            while len(self._live) >= self._limit:
                if not any(live.evicted for live in self._live) and not self._evict():
                    return False
                if not self._changed.wait(deadline - time.monotonic()):
                    return False
            self._live.add(connection)
        return True

    def _evict(self) -> bool:
        """End the connection that has waited longest for a request. The lock is held."""
        waiting = [live for live in self._live if live.waiting_since is not None and not live.evicted]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda live: live.waiting_since or 0.0)
        oldest.evicted = True
        oldest.abort()
        self._dropped("idle")
        return True

    def make_room(self) -> None:
        """End one waiting connection, for its descriptor."""
        with self._changed:
            self._evict()

    def answering(self, connection: _Client) -> bool:
        """Note that a request has come; False when the connection was ended to make room."""
        with self._changed:
            connection.waiting_since = None
            return not connection.evicted

    def waiting(self, connection: _Client) -> None:
        """Note that the connection waits for its next request."""
        with self._changed:
            connection.waiting_since = time.monotonic()

    def remove(self, connection: _Client) -> None:
        """Forget a connection that is closed."""
        with self._changed:
            self._live.discard(connection)
            self._changed.notify_all()

    def end(self) -> list[_Client]:
        """End those that wait at once, the others after a grace; give those that were live, to be joined."""
        with self._changed:
            live = list(self._live)
            for connection in live:
                connection.evicted = True
                if connection.waiting_since is not None:
                    connection.abort()
            self._changed.wait_for(lambda: not self._live, _STOP_GRACE)
            for connection in self._live:
                connection.abort()
        return live


def bind(address: str) -> socket.socket:
    """Listen on `host:port`, `[ipv6]:port` or `:port` (every address of both families). Raises OSError, ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 0xFFFF:  # noqa: PLR2004 - highest TCP port
        raise ValueError(
            f"listen address {address!r}: expected host:port, [ipv6]:port or :port with a port up to 65535"
        )
    host = host.removeprefix("[").removesuffix("]")
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", int(port)), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
            except OSError as error:  # IPv6 may be compiled in but switched off: then IPv4 alone will do
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
        family, _, _, _, target = socket.getaddrinfo(
            host or "0.0.0.0",  # noqa: S104 - an empty host asks for every address
            int(port),
            type=socket.SOCK_STREAM,
        )[0]
        return socket.create_server(target[:2], family=family, backlog=1024)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the address")
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise OSError(error.errno, f"cannot listen on {address} ({reason}): {remedy}") from error


class Server:
    """Serves an application on one address until it is stopped."""

    def __init__(  # noqa: PLR0913 - each is a limit that a test or a user may set
        self,
        address: str,
        application: Application,
        *,
        dropped: Callable[[str], None],
        max_connections: int = 512,
        request_timeout: float = 10.0,
        response_timeout: float = 30.0,
        topology: Callable[[], Mapping[str, object]] | None = None,
        answered: Callable[[str, Request, Response], None] | None = None,
    ) -> None:
        """Prepare a server; nothing is bound yet.

        `dropped` is called, from any thread, with the reason for each connection that was ended early: `idle` (made
        room for another), `limit` (refused, as all were busy), `slow` (sent or read too slowly), `error` (the
        application failed). Timeouts are in seconds and total: for a request's head, and for sending a response.
        `topology` gives what is served as `/topology.json`; without it that path is not found. `answered` is told of
        each request with the client's address, once the response is sent; it must not block.
        """
        self.address: tuple[str, int] = ("", 0)
        self._wanted = address
        self._application = application
        self._dropped = dropped
        self._request_timeout = request_timeout
        self._response_timeout = response_timeout
        self._connections = _Connections(max_connections, dropped)
        self._topology = topology
        self._answered = answered
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Bind and serve in an owned thread. Raises OSError naming address and remedy, ValueError for a bad address."""
        self._listener = listener = bind(self._wanted)
        listener.settimeout(5.0)
        self.address = listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, args=(listener,), name="web", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening, let answers in progress end for two seconds, join every thread; five seconds at most."""
        if self._listener is None or self._thread is None:
            return
        deadline = time.monotonic() + _STOP_LIMIT
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(1.0)
        self._listener.close()
        for connection in self._connections.end():
            if connection.thread is not None:
                connection.thread.join(max(0.0, deadline - time.monotonic()))

    def _accept(self, listener: socket.socket) -> None:
        """Take connections until the listener is shut down."""
        while not self._stopping.is_set():
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._stopping.is_set():
                    return
                _LOG.warning("web: cannot accept a connection: %s; one that waits is closed", error)
                self._connections.make_room()
                self._stopping.wait(0.1)
                continue
            self._admit(_Client(sock, str(peer[0])))

    def _admit(self, connection: _Client) -> None:
        """Give a connection its thread, or refuse it where there is no place or no thread for it."""
        if self._connections.admit(connection):
            connection.thread = threading.Thread(target=self._serve, args=(connection,), name="web-client", daemon=True)
            try:
                connection.thread.start()
            except RuntimeError as error:  # the limit of tasks of our cgroup
                _LOG.warning("web: no thread for a connection: %s; raise the limit of tasks", error)
                connection.thread = None
                self._connections.remove(connection)
            else:
                return
        self._dropped("limit")
        refusal = said(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections; try again.")
        with connection.sock, contextlib.suppress(OSError):
            connection.send(refusal, close=True, body=True, timeout=0.05)

    def _serve(self, connection: _Client) -> None:
        """Run one connection to its end, in its own thread."""
        try:
            with connection.sock:
                self._converse(connection)
        except OSError as error:
            _LOG.debug("web: connection lost: %s", error)
        finally:
            self._connections.remove(connection)

    def _converse(self, connection: _Client) -> None:
        """Answer request after request. Raises OSError when the connection is lost."""
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        idle = self._request_timeout
        try:
            while self._exchange(connection, idle) and not self._stopping.is_set():
                self._connections.waiting(connection)
                idle = IDLE_TIMEOUT
        except TimeoutError:
            connection.discard()
            self._dropped("slow")

    def _exchange(self, connection: _Client, idle: float) -> bool:
        """Answer one request; False when the connection is to end. Raises TimeoutError when the client reads slowly."""
        request: Request | None = None
        try:
            head = connection.read_head(idle, self._request_timeout)
            if not head or not self._connections.answering(connection):
                return False
            request = parse(head)
            response = self._respond(request)
        except TimeoutError:
            self._dropped("slow")
            response = said(HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")
        except Refused as refused:
            response = said(refused.status, str(refused))
        keep = request is not None and request.keep_alive and response.status < HTTPStatus.INTERNAL_SERVER_ERROR
        body = request is None or request.method != "HEAD"
        connection.send(response, close=not keep, body=body, timeout=self._response_timeout)
        if request is not None and self._answered is not None:
            self._answered(connection.address, request, response)
        if request is None or request.body:
            self._connections.waiting(connection)  # it may make room again
            connection.linger()
        return keep

    def _respond(self, request: Request) -> Response:
        """Route a request. A failure of the application is an answer too: counted, logged, without details outside."""
        if request.method not in ("GET", "HEAD"):
            refusal = said(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD are served.")
            return Response(refusal.status, refusal.body, {**refusal.headers, "Allow": "GET, HEAD"})
        try:
            return self._route(request)
        except Refused:
            raise
        except Exception:  # noqa: BLE001 - whatever fails in the application, the client gets an answer
            _LOG.exception("web: %s %s failed", request.method, request.path)
            self._dropped("error")
            return said(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; the exporter's log has the details.")

    def _route(self, request: Request) -> Response:
        """Ask the application. Raises whatever it raises."""
        match request.path:
            case "/metrics":
                wanted = (request.headers.get(name, "") for name in ("accept", "accept-encoding"))
                headers, body = self._application.metrics(*wanted)
                return Response(HTTPStatus.OK, body, headers)
            case "/-/healthy" | "/-/ready":
                good, text = self._application.healthy() if request.path == "/-/healthy" else self._application.ready()
                return said(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, text.rstrip("\n"))
            case "/":
                return Response(HTTPStatus.OK, self._application.page().encode(), _PAGE)
            case "/topology.json" if self._topology is not None:
                body = json.dumps(self._topology(), ensure_ascii=False).encode()
                return Response(HTTPStatus.OK, body, {"Content-Type": "application/json"})
        return said(HTTPStatus.NOT_FOUND, "Not found. There are /, /metrics, /-/healthy and /-/ready.")
