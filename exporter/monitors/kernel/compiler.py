"""bcc as a compiler: C text in, BPF instructions out; each compilation in a child, so that several run side by side.

Flows in: text, flags, a directory of headers. Flows out: instructions by function name. Nothing is attached here. The
text names maps by the numbers of their descriptors, which a child has as well.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from exporter.contract import Unsupported

_PR_SET_PDEATHSIG = 1


class Module:
    """Compiled programs."""

    def __init__(self, functions: Mapping[str, bytes]) -> None:
        """Take instructions by function."""
        self._functions = functions

    def code(self, function: str) -> bytes:
        """Give a function's instructions. Raises Unsupported where it was compiled out for this kernel."""
        if function not in self._functions:
            raise Unsupported(f"{function} does not fit this kernel")
        return self._functions[function]


class Job:
    """A compilation under way."""

    def __init__(self, text: str, flags: Sequence[str], directory: Path) -> None:
        """Start it in a child. Raises OSError."""
        self._reading, writing = os.pipe()
        self._child = os.fork()
        if not self._child:
            _serve(writing, text, flags, directory)
        os.close(writing)

    def wait(self) -> dict[str, bytes]:
        """Give the instructions by function. Raises Unsupported with the compiler's first error, or without bcc."""
        with os.fdopen(self._reading, "rb") as answer:
            content = answer.read()
        os.waitpid(self._child, 0)
        if not content:
            raise Unsupported("the compiler ended without an answer", "see the log; it takes some 150 MB of memory")
        found = json.loads(content)
        if "reason" in found:
            raise Unsupported(found["reason"], found["remedy"])
        return {name: bytes.fromhex(code) for name, code in found.items()}


def _serve(answer: int, text: str, flags: Sequence[str], directory: Path) -> None:
    """Be the child: compile, answer, end, whatever happens; and end when the loader does."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            result = {name: code.hex() for name, code in compiled(text, flags, directory).items()}
        except Unsupported as error:
            result = {"reason": error.reason, "remedy": error.remedy}
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(json.dumps(result).encode())
    finally:
        os._exit(0)


def compiled(text: str, flags: Sequence[str], directory: Path) -> dict[str, bytes]:
    """Compile in this very process. Raises Unsupported with the compiler's first error, or where bcc is not there."""
    os.environ["BCC_KERNEL_SOURCE"] = str(directory)
    try:
        import bcc  # type: ignore[import-untyped]  # noqa: PLC0415 - heavy, and not everywhere
    except (ImportError, OSError) as error:
        raise Unsupported(f"bcc cannot be imported: {error}", "install the package python3-bpfcc") from error
    with _errors_into(directory / f"errors-{os.getpid()}") as errors:
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


@contextlib.contextmanager
def _errors_into(path: Path) -> Iterator[Path]:
    """Have the compiler's words, which it writes to standard error, in a file."""
    kept = os.dup(2)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(target, 2)
    os.close(target)
    try:
        yield path
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _complaint(path: Path) -> str:
    """Give the first error of the compiler's words: `file:line: what`."""
    found = re.search(r"^(\S+?):(\d+):\d+: (?:fatal )?error: (.*)$", path.read_text(errors="replace"), re.MULTILINE)
    return f"{found[1]}:{found[2]}: {found[3]}" if found else ""
