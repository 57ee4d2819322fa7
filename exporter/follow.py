"""The other end of the live feed: follows a running exporter's events, for the command `cni-exporter events`.

Flows in: a socket's path, what is wanted, how long. Flows out: the records of the feed, and lines for people.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from exporter.feed_protocol import default_socket

Record = Mapping[str, Any]
"""A line of the feed."""

_SYSTEM = Path("/run/cni-exporter/events.sock")
_CONNECT = 5.0  # seconds to connect and to say what is wanted
_LINE = 4 * 1024 * 1024  # bytes of a line at most
_NOTES = {"error", "following", "lost"}
_FIELDS = {"time", "class", "kind", "namespace", "pod", "container", "netns", "pid", "command", "weight", "details"}
_WIDTHS = (12, 16, 32, 14)  # columns of time, class, workload, kind


class Ended(Exception):  # noqa: N818 - the end of a feed is no fault of ours
    """The feed cannot be followed, or not any longer; the text says why and what to do."""


def find_socket() -> Path:
    """Give the socket to look at: our own exporter's where there is one, else the system's."""
    with contextlib.suppress(OSError):
        own = default_socket()
        if own.exists():
            return own
    return _SYSTEM


def follow(path: Path, request: Mapping[str, object], seconds: float | None = None) -> Iterator[Record]:
    """Give the feed's records as they come; for `seconds`, else without end. Raises Ended.

    The first is `following`; then come events, and `lost` with the number of those that were missed there.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    with _connect(path) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer says why
            sock.sendall(json.dumps(request).encode() + b"\n")
        for line in _lines(sock, deadline):
            record = _read(line)
            if "error" in record:
                raise Ended(f"the exporter refuses: {record['error']}")
            yield record


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_CONNECT)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise Ended(f"cannot follow {path}: {_reason(error)}") from None
    return sock


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no exporter offers its feed there; start one, or name its socket (feed.socket) with --socket"
    if isinstance(error, ConnectionRefusedError):
        return "the exporter that made this socket has ended; start it again"
    if isinstance(error, PermissionError):
        return "it is for the exporter's own user alone; run this command as that user, or as root"
    return f"{error.strerror or error}; is the exporter well?"


def _lines(sock: socket.socket, deadline: float | None) -> Iterator[bytes]:
    """Give lines until the deadline. Raises Ended where the exporter hangs up or talks nonsense."""
    rest = b""
    while True:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            return
        sock.settimeout(remaining)
        try:
            data = sock.recv(256 * 1024)
        except TimeoutError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            raise Ended("the exporter ended, or cut this reader because it was too slow")
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
        if len(rest) > _LINE:
            raise Ended("what answers there is no exporter's feed")


def _read(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not (_NOTES & record.keys() or record.keys() >= _FIELDS):
        raise Ended("what answers there is no exporter's feed")
    return record


def as_text(record: Record) -> str:
    """Write a record as a line for people, the first as the columns' names; times are local."""
    if "following" in record:
        return _columns("time", "class", "workload", "kind", "details")
    if "lost" in record:
        return f"{record['lost']} events were lost here: this reader was too slow"
    at = datetime.fromtimestamp(record["time"]).astimezone()
    details = [f"{name}={value}" for name, value in record["details"].items()]
    if record["command"] or record["pid"]:
        details.append(f"by={record['command']}[{record['pid']}]")
    if record["weight"] != 1:
        details.append(f"weight={record['weight']:.4g}")
    return _columns(
        at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03}",
        record["class"],
        _workload(record),
        record["kind"],
        " ".join(details),
    )


def _workload(record: Record) -> str:
    names = (record["namespace"], record["pod"], record["container"])
    return "/".join(filter(None, names)) or (f"netns {record['netns'].partition(':')[0]}" if record["netns"] else "-")


def _columns(*values: str) -> str:
    return "  ".join([f"{value:{width}}" for value, width in zip(values[:-1], _WIDTHS, strict=True)] + [values[-1]])
