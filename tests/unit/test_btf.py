"""The reader of kernel types, on types encoded here: what it says must be what was encoded."""

import struct
from pathlib import Path

import pytest

from exporter.contract import Unsupported
from exporter.host import btf


class Encoder:
    """Writes BTF (Documentation/bpf/btf.rst): types are numbered from 1."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        offset = len(self.strings)
        self.strings += text.encode() + b"\0"
        return offset

    def add(self, name: str, kind: int, vlen: int, size: int, rest: bytes = b"", *, flag: bool = False) -> int:
        self.types += struct.pack("=III", self.name(name), kind << 24 | vlen | flag << 31, size) + rest
        self.count += 1
        return self.count

    def integer(self, name: str, size: int) -> int:
        return self.add(name, 1, 0, size, struct.pack("=I", 8 * size))

    def record(
        self, name: str, size: int, *members: tuple[str, int, int], union: bool = False, flag: bool = False
    ) -> int:
        rest = b"".join(struct.pack("=III", self.name(n), type_, bits) for n, type_, bits in members)
        return self.add(name, 5 if union else 4, len(members), size, rest, flag=flag)

    def enum(self, name: str, **values: int) -> int:
        rest = b"".join(struct.pack("=Ii", self.name(n), value) for n, value in values.items())
        return self.add(name, 6, len(values), 4, rest)

    def write(self, path: Path) -> Path:
        head = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        path.write_bytes(head + self.types + self.strings)
        return path


@pytest.fixture
def types(tmp_path: Path) -> btf.Btf:
    try:
        btf._library()
    except Unsupported as error:
        pytest.skip(error.reason)
    encoder = Encoder()
    long_, int_ = encoder.integer("unsigned long", 8), encoder.integer("unsigned int", 4)
    encoder.add("u64", 8, 0, long_)
    inner = encoder.record("ns_common", 16, ("ops", long_, 0), ("inum", int_, 64))
    alias = encoder.add("ns_t", 8, 0, inner)
    choice = encoder.record("", 8, ("dev", long_, 0), ("scratch", long_, 0), union=True)
    encoder.record("net", 64, ("", choice, 64), ("ns", alias, 128), ("net_cookie", long_, 448))
    encoder.record("flags", 4, ("whole", int_, 0), ("low", int_, 3 << 24), flag=True)
    encoder.enum("skb_drop_reason", SKB_NOT_DROPPED_YET=0, SKB_CONSUMED=1, SKB_DROP_REASON_NO_SOCKET=3)
    return btf.Btf(encoder.write(tmp_path / "types"))


def test_offset_of_nested_members(types: btf.Btf) -> None:
    """A member is found through a typedef and through an unnamed union, in bytes from the outermost struct."""
    assert types.offset("net.net_cookie") == 56
    assert types.offset("net.ns.inum") == 24
    assert types.offset("net.dev") == 8
    assert types.offset("net.scratch") == 8


def test_no_offset_where_there_is_no_such_member(types: btf.Btf) -> None:
    """A struct or member that the kernel lacks, and a bit-field, have no offset."""
    assert types.offset("net.nothing") is None
    assert types.offset("nothing.member") is None
    assert types.offset("net.net_cookie.further") is None
    assert types.offset("flags.whole") == 0
    assert types.offset("flags.low") is None
    assert types.knows("skb_drop_reason")
    assert not types.knows("sk_rst_reason")


def test_padding_gets_a_name(types: btf.Btf) -> None:
    """Padding that fills whole units is written as named members: clang 14 under bcc misplaces unnamed ones."""
    base, text = types.base_and_header(["net"])
    assert "long: 64;" not in text
    assert text.count("__unnamed") >= 3  # 4 and 24 bytes of padding, in units
    assert "typedef" in base
    assert "struct net {" in text
    assert "struct net {" not in base


def test_partial_padding_stays() -> None:
    """A bit-field that fills its unit only in part keeps its place: a named member would move what follows."""
    assert btf._named_padding("\tlong: 28;\n\tlong: 64;\n") == "\tlong: 28;\n\tlong __unnamed0;\n"


def test_drop_reasons_are_short_names(types: btf.Btf, tmp_path: Path) -> None:
    """Reasons are the enum's names without their prefix, by number."""
    assert btf.drop_reasons(types, tmp_path) == {0: "not_dropped_yet", 1: "consumed", 3: "no_socket"}


def test_a_kernel_without_types_is_unsupported(tmp_path: Path) -> None:
    """No BTF is an answer with a remedy, not a failure."""
    with pytest.raises(Unsupported) as caught:
        btf.Btf(tmp_path / "vmlinux")
    assert "BTF" in caught.value.remedy
    assert "BTF" in btf.available(tmp_path / "vmlinux")


def test_garbage_is_an_error(tmp_path: Path) -> None:
    """A file that holds no types is Unsupported, with its path, and not taken for an empty kernel."""
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x9f\xeb\x01" + b"\xff" * 100)
    with pytest.raises(Unsupported, match="vmlinux"):
        btf.Btf(path)


def test_closed_types_are_refused(types: btf.Btf) -> None:
    """Nothing is read from memory that was freed."""
    types.close()
    with pytest.raises(ValueError, match="closed"):
        types.offset("net.ns")
