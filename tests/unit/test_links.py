"""What the links monitor says of hosts that are plain files, with a netlink that plays what the test tells it."""

import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import CONTAINER, COUNTERS, NET_DEV, OTHER, Host
from hypothesis import given
from hypothesis import strategies as st
from recorder import RecordedEvents, RecordedFamilies, Recorder

from exporter.contract import Paths, Source, Unsupported
from exporter.host.netlink import Dump
from exporter.host.netlink_messages import Counters, Link, News
from exporter.monitors import links
from exporter.monitors.links import health, namespaces, source
from exporter.monitors.links.devices import Devices
from exporter.monitors.links.source import PollingSource, ProcfsSource


def test_traffic_is_the_containers(host: Host) -> None:
    """What the host's end sent, the container received: all eight counters, by identity and device."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    host.open().update()
    key = (host.identity("veth7"), "veth7")
    read = {name: host.value(f"cni_veth_{name}_total", *key) for name in ("receive_packets", "transmit_packets")}
    assert read == {"receive_packets": COUNTERS.tx_packets, "transmit_packets": COUNTERS.rx_packets}
    assert host.value("cni_veth_receive_bytes_total", *key) == COUNTERS.tx_bytes
    assert host.value("cni_veth_transmit_bytes_total", *key) == COUNTERS.rx_bytes
    assert host.value("cni_veth_receive_errors_total", *key) == COUNTERS.tx_errors
    assert host.value("cni_veth_transmit_errors_total", *key) == COUNTERS.rx_errors
    assert host.value("cni_veth_receive_dropped_total", *key) == COUNTERS.tx_dropped
    assert host.value("cni_veth_transmit_dropped_total", *key) == COUNTERS.rx_dropped


def test_owner_is_the_oldest_process_in_a_container(host: Host) -> None:
    """Several containers share a namespace: the first one owns it, all are members; a process of none is no owner."""
    host.network("pod")
    host.process(40, "pod", "", started=1)
    host.process(60, "pod", OTHER, started=20)
    host.process(50, "pod", CONTAINER, started=30)
    host.veth(7, "pod")
    host.open().update()
    identity = host.identity("veth7")
    assert host.info()[identity] == OTHER
    assert host.value("cni_netns_members", identity.partition(":")[0]) == 2


def test_host_is_reserved_and_counts_its_members(host: Host) -> None:
    """The host's own namespace has the reserved owner; a host-network container is a member of it."""
    host.process(70, "host", CONTAINER)
    host.open().update()
    (identity,) = [key for key, owner in host.info().items() if owner == "(host)"]
    assert host.value("cni_netns_members", identity.partition(":")[0]) == 1


def test_pair_on_the_host_is_the_hosts(host: Host) -> None:
    """A pair with both ends here is of state host, and its series are the host's."""
    host.veth(7, None, peer=8)
    host.veth(8, None, peer=7)
    host.open().update()
    assert host.veths() == {"attached": 0, "orphaned": 0, "host": 2}
    assert host.info()[host.identity("veth7")] == "(host)"


def test_veth_info_names_bridge_and_kind(host: Host) -> None:
    """Peer, bridge and kind of a netkit device are told."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod", kind="netkit", peer=42)
    host.links[0] = host.links[0]._replace(master=3)
    host.links.append(Link(3, "br0", "bridge", 0, None, 0, False, COUNTERS))  # noqa: FBT003
    host.open().update()
    label = host.identity("veth7").partition(":")[0]
    assert host.value("cni_veth_info", "veth7", "7", "42", label, "br0", "netkit", "attached") == 1


def test_dead_process_leaves_an_orphan_at_once_with_its_labels(host: Host) -> None:
    """The series of a veth whose container died keep identity and owner; the veth is orphaned without delay."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    opened = host.open()
    opened.update()
    identity = host.identity("veth7")
    host.dies(50)
    opened.update()
    assert host.veths() == {"attached": 0, "orphaned": 1, "host": 0}
    assert host.identity("veth7") == identity
    assert host.info()[identity] == CONTAINER


