"""Docker's stream of events: a connection and a thread of its own, and a bounded queue.

Flows in: the daemon's Unix socket. Flows out: events, in order, for whoever takes them; it is woken for each.
"""

import http.client
import json
import queue
import socket
import threading
from urllib.parse import quote

from exporter.contract import Context
from exporter.monitors.runtimes.docker_answers import ACTIONS, Event, read_event

TIMEOUT = 5.0
"""Seconds that the daemon may take for an answer."""

_QUEUE = 2048
_LINE = 1 << 20
"""Bytes of one event; a container's labels are all in it."""


class EventStream:
    """The daemon's events, read by a thread of its own into a bounded queue.

    A plain HTTP connection, because the read must be without a timeout (events may be hours apart), the answer to the
    request must not be, and the end must be possible at any moment.
    """

    def __init__(self, path: str, version: str, since: int, context: Context) -> None:
        """Subscribe to what happens from `since` (Unix time in nanoseconds). Raises OSError where nobody answers."""
        self._context = context
        self._queue: queue.Queue[Event] = queue.Queue(_QUEUE)
        self._overflow = threading.Event()
        self._closing = False
        self.ended = False
        self.reason = ""
        self._connection = _UnixConnection(path)
        try:
            self._response = self._subscribe(version, since)
        except Exception:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._run, name="docker-events", daemon=True)
        self._thread.start()

    def take(self) -> list[Event]:
        """Take what has come since the last call."""
        return [self._queue.get_nowait() for _ in range(self._queue.qsize())]

    def overflowed(self) -> bool:
        """Tell, once, whether events were shed."""
        overflow = self._overflow.is_set()
        self._overflow.clear()
        return overflow

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        self._connection.shutdown()
        self._thread.join(TIMEOUT)
        self._response.close()
        self._connection.close()

    def _subscribe(self, version: str, since: int) -> http.client.HTTPResponse:
        wanted = {"type": ["container", "network"], "event": ACTIONS}
        moment = f"{since // 10**9}.{since % 10**9:09d}"
        self._connection.request("GET", f"/v{version}/events?since={moment}&filters={quote(json.dumps(wanted))}")
        response = self._connection.getresponse()
        if response.status != http.client.OK:
            raise ConnectionError(f"Docker refused its event stream with HTTP status {response.status}")
        self._connection.wait_forever()
        return response

    def _run(self) -> None:
        try:
            while line := self._response.readline(_LINE + 1):
                if len(line) > _LINE:
                    self._skip()
                    continue
                self._take_in(line)
            self.reason = "the connection was closed"
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.reason = f"{type(error).__name__}: {error}"
        self.ended = True
        if not self._closing:
            self._context.wake()

    def _skip(self) -> None:
        """Leave out the rest of a line that is too long; the list tells what it would have."""
        self._context.error("docker_event", f"an event of more than {_LINE} bytes")
        self._overflow.set()
        while (line := self._response.readline(_LINE)) and not line.endswith(b"\n"):
            pass

    def _take_in(self, line: bytes) -> None:
        try:
            event = read_event(json.loads(line))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            self._context.error("docker_event", f"an event cannot be read: {type(error).__name__}")
            return
        if event is None:
            return
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._overflow.set()
            self._context.dropped()
        self._context.wake()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def connect(self) -> None:
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(self._path)
        self.sock = self._socket

    def wait_forever(self) -> None:
        self._socket.settimeout(None)

    def shutdown(self) -> None:
        """Wake whoever reads."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the daemon was faster

    def close(self) -> None:
        super().close()
        self._socket.close()
