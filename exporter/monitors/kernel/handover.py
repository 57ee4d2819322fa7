"""What the loader hands to the exporter, and how: JSON and descriptors over a socket pair.

Flows in: a manifest and open descriptors. Flows out: the same in another process (SCM_RIGHTS, unix(7)).
"""

import array
import gc
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_LENGTH = struct.Struct("=II")  # bytes of JSON, number of descriptors
PREFIX = "cni-exporter-"
"""How the name of the loader's private directory begins; its PID follows."""
_PER_MESSAGE = 200  # the kernel takes 253 (SCM_MAX_FD)
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a probe stands, for metrics and people."""

    program: str
    """The probe's name."""
    hook: str = ""
    """Kernel functions or tracepoints, joined by a comma; empty where nothing is attached."""
    rung: str = ""
    attached: bool = False
    fallback: bool = True
    """Whether it is not on its best rung."""
    reason: str = ""
    """Why not, or why not better."""
    remedy: str = ""
    cannot_see: str = ""


@dataclass(slots=True)
class Manifest:
    """What is in force. Maps and programs are indices of descriptors in the loader, descriptors in the exporter."""

    standings: list[Standing] = field(default_factory=list)
    maps: dict[str, int] = field(default_factory=dict)
    map_numbers: dict[str, int] = field(default_factory=dict)
    """Each map's slot in the map insert_failures."""
    programs: dict[str, list[int]] = field(default_factory=dict)
    """Programs by probe."""
    links: list[int] = field(default_factory=list)
    """What keeps the programs attached (and the run statistics on)."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Drop reasons by number."""
    reason: str = ""
    """Why nothing could be loaded at all."""
    remedy: str = ""
    unprivileged: bool = False
    """Whether a process without capabilities can read maps here."""
    measured: bool = False
    """Whether the kernel measures the programs' run time."""
    unmeasured: str = ""
    """Why not; empty where it does or was not asked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What the parts of loading took."""
    peak_bytes: int = 0
    """Peak resident memory of the largest of the loader's processes."""


def send(link: socket.socket, manifest: Manifest, descriptors: Sequence[int]) -> None:
    """Hand over. Raises OSError (EPIPE: the exporter is gone)."""
    text = json.dumps(asdict(manifest)).encode()
    link.sendall(_LENGTH.pack(len(text), len(descriptors)) + text)
    for start in range(0, len(descriptors), _PER_MESSAGE):
        part = array.array("i", descriptors[start : start + _PER_MESSAGE])
        link.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, part)])


def receive(link: socket.socket) -> Manifest:
    """Take over; the manifest's indices become descriptors of this process. Raises OSError, EOFError, ValueError.

    On an error nothing that was received stays open.
    """
    size, count = _LENGTH.unpack(_exactly(link, _LENGTH.size))
    if size > _LARGEST:
        raise ValueError(f"the loader announces {size} bytes")
    content = json.loads(_exactly(link, size))
    descriptors: list[int] = []
    try:
        _receive_descriptors(link, count, descriptors)
        return _renumbered(content, descriptors)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _receive_descriptors(link: socket.socket, count: int, into: list[int]) -> None:
    while len(into) < count:
        data, received, _, _ = socket.recv_fds(link, 1, _PER_MESSAGE)
        into += received
        for descriptor in received:  # a child that kept one would keep the programs attached
            os.set_inheritable(descriptor, False)  # noqa: FBT003 - the library's own interface
        if not data or not received:
            raise EOFError(f"the loader handed over {len(into)} of {count} descriptors")


def _renumbered(content: dict[str, Any], descriptors: Sequence[int]) -> Manifest:
    manifest = Manifest(**content)
    manifest.standings = [Standing(**standing) for standing in content["standings"]]
    manifest.maps = {name: descriptors[index] for name, index in manifest.maps.items()}
    manifest.programs = {name: [descriptors[i] for i in group] for name, group in manifest.programs.items()}
    manifest.links = [descriptors[index] for index in manifest.links]
    manifest.reasons = {int(number): name for number, name in manifest.reasons.items()}
    return manifest


def _exactly(link: socket.socket, size: int) -> bytes:
    parts = b""
    while len(parts) < size:
        part = link.recv(size - len(parts))
        if not part:
            raise EOFError("the loader ended without an answer")
        parts += part
    return parts


def keep_only(link: int) -> None:
    """Be a fork with one descriptor of its parent's, beside standard output and error; standard input is empty."""
    gc.freeze()  # or what was the parent's would be closed by its number, which is another's by then
    os.closerange(0, 1)
    os.open(os.devnull, os.O_RDONLY)  # is given the lowest number, which is 0
    os.closerange(3, link)
    os.closerange(link + 1, os.sysconf("SC_OPEN_MAX"))
