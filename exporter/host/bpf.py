"""Reading BPF maps, rings and programs by their descriptors, through libbpf.so.1; no bcc, no capability.

Flows in: descriptors that the loader made. Flows out: keys and values as bytes, records, run statistics. Interface:
bpf(2), include/uapi/linux/bpf.h. Calls by descriptor need no privilege from Linux 5.19 on; before, CAP_BPF where
`kernel.unprivileged_bpf_disabled` is set.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from exporter.contract import Unsupported

PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH = 5, 6, 10
_PER_CPU = frozenset({PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH})
_BATCH = 512  # entries asked for at once
_STOPPED = -errno.EAGAIN
_NOT_SUPPORTED = -524  # ENOTSUPP, which is the kernel's own and has no name in errno

_SAMPLE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _MapInfo(ctypes.Structure):
    """struct bpf_map_info, as far as it is read."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class _ProgramInfo(ctypes.Structure):
    """struct bpf_prog_info, as far as it is read."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("lengths", ctypes.c_uint32 * 2),
        ("instructions", ctypes.c_uint64 * 2),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("map_count", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("gpl", ctypes.c_uint32),
        ("netns", ctypes.c_uint64 * 2),
        ("counts", ctypes.c_uint32 * 2),
        ("symbols", ctypes.c_uint64 * 2),
        ("btf_id", ctypes.c_uint32),
        ("func_info_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("func_info_count", ctypes.c_uint32),
        ("line_info_count", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64 * 2),
        ("line_counts", ctypes.c_uint32 * 3),
        ("tag_count", ctypes.c_uint32),
        ("tags", ctypes.c_uint64),
        ("run_time", ctypes.c_uint64),
        ("run_count", ctypes.c_uint64),
        ("misses", ctypes.c_uint64),
    )


Calls = Mapping[str, tuple[type | None, Sequence[type]]]
"""Functions of libbpf: what each returns and takes."""


def libbpf(calls: Calls) -> ctypes.CDLL:
    """Load libbpf with these calls described. Raises Unsupported."""
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise Unsupported(f"libbpf.so.1: {error}", "install the package libbpf1") from error
    for name, (result, arguments) in calls.items():
        call = getattr(library, name)
        call.restype, call.argtypes = result, list(arguments)
    return library


@cache
def library() -> ctypes.CDLL:
    """Give libbpf with the calls that maps, rings and programs need. Raises Unsupported."""
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64
    calls: dict[str, tuple[type | None, list[type]]] = {
        "bpf_map_lookup_elem": (number, [number, pointer, pointer]),
        "bpf_map_update_elem": (number, [number, pointer, pointer, size]),
        "bpf_map_delete_elem": (number, [number, pointer]),
        "bpf_map_get_next_key": (number, [number, pointer, pointer]),
        "bpf_map_lookup_batch": (number, [number, pointer, pointer, pointer, pointer, pointer, pointer]),
        "bpf_prog_test_run_opts": (number, [number, pointer]),
        "bpf_obj_get_info_by_fd": (number, [number, pointer, pointer]),
        "libbpf_num_possible_cpus": (number, []),
        "libbpf_set_print": (pointer, [pointer]),
        "ring_buffer__new": (pointer, [number, _SAMPLE, pointer, pointer]),
        "ring_buffer__epoll_fd": (number, [pointer]),
        "ring_buffer__free": (None, [pointer]),
    }
    lib = libbpf(calls)
    lib.libbpf_set_print(None)  # it would write to standard error
    return lib


@cache
def _consume() -> Callable[[int], int]:
    """Give libbpf's ring_buffer__consume, called with the interpreter lock held.

    Its callback is Python: to let go of the lock, and to ask for it again for each record, costs a third of the record,
    and up to 5 ms of waiting for another thread at work.
    """
    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(("ring_buffer__consume", library()))


@cache
def cpus() -> int:
    """How many values an entry of a per-CPU map has."""
    count = int(library().libbpf_num_possible_cpus())
    if count <= 0:
        raise OSError(-count, "the number of possible CPUs cannot be read from sysfs")
    return count


def _checked(result: int, what: str) -> int:
    """Raise OSError where libbpf answers with a negative number."""
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Map:
    """A map by its descriptor, which stays the caller's. Keys and values are bytes of the map's own sizes."""

    def __init__(self, fd: int) -> None:
        """Ask the kernel for type and sizes. Raises OSError."""
        info = _MapInfo()
        size = ctypes.c_uint32(ctypes.sizeof(info))
        _checked(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "bpf map")
        self.fd = fd
        self.name = info.name.decode(errors="replace")
        self.type, self.key_size, self.capacity = info.type, info.key_size, info.max_entries
        self.per_cpu = info.type in _PER_CPU
        self.value_size = info.value_size
        """Bytes of one value; of an entry of a per-CPU map for one CPU, without its padding."""
        self._stride = (info.value_size + 7) // 8 * 8 if self.per_cpu else info.value_size
        self._entry = self._stride * cpus() if self.per_cpu else info.value_size
        self._batches = True

    def get(self, key: bytes) -> bytes | None:
        """Give an entry's value (all CPUs' values, each padded to 8 bytes); None where there is none."""
        self._check(key)
        value = ctypes.create_string_buffer(self._entry)
        result = library().bpf_map_lookup_elem(self.fd, key, value)
        if result == -errno.ENOENT:
            return None
        _checked(result, f"lookup in map {self.name}")
        return value.raw

    def put(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Write an entry. Raises OSError (E2BIG: the map is full)."""
        self._check(key)
        if len(value) != self._entry:
            raise ValueError(f"map {self.name} takes values of {self._entry} bytes, not {len(value)}")
        result = library().bpf_map_update_elem(self.fd, key, value, flags)
        _checked(result, f"writing map {self.name}")

    def delete(self, key: bytes) -> bool:
        """Remove an entry; the answer is whether there was one."""
        self._check(key)
        result = library().bpf_map_delete_elem(self.fd, key)
        if result == -errno.ENOENT:
            return False
        return _checked(result, f"removal in map {self.name}") == 0

    def keys(self) -> list[bytes]:
        """Give all keys. A key that comes or goes meanwhile may be missed; the answer is never longer than the map."""
        found: list[bytes] = []
        following = ctypes.create_string_buffer(self.key_size)
        previous: bytes | None = None
        while len(found) < self.capacity:
            result = library().bpf_map_get_next_key(self.fd, previous, following)
            if result == -errno.ENOENT:
                break
            _checked(result, f"walk of map {self.name}")
            previous = following.raw
            found.append(previous)
        return found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Give all entries, in batches where the kernel has them (hashes: 5.6), each key once."""
        if self._batches:
            try:
                yield from self._in_batches()
            except _NoBatchesError:
                self._batches = False
            else:
                return
        for key in self.keys():
            value = self.get(key)
            if value is not None:
                yield key, value

    def length(self) -> int:
        """Count the entries, which is cheaper than to look at them. One that comes or goes meanwhile may be missed."""
        if self._batches:
            try:
                return sum(count for count, _, _ in self._read_batches())
            except _NoBatchesError:
                self._batches = False
        return len(self.keys())

    def sums(self) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Give all entries of a map whose values are u64s, summed over the CPUs."""
        for key, value in self.items():
            yield key, self.total(value)

    def total(self, value: bytes) -> tuple[int, ...]:
        """Sum the u64s of an entry's value over the CPUs."""
        words = memoryview(value).cast("Q")
        width = self._stride // 8
        if width == 1:
            return (sum(words),)
        return tuple(sum(words[word::width]) for word in range(width))

    def each(self, value: bytes) -> list[bytes]:
        """Split an entry's value into those of the CPUs."""
        return [value[start : start + self.value_size] for start in range(0, self._entry, self._stride)]

    def _check(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name} takes keys of {self.key_size} bytes, not {len(key)}")

    def _in_batches(self) -> Iterator[tuple[bytes, bytes]]:
        for count, keys, values in self._read_batches():
            raw_keys, raw_values = keys.raw, values.raw
            for index in range(count):
                key = raw_keys[index * self.key_size : (index + 1) * self.key_size]
                yield key, raw_values[index * self._entry : (index + 1) * self._entry]

    def _read_batches(self) -> "Iterator[tuple[int, ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]]":
        """Give how many entries a batch has, their keys and their values."""
        wanted, mark, more = min(_BATCH, self.capacity), None, True
        while more:
            keys = ctypes.create_string_buffer(self.key_size * wanted)
            values = ctypes.create_string_buffer(self._entry * wanted)
            count, following = ctypes.c_uint32(wanted), ctypes.create_string_buffer(max(4, self.key_size))
            result = library().bpf_map_lookup_batch(self.fd, mark, following, keys, values, ctypes.byref(count), None)
            if result == -errno.ENOSPC and wanted < self.capacity:  # a bucket holds more than was asked for
                wanted = min(4 * wanted, self.capacity)
                continue
            if result in (-errno.EINVAL, _NOT_SUPPORTED) and mark is None:
                raise _NoBatchesError
            more = result != -errno.ENOENT
            if more:
                _checked(result, f"walk of map {self.name}")
            yield count.value, keys, values
            mark = following