def test_orphan_gives_its_owner_up_when_the_container_lives_elsewhere(host: Host) -> None:
    """A restarted container has one namespace: what its former life left behind is nobody's."""
    host.network("old")
    host.process(50, "old", CONTAINER)
    host.veth(7, "old")
    opened = host.open()
    opened.update()
    old = host.identity("veth7")
    host.dies(50)
    host.network("new")
    host.process(51, "new", CONTAINER)
    opened.update()
    assert host.info()[old] == ""
    assert list(host.info().values()).count(CONTAINER) == 1


def test_new_namespace_has_its_grace(host: Host) -> None:
    """A namespace that never had a process counts as attached for 5 s (CNI ADD), then as orphaned."""
    host.network("pod")
    host.veth(7, "pod")
    opened = host.open()
    opened.update()
    assert host.veths()["attached"] == 1
    host.now += namespaces.GRACE_SECONDS - 0.1
    opened.update()
    assert host.veths()["attached"] == 1
    host.now += 0.2
    opened.update()
    assert host.veths()["orphaned"] == 1


def test_unknown_namespace_keeps_a_stable_identity_and_gets_its_name(host: Host) -> None:
    """Known by its id alone it is nsid-N:gM in every pass; when its process shows up it gets its inode's name."""
    host.network("pod")
    host.veth(7, "pod", nsid=5)
    opened = host.open()
    opened.update()
    assert host.identity("veth7") == "nsid-5:g2"
    opened.update()
    assert host.identity("veth7") == "nsid-5:g2"
    host.process(50, "pod", CONTAINER)
    opened.update()
    inode = (host.networks / "pod/ns").stat().st_ino
    assert host.identity("veth7").startswith(f"{inode}:g")
    assert host.value("cni_netns_created_total") == 0


def test_reused_inode_and_id_are_another_namespace(host: Host) -> None:
    """Same proc inode, same namespace inode, same namespace id, other process and other device: a new identity."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    opened = host.open()
    opened.update()
    first = host.identity("veth7")
    host.dies(50)
    host.process(51, "pod", OTHER)
    host.links = []
    host.veth(8, "pod")
    opened.update()
    second = host.identity("veth8")
    assert second != first
    assert second.partition(":")[0] == first.partition(":")[0]
    assert first not in host.info()
    assert host.value("cni_netns_created_total") == 1
    assert host.value("cni_netns_destroyed_total") == 1


def test_reused_pid_is_another_process(host: Host) -> None:
    """The same pid with another start time does not carry an identity on."""
    host.network("pod")
    host.process(50, "pod", CONTAINER, started=100)
    opened = host.open()
    opened.update()
    before = set(host.info())
    host.dies(50)
    (host.procfs / "spare").mkdir()  # takes the freed inode: unlike here, procfs never gives one out again
    host.process(50, "pod", OTHER, started=200)
    opened.update()
    assert len(set(host.info()) - before) == 1


def test_device_proves_the_namespace_while_processes_change(host: Host) -> None:
    """All processes are new, the host device into the namespace is the same: so is the namespace."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    opened = host.open()
    opened.update()
    first = host.identity("veth7")
    host.dies(50)
    host.process(51, "pod", CONTAINER)
    opened.update()
    assert host.identity("veth7") == first


def test_freed_id_ends_an_identity(host: Host) -> None:
    """After RTM_DELNSID nothing but a cookie can prove the namespace: it is a new one."""
    host.network("pod")
    host.veth(7, "pod", nsid=5)
    opened = host.open()
    opened.update()
    first = host.identity("veth7")
    host.news = [[News(None, gone=True, nsid=5)]]
    opened.update()
    assert host.identity("veth7") != first


