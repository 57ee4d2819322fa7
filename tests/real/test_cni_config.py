"""CNI configurations watched by the kernel's inotify: what is heard of, how soon, and how often it is counted."""

import json
import os
import pty
import select
import shutil
import statistics
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import Running
from runtimes import until

from exporter.contract import Paths
from exporter.metrics import Policy, Store
from exporter.monitors import cni_config
from exporter.supervisor import Supervisor

_QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")
_QUIET = 0.4  # seconds in which everything that was heard of is told
_ROUNDS = 50
_ALONE = {"enable_container_discovery": False, "enable_kubernetes_integration": False}


def content(kind: str = "bridge", **more: object) -> bytes:
    """Write a list with one plugin, laid out over lines as people do."""
    return json.dumps({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": kind, **more}]}, indent=2).encode()


class Watched:
    """A directory below a place of its own, and the monitor over it, run by the supervisor as ever."""

    def __init__(self, root: Path, **settings: Any) -> None:  # noqa: ANN401 - of several types
        self.root = root
        self.net = root / "cni" / "net.d"
        self._use_inotify = settings.pop("use_inotify", True)
        directories = settings.pop("directories", (str(self.net),))
        self.settings = cni_config.Settings(directories, (str(root / "bin"),), **settings)
        self.store = Store(Policy(grace=0.0))
        self.supervisor = Supervisor(self.store.owned("supervisor"))

    def start(self) -> "Watched":
        monitor = cni_config.monitor(self.settings, use_inotify=self._use_inotify)
        self.supervisor.add(monitor, self.store.owned("cni_config"), Paths())
        self.supervisor.start()
        until(lambda: self.supervisor.standings()[0].seen)
        return self

    def mode(self) -> str:
        return self.supervisor.standings()[0].mode

    def write(self, name: str, data: bytes) -> Path:
        """Put a file there as careful programs do: written aside, then renamed."""
        self.net.mkdir(parents=True, exist_ok=True)
        aside = self.net / f".{name}.new"
        aside.write_bytes(data)
        return aside.rename(self.net / name)

    def samples(self, family: str, label: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in self.store.read(family)}

    def plugins(self) -> dict[str, str]:
        """Give the plugins of each file, by name."""
        return {Path(labels["file"]).name: labels["plugins"] for labels, _ in self.store.read("cni_config_info")}

    def changes(self) -> dict[str, float]:
        return {operation: n for operation, n in self.samples("cni_config_changes_total", "operation").items() if n}

    def total(self, family: str) -> float:
        return sum(value for _, value in self.store.read(family))

    def settled(self) -> dict[str, float]:
        """Give the changes once nothing more is under way."""
        time.sleep(_QUIET)
        return self.changes()


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Start monitors that end with the test."""
    started: list[Watched] = []

    def start(**settings: Any) -> Watched:  # noqa: ANN401 - as above
        started.append(Watched(tmp_path, **settings))
        return started[-1]

    yield start
    for watched in started:
        assert watched.supervisor.stop(10) == []


@pytest.fixture
def watched(watch: Callable[..., Watched]) -> Watched:
    """A monitor over a directory with one file."""
    made = watch()
    made.write("10-a.conflist", content())
    return made.start()


# How soon


def test_a_rename_is_on_the_metrics_page_at_once(exporter: Callable[..., Running], tmp_path: Path) -> None:
    """A real exporter scraped over HTTP, fifty times; the bound is a loose one, the figure is printed."""
    net = tmp_path / "net.d"
    net.mkdir()
    aside, target = net / ".new", net / "10-a.conflist"
    running = exporter({"cni_config": {"config_paths": [str(net)], "use_ebpf": False}, "general": _ALONE})
    delays, scrapes = [], []
    for number in range(_ROUNDS):
        aside.write_bytes(content(f"plugin-{number}"))
        began = asked = time.monotonic()
        aside.rename(target)
        while f'plugins="plugin-{number}"'.encode() not in running.get("/metrics"):
            asked = time.monotonic()
            assert asked < began + 10
        delays.append(time.monotonic() - began)
        scrapes.append(time.monotonic() - asked)
    middle, alone, most = statistics.median(delays), statistics.median(scrapes), max(delays)
    print(
        f"rename to answer: median {middle * 1000:.1f} ms (the scrape: {alone * 1000:.1f}), most {most * 1000:.1f} ms"
    )
    assert middle < 1.0
    counted = running.scrape().value("cni_config_changes_total", operation="modify")
    assert counted == _ROUNDS - 1


# How often


def test_an_equal_rewrite_is_no_change(watched: Watched) -> None:
    """In place, by rename, and with another time."""
    path = watched.net / "10-a.conflist"
    path.write_bytes(content())
    watched.write("10-a.conflist", content())
    os.utime(path)
    path.chmod(0o600)
    assert watched.settled() == {}


def _vim(vim: str, path: Path) -> None:
    """Search and replace, with swap file and backup, by the editor's own settings and nobody's of this machine."""
    commands = [part for text in ("set swapfile backup writebackup", "%s/bridge/ptp/", "wq") for part in ("-c", text)]
    _edit(vim, "-u", "NONE", "-N", "-es", *commands, path)


def _nano(nano: str, path: Path) -> None:
    """Search and replace, with backup and lock file, as a person does: the next key when the screen asks for it."""
    terminal, own = pty.openpty()
    termios.tcsetwinsize(own, (24, 80))
    process = subprocess.Popen(
        [nano, "--ignorercfiles", "--backup", "--locking", path],
        stdin=own,
        stdout=own,
        stderr=own,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "LC_ALL": "C"},
    )
    os.close(own)
    try:
        for shown, keys in (
            *((b"bridge", b"\x1c"), (b"Search", b"bridge\r"), (b"Replace with", b"ptp\r"), (b"this instance", b"a")),
            *((b"Replaced", b"\x0f"), (b"Name to Write", b"\r"), (b"Wrote", b"\x18")),
        ):
            _await_screen(terminal, shown)
            os.write(terminal, keys)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def _await_screen(terminal: int, shown: bytes) -> None:
    seen = b""
    while shown not in seen:
        assert select.select([terminal], [], [], 20)[0], f"{shown!r} is not on the screen: {seen!r}"
        seen += os.read(terminal, 4096)


def _sed(sed: str, path: Path) -> None:
    _edit(sed, "-i.bak", "s/bridge/ptp/", path)


def _edit(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=20, stdin=subprocess.DEVNULL, capture_output=True)


@pytest.mark.parametrize(
    ("edit", "editor"), [(_vim, "vim"), (_nano, "nano"), (_sed, "sed")], ids=["vim", "nano", "sed -i"]
)
def test_what_an_editor_does_is_one_change(
    watched: Watched, need: Callable[[str], str], edit: Callable[[str, Path], None], editor: str
) -> None:
    """The real editors: their swap, lock, backup and probe files are none, and nobody is deleted in between."""
    edit(need(editor), watched.net / "10-a.conflist")
    assert "ptp" in (watched.net / "10-a.conflist").read_text()
    until(lambda: watched.plugins()["10-a.conflist"] == "ptp")
    assert watched.settled() == {"modify": 1.0}


def test_an_editor_that_is_slow_to_write_is_waited_for(watched: Watched) -> None:
    """The old file is moved away, the new one is created empty and filled piece by piece: one change, never invalid."""
    path = watched.net / "10-a.conflist"
    path.rename(watched.net / "10-a.conflist~")
    data = content("ptp")
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(data), 32):
            file.write(data[start : start + 32])
            time.sleep(0.03)
    until(lambda: watched.plugins()["10-a.conflist"] == "ptp")
    assert watched.settled() == {"modify": 1.0}


def test_locks_and_temporary_files_are_no_change(watched: Watched) -> None:
    """Those of plugins, of editors, of installers."""
    for name in ("cni.lock", ".10-a.conflist.swp", "4913", "10-a.conflist~", "#10-a.conflist#", ".10-a.conflist.tmp1"):
        (watched.net / name).write_bytes(content("other"))
        (watched.net / name).unlink()
    (watched.net / ".#10-a.conflist").symlink_to("root@node.1:1")
    assert watched.settled() == {}


def config_map(volume: Path, generation: int, files: dict[str, bytes]) -> None:
    """Swap the content of a volume as the kubelet does (pkg/volume/util/atomic_writer.go)."""
    volume.mkdir(parents=True, exist_ok=True)
    data = volume / f"..2026_11_22_{generation}"
    data.mkdir()
    for name, content_ in files.items():
        (data / name).write_bytes(content_)
    (volume / "..data_tmp").symlink_to(data.name)
    old = (volume / "..data").readlink() if (volume / "..data").is_symlink() else None
    (volume / "..data_tmp").rename(volume / "..data")
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")
    for link in volume.iterdir():
        if not link.name.startswith("..") and link.name not in files:
            link.unlink()
    if old:
        shutil.rmtree(volume / old)


def test_a_config_maps_swap_counts_what_it_changed(watch: Callable[..., Watched]) -> None:
    """Several swaps: of equal content none, else as many changes as files differ."""
    watched = watch()
    config_map(watched.net, 1, {"10-a.conflist": content(), "20-b.conf": b"{}"})
    watched.start()
    config_map(watched.net, 2, {"10-a.conflist": content(), "20-b.conf": b"{}"})
    assert watched.settled() == {}
    config_map(watched.net, 3, {"10-a.conflist": content("ptp"), "20-b.conf": b"{}"})
    until(lambda: watched.plugins()["10-a.conflist"] == "ptp")
    assert watched.settled() == {"modify": 1.0}
    config_map(watched.net, 4, {"10-a.conflist": content("ipvlan"), "30-c.conf": b"[]"})
    until(lambda: "30-c.conf" in watched.plugins())
    assert watched.settled() == {"modify": 2.0, "create": 1.0, "delete": 1.0}


def test_each_operation_is_counted_for_what_it_is(watched: Watched) -> None:
    """Create, modify, rename, delete, in a subdirectory too."""
    watched.write("20-b.conf", content("ptp"))
    assert watched.settled() == {"create": 1.0}
    (watched.net / "20-b.conf").rename(watched.net / "05-b.conf")
    assert watched.settled() == {"create": 1.0, "rename": 1.0}
    (watched.net / "net").mkdir()
    (watched.net / "net" / "1.conf").write_bytes(b'{"type": "tuning"}')
    assert watched.settled() == {"create": 2.0, "rename": 1.0}
    (watched.net / "net" / "1.conf").write_bytes(b'{"type": "sbr"}')
    assert watched.settled() == {"create": 2.0, "rename": 1.0, "modify": 1.0}
    shutil.rmtree(watched.net / "net")
    assert watched.settled() == {"create": 2.0, "rename": 1.0, "modify": 1.0, "delete": 1.0}


# Directories


def test_a_directory_that_comes_late_and_goes_and_comes_back(watch: Callable[..., Watched]) -> None:
    """Any part of its path: made one by one, removed with all, moved away and back."""
    watched = watch().start()
    watched.net.parent.mkdir()
    time.sleep(0.1)
    watched.write("10-a.conflist", content())
    until(lambda: watched.plugins() == {"10-a.conflist": "bridge"})
    shutil.rmtree(watched.net.parent)
    until(lambda: watched.plugins() == {})
    watched.write("10-a.conflist", content("ptp"))
    until(lambda: watched.plugins() == {"10-a.conflist": "ptp"})
    watched.net.parent.rename(watched.root / "away")
    until(lambda: watched.plugins() == {})
    (watched.root / "away").rename(watched.net.parent)
    until(lambda: watched.plugins() == {"10-a.conflist": "ptp"})
    watched.write("10-a.conflist", content("ipvlan"))
    until(lambda: watched.plugins() == {"10-a.conflist": "ipvlan"})
    assert watched.settled() == {"create": 3.0, "delete": 2.0, "modify": 1.0}


def test_links_are_followed_wherever_they_lead(watched: Watched, tmp_path: Path) -> None:
    """A link to a file elsewhere, by way of another link: each part may change."""
    store = tmp_path / "store"
    for version, kind in (("v1", "ptp"), ("v2", "ipvlan")):
        (store / version).mkdir(parents=True)
        (store / version / "b").write_bytes(content(kind))
    (store / "now").symlink_to("v1")
    (watched.net / "20-b.conflist").symlink_to("../../store/now/b")
    until(lambda: watched.plugins().get("20-b.conflist") == "ptp")
    (store / "next").symlink_to("v2")
    (store / "next").rename(store / "now")
    until(lambda: watched.plugins()["20-b.conflist"] == "ipvlan")
    (store / "v2" / "b").write_bytes(content("macvlan"))
    until(lambda: watched.plugins()["20-b.conflist"] == "macvlan")
    (store / "v2" / "b").unlink()
    until(lambda: watched.plugins()["20-b.conflist"] == "")
    assert watched.settled() == {"create": 1.0, "modify": 2.0, "delete": 1.0}


def test_a_directory_that_is_a_link_is_followed(watch: Callable[..., Watched], tmp_path: Path) -> None:
    """Where the link is turned to another directory, that one is watched from then on."""
    for name, kind in (("one", "bridge"), ("two", "ptp")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.conflist").write_bytes(content(kind))
    (tmp_path / "cni").mkdir()
    watched = watch()
    watched.net.symlink_to(tmp_path / "one")
    watched.start()
    (tmp_path / "next").symlink_to(tmp_path / "two")
    (tmp_path / "next").rename(watched.net)
    until(lambda: watched.plugins() == {"a.conflist": "ptp"})
    (tmp_path / "two" / "a.conflist").write_bytes(content("ipvlan"))
    until(lambda: watched.plugins() == {"a.conflist": "ipvlan"})


@contextmanager
def mounted(*arguments: str | Path, at: Path) -> Iterator[None]:
    """Mount something for a while."""
    subprocess.run(["mount", *arguments, at], check=True, timeout=10)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True, timeout=10)


@pytest.mark.real("root", "mount")
def test_a_mount_that_comes_late_is_seen_and_its_end_too(watched: Watched, tmp_path: Path) -> None:
    """Mounts are nothing that inotify tells; a read-only one is watched like any other."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.conflist").write_bytes(content("ptp"))
    with mounted("--bind", elsewhere, at=watched.net):
        until(lambda: watched.plugins() == {"a.conflist": "ptp"})
        subprocess.run(["mount", "-o", "remount,bind,ro", watched.net], check=True, timeout=10)
        with pytest.raises(OSError, match="Read-only"):
            (watched.net / "a.conflist").touch()
        (elsewhere / "a.conflist").write_bytes(content("ipvlan"))
        until(lambda: watched.plugins() == {"a.conflist": "ipvlan"})
    until(lambda: watched.plugins() == {"10-a.conflist": "bridge"})


def test_names_of_any_bytes_do_not_stop_the_watch(watched: Watched) -> None:
    """They cannot be decoded by pyinotify, which loses what came with them: then everything is read again."""
    odd = Path(os.fsdecode(os.fsencode(watched.net) + b"/\xff\n.conf"))
    odd.write_bytes(content("ptp"))
    until(lambda: len(watched.plugins()) == 2)
    (watched.net / os.fsdecode(b"\xfe")).mkdir()
    watched.write("10-a.conflist", content("ipvlan"))
    until(lambda: watched.plugins()["10-a.conflist"] == "ipvlan")
    assert watched.mode() == "inotify"
    assert watched.total("cni_config_rescans_total") >= 1


# Surroundings


def test_plugins_and_leases_are_heard_of(watch: Callable[..., Watched], tmp_path: Path) -> None:
    """A plugin that is installed, loses its permission, is removed; addresses that are leased and given back."""
    ipam = {"type": "host-local", "dataDir": str(tmp_path / "leases"), "subnet": "10.0.0.0/24"}
    watched = watch()
    watched.write("10-a.conflist", content(ipam=ipam))
    watched.start()

    def there() -> dict[str, float]:
        return watched.samples("cni_config_plugin_available", "plugin")

    (tmp_path / "bin").mkdir()
    until(lambda: there() == {"bridge": 0.0, "host-local": 0.0})
    (tmp_path / "bin" / "bridge").touch(0o755)
    until(lambda: there()["bridge"] == 1.0)
    (tmp_path / "bin" / "bridge").chmod(0o644)
    until(lambda: there()["bridge"] == 0.0)
    leases = tmp_path / "leases" / "net"
    leases.mkdir(parents=True)
    for number in range(2, 25):
        (leases / f"10.0.0.{number}").touch()
    until(lambda: watched.samples("cni_ipam_addresses", "state") == {"used": 23.0, "free": 230.0})
    (leases / "10.0.0.9").unlink()
    until(lambda: watched.samples("cni_ipam_addresses", "state") == {"used": 22.0, "free": 231.0})
    assert watched.changes() == {}


# Limits


@contextmanager
def limited(limit: Path, value: int) -> Iterator[None]:
    """Lower a limit of the kernel for a while."""
    before = limit.read_text()
    limit.write_text(str(value))
    try:
        yield
    finally:
        limit.write_text(before)


@pytest.mark.real("root")
def test_a_burst_over_the_queues_limit_is_counted_and_ends_right(watch: Callable[..., Watched]) -> None:
    """Ten thousand changes while the queue holds sixteen: lost ones are said, and what is told at the end is true."""
    watched = watch()
    watched.net.mkdir(parents=True)
    with limited(_QUEUE, 16):
        watched.start()
    for number in range(10_000):
        (watched.net / f"{number % 50:02}.conf").write_bytes(b'{"type": "plugin-%d"}' % number)
    (watched.net / "07.conf").unlink()
    expected = {f"{number % 50:02}.conf": f"plugin-{number}" for number in range(9950, 10_000) if number % 50 != 7}
    until(lambda: watched.plugins() == expected, 20)
    lost = watched.total("cni_config_watch_overflows_total")
    print(f"overflows {lost:.0f}, rescans {watched.total('cni_config_rescans_total'):.0f}, changes {watched.changes()}")
    assert lost >= 1
    assert watched.total("cni_config_rescans_total") >= 1
    assert watched.mode() == "inotify"


@pytest.mark.real("root")
@pytest.mark.parametrize("limit", ["max_user_instances", "max_user_watches"])
def test_where_a_limit_is_reached_polling_takes_over(watch: Callable[..., Watched], limit: str) -> None:
    """The reason names the limit to raise; the families are the same, and no change is counted twice."""
    watched = watch(poll_interval=0.05)
    watched.write("10-a.conflist", content())
    with limited(_QUEUE.with_name(limit), 0):
        watched.start()
    standing = watched.supervisor.standings()[0]
    assert (watched.mode(), standing.fallback) == ("polling", True)
    assert limit in standing.remedy
    watched.write("10-a.conflist", content("ptp"))
    until(lambda: watched.changes() == {"modify": 1.0})
    assert watched.plugins() == {"10-a.conflist": "ptp"}


def test_polling_tells_the_same(watch: Callable[..., Watched], tmp_path: Path) -> None:
    """The same acts under both, each with its own directory's eyes: the same families with the same values."""
    (tmp_path / "bin").mkdir()
    both = [watch(use_inotify=use, poll_interval=0.05) for use in (True, False)]
    both[0].write("10-a.conflist", content())
    heard, polled = (watched.start() for watched in both)
    assert (heard.mode(), polled.mode()) == ("inotify", "polling")
    heard.write("20-b.conf", b"{")
    assert heard.settled() == polled.changes() == {"create": 1.0}
    heard.write("10-a.conflist", content("ptp"))
    (heard.net / "20-b.conf").rename(heard.net / "05-b.conf")
    assert heard.settled() == polled.changes() == {"create": 1.0, "modify": 1.0, "rename": 1.0}
    shutil.rmtree(heard.net)
    assert heard.settled() == polled.changes()
    heard.write("30-c.conflist", content("ipvlan", ipam={"type": "host-local", "subnet": "10.0.0.0/24"}))
    assert heard.settled() == polled.changes()
    for family in ("info", "valid", "active", "problem_info", "plugin_available", "changes_total"):
        told = [
            sorted((sorted(labels.items()), n) for labels, n in one.store.read(f"cni_config_{family}")) for one in both
        ]
        assert told[0] == told[1], family
    assert list(heard.store.read("cni_ipam_addresses")) == list(polled.store.read("cni_ipam_addresses")) != []
