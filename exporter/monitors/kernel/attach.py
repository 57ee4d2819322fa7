"""The loader's system calls: make maps, load instructions, attach them; by libbpf.so.1, without bcc's own attaching.

Flows in: shapes of maps, instructions, hooks. Flows out: descriptors. Interface: bpf(2), perf_event_open(2),
include/uapi/linux/bpf.h and perf_event.h.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from exporter.contract import Unsupported
from exporter.host import bpf
from exporter.host.bpf import library
from exporter.host.btf import Btf
from exporter.monitors.kernel.compiler import kernel_call
from exporter.monitors.kernel.shapes import LPM_TRIE, Hook, MapShape, Settings

_MAPPABLE = 1 << 10  # BPF_F_MMAPABLE (5.5)
_NO_PREALLOCATION = 1
_KPROBE, _RAW_TRACEPOINT, _TRACING = 2, 17, 26  # enum bpf_prog_type
_TRACE_RAW_TP, _TRACE_FENTRY, _TRACE_FEXIT = 23, 24, 25  # enum bpf_attach_type
_STATS_RUN_TIME = 0
_LOG = 1 << 16
_SET_BPF, _ENABLE = 0x40042408, 0x2400  # PERF_EVENT_IOC_SET_BPF, PERF_EVENT_IOC_ENABLE
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_CLOSE_ON_EXEC = 8  # PERF_FLAG_FD_CLOEXEC
_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")  # not everywhere
_INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: code, registers, offset, immediate
_SET, _EXIT = 0xB7, 0x95  # BPF_ALU64 | BPF_MOV, BPF_JMP | BPF_EXIT
_NOTHING = _INSTRUCTION.pack(_SET, 0, 0, 0) + _INSTRUCTION.pack(_EXIT, 0, 0, 0)
_T = TypeVar("_T")


class _MapOptions(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf 1.x."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("btf_and_inner", ctypes.c_uint32 * 5),
        ("flags", ctypes.c_uint32),
        ("extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
    )


class _LoadOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf 1.x."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("ifindex", ctypes.c_uint32),
        ("kernel_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


class _PerfAttributes(ctypes.Structure):
    """struct perf_event_attr, version 5."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", ctypes.c_uint32),
        ("bp_type", ctypes.c_uint32),
        ("config1", ctypes.c_uint64),
        ("config2", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


@dataclass(frozen=True, slots=True)
class Attached:
    """A program in force: it stays as long as both descriptors are open somewhere."""

    program: int
    link: int
    symbol: str


@dataclass(frozen=True, slots=True)
class _Target:
    """What the verifier must know of where a program will be attached."""

    type: int
    attach_type: int = 0
    btf_id: int = 0


def _failure(what: str, number: int) -> OSError:
    return OSError(number, f"{what}: {os.strerror(number)}")


def create_map(shape: MapShape, settings: Settings) -> int:
    """Make a map. Raises OSError (EPERM: CAP_BPF is missing)."""
    options = _MapOptions(ctypes.sizeof(_MapOptions))
    options.flags = _NO_PREALLOCATION if shape.type == LPM_TRIE else _MAPPABLE if shape.mapped else 0
    call = library().bpf_map_create
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint32] * 3, ctypes.c_void_p]
    name = f"cni_{shape.name}"[:15].encode()
    fd = int(call(shape.type, name, shape.key, shape.value, shape.capacity(settings), ctypes.byref(options)))
    if fd < 0:
        raise _failure(f"making the BPF map {shape.name}", -fd)
    return fd


def enable_statistics() -> int:
    """Have the kernel measure programs as long as the descriptor is open (5.8). Raises OSError."""
    fd = int(library().bpf_enable_stats(_STATS_RUN_TIME))
    if fd < 0:
        raise _failure("run statistics of BPF programs", -fd)
    return fd


def _load(name: str, code: bytes, target: _Target) -> int:
    """Hand instructions to the verifier. Raises OSError with the verifier's last words."""
    log = ctypes.create_string_buffer(_LOG)
    options = _LoadOptions(ctypes.sizeof(_LoadOptions), 5)
    options.expected_attach_type, options.attach_btf_id = target.attach_type, target.btf_id
    options.log_buf, options.log_size = ctypes.cast(log, ctypes.c_char_p), _LOG
    call = library().bpf_prog_load
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    fd = int(call(target.type, f"cni_{name}"[:15].encode(), b"GPL", code, len(code) // 8, ctypes.byref(options)))
    if fd < 0:
        words = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(words) if not line.startswith("processed ")), "")
        raise OSError(-fd, f"the kernel refuses to load it: {reason or os.strerror(-fd)}")
    return fd


def run_once(name: str, code: bytes, argument: int = 0) -> None:
    """Run a raw tracepoint program on the calling process, attached nowhere (5.10). Raises OSError."""
    program = _load(name, code, _Target(_RAW_TRACEPOINT))
    try:
        bpf.run(program, argument)
    finally:
        os.close(program)