def test_pinned_namespace_is_listed_and_holds_its_veth(host: Host) -> None:
    """A bind-mounted namespace without process: pinned, owner unknown, its veth keyed to it, orphaned after grace."""
    host.network("kept")
    host.mounts("kept")
    host.veth(7, "kept", nsid=4)
    opened = host.open()
    opened.update()
    identity = host.identity("veth7")
    inode = (host.networks / "kept/ns").stat().st_ino
    assert identity.startswith(f"{inode}:")
    assert host.value("cni_netns_info", identity, "", str(inode), "true") == 1
    host.now += 6
    opened.update()
    assert host.identity("veth7") == identity
    assert host.veths()["orphaned"] == 1
    host.mounts()
    host.links = []
    opened.update()
    assert identity not in host.info()


def test_mount_that_leads_elsewhere_is_not_opened(host: Host) -> None:
    """A path that is another file from here (another mount namespace) is not taken for the namespace."""
    trap = host.procfs / "fifo"
    os.mkfifo(trap)
    (host.procfs / "1/mountinfo").write_text(f"1 2 0:4 net:[4026539999] {trap} rw - nsfs nsfs rw\n")
    opened = host.open()
    opened.update()
    opened.update()
    labels = {key.partition(":")[0] for key in host.info()}
    assert "4026539999" in labels
    trap.unlink()


def test_hidden_processes_make_no_orphans(host: Host) -> None:
    """In a PID namespace that shows no container's process nothing is called orphaned, and an error says why."""
    (host.procfs / "self/ns/pid").unlink()
    (host.procfs / "self/ns/pid").symlink_to("pid:[4026532000]")
    host.network("pod")
    host.veth(7, "pod")
    opened = host.open()
    opened.update()
    host.now += 60
    opened.update()
    assert host.veths() == {"attached": 1, "orphaned": 0, "host": 0}
    assert host.recorder.error_kinds() == ["processes_hidden"]


def test_foreign_network_is_an_error(host: Host) -> None:
    """Where init lives in another network namespace than we do, the user is told."""
    host.network("container")
    host.dies(os.getpid())
    host.process(os.getpid(), "container")
    host.open()
    assert host.recorder.error_kinds() == ["not_host_network"]


def test_lifetime_only_of_what_was_seen_from_the_start(host: Host) -> None:
    """A namespace of the first pass is not created and has no lifetime; one that came and went has both."""
    host.network("old")
    host.process(50, "old")
    opened = host.open()
    opened.update()
    host.network("new")
    host.process(51, "new")
    opened.update()
    host.now += 42
    host.dies(50)
    host.dies(51)
    opened.update()
    assert host.value("cni_netns_created_total") == 1
    assert host.value("cni_netns_destroyed_total") == 2
    assert host.recorder.families.observations["cni_netns_lifetime_seconds"] == [((), 42.0)]


def test_own_counters_exist_from_the_start(host: Host) -> None:
    """Before anything happened, each counter of our own is there with 0."""
    host.open()
    for name in ("cni_veth_created_total", "cni_veth_deleted_total", "cni_veth_moved_total"):
        assert host.value(name) == 0
    assert host.value("cni_netns_created_total") == host.value("cni_netns_destroyed_total") == 0


def test_interfaces_without_host_side(host: Host) -> None:
    """Of a veth and a macvlan, the macvlan is shown: its index is not that of a host device's peer."""
    host.network("pod")
    lines = NET_DEV + "  eth0: 1 1 1 1 0 0 0 0 2 2 2 2 0 0 0 0\n  net1: 10 11 12 13 0 0 0 0 20 21 22 23 0 0 0 0\n"
    (host.networks / "pod/dev").write_text(lines)
    host.process(50, "pod", CONTAINER)
    (host.procfs / "50/net/igmp").write_text("Idx\tDevice\n2\teth0 : 1 V3\n3\tnet1 : 1 V3\n")
    host.veth(7, "pod", peer=2)
    host.open().update()
    key = (host.identity("veth7"), "net1")
    assert host.value("cni_netns_receive_bytes_total", *key) == 10
    assert host.value("cni_netns_transmit_dropped_total", *key) == 23
    assert {name for _, name in host.recorder.families.snapshots["cni_netns_receive_bytes_total"]} == {"net1"}


