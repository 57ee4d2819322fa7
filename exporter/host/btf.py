"""The running kernel's types (BTF): C headers for the few structs that the programs need, offsets, enum names.

Flows in: /sys/kernel/btf through libbpf.so.1. Flows out: C text, byte offsets, numbers with names. Format:
Documentation/bpf/btf.rst, include/uapi/linux/btf.h.
"""

import ctypes
import ctypes.util
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Self

from exporter.contract import Unsupported
from exporter.host.bpf import libbpf

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_STRUCT, _UNION, _ENUM, _TYPEDEF, _VOLATILE, _CONST, _FUNC, _RESTRICT, _ENUM64 = 4, 5, 6, 8, 9, 10, 12, 11, 19
_SKIPPED = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT)
_DEPTH = 32  # levels of typedefs and nested structs that are followed

_BASE = (
    *("__u8", "__u16", "__u32", "__u64", "__s8", "__s16", "__s32", "__s64", "__be16", "__be32", "__be64", "__le16"),
    *("__le32", "__wsum", "__sum16", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "bool", "size_t"),
    *("uint64_t", "uint32_t", "uint16_t", "uint8_t", "int64_t", "int32_t", "uintptr_t"),
)

# Unnamed padding as libbpf writes it. Where it fills whole units, clang 14 under bcc lays a run of them out as one
# wider integer with another alignment, and every field behind it moves: a named member of the same type does not.
_PADDING = re.compile(r"^(\t+)((?:unsigned )?(?:long long|long|int|short|char)): (\d+);$", re.MULTILINE)
_WIDTHS = {"char": 8, "short": 16, "int": 32, "long": 8 * ctypes.sizeof(ctypes.c_long), "long long": 64}

_PRINTF = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class _Type(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("info", ctypes.c_uint32), ("size_or_type", ctypes.c_uint32))

    @property
    def kind(self) -> int:
        return int(self.info >> 24 & 0x1F)

    @property
    def count(self) -> int:
        return int(self.info & 0xFFFF)


class _Member(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("type", ctypes.c_uint32), ("offset", ctypes.c_uint32))


class _Enumerator(ctypes.Structure):
    _fields_ = (("name", ctypes.c_uint32), ("value", ctypes.c_int32))


@cache
def _library() -> ctypes.CDLL:
    """Give libbpf with the calls that types need. Raises Unsupported."""
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32
    calls: dict[str, tuple[type | None, list[type]]] = {
        "btf__parse": (pointer, [text, pointer]),
        "btf__parse_split": (pointer, [text, pointer]),
        "btf__free": (None, [pointer]),
        "btf__find_by_name_kind": (ctypes.c_int32, [pointer, text, number]),
        "btf__type_by_id": (pointer, [pointer, number]),
        "btf__name_by_offset": (text, [pointer, number]),
        "btf_dump__new": (pointer, [pointer, _PRINTF, pointer, pointer]),
        "btf_dump__dump_type": (ctypes.c_int, [pointer, number]),
        "btf_dump__free": (None, [pointer]),
    }
    return libbpf(calls)