class _NoBatchesError(Exception):
    """The kernel reads this type of map entry by entry only."""


class Ring:
    """A ring buffer's reading end. One thread reads."""

    def __init__(self, fd: int, handle: Callable[[int, int], None]) -> None:
        """Map the ring; `handle` gets address and size of each record, valid until it returns. Raises OSError."""
        self._handle = handle
        self._left = 0
        self._failure: BaseException | None = None
        self._callback = _SAMPLE(self._sample)
        self._ring = library().ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            number = ctypes.get_errno()
            raise OSError(number, f"ring buffer: {os.strerror(number)}")
        self._read = 0

    def fileno(self) -> int:
        """Descriptor that is readable while the ring holds records."""
        return int(library().ring_buffer__epoll_fd(self._ring))

    def consume(self, budget: int = 4096) -> int:
        """Handle what is there, at most `budget` records; the answer is how many. Raises what `handle` raised."""
        self._left, self._read = budget, 0
        result = _consume()(self._ring)
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure
        if result < 0 and result != _STOPPED:
            _checked(result, "ring buffer")
        return self._read

    def close(self) -> None:
        """Unmap. The descriptor stays the caller's."""
        if self._ring:
            library().ring_buffer__free(self._ring)
            self._ring = None

    def _sample(self, _: int, address: int, size: int) -> int:
        self._read += 1
        try:
            self._handle(address, size)
        except BaseException as failure:  # noqa: BLE001 - it must not be lost in C; `consume` raises it
            self._failure = failure
            return _STOPPED
        self._left -= 1
        return 0 if self._left > 0 else _STOPPED


