"""A host of plain files for tests: a procfs, a netlink that plays what the test tells it, a clock that stands still.

Flows in: networks, processes and devices that a test makes. Flows out: an opened links source, and what it wrote.
"""

import itertools
import os
from pathlib import Path

import pytest
from recorder import Recorder

from exporter.contract import Context, Paths
from exporter.host.netlink import Dump
from exporter.host.netlink_messages import Counters, Link, News
from exporter.monitors.links import source
from exporter.monitors.links.source import LinksSource, NetlinkSource

CONTAINER = "a" * 64
OTHER = "b" * 64
COUNTERS = Counters(1, 2, 3, 4, 5, 6, 7, 8)
NET_DEV = "h\nh\n    lo: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
FILES = {
    "dev": NET_DEV,
    "snmp": "Tcp: InSegs RetransSegs OutRsts CurrEstab\nTcp: 1 2 3 4\nUdp: RcvbufErrors\nUdp: 5\n",
    "netstat": "TcpExt: ListenOverflows\nTcpExt: 6\n",
    "snmp6": "Udp6RcvbufErrors 10\n",
    "sockstat": "TCP: inuse 1 orphan 0 tw 0 alloc 1 mem 80\nUDP: inuse 1 mem 0\n",
    "sockstat6": "TCP6: inuse 0\nUDP6: inuse 1\n",
    "tcp": "  sl\n   0: 0100007F:1F90 00000000:0000 0A 0\n   1: 0100007F:1F90 00000000:0000 08 0\n",
    "tcp6": "",
}


class Host:
    """A procfs of plain files, a netlink that answers from it, and a clock that stands still."""

    def __init__(self, root: Path) -> None:
        self.procfs = root / "proc"
        self.networks = root / "networks"
        self.now = 1000.0
        self.links: list[Link] = []
        self.nsids: dict[str, int] = {}
        self.news: list[list[News | ValueError] | OSError] = []
        self.recorder = Recorder(paths=Paths(self.procfs, root / "sys"))
        self.network("host")
        self.process(1, "host")
        self.process(os.getpid(), "host")
        (self.procfs / "self").symlink_to(str(os.getpid()))
        (self.procfs / "self/ns/pid").symlink_to("pid:[4026531836]")
        self.mounts("")

    def network(self, name: str) -> None:
        """Make a network namespace: files that its processes share, so that inodes are as in a real procfs."""
        (self.networks / name).mkdir(parents=True)
        for file, content in {**FILES, "ns": "", "stat": ""}.items():
            (self.networks / name / file).write_text(content)

    def process(self, pid: int, network: str, container: str = "", started: int = 100) -> None:
        home = self.procfs / str(pid)
        (home / "net").mkdir(parents=True)
        (home / "ns").mkdir()
        for file in (*FILES, "stat"):
            (home / "net" / file).hardlink_to(self.networks / network / file)
        (home / "ns/net").hardlink_to(self.networks / network / "ns")
        for kind in ("pid", "mnt", "user", "ipc", "uts", "cgroup"):
            namespace = self.networks.parent / f"{network}-{kind}"
            namespace.touch()
            if kind != "pid" or pid != os.getpid():
                (home / "ns" / kind).hardlink_to(namespace)
        (home / "status").write_text(f"NSpid:\t{pid}\t1\n")
        (home / "uid_map").write_text("         0          0 4294967295\n")
        (home / "cgroup").write_text(f"0::/docker/{container}\n" if container else "0::/init.scope\n")
        (home / "stat").write_text(f"{pid} (sleep) S " + "0 " * 18 + f"{started} 0\n")

    def dies(self, pid: int) -> None:
        for path in sorted((self.procfs / str(pid)).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (self.procfs / str(pid)).rmdir()

    def mounts(self, *names: str) -> None:
        lines = []
        for name in filter(None, names):
            path = self.networks / name / "ns"
            lines.append(f"1 2 0:4 net:[{path.stat().st_ino}] {path} rw - nsfs nsfs rw\n")
        (self.procfs / "1/mountinfo").write_text("".join(lines))

    def veth(self, ifindex: int, network: str | None, nsid: int = 0, peer: int = 2, kind: str = "veth") -> None:
        if network is not None:
            self.nsids[network] = nsid
        link = Link(ifindex, f"veth{ifindex}", kind, peer, None if network is None else nsid, 0, False, COUNTERS)  # noqa: FBT003
        self.links.append(link)

    def open(self, kind: type[LinksSource] = NetlinkSource, context: Context | None = None) -> LinksSource:
        opened = kind(itertools.count(1), lambda: self.now)
        opened.open(context or self.recorder)
        return opened

    def value(self, family: str, *key: str) -> float:
        return self.recorder.families.value(family, key)

    def info(self) -> dict[str, str]:
        """Owner by netns_id."""
        return {key[0]: key[1] for key in self.recorder.families.snapshots["cni_netns_info"]}

    def veths(self) -> dict[str, float]:
        return {key[0]: value for key, value in self.recorder.families.snapshots["cni_veths"].items()}

    def identity(self, device: str) -> str:
        """Hidden key of a device's traffic."""
        series = self.recorder.families.snapshots["cni_veth_receive_bytes_total"]
        return next(key[0] for key in series if key[1] == device)

    # What the source calls in place of netlink.Route and netlink.Subscription

    def dump(self) -> Dump:
        return Dump(list(self.links), [], interrupted=False)

    def nsid_of_fd(self, descriptor: int) -> int:
        inode = os.fstat(descriptor).st_ino
        names = [home.name for home in self.networks.iterdir() if (home / "ns").stat().st_ino == inode]
        return self.nsids.get(names[0], -1) if names else -1

    def receive(self) -> list[News | ValueError] | None:
        item = self.news.pop(0) if self.news else None
        if isinstance(item, OSError):
            raise item
        return item


class FakeRoute:
    def __init__(self, host: Host) -> None:
        self.links, self.nsid_of_fd, self.close = host.dump, host.nsid_of_fd, lambda: None


class FakeSubscription:
    def __init__(self, host: Host) -> None:
        self.receive, self.fileno, self.close = host.receive, lambda: 99, lambda: None


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(source, "Route", lambda: FakeRoute(made))
    monkeypatch.setattr(source, "Subscription", lambda: FakeSubscription(made))
    return made