def test_nothing_counts_twice_while_an_index_is_unknown(host: Host) -> None:
    """Which of two interfaces is the veth's peer cannot be told: neither is shown; idle fallback tunnels never are."""
    host.network("pod")
    lines = NET_DEV + "".join(f"  {name}: {' '.join(['1'] * 16)}\n" for name in ("eth0", "net1"))
    (host.networks / "pod/dev").write_text(lines + f" tunl0: {' '.join(['0'] * 16)}\n")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod", peer=2)
    host.open().update()
    assert host.recorder.families.snapshots["cni_netns_receive_bytes_total"] == {}


def test_host_shows_its_own_interfaces_but_no_bridge(host: Host) -> None:
    """Hardware is shown with the host's identity; loopback, bridges and veths are not."""
    for ifindex, name, kind, loopback in ((1, "lo", "", True), (2, "eth0", "", False), (3, "br0", "bridge", False)):
        host.links.append(Link(ifindex, name, kind, 0, None, 0, loopback, COUNTERS))
    host.open().update()
    (key,) = host.recorder.families.snapshots["cni_netns_receive_bytes_total"]
    assert key[1] == "eth0"
    assert host.value("cni_netns_receive_bytes_total", *key) == COUNTERS.rx_bytes


def test_protocol_health(host: Host) -> None:
    """Retransmissions, resets, overflows, UDP over both IP versions, and sockets by state."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    host.open().update()
    identity = host.identity("veth7")
    assert host.value("cni_netns_tcp_retransmitted_segments_total", identity) == 2
    assert host.value("cni_netns_tcp_resets_sent_total", identity) == 3
    assert host.value("cni_netns_tcp_listen_overflows_total", identity) == 6
    assert host.value("cni_netns_udp_receive_buffer_errors_total", identity) == 15
    states = host.recorder.families.snapshots["cni_netns_tcp_connections"]
    mine = {key[1]: value for key, value in states.items() if key[0] == identity}
    assert mine == {"established": 0, "listen": 1, "close_wait": 1}


def test_tcp_tables_are_read_only_when_something_happened(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resting namespace's table is not read again; one segment later it is."""
    read: list[str] = []
    count = health.procfs.count_tcp_states
    monkeypatch.setattr(health.procfs, "count_tcp_states", lambda path, *rest: read.append(path) or count(path, *rest))
    opened = host.open()
    opened.update()
    opened.update()
    assert len(read) == 1
    snmp = host.networks / "host/snmp"
    snmp.write_text(snmp.read_text().replace("Tcp: 1 2", "Tcp: 9 2"))
    opened.update()
    assert len(read) == 2


def test_tcp_tables_share_a_bounded_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a table takes all the time, the others wait for the next pass, oldest first; none is forgotten."""
    read: list[str] = []

    def slow(path: str, *_: object) -> bool:
        read.append(path.split("/")[-3])
        host.now += health.TABLE_SECONDS
        return True

    monkeypatch.setattr(health.procfs, "count_tcp_states", slow)
    for pid in (50, 51):
        host.network(f"pod{pid}")
        host.process(pid, f"pod{pid}")
    opened = host.open()
    for _ in range(3):
        opened.update()
    assert len(read) == len(set(read)) == 3


def test_uncounted_table_shows_what_the_kernel_counts(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its table was read, a namespace has its established connections and no made-up zeros."""
    monkeypatch.setattr(health, "TABLE_SECONDS", 0.0)
    host.open().update()
    states = host.recorder.families.snapshots["cni_netns_tcp_connections"]
    assert {key[1]: value for key, value in states.items()} == {"established": 4}


