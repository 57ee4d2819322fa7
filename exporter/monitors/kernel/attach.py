"""The loader's system calls: make maps, load instructions, attach them; by libbpf.so.1, without bcc's own attaching.

Flows in: shapes of maps, instructions, hooks. Flows out: descriptors. Interface: bpf(2), perf_event_open(2),
include/uapi/linux/bpf.h and perf_event.h.
"""

import ctypes
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from exporter.contract import Unsupported
from exporter.host import bpf
from exporter.host.bpf import library
from exporter.host.btf import VMLINUX, Btf
from exporter.monitors.kernel.shapes import LPM_TRIE, Hook, MapShape, Settings

_NO_PREALLOCATION = 1
_KPROBE, _TRACEPOINT, _RAW_TRACEPOINT, _TRACING = 2, 5, 17, 26  # enum bpf_prog_type
_TRACE_RAW_TP, _TRACE_FENTRY, _TRACE_FEXIT = 23, 24, 25  # enum bpf_attach_type
_STATS_RUN_TIME = 0
_LOG = 1 << 16
_SET_BPF, _ENABLE = 0x40042408, 0x2400  # PERF_EVENT_IOC_SET_BPF, PERF_EVENT_IOC_ENABLE
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_TYPE_TRACEPOINT = 2
_CLOSE_ON_EXEC = 8  # PERF_FLAG_FD_CLOEXEC
_TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


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


class _BtfInfo(ctypes.Structure):
    """struct bpf_btf_info."""

    _fields_ = (
        ("types", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_length", ctypes.c_uint32),
        ("kernel", ctypes.c_uint32),
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
    module: int = 0
    """Descriptor of a module's types; 0 for the kernel itself."""


def _failure(what: str, number: int) -> OSError:
    return OSError(number, f"{what}: {os.strerror(number)}")


def create_map(shape: MapShape, settings: Settings) -> int:
    """Make a map. Raises OSError (EPERM: CAP_BPF is missing)."""
    options = _MapOptions(ctypes.sizeof(_MapOptions))
    options.flags = _NO_PREALLOCATION if shape.type == LPM_TRIE else 0
    call = library().bpf_map_create
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint32] * 3, ctypes.c_void_p]
    name = f"cni_{shape.name}"[:15].encode()
    fd = int(call(shape.type, name, shape.key, shape.value, shape.capacity(settings), ctypes.byref(options)))
    if fd < 0:
        raise _failure(f"map {shape.name}", -fd)
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
    options.attach_btf_obj_fd = target.module
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
    refusal: Exception = Unsupported("no symbol is named")
    for symbol in hook.symbols:
        try:
            return _ATTACHING[hook.kind](hook, symbol, code, types)
        except (OSError, Unsupported) as error:
            refusal = error
    raise refusal


def _attach_raw_tracepoint(hook: Hook, symbol: str, code: bytes, _: Btf) -> Attached:
    program = _load(hook.function, code, _Target(_RAW_TRACEPOINT))
    return _linked(program, symbol, symbol.encode())


def _attach_tp_btf(hook: Hook, symbol: str, code: bytes, types: Btf) -> Attached:
    number = types.tracepoint(symbol)
    if not number:
        raise Unsupported(f"this kernel has no tracepoint {symbol}")
    program = _load(hook.function, code, _Target(_TRACING, _TRACE_RAW_TP, number))
    return _linked(program, symbol, None)


def _attach_function(hook: Hook, symbol: str, code: bytes, types: Btf) -> Attached:
    """Attach by trampoline: fentry, fexit (5.5; in modules 5.11)."""
    module, _, name = symbol.rpartition(":")
    kind = _TRACE_FENTRY if hook.kind == "fentry" else _TRACE_FEXIT
    if not module:
        program = _load(hook.function, code, _Target(_TRACING, kind, _known(types.function(name), symbol)))
        return _linked(program, symbol, None)
    path = VMLINUX.with_name(module)
    if not path.exists():
        raise Unsupported(f"the module {module} is not loaded", f"modprobe {module}")
    with Btf(path, types) as own:
        number = _known(own.function(name), symbol)
    fd = _module_types(module)
    try:
        program = _load(hook.function, code, _Target(_TRACING, kind, number, fd))
    finally:
        os.close(fd)
    return _linked(program, symbol, None)


