"""Anything at all as a CNI configuration: no crash, no wait, bounded memory, and nothing of the content is told."""

import json
import os
import signal
import stat
import string
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import Recorder

from exporter.contract import Paths
from exporter.monitors.cni_config import Settings
from exporter.monitors.cni_config.configuration import read
from exporter.monitors.cni_config.files import Found, Reader
from exporter.monitors.cni_config.polling import PollingSource
from exporter.monitors.cni_config.reading import LARGEST
from exporter.monitors.cni_config.records import Records

MIB = 1 << 20
_NAMES = ("a.conf", "a.conflist", "a.json")


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail what waits for ever; the bound is far above what a busy machine needs."""

    def end(_number: int, _frame: object) -> None:
        raise TimeoutError(f"not within {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def look(directory: Path) -> Recorder:
    """Look once at a directory."""
    context = Recorder(Paths())
    source = PollingSource(Records(Settings((str(directory),), ())))
    source.open(context)
    with within(30):
        source.update()
    return context


def problems(directory: Path) -> dict[str, str]:
    """Give the problem of each file."""
    told = look(directory).families.snapshots["cni_config_problem_info"]
    return {os.path.relpath(path, directory): problem for path, problem, _, _ in told}


# Content


@given(st.binary(max_size=4000))
def test_any_bytes_are_a_configuration_or_a_problem(content: bytes) -> None:
    """Nothing is raised, and what is not loaded has a problem."""
    for name in _NAMES:
        found = read(name, content)
        assert found.loads or found.problem


_KEYS = st.sampled_from(
    [
        *(
            "name",
            "cniVersion",
            "type",
            "Type",
            "plugins",
            "ipam",
            "ranges",
            "subnet",
            "rangeStart",
            "gateway",
            "dataDir",
        ),
        *("delegates", "delegate", "subnetFile", "dns", "nameservers", "capabilities", "prevResult", "x"),
    ]
)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["host-local", "bridge", "multus", "flannel", "1.0.0", "10.0.0.0/24", "fd00::/8", "/var/lib", "\0", "a/b"]
    )
)
_ANY = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=8), max_leaves=40
)


@given(st.dictionaries(_KEYS, _ANY, max_size=10))
def test_any_types_in_any_place_are_a_configuration_or_a_problem(document: dict[str, Any]) -> None:
    """The keys that are looked at, with every value but the one expected."""
    for name in _NAMES:
        found = read(name, json.dumps(document).encode())
        assert found.loads or found.problem
        assert all(isinstance(text, str) for text in (found.network, found.version, *found.plugins))
        assert all(pool.size >= 0 for pool in found.pools)


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 200_000, b'{"a":' * 200_000, b"[" * 500_000 + b"]" * 500_000),
        *(b'{"type":"a","x":' + b"[" * 900 + b"]" * 900 + b"}", b"[" + b"{}," * 300_000 + b"{}]"),
        *(b'"' + b"\\u0000" * 170_000 + b'"', b"9" * MIB, b"\0" * MIB, b"\xff" * MIB),
        b'{"type":"multus","delegates":[' + b'{"type":"multus","delegates":[' * 300 + b"]}" * 300 + b"]}",
        b'{"name":"a","plugins":[' + b'{"type":"b"},' * 70_000 + b'{"type":"b"}]}',
    ],
)
def test_the_worst_documents_cost_bounded_memory(content: bytes) -> None:
    """Deep, wide or long: far less than the exporter's own size."""
    tracemalloc.start()
    try:
        with within(60):
            for name in _NAMES:
                read(name, content)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


@given(st.text(string.ascii_letters + string.digits, min_size=24, max_size=60), st.integers(0, 400))
def test_nothing_of_a_content_is_told_in_a_problem(secret: str, cut: int) -> None:
    """Tokens and keys, whole or cut anywhere, do not come out by way of an error."""
    document = {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "calico",
        "kubernetes": {"kubeconfig": secret},
        "k8s_api_token": secret,
        "ipsec": {"psk": secret},
        "ipam": {"type": "calico-ipam", "psk": secret},
        "dns": {"search": secret},
    }
    text = json.dumps(document, indent=1)
    for content in (
        text,
        text[:cut],
        text.replace('"net"', f'{{"{secret}": 1}}'),
        text.replace(f'"{secret}"', secret, 1),
    ):
        for name in _NAMES:
            found = read(name, content.encode())
            assert secret[:12] not in f"{found.problem}{found.network}{found.version}{found.plugins}{found.binaries}"


# What a file turns out to be


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _directory(path: Path) -> None:
    inner = path.parent.parent / "inner"
    inner.mkdir()
    path.symlink_to(inner)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


