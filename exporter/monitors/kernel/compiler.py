"""bcc as a compiler: C text in, BPF instructions out; each compilation in a child, so that several run side by side.

Flows in: text, flags, a directory of headers. Flows out: instructions by function name. Nothing is attached here. The
text names maps by the numbers of their descriptors. A child has no rights, and ends with the loader.
"""

import contextlib
import ctypes
import importlib
import json
import os
import re
import select
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from exporter.contract import Unsupported
from exporter.monitors.kernel.handover import keep_only

_PACKAGE = "install the package python3-bpfcc"
KERNEL_FUNCTION, OWN_FUNCTION = 1 << 28, 1 << 29
"""What a call of a helper with a number from here on stands for, since bcc knows no other calls: one to the function of
the kernel with this BTF id, one to the function of ours with this place in SHARED."""
SHARED = (
    *("events_judge", "events_longer", "events_unlike", "events_note", "events_brake"),
    *("rules_weigh", "rules_decide", "rules_settle", "rules_matched", "rules_quota", "count_slowly"),
)
"""Functions that programs call; each program has its own copies."""
_CALL, _TO_OWN, _TO_KERNEL = 0x85, 1, 2  # BPF_JMP | BPF_CALL, BPF_PSEUDO_(KFUNC_)CALL, include/uapi/linux/bpf.h
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: code, registers, offset, immediate
_NOBODY = 65534  # overflowuid, include/linux/highuid.h: owns nothing


