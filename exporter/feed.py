"""The live feed: every kept event as it happens, to each reader of a local socket that wants it.

Flows in: events from the admission, and from each reader one line that says which of them it wants. Flows out: JSON
lines: at the start `{"following": …}` or `{"error": …}`, then events, and `{"lost": N}` where a reader was too slow. It
loses its own events and nobody else's.
"""

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from exporter.contract import Families
from exporter.feed_protocol import Filter, Named, encoded, parse_filter
from exporter.load.admission import Admission, KeptEvent, Tapping

log = logging.getLogger(__name__)

READERS = 16
"""Readers at most."""
QUEUE = 4096
"""Events that wait for a reader at most."""
REQUEST_LIMIT = 64 * 1024
"""Bytes of a reader's request at most."""

_REQUEST_TIMEOUT = 5.0  # seconds that a reader has to say what it wants
_PATIENCE = 30.0  # seconds without taking a byte, after which a reader is cut
_STOP = 2.0  # seconds that readers get to end
_AT_ONCE = 64  # events that are sent in one go

NamesOf = Callable[[str, str], tuple[str, str, str]]
"""Namespace, pod and container for (netns_id, container_id)."""


class _Gone(Exception):  # noqa: N818 - the usual end of a reader
    """The reader is not there any more, or is to end."""


class _Reader:
    """One reader: its socket, its queue, its thread."""

    def __init__(self, sock: socket.socket, lost: Callable[[int], None]) -> None:
        self.filter: Filter | None = None
        """None until it has said what it wants."""
        self.thread: threading.Thread | None = None
        self._sock = sock
        self._count_lost = lost
        self._queue: deque[Named] = deque()
        self._lost = 0
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ending = False

    @property
    def classes(self) -> frozenset[str]:
        """Classes of events that it wants."""
        wanted = self.filter
        return frozenset() if wanted is None else wanted.classes

    def offer(self, event: Named) -> None:
        """Queue an event that is wanted, or count it as lost. From any thread; does not block."""
        wanted = self.filter
        if wanted is None or not wanted.admits(event):
            return
        with self._lock:
            if len(self._queue) >= QUEUE:
                self._lost += 1
                return
            self._queue.append(event)
            if len(self._queue) == 1 and self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def end(self) -> None:
        """Make the thread end soon. From any thread."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # ends a send that blocks, and is a hang-up for poll

    def run(self, begin: Callable[[], None]) -> None:
        """Serve the reader to its end; `begin` is called when it is known what it wants."""
        try:
            self._converse(begin)
        except (OSError, _Gone) as error:
            log.debug("feed: a reader is gone: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Release everything. Called once, by the thread where there is one."""
        self.filter = None
        with self._lock:
            os.close(self._wake)
            self._wake = -1
            lost, self._lost = self._lost, 0
        self._count_lost(lost)
        self._sock.close()

    def refuse(self, reason: str) -> None:
        """Say why there is nothing to read, if the reader takes it at once."""
        with contextlib.suppress(OSError):
            self._sock.send(encoded({"error": reason}), socket.MSG_DONTWAIT)

    def _converse(self, begin: Callable[[], None]) -> None:
        try:
            wanted = parse_filter(self._request())
        except ValueError as error:
            self.refuse(str(error))
            return
        self.filter = wanted
        begin()
        shown = {"class": sorted(wanted.classes), "pod": wanted.pod, "container": wanted.container}
        self._send(encoded({"following": shown}))
        waiting = select.poll()
        waiting.register(self._sock, 0)  # a hang-up is always told
        waiting.register(self._wake, select.POLLIN)
        while True:
            if any(descriptor != self._wake for descriptor, _ in waiting.poll()):
                raise _Gone("it hung up")
            self._deliver()

    def _request(self) -> bytes:
        """Read the first line. Raises ValueError where it is too long or too late."""
        deadline = time.monotonic() + _REQUEST_TIMEOUT
        request = b""
        while b"\n" not in request:
            if len(request) > REQUEST_LIMIT:
                raise ValueError(f"the request is longer than {REQUEST_LIMIT} bytes")
            try:
                self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
                more = self._sock.recv(REQUEST_LIMIT)
            except TimeoutError:
                raise ValueError(f"no request within {_REQUEST_TIMEOUT:g} s") from None
            if not more:
                raise _Gone("it asked for nothing")
            request += more
        return request.partition(b"\n")[0]

    def _deliver(self) -> None:
        """Send what waits, then how much was lost behind it."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            events, self._queue = self._queue, deque()
            lost, self._lost = self._lost, 0
        if lost:
            self._count_lost(lost)
        while events:
            self._send(b"".join(events.popleft().line() for _ in range(min(len(events), _AT_ONCE))))
        if lost:
            self._send(encoded({"lost": lost}))

    def _send(self, data: bytes) -> None:
        """Send all. Raises _Gone where the reader takes nothing for too long, OSError where it is gone."""
        self._sock.settimeout(_PATIENCE)
        rest = memoryview(data)
        while rest:
            if self._ending:
                raise _Gone("the feed ends")
            try:
                rest = rest[self._sock.send(rest) :]
            except TimeoutError:
                log.warning("feed: a reader took nothing for %g s and is cut", _PATIENCE)
                raise _Gone("it took nothing") from None


def _bind(path: Path) -> socket.socket:
    """Listen on a socket for our own user alone, in place of one that nobody listens on any more. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "something else than a socket has this name")
        if _is_alive(path):
            raise OSError(errno.EADDRINUSE, "another exporter has its feed there")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the socket's file is made with these permissions
        listener.bind(str(path))
        listener.listen(READERS)
    except OSError:
        listener.close()
        raise
    return listener