def _endless(path: Path) -> None:
    path.symlink_to("/proc/self/pagemap")  # a regular file of size 0 with gigabytes in it


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (_fifo, "not a regular file"),
        (_socket, "not a regular file"),
        (_device, "not a regular file"),
        (_directory, "a directory"),
        (_loop, "a loop of links"),
        (_dangling, "a link that leads nowhere"),
        (_sparse, "larger than 1 MiB"),
        (_endless, "larger than 1 MiB"),
    ],
)
def test_what_is_no_plain_file_is_a_problem_of_its_own(
    tmp_path: Path, make: Callable[[Path], None], problem: str
) -> None:
    """It is neither waited for nor read whole; the file beside it is read as ever."""
    net = tmp_path / "net.d"
    net.mkdir()
    make(net / "a.conf")
    (net / "b.conf").write_text('{"cniVersion": "1.0.0", "name": "b", "type": "bridge"}')
    tracemalloc.start()
    try:
        context = look(net)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    told = context.families.snapshots
    assert [key[1] for key in told["cni_config_problem_info"]] == [problem]
    assert told["cni_config_valid"] == {(f"{net}/a.conf",): 0.0, (f"{net}/b.conf",): 1.0}
    assert told["cni_config_active"] == {(f"{net}/a.conf",): 0.0, (f"{net}/b.conf",): 0.0}


@pytest.mark.real("root")
def test_a_device_node_is_not_opened(tmp_path: Path) -> None:
    """Opening may have effects; what is asked first is what it is."""
    os.mknod(tmp_path / "a.conf", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    assert problems(tmp_path) == {"a.conf": "not a regular file"}


_ODD_NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=()), min_size=1, max_size=40)


@given(st.lists(_ODD_NAMES, min_size=1, max_size=5))
def test_any_name_of_a_file_is_taken(names: list[str]) -> None:
    """Newlines, quotes, control characters, lone surrogates: the bytes of names are anything but / and NUL."""
    with TemporaryDirectory() as directory:
        made = set()
        for name in names:
            try:
                Path(directory, f"{name}.conf").write_text('{"type": "a"}')
            except (UnicodeEncodeError, OSError):  # surrogates of no byte; too long
                continue
            made.add(f"{directory}/{name}.conf")
        told = look(Path(directory)).families.snapshots
        assert {key[0] for key in told["cni_config_info"]} == made


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """It has the place that its bytes give it."""
    for name in (b"\xff.conf", b"\xc3\xa9.conf", b"a\nb.conf"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text('{"type": "a"}')
    (tree,) = Reader().trees((str(tmp_path),))
    assert [os.fsencode(found.path).rpartition(b"/")[2] for found in tree.files] == [
        b"a\nb.conf",
        b"\xc3\xa9.conf",
        b"\xff.conf",
    ]


def test_a_file_that_grows_while_it_is_read_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size that counts is what is read, not what was said before."""
    path = tmp_path / "a.conf"
    path.write_text("{}")
    fstat = os.fstat

    def then_grow(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(path, 2 * LARGEST)
        return status

    monkeypatch.setattr("exporter.monitors.cni_config.reading.os.fstat", then_grow)
    assert problems(tmp_path) == {"a.conf": "larger than 1 MiB"}


def test_a_file_that_turns_into_a_fifo_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the question what it is and its opening anything may happen."""
    path = tmp_path / "a.conf"
    path.write_text("{}")
    opened = os.open

    def replaced(target: str, flags: int) -> int:
        if target == str(path):
            path.unlink()
            os.mkfifo(path)
        return opened(target, flags)

    monkeypatch.setattr("exporter.monitors.cni_config.reading.os.open", replaced)
    assert problems(tmp_path) == {"a.conf": "not a regular file"}


def test_a_file_that_vanishes_while_it_is_looked_at_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No problem is told of it."""
    (tmp_path / "a.conf").write_text("{}")
    opened = os.open

    def vanish(target: str, flags: int) -> int:
        Path(target).unlink()
        return opened(target, flags)

    monkeypatch.setattr("exporter.monitors.cni_config.reading.os.open", vanish)
    assert look(tmp_path).families.snapshots["cni_config_info"] == {}


# Numbers


def test_a_flood_of_files_and_directories_is_bounded_and_said(tmp_path: Path) -> None:
    """A thousand files, a hundred directories, five levels; that there is more is an error of kind `directory`."""
    for number in range(1200):
        (tmp_path / f"{number:04}.conf").write_text('{"type": "a"}')
    began = time.monotonic()
    context = look(tmp_path)
    assert len(context.families.snapshots["cni_config_info"]) == 1000
    assert context.error_kinds() == ["directory"]
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("wide", "deep"), [(150, 0), (1, 12)])
def test_subdirectories_are_bounded(tmp_path: Path, wide: int, deep: int) -> None:
    """Wide or deep: what is left out is said."""
    for number in range(wide):
        (tmp_path / f"d{number}" / "/".join("x" * deep)).mkdir(parents=True)
    (tree,) = Reader().trees((str(tmp_path),))
    assert len(tree.subdirectories) == min(100, wide + min(deep, 3))
    assert not tree.complete


def test_a_configured_path_that_is_no_directory_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """A file, a FIFO, a path with a file in the middle, a name too long."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    paths = (f"{tmp_path}/file", f"{tmp_path}/fifo", f"{tmp_path}/file/net.d", "/" + "x" * 3000, "/nowhere")
    assert [(tree.files, tree.exists) for tree in Reader().trees(paths)] == [((), False)] * 5


def test_a_found_file_shows_nothing_of_its_content() -> None:
    """What is kept of a file is what may be told; there is no field for the rest."""
    assert set(Found.__slots__) == {"path", "configuration", "sha256", "changed", "readable"}
