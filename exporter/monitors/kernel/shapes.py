"""What a BPF program is made of, as data: settings, maps, hooks, rungs, probes.

Flows in: nothing. Flows out: the types that `programs` fills and that the loader and the readers understand.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LRU_PERCPU_HASH, LPM_TRIE, RINGBUF = 1, 2, 5, 6, 9, 10, 11, 27
"""Map types, enum bpf_map_type of include/uapi/linux/bpf.h."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the loader must know; it crosses a process boundary as JSON."""

    programs: tuple[str, ...] | None = None
    """Names of the programs wanted; None: all."""
    entries: int = 16384
    """Entries of a counting map; a namespace takes some ten."""
    ring_bytes: int = 1 << 20
    """Room for events; a power of two, at least a page."""
    lifecycle_bytes: int = 1 << 18
    """Room of their own for critical events; likewise."""
    run_statistics: bool = True
    """Whether the kernel measures the programs' cost (some 20 ns per run)."""
    timeout: float = 60.0
    """Seconds that the loader may take."""
    types: str = ""
    """A header of the kernel's types to use in place of the one made from BTF; empty: made."""
    plugin_directories: tuple[str, ...] = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
    """Where CNI plugins lie."""
    syscalls: tuple[int, ...] = ()
    """Numbers of system calls that are reported."""


@dataclass(frozen=True, slots=True)
class MapShape:
    """A map: sizes in bytes; `entries` is a number or gives one from the settings (a ring: its bytes)."""

    name: str
    type: int
    key: int
    value: int
    entries: int | Callable[[Settings], int]
    mapped: bool = False
    """Whether user space maps its memory (an array)."""

    def capacity(self, settings: Settings) -> int:
        """Entries of this map under these settings."""
        return self.entries if isinstance(self.entries, int) else self.entries(settings)


@dataclass(frozen=True, slots=True)
class Hook:
    """A C function and where it is attached."""

    kind: str
    """fentry, fexit, kprobe or tp_btf; on_request: its reader runs it."""
    function: str
    symbols: tuple[str, ...]
    """Kernel functions or tracepoints; the first that the kernel takes a program at."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A step of a ladder: all its hooks, or none."""

    name: str
    """The label `rung`: fentry, kprobe or tp_btf (a tracepoint with typed arguments)."""
    hooks: tuple[Hook, ...]
    cannot_see: str = ""
    """What is missed here and not on the rung above."""
    needs: str = ""
    """A type that the kernel must have: the rung is for kernels from the one on that brought it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One thing that is observed, best rung first. The label `program`; the kernel sees cni_NAME."""

    name: str
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """One C file."""

    name: str
    """Also the file's: NAME.c."""
    members: tuple[str, ...]
    """What it reads, `struct.member.member`: the header, the offsets' proof and HAVE_struct_member follow from it."""
    maps: tuple[MapShape, ...]
    probes: tuple[Probe, ...]
    families: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Members that it reads where the kernel has them (#ifdef HAVE_…)."""
    types: tuple[str, ...] = ()
    """Structs and functions whose numbers among the kernel's types it uses where the kernel has them (BTF_ID_…)."""
    constants: Callable[[Settings, Mapping[str, int]], Mapping[str, str]] = field(default=lambda _s, _r: {})
    """Further #defines, from the settings and the drop reasons' numbers by name."""
    wanted: Callable[[Settings], bool] = field(default=lambda _: True)
    """Whether these settings ask for it at all."""
    contents: Callable[[Settings], Iterable[tuple[str, bytes, bytes]]] = field(default=lambda _: ())
    """What is in its maps before it is attached: map, key, value."""


CLASSES = (
    *("netns", "veth", "cni_run", "packet_drop", "tcp_fault"),
    *("exec", "connection", "connection_close", "syscall"),
)
"""Event classes, in the order of enum event_class in rules.h."""

THINNED = CLASSES[3:]
"""Those that are not critical: rules, counts by key and the brake are for them alone."""