def attach(hook: Hook, code: bytes, types: Btf) -> Attached:
    """Load and attach at the first of the hook's symbols that the kernel takes.

    Raises Unsupported where it has none of them, OSError with the last refusal.
    """

    def at(symbol: str) -> Attached:
        program = _load_at(hook, symbol, code, types)
        try:
            return Attached(program, _KINDS[hook.kind].link(program, symbol), symbol)
        except (OSError, Unsupported):
            os.close(program)
            raise

    return _first(hook.symbols, at)


def try_out(hook: Hook, types: Btf) -> None:
    """Have the verifier take a program that does nothing for the hook's place: milliseconds before any compiler runs.

    What is refused only when it is attached is not found out. Raises Unsupported or OSError as `attach` does.
    """
    _first(hook.symbols, lambda symbol: os.close(_load_at(hook, symbol, _NOTHING, types)))


def takes_casts(types: Btf) -> bool:
    """Say whether programs may call bpf_rdonly_cast: where the kernel has it (6.2), and its JIT compiler is on."""
    function, number = types.function("bpf_rdonly_cast"), types.find("iphdr")
    tracepoint = types.tracepoint("kfree_skb")
    if not (function and number and tracepoint):
        return False
    code = _INSTRUCTION.pack(_SET, 1, 0, 0) + _INSTRUCTION.pack(_SET, 2, 0, number) + kernel_call(function) + _NOTHING
    try:
        os.close(_load("casts", code, _Target(_TRACING, _TRACE_RAW_TP, tracepoint)))
    except OSError:
        return False
    return True


def _first(symbols: Iterable[str], work: Callable[[str], _T]) -> _T:
    """Do it with the first symbol that it can be done with."""
    refusal: Exception = Unsupported("no symbol is named")
    for symbol in symbols:
        try:
            return work(symbol)
        except (OSError, Unsupported) as error:
            refusal = error
    raise refusal


def _load_at(hook: Hook, symbol: str, code: bytes, types: Btf) -> int:
    return _load(hook.function, code, _KINDS[hook.kind].target(hook, symbol, types))


# Where a program may go: what the verifier must know of it.


def _no_target(_: Hook, __: str, ___: Btf) -> _Target:
    return _Target(_RAW_TRACEPOINT)


def _tp_btf_target(_: Hook, symbol: str, types: Btf) -> _Target:
    number = types.tracepoint(symbol)
    if not number:
        raise Unsupported(f"this kernel has no tracepoint {symbol}")
    return _Target(_TRACING, _TRACE_RAW_TP, number)


def _function_target(hook: Hook, symbol: str, types: Btf) -> _Target:
    """Find a function that takes a trampoline: fentry, fexit (5.5)."""
    number = types.function(symbol)
    if not number:
        raise Unsupported(f"this kernel has no function {symbol}")
    return _Target(_TRACING, _TRACE_FENTRY if hook.kind == "fentry" else _TRACE_FEXIT, number)


def _kprobe_target(_: Hook, __: str, ___: Btf) -> _Target:
    if not _KPROBE_PMU.exists():
        raise Unsupported("this kernel is built without kprobes")
    return _Target(_KPROBE)


# Bringing a loaded program there: the answer is the descriptor that keeps it in force.


def _link_typed(program: int, symbol: str) -> int:
    """Attach a program whose place the verifier knows already."""
    link = int(library().bpf_raw_tracepoint_open(None, program))
    if link < 0:
        raise _failure(f"attaching at {symbol}", -link)
    return link


def _link_kprobe(program: int, symbol: str) -> int:
    """Attach by perf event on the PMU `kprobe` (4.17)."""
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise Unsupported(f"perf events are not known for {os.uname().machine}")
    name = ctypes.create_string_buffer(symbol.encode())
    attributes = _PerfAttributes(int(_KPROBE_PMU.read_text()), ctypes.sizeof(_PerfAttributes))
    attributes.config1 = ctypes.addressof(name)
    libc = ctypes.CDLL(None, use_errno=True)
    event = int(libc.syscall(number, ctypes.byref(attributes), -1, 0, -1, ctypes.c_ulong(_CLOSE_ON_EXEC)))
    if event < 0:
        code = ctypes.get_errno()
        if code == errno.ENOENT:
            raise Unsupported(f"this kernel has no function {symbol}")
        raise _failure(f"a probe at {symbol}", code)
    try:
        fcntl.ioctl(event, _SET_BPF, program)
        fcntl.ioctl(event, _ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return event


def _link_nothing(program: int, _: str) -> int:
    """Attach nowhere: its reader runs it (BPF_PROG_TEST_RUN, 5.10)."""
    return os.dup(program)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How programs of one kind are loaded and attached."""

    target: Callable[[Hook, str, Btf], _Target]
    link: Callable[[int, str], int]


_KINDS = {
    "tp_btf": _Kind(_tp_btf_target, _link_typed),
    "fentry": _Kind(_function_target, _link_typed),
    "fexit": _Kind(_function_target, _link_typed),
    "kprobe": _Kind(_kprobe_target, _link_kprobe),
    "on_request": _Kind(_no_target, _link_nothing),
}