class Btf:
    """One kernel's types, read once. Close it: it holds some ten megabytes."""

    def __init__(self, path: Path = VMLINUX, base: "Btf | None" = None) -> None:
        """Read the types; `base` is the kernel's own where `path` is a module's. Raises Unsupported."""
        self._library = _library()
        if not path.exists():
            raise Unsupported(f"{path} does not exist", "a kernel built with CONFIG_DEBUG_INFO_BTF=y")
        if base is None:
            self._handle = self._library.btf__parse(bytes(path), None)
        else:
            self._handle = self._library.btf__parse_split(bytes(path), base.handle)
        if not self._handle:
            said = os.strerror(ctypes.get_errno())
            raise Unsupported(f"{path} is not a kernel's types (BTF): {said}", "mount the host's own /sys there")

    @property
    def handle(self) -> int:
        """The libbpf object."""
        if self._handle is None:
            raise ValueError("these types are closed")
        return int(self._handle)

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Free what libbpf holds."""
        if self._handle is not None:
            self._library.btf__free(self._handle)
            self._handle = None

    def find(self, name: str, *kinds: int) -> int:
        """Give the id of a type by its name, 0 where there is none; `kinds` are BTF kinds, any of struct and union."""
        for kind in kinds or (_STRUCT, _UNION):
            number = self._library.btf__find_by_name_kind(self.handle, name.encode(), kind)
            if number > 0:
                return int(number)
        return 0

    def knows(self, name: str) -> bool:
        """Say whether the kernel has a struct, union, enum or typedef of this name."""
        return self.find(name, _STRUCT, _UNION, _ENUM, _TYPEDEF) > 0

    def function(self, name: str) -> int:
        """Give the id of a function, 0 where there is none."""
        return self.find(name, _FUNC)

    def tracepoint(self, name: str) -> int:
        """Give the id of a tracepoint's type (`btf_trace_NAME`), 0 where there is none."""
        return self.find(f"btf_trace_{name}", _TYPEDEF)

    def enumerators(self, name: str) -> dict[int, str]:
        """Give an enum's names by value; empty where the kernel has no such enum."""
        number = self.find(name, _ENUM)
        if not number:
            return {}
        address, type_ = self._type(number)
        entries = (_Enumerator * type_.count).from_address(address + ctypes.sizeof(_Type))
        return {entry.value: self._name(entry.name) for entry in entries}

    def offset(self, path: str) -> int | None:
        """Give the byte offset of `struct.member[.member…]`; None where there is none or it is a bit-field."""
        struct, *members = path.split(".")
        number, bits = self.find(struct), 0
        for member in members:
            found = self._member(number, member, _DEPTH) if number else None
            if found is None:
                return None
            number, bits = found[0], bits + found[1]
        return bits // 8 if number and bits % 8 == 0 else None

    def header(self, structs: Iterable[str]) -> str:
        """Write C definitions of the structs and of all that they contain; a name that is not there is left out."""
        numbers = [self.find(name, _STRUCT, _UNION, _ENUM, _TYPEDEF) for name in structs]
        return self._dump([number for number in numbers if number])

    def base_and_header(self, structs: Iterable[str]) -> tuple[str, str]:
        """Write the base typedefs (u8, __be32, …) and, apart, what `header` writes besides them."""
        base = [self.find(name, _TYPEDEF) for name in _BASE]
        others = [self.find(name, _STRUCT, _UNION, _ENUM, _TYPEDEF) for name in structs]
        texts: list[str] = []
        text = self._dump([n for n in base if n], [n for n in others if n], texts)
        return texts[0], text

    def _dump(self, first: list[int], then: list[int] | None = None, apart: list[str] | None = None) -> str:
        libc = ctypes.CDLL(None)
        buffer = ctypes.create_string_buffer(1 << 16)
        pieces: list[bytes] = []

        def write(_: int, template: bytes, arguments: int) -> None:
            libc.vsnprintf(buffer, ctypes.c_size_t(len(buffer)), template, ctypes.c_void_p(arguments))
            pieces.append(buffer.value)

        callback = _PRINTF(write)
        dump = self._library.btf_dump__new(self.handle, callback, None, None)
        if not dump:
            raise OSError(ctypes.get_errno(), "libbpf cannot write the kernel's types as C")
        try:
            for number in first:
                self._dump_type(dump, number)
            if then is not None and apart is not None:
                apart.append(_named_padding(b"".join(pieces).decode()))
                pieces.clear()
                for number in then:
                    self._dump_type(dump, number)
        finally:
            self._library.btf_dump__free(dump)
        return _named_padding(b"".join(pieces).decode())

    def _dump_type(self, dump: int, number: int) -> None:
        if self._library.btf_dump__dump_type(dump, number) < 0:
            raise OSError(ctypes.get_errno(), f"libbpf cannot write type {number} of the kernel as C")

    def _type(self, number: int) -> tuple[int, _Type]:
        address = self._library.btf__type_by_id(self.handle, number)
        if not address:
            raise OSError(ctypes.get_errno(), f"the kernel's types have no number {number}")
        return int(address), _Type.from_address(address)

    def _name(self, offset: int) -> str:
        name: bytes | None = self._library.btf__name_by_offset(self.handle, offset)
        return (name or b"").decode()

    def _member(self, number: int, wanted: str, depth: int) -> tuple[int, int] | None:
        """Find a member by name, unnamed structs and unions included: (type, offset in bits)."""
        address, type_ = self._type(number)
        while type_.kind in _SKIPPED and depth:
            address, type_ = self._type(type_.size_or_type)
            depth -= 1
        if type_.kind not in (_STRUCT, _UNION) or not depth:
            return None
        flagged = type_.info >> 31
        for member in (_Member * type_.count).from_address(address + ctypes.sizeof(_Type)):
            bits = member.offset & 0xFFFFFF if flagged else member.offset
            name = self._name(member.name)
            if name == wanted:
                return None if flagged and member.offset >> 24 else (member.type, bits)
            inner = None if name else self._member(member.type, wanted, depth - 1)
            if inner:
                return inner[0], bits + inner[1]
        return None


def available(path: Path = VMLINUX) -> str:
    """Say why the kernel's types cannot be had; an empty text where they can."""
    try:
        _library()
    except Unsupported as error:
        return error.reason
    return "" if path.exists() else f"{path} does not exist: the kernel was built without BTF"


_SUBSYSTEMS = {"MAC80211_UNUSABLE": "mac80211_drop_reason", "OPENVSWITCH": "ovs_drop_reason"}


def drop_reasons(kernel: Btf, modules: Path = VMLINUX.parent) -> dict[int, str]:
    """Give the names of `enum skb_drop_reason` and of the subsystems' own, in lower case without their prefix.

    A kernel before 5.17 has no reasons: then the answer is empty. Source: include/net/dropreason-core.h, dropreason.h.
    """
    names = {value: _short(name) for value, name in kernel.enumerators("skb_drop_reason").items()}
    for name in kernel.enumerators("skb_drop_reason_subsys").values():
        enum = _SUBSYSTEMS.get(name.removeprefix("SKB_DROP_REASON_SUBSYS_"))
        if enum:
            names |= {value & 0xFFFFFFFF: _short(text) for value, text in _of_module(kernel, modules, enum).items()}
    return names


def _of_module(kernel: Btf, modules: Path, enum: str) -> Mapping[int, str]:
    found = kernel.enumerators(enum)
    path = modules / {"mac80211_drop_reason": "mac80211", "ovs_drop_reason": "openvswitch"}[enum]
    if found or not path.exists():
        return found
    with Btf(path, kernel) as module:
        return module.enumerators(enum)


def _short(name: str) -> str:
    return re.sub(r"^(SKB_DROP_REASON_|SKB_|OVS_DROP_|RX_DROP_)", "", name).lower()


def _named_padding(text: str) -> str:
    """Give each unnamed bit-field that fills its unit a name."""
    numbers = iter(range(1 << 30))

    def named(match: re.Match[str]) -> str:
        indent, type_, width = match.groups()
        if _WIDTHS[type_.removeprefix("unsigned ")] != int(width):
            return match[0]
        return f"{indent}{type_} __unnamed{next(numbers)};"

    return _PADDING.sub(named, text)