def _is_alive(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except (TimeoutError, BlockingIOError):
            return True
    return True


@dataclass(slots=True)
class Feed:
    """The socket and its readers."""

    path: Path
    admission: Admission
    families: Families
    """Writer for the families of owner `feed`."""
    names: NamesOf
    clean: Callable[[str], str]
    """What a text may be shown as."""
    shows: Callable[[str], bool] = lambda _: True
    """Whether events of a Kubernetes namespace are shown."""
    _readers: set[_Reader] = field(default_factory=set)
    _following: tuple[_Reader, ...] = ()
    """Those that have said what they want."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listener: socket.socket | None = None
    _inode: int = 0
    _thread: threading.Thread | None = None
    _tapping: Tapping | None = None

    def start(self) -> bool:
        """Listen. Where that cannot be had, the answer is False, with a warning: the exporter does without."""
        self.families.add("cni_exporter_feed_lost_total", (), 0)
        try:
            self._listener = _bind(self.path)
            self._inode = self.path.stat().st_ino
        except OSError as error:
            reason = error.strerror or str(error)
            log.warning("no live feed at %s: %s (set feed.socket, or feed.enabled to false)", self.path, reason)
            self._publish()
            return False
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), name="feed", daemon=True)
        self._thread.start()
        self._publish()
        return True

    def stop(self) -> None:
        """End every reader, remove the socket; within two seconds."""
        listener, self._listener = self._listener, None
        if listener is None or self._thread is None:
            return
        deadline = time.monotonic() + _STOP
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join(_STOP)
        listener.close()
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            reader.end()
        for reader in readers:
            if reader.thread:
                reader.thread.join(max(0.0, deadline - time.monotonic()))
        self._publish()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if self._listener is listener:
                    log.warning("feed: cannot accept a reader: %s", error)
                    time.sleep(0.1)
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        """Give a reader its thread, or refuse it."""
        reader = _Reader(sock, self._count_lost)
        with self._lock:
            room = len(self._readers) < READERS
            if room:
                self._readers.add(reader)
        reader.thread = threading.Thread(target=self._serve, args=(reader,), name="feed-reader", daemon=True)
        if room:
            try:
                reader.thread.start()
            except RuntimeError as error:  # the limit of tasks of our cgroup
                log.warning("feed: no thread for a reader: %s; raise the limit of tasks", error)
            else:
                return
            self._forget(reader)
        reader.refuse(f"{READERS} readers are connected already: end one of them and try again")
        reader.close()

    def _serve(self, reader: _Reader) -> None:
        try:
            reader.run(self._publish)
        finally:
            self._forget(reader)

    def _forget(self, reader: _Reader) -> None:
        with self._lock:
            self._readers.discard(reader)
        self._publish()

    def _publish(self) -> None:
        """Tap the admission while somebody reads, and say how many do."""
        with self._lock:
            self._following = tuple(reader for reader in self._readers if reader.filter is not None)
            classes: frozenset[str] = frozenset().union(*(reader.classes for reader in self._following))
            if self._following and self._tapping is None:
                self.names("", "")  # who is there now is known by name also when its end is the first event
                self._tapping = self.admission.tap(self._offer, ())
            if self._tapping:
                self._tapping.want(classes)
            if not self._following:
                self._tapping = None
            self.families.replace(
                {
                    "cni_exporter_feed_up": {(): float(self._listener is not None)},
                    "cni_exporter_feed_readers": {(): float(len(self._following))},
                }
            )

    def _offer(self, event: KeptEvent) -> None:
        """Name an event and offer it to each reader; in the thread of its monitor."""
        names = self.names(event.netns, event.container_id)
        if names[1] and not self.shows(names[0]):
            return
        named = Named(event, names, self.clean)
        for reader in self._following:
            reader.offer(named)

    def _count_lost(self, count: int) -> None:
        if count:
            self.families.add("cni_exporter_feed_lost_total", (), count)