class Module:
    """Compiled programs."""

    def __init__(self) -> None:
        """Begin empty."""
        self._functions: dict[str, bytes] = {}
        self._asked: set[str] = set()

    def add(self, functions: Mapping[str, bytes], asked: Iterable[str]) -> None:
        """Take what came of the functions that were asked for."""
        self._functions |= functions
        self._asked.update(asked)

    def knows(self, function: str) -> bool:
        """Say whether it was asked for already."""
        return function in self._asked

    def size(self, function: str) -> int:
        """Bytes of a function's instructions; 0 where it was compiled out."""
        return len(self._functions.get(function, b""))

    def code(self, function: str) -> bytes:
        """Give a function's instructions, those that it calls behind. Raises Unsupported where there are none."""
        linked, places = bytearray(self._own(function)), dict[str, int]()
        at = 0
        while at < len(linked):
            what, registers, _, number = _INSTRUCTION.unpack_from(linked, at)
            end = at + _INSTRUCTION.size
            if what == _CALL and not registers and number >= OWN_FUNCTION:
                name = SHARED[number - OWN_FUNCTION]
                if name not in places:
                    places[name] = len(linked)
                    linked += self._own(name)
                linked[at:end] = _call(_TO_OWN, (places[name] - end) // _INSTRUCTION.size)
            elif what == _CALL and not registers and number >= KERNEL_FUNCTION:
                linked[at:end] = kernel_call(number - KERNEL_FUNCTION)
            at = end
        return bytes(linked)

    def _own(self, function: str) -> bytes:
        if function not in self._functions:
            raise Unsupported(f"{function} does not fit this kernel")
        return self._functions[function]


def kernel_call(function: int) -> bytes:
    """Write the instruction that calls a function of the kernel, by its BTF id."""
    return _call(_TO_KERNEL, function)


def _call(kind: int, number: int) -> bytes:
    return _INSTRUCTION.pack(_CALL, kind << 4 if sys.byteorder == "little" else kind, 0, number)


class Job:
    """A compilation in a child, which has its compiler ready by the time that there is a text."""

    def __init__(self, directory: Path) -> None:
        """Start the child; what texts include is below `directory`. Raises OSError."""
        self._link, theirs = socket.socketpair()
        self._child = os.fork()
        if not self._child:
            _serve(theirs, directory)
        theirs.close()

    def begin(self, text: str, flags: Sequence[str]) -> None:
        """Have a text compiled, once."""
        with contextlib.suppress(BrokenPipeError):  # `wait` finds out
            self._link.sendall(json.dumps([text, list(flags)]).encode())
        self._link.shutdown(socket.SHUT_WR)

    def wait(self) -> dict[str, bytes]:
        """Give the instructions by function. Raises Unsupported with the compiler's first error, or without bcc."""
        try:
            content = _all_of(self._link)
        except ConnectionResetError:
            content = b""
        self.end()
        if not content:
            raise Unsupported("the compiler ended without an answer", "see the log; it takes some 150 MB of memory")
        found = json.loads(content)
        if "reason" in found:
            raise Unsupported(found["reason"], found["remedy"])
        return {name: bytes.fromhex(code) for name, code in found.items()}

    def end(self) -> None:
        """Have the child gone, whatever it is at."""
        self._link.close()
        os.waitpid(self._child, 0)


def _serve(link: socket.socket, directory: Path) -> None:
    """Be the child: compile, answer, end, whatever happens; and end when nobody waits for the answer any more."""
    try:
        keep_only(link.fileno())
        threading.Thread(target=_leave_when_alone, args=(link.fileno(),), daemon=True).start()
        try:
            try:
                bcc = _compiler(directory)
            finally:
                order = _all_of(link)  # whatever the answer: what is left unread would take it with it
            text, flags = json.loads(order)
            result = {name: code.hex() for name, code in _compiled(bcc, text, flags).items()}
        except Unsupported as error:
            result = {"reason": error.reason, "remedy": error.remedy}
        link.sendall(json.dumps(result).encode())
    finally:
        os._exit(0)


def _all_of(link: socket.socket) -> bytes:
    with link.makefile("rb") as text:
        return text.read()


def _leave_when_alone(link: int) -> None:
    """End this process once the other end is closed: a signal at the loader's death may not be allowed here."""
    waiting = select.poll()
    waiting.register(link, 0)  # POLLHUP is always told
    waiting.poll()
    os._exit(1)


def _compiler(directory: Path) -> ModuleType:
    """Make this very process one that compiles. Raises Unsupported where bcc is not there."""
    os.chdir(directory)
    os.environ["BCC_KERNEL_SOURCE"] = "."  # as a path it would have to be open to nobody from the root on
    try:
        bcc = importlib.import_module("bcc")  # heavy, and not everywhere
    except (ImportError, OSError) as error:
        raise Unsupported(f"bcc cannot be imported: {error}", _PACKAGE) from error
    if not hasattr(bcc, "BPF"):
        found = getattr(bcc, "__file__", None) or ", ".join(bcc.__path__)
        raise Unsupported(
            f"the module bcc in {found} is not the BPF compiler (on PyPI the name is another's)", _PACKAGE
        )
    _become_nobody()
    return bcc


def _compiled(bcc: ModuleType, text: str, flags: Sequence[str]) -> dict[str, bytes]:
    """Compile in this very process. Raises Unsupported with the compiler's first error."""
    with _errors() as errors:
        try:
            module = bcc.BPF(text=text, cflags=list(flags)).module
        except Exception as error:  # bcc raises nothing more exact
            raise Unsupported(_complaint(errors) or str(error)) from error
    functions = {}
    for number in range(bcc.lib.bpf_num_functions(module)):
        name = bcc.lib.bpf_function_name(module, number)
        size = bcc.lib.bpf_function_size(module, name)
        functions[name.decode()] = ctypes.string_at(bcc.lib.bpf_function_start(module, name), size)
    return functions


def _become_nobody() -> None:
    """Give up every right: a compiler needs none.

    It also saves most of a short compilation: as root, and only then, libbcc reads all of /proc/kallsyms to learn
    whether the kernel has bpf_probe_read_kernel (bcc_procutils_each_ksym, src/cc/bcc_proc.c). Without CAP_SETUID root
    stays root.
    """
    with contextlib.suppress(OSError):
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


@contextlib.contextmanager
def _errors() -> Iterator[int]:
    """Have the compiler's words, which it writes to standard error, in memory."""
    kept = os.dup(2)
    target = os.memfd_create("errors")
    os.dup2(target, 2)
    try:
        yield target
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(target)


def _complaint(errors: int) -> str:
    """Give the first error of the compiler's words: `file:line: what`."""
    words = os.pread(errors, 1 << 20, 0).decode(errors="replace")
    found = re.search(r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$", words, re.MULTILINE)
    return f"{found[1]}:{found[2]}: {found[3]}" if found else ""