def test_too_large_table_shows_no_states(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that cannot be counted in time is an error and no figure, rather than a wrong one."""
    monkeypatch.setattr(health.procfs, "count_tcp_states", lambda *_: False)
    host.open().update()
    assert host.recorder.families.snapshots["cni_netns_tcp_connections"] == {}
    assert host.recorder.error_kinds() == ["tcp_table_too_large"]


def test_odd_files_are_errors_not_failures(host: Host) -> None:
    """Content that cannot be read is counted; the rest of the pass stands."""
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    host.veth(7, "pod")
    (host.networks / "pod/dev").write_text("h\nh\nnonsense\n")
    (host.networks / "pod/snmp").write_text("Tcp: InSegs\nTcp: many\n")
    host.open().update()
    assert host.recorder.error_kinds() == ["procfs_format", "procfs_format"]
    assert host.veths()["attached"] == 1


def test_vanishing_files_do_not_fail_the_pass(host: Host) -> None:
    """A process of which parts are gone already is passed over for the next one of its namespace."""
    host.network("pod")
    host.process(50, "pod", CONTAINER, started=1)
    host.process(51, "pod", CONTAINER, started=2)
    for file in ("net/snmp", "ns/net"):
        (host.procfs / "50" / file).unlink()
    (host.procfs / "52").mkdir()
    host.veth(7, "pod")
    host.open().update()
    assert host.value("cni_netns_tcp_resets_sent_total", host.identity("veth7")) == 3
    assert host.recorder.errors == []


def test_news_are_counted_and_wake_once(host: Host) -> None:
    """23 devices appear, one moves, two are deleted; chatter about a known device neither counts nor wakes."""
    opened = host.open()
    hear = opened.readers()[99]
    made = [Link(100 + n, f"v{n}", "veth", 0, None, 0, False, None) for n in range(23)]  # noqa: FBT003
    host.news = [[News(link, gone=False)] for link in made]
    hear()
    assert host.recorder.wakes == 1
    host.news = [[News(made[0], gone=False)], [News(Link(1, "eth0", "", 0, None, 0, False, None), gone=False)]]  # noqa: FBT003
    hear()
    assert host.recorder.wakes == 1
    host.news = [[News(made[0]._replace(moved=True), gone=True), News(made[1], gone=True)], [News(made[2], gone=True)]]
    host.news.append([News(made[2], gone=True)])
    hear()
    assert host.recorder.wakes == 2
    assert [host.value(f"cni_veth_{name}_total") for name in ("created", "moved", "deleted")] == [23, 1, 2]


@pytest.mark.parametrize("loss", [OSError(errno.ENOBUFS, "full"), [ValueError("bad")]])
def test_lost_news_are_made_up_by_a_dump(host: Host, loss: OSError | list[News | ValueError]) -> None:
    """After an overrun or unreadable news the counters rise by the difference, once, and the loss is an error."""
    host.veth(7, None)
    opened = host.open()
    host.links = []
    host.veth(8, None)
    host.veth(9, None)
    host.news = [loss]
    opened.readers()[99]()
    opened.update()
    opened.update()
    assert [host.value(f"cni_veth_{name}_total") for name in ("created", "deleted")] == [2, 1]
    assert host.recorder.error_kinds() in (["netlink_overrun"], ["netlink_message"])
    assert host.recorder.wakes == 1


def test_polling_counts_differences(host: Host) -> None:
    """Without news the same counters come from dumps."""
    host.veth(7, None)
    opened = host.open(PollingSource)
    host.links = []
    host.veth(8, None)
    opened.update()
    assert [host.value(f"cni_veth_{name}_total") for name in ("created", "deleted", "moved")] == [1, 1, 0]
    assert opened.readers() == {}
    opened.close()


def test_bad_dump_is_an_error(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreadable links and a list that never stands still are counted."""
    monkeypatch.setattr(host, "dump", lambda: Dump([], ["odd"], interrupted=True))
    host.open()
    assert host.recorder.error_kinds() == ["netlink_message", "netlink_interrupted"]


def test_ladder_tells_refused_from_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that is refused is Unsupported with a remedy; one that failed otherwise stays an OSError."""

    def refuse(number: int) -> Iterator[Source]:
        def make() -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(source, "Subscription", make)
        monkeypatch.setattr(source, "Route", make)
        yield from (rung() for rung in links.monitor().rungs[:2])

    recorder = Recorder()
    for opened in refuse(errno.EPERM):
        with pytest.raises(Unsupported) as caught:
            opened.open(recorder)
        assert caught.value.remedy
        opened.close()
    for opened in refuse(errno.EMFILE):
        with pytest.raises(OSError, match="Too many"):
            opened.open(recorder)
        opened.close()
    empty = ProcfsSource(itertools.count(1))
    with pytest.raises(Unsupported):
        empty.open(Recorder(paths=Paths(tmp_path, tmp_path)))


def test_monitor_describes_itself() -> None:
    """Three rungs, best first; each scrape refreshes; identities of ours are shared by all sources."""
    monitor = links.monitor(interval=3.0)
    opened = [rung() for rung in monitor.rungs]
    assert [source_.mode for source_ in opened] == ["netlink", "polling", "procfs"]
    assert (monitor.name, monitor.interval, monitor.max_age) == ("links", 3.0, 0.0)


def sysfs_device(root: Path, name: str, ifindex: int, iflink: int, uevent: str = "") -> None:
    home = root / "devices/virtual/net" / name
    (home / "statistics").mkdir(parents=True)
    values = {"ifindex": ifindex, "iflink": iflink, "type": 772 if name == "lo" else 1}
    for file, value in values.items():
        (home / file).write_text(f"{value}\n")
    (home / "uevent").write_text(uevent)
    for file, value in zip(Counters._fields, COUNTERS, strict=True):
        (home / "statistics" / file).write_text(f"{value}\n")
    (root / "class/net").mkdir(parents=True, exist_ok=True)
    (root / "class/net" / name).symlink_to(home)


def test_sysfs_rung_yields_the_same_families(host: Host) -> None:
    """Without netlink: a veth is told from a VLAN, its namespace found by the peer's index, a host pair by its twin."""
    sysfs = host.recorder.paths.sysfs
    sysfs_device(sysfs, "lo", 1, 1)
    sysfs_device(sysfs, "vetha", 7, 42)
    sysfs_device(sysfs, "vethb", 8, 9)
    sysfs_device(sysfs, "vethc", 9, 8)
    sysfs_device(sysfs, "vethd", 10, 66)
    sysfs_device(sysfs, "eth0.5", 11, 2, "DEVTYPE=vlan\n")
    (sysfs / "class/net/broken").mkdir()
    host.network("pod")
    host.process(50, "pod", CONTAINER)
    (host.procfs / "50/net/igmp").write_text("Idx\tDevice\n42\teth0 : 1 V3\n")
    opened = host.open(ProcfsSource)
    opened.update()
    assert host.info()[host.identity("vetha")] == CONTAINER
    assert host.info()[host.identity("vethb")] == "(host)"
    assert host.veths() == {"attached": 2, "orphaned": 0, "host": 2}
    assert host.value("cni_veth_receive_bytes_total", host.identity("vetha"), "vetha") == COUNTERS.tx_bytes
    assert host.identity("vethd").startswith("unknown-")


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.booleans()), max_size=40))
def test_counters_always_add_up(events: list[tuple[int, bool, bool]]) -> None:
    """Whatever the order of news: created - deleted - moved is the number of devices known; a dump changes nothing."""
    families, sink = RecordedFamilies(), RecordedEvents()
    devices = Devices(families, [], sink)
    known: dict[int, Link] = {}
    for ifindex, gone, moved in events:
        link = Link(ifindex, "v", "veth", 0, None, 0, False, None, moved)  # noqa: FBT003
        devices.hear(News(link, gone))
        known.pop(ifindex, None)
        if not gone:
            known[ifindex] = link

    def total() -> list[float]:
        return [families.value(f"cni_veth_{name}_total") for name in ("created", "deleted", "moved")]

    told = Counter(event.kind for event in sink.kept)
    assert [told["created"], told["deleted"], told["moved"]] == total()
    before = total()
    assert before[0] - before[1] - before[2] == len(known)
    devices.compare(known.values())
    assert total() == before