class _RunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf 1.x."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("data", ctypes.c_void_p * 2),
        ("data_sizes", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("context_out", ctypes.c_void_p),
        ("context_sizes", ctypes.c_uint32 * 2),
        ("result", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 5),
    )


def run(fd: int, *arguments: int) -> int:
    """Run a raw tracepoint program once, on the calling thread (5.10); the answer is its result. Raises OSError."""
    context = (ctypes.c_uint64 * 12)(*arguments)
    options = _RunOptions(ctypes.sizeof(_RunOptions))
    options.context, options.context_sizes[0] = ctypes.addressof(context), ctypes.sizeof(context)
    _checked(library().bpf_prog_test_run_opts(fd, ctypes.byref(options)), "run of a bpf program")
    return int(options.result)


@dataclass(frozen=True, slots=True)
class Runs:
    """What a program cost so far; both are 0 while the kernel's run statistics are off."""

    seconds: float
    count: int
    misses: int
    """Events that the kernel did not hand over because the program ran on that CPU already."""


def runs(fd: int) -> Runs:
    """Read a program's run statistics (kernel 5.1; misses 5.12). Raises OSError."""
    info = _ProgramInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    _checked(library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size)), "bpf program")
    return Runs(info.run_time / 1e9, info.run_count, info.misses)