def _known(number: int, symbol: str) -> int:
    if not number:
        raise Unsupported(f"this kernel has no function {symbol}")
    return number


def _module_types(module: str) -> int:
    """Open a module's types as the kernel holds them (5.11). Raises Unsupported or OSError."""
    number = ctypes.c_uint32(0)
    while library().bpf_btf_get_next_id(number, ctypes.byref(number)) == 0:
        fd = int(library().bpf_btf_get_fd_by_id(number))
        if fd < 0:
            continue
        name = ctypes.create_string_buffer(64)
        info = _BtfInfo(name=ctypes.addressof(name), name_length=len(name))
        size = ctypes.c_uint32(ctypes.sizeof(info))
        known = library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)) == 0
        if known and info.kernel and name.value.decode(errors="replace") == module:
            return fd
        os.close(fd)
    raise Unsupported(f"the kernel does not hand out the types of module {module}")


def _linked(program: int, symbol: str, name: bytes | None) -> Attached:
    link = int(library().bpf_raw_tracepoint_open(name, program))
    if link < 0:
        os.close(program)
        raise _failure(f"attaching at {symbol}", -link)
    return Attached(program, link, symbol)


def _attach_kprobe(hook: Hook, symbol: str, code: bytes, _: Btf) -> Attached:
    """Attach by perf event on the PMU `kprobe` (4.17)."""
    pmu = Path("/sys/bus/event_source/devices/kprobe")
    if not (pmu / "type").exists():
        raise Unsupported("this kernel is built without kprobes")
    name = ctypes.create_string_buffer(symbol.encode())
    attributes = _PerfAttributes(int((pmu / "type").read_text()), ctypes.sizeof(_PerfAttributes))
    attributes.config1 = ctypes.addressof(name)
    if hook.kind == "kretprobe":
        attributes.config = 1 << int((pmu / "format/retprobe").read_text().strip().removeprefix("config:"))
    return _on_event(hook, symbol, code, attributes, _KPROBE)


def _attach_tracepoint(hook: Hook, symbol: str, code: bytes, _: Btf) -> Attached:
    """Attach by perf event at `category/name`; its number is in tracefs."""
    found = next((path for root in _TRACEFS if (path := root / "events" / symbol / "id").exists()), None)
    if found is None:
        raise Unsupported(f"tracefs is not mounted or has no {symbol}", "mount -t tracefs tracefs /sys/kernel/tracing")
    attributes = _PerfAttributes(_PERF_TYPE_TRACEPOINT, ctypes.sizeof(_PerfAttributes), int(found.read_text()))
    return _on_event(hook, symbol, code, attributes, _TRACEPOINT)


def _on_event(hook: Hook, symbol: str, code: bytes, attributes: _PerfAttributes, type_: int) -> Attached:
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise Unsupported(f"perf events are not known for {os.uname().machine}")
    program = _load(hook.function, code, _Target(type_))
    libc = ctypes.CDLL(None, use_errno=True)
    event = int(libc.syscall(number, ctypes.byref(attributes), -1, 0, -1, ctypes.c_ulong(_CLOSE_ON_EXEC)))
    if event < 0:
        os.close(program)
        code_ = ctypes.get_errno()
        if code_ == errno.ENOENT:
            raise Unsupported(f"this kernel has no function {symbol}")
        raise _failure(f"a probe at {symbol}", code_)
    try:
        fcntl.ioctl(event, _SET_BPF, program)
        fcntl.ioctl(event, _ENABLE, 0)
    except OSError:
        os.close(event)
        os.close(program)
        raise
    return Attached(program, event, symbol)


def _attach_on_request(hook: Hook, symbol: str, code: bytes, _: Btf) -> Attached:
    """Load a raw tracepoint program that is attached nowhere: its reader runs it (BPF_PROG_TEST_RUN, 5.10)."""
    program = _load(hook.function, code, _Target(_RAW_TRACEPOINT))
    return Attached(program, os.dup(program), symbol)


_ATTACHING = {
    "raw_tracepoint": _attach_raw_tracepoint,
    "tp_btf": _attach_tp_btf,
    "fentry": _attach_function,
    "fexit": _attach_function,
    "kprobe": _attach_kprobe,
    "kretprobe": _attach_kprobe,
    "tracepoint": _attach_tracepoint,
    "on_request": _attach_on_request,
}
