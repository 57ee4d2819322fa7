"""How much of the host is in use: figures from files whose numbers are known; what is missing or odd harms none."""

import time
from pathlib import Path

import psutil
import pytest
from recorder import Recorder

from exporter.contract import Paths, Unsupported
from exporter.monitors.host_load import FAMILY, INTERVAL, HostLoad, Pressures, monitor

MIB = 1 << 20
LIMIT = 1 << 40  # no share worth mentioning, so that a control group's is what is seen
ZEROS = "0 0 0 0 0 0 0 0"


class Machine:
    """Pseudo files of a host and of the exporter's own container, and a clock."""

    def __init__(self, home: Path) -> None:
        self.host = Paths(home / "proc", home / "sys")
        self.own = Paths(home / "own-proc", home / "own-sys")
        self.now = 100.0
        self.write("proc/stat", "cpu 0 0 0 0 0 0 0 0\n")

    def write(self, name: str, text: str) -> None:
        path = self.host.procfs.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, controllers: str, path: str, **files: str) -> None:
        """Say that the exporter is in a v2 control group, and what its files say."""
        self.write("own-proc/self/cgroup", f"0:{controllers}:{path}\n")
        self.write("own-sys/fs/cgroup/cgroup.controllers", "cpu memory\n")
        for name, text in files.items():
            self.write(f"own-sys/fs/cgroup{path}/{name.replace('_', '.')}", text)

    def links(self, **counters: tuple[int, int, int, int, int, int]) -> None:
        """Bytes, packets and dropped, received and then sent, by link."""
        rows = [
            f"{name}: {r} {rp} 0 {rd} 0 0 0 0 {t} {tp} 0 {td} 0 0 0 0"
            for name, (r, rp, rd, t, tp, td) in counters.items()
        ]
        self.write("proc/1/net/dev", "Inter-| Receive\n face |bytes\n" + "\n".join(rows) + "\n")

    def open(self, limit: int = LIMIT) -> Pressures:
        return Pressures(self.host, limit, self.own, lambda: self.now)

    def after(self, pressures: Pressures, seconds: float = 1.0) -> dict[str, float]:
        self.now += seconds
        return pressures.read()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# CPU


@pytest.mark.parametrize(
    ("ticks", "busy"),
    [
        ("0 0 0 200 0 0 0 0", 0.0),
        ("100 20 30 20 20 4 6 0", 0.8),
        ("0 0 0 50 0 0 0 150", 0.75),  # stolen by a hypervisor
        ("40 0 0 60 0 0 0 0 40 0", 0.4),  # a guest's time is part of user's
        ("50 0 0 50", 0.5),  # Linux 2.4 had four columns
    ],
)
def test_cpu_is_the_share_that_was_not_idle(machine: Machine, ticks: str, busy: float) -> None:
    """Waiting for disks is idle, what a hypervisor took is not; guests are not counted twice."""
    pressures = machine.open()
    machine.write("proc/stat", f"cpu  {ticks}\ncpu0 1 1 1 1\nintr 5\n")
    assert machine.after(pressures)["cpu"] == pytest.approx(busy)


def test_a_quota_of_our_own_counts_where_it_is_tighter_than_the_host(machine: Machine) -> None:
    """A quarter of a core, used up: the pressure is 1 although the host idles."""
    machine.group("", "/pod/ours", cpu_max="25000 100000\n", cpu_stat="usage_usec 0\n")
    pressures = machine.open()
    machine.write("own-sys/fs/cgroup/pod/ours/cpu.stat", "usage_usec 500000\n")
    machine.write("proc/stat", "cpu 1 0 0 99 0 0 0 0\n")
    assert machine.after(pressures, 2.0)["cpu"] == pytest.approx(1.0)


# Memory


def test_memory_is_our_own_over_the_limit(machine: Machine) -> None:
    """The share may be above 1: the limit is a wish and no wall."""
    resident = psutil.Process().memory_info().rss
    assert machine.after(machine.open(resident // 2))["memory"] == pytest.approx(2.0, rel=0.1)


def test_the_tightest_control_group_above_us_counts(machine: Machine) -> None:
    """The pod's limit binds us as our own does: here it is the nearer one. File cache that can go is not counted."""
    machine.group("", "/pod/ours", memory_current="1000\n", memory_max="max\n")
    machine.write("own-sys/fs/cgroup/pod/memory.current", "10000\n")
    machine.write("own-sys/fs/cgroup/pod/memory.stat", "anon 1\ninactive_file 1000\n")
    machine.write("own-sys/fs/cgroup/pod/memory.max", "12000\n")
    assert machine.open().read()["memory"] == pytest.approx(0.75 / 0.9)


def test_control_groups_of_v1_are_read_each_from_its_own_hierarchy(machine: Machine) -> None:
    """A hybrid host: memory in one place, CPU in another, the unified tree counts nothing."""
    machine.write("own-proc/self/cgroup", "4:memory:/docker/x\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n")
    base = "own-sys/fs/cgroup/memory/docker/x/memory"
    machine.write(f"{base}.usage_in_bytes", "500\n")
    machine.write(f"{base}.limit_in_bytes", "1000\n")
    assert machine.open().read()["memory"] == pytest.approx(0.5 / 0.9)


def test_a_mount_that_shows_only_our_own_group_is_enough(machine: Machine) -> None:
    """In most containers /sys/fs/cgroup is the group itself, whatever its path on the host."""
    machine.write("own-proc/self/cgroup", "0::/kubepods/pod1/ours\n")
    machine.write("own-sys/fs/cgroup/cgroup.controllers", "memory\n")
    machine.write("own-sys/fs/cgroup/memory.current", "900\n")
    machine.write("own-sys/fs/cgroup/memory.max", "1000\n")
    assert machine.open().read()["memory"] == pytest.approx(1.0)


# Network


def test_network_is_the_fullest_link_in_its_fuller_direction(machine: Machine) -> None:
    """100 Mbit/s received on a Gbit link is a tenth; 8 Gbit/s sent over a veth of 10 is four fifths."""
    machine.write("sys/class/net/eth0/speed", "1000\n")
    machine.write("sys/class/net/veth1/speed", "10000\n")
    machine.links(eth0=(0, 0, 0, 0, 0, 0), veth1=(0, 0, 0, 0, 0, 0))
    pressures = machine.open()
    machine.links(eth0=(25_000_000, 9, 0, 9, 9, 0), veth1=(0, 0, 0, 0, 0, 0))
    assert machine.after(pressures, 2.0)["network"] == pytest.approx(0.1)
    machine.links(eth0=(25_000_000, 9, 0, 9, 9, 0), veth1=(7, 7, 0, 2_000_000_000, 9, 0))
    assert machine.after(pressures, 2.0)["network"] == pytest.approx(0.8)


@pytest.mark.parametrize("speed", ["-1\n", "", "unknown\n"])
def test_a_link_without_a_speed_is_never_full(machine: Machine, speed: str) -> None:
    """Bridges, tunnels and virtio say -1 or nothing."""
    machine.write("sys/class/net/br0/speed", speed)
    machine.links(br0=(0, 0, 0, 0, 0, 0))
    pressures = machine.open()
    machine.links(br0=(10**12, 10**9, 0, 10**12, 10**9, 0))
    assert machine.after(pressures)["network"] == 0.0


def test_packets_shed_count_as_a_full_link_where_they_are_many(machine: Machine) -> None:
    """A twentieth dropped is full, a fortieth half of that; 99 in a second are no flood, whatever their share."""
    machine.links(veth1=(0, 0, 0, 0, 0, 0))
    pressures = machine.open()
    machine.links(veth1=(0, 0, 0, 0, 9_500, 500))
    assert machine.after(pressures)["network"] == pytest.approx(1.0)
    machine.links(veth1=(0, 19_500, 500, 0, 9_500, 500))
    assert machine.after(pressures)["network"] == pytest.approx(0.5)
    machine.links(veth1=(0, 19_500, 599, 0, 9_500, 500))
    assert machine.after(pressures)["network"] == 0.0


def test_a_full_backlog_of_a_cpu_counts(machine: Machine) -> None:
    """softnet_stat is hexadecimal, a row per CPU: taken, dropped."""
    machine.write("proc/net/softnet_stat", "00000000 00000000 00000000\n00000000 00000000 00000000\n")
    pressures = machine.open()
    machine.write("proc/net/softnet_stat", "0000ff00 00000000 00000000\n0000ff00 00003000 00000000\n")
    assert machine.after(pressures)["network"] == 1.0


def test_a_link_that_comes_anew_under_an_old_name_has_not_carried_less_than_nothing(machine: Machine) -> None:
    """Counters that step back count as still, and go on from there."""
    machine.write("sys/class/net/veth1/speed", "10000\n")
    machine.links(veth1=(10**12, 10**9, 0, 10**12, 10**9, 0))
    pressures = machine.open()
    machine.links(veth1=(0, 0, 0, 0, 0, 0))
    assert machine.after(pressures)["network"] == 0.0
    machine.links(veth1=(1_250_000_000, 0, 0, 0, 0, 0))
    assert machine.after(pressures)["network"] == pytest.approx(1.0)


# Disk

DISKS = """\
 254 0 vda 1 0 1 1 1 0 1 1 0 {vda} 1
 254 1 vda1 1 0 1 1 1 0 1 1 0 {part} 1
   7 0 loop0 1 0 1 1 1 0 1 1 0 {loop} 1
"""


def test_disk_is_the_busiest_device_s_share_of_time_with_work(machine: Machine) -> None:
    """Partitions, loops and what else is made of disks do not count."""
    (machine.host.sysfs / "block" / "vda" / "device").mkdir(parents=True)
    (machine.host.sysfs / "block" / "loop0").mkdir()
    machine.write("proc/diskstats", DISKS.format(vda=1000, part=1000, loop=0))
    pressures = machine.open()
    machine.write("proc/diskstats", DISKS.format(vda=1900, part=9000, loop=9000))
    assert machine.after(pressures, 2.0)["disk"] == pytest.approx(0.45)


def test_time_in_which_everybody_waits_counts_where_no_disk_shows_it(machine: Machine) -> None:
    """A network file system has no line in diskstats: the `full` line of PSI tells."""
    stall = "some avg10=0.00 avg60=0.00 avg300=0.00 total={some}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={full}\n"
    machine.write("proc/pressure/io", stall.format(some=0, full=0))
    pressures = machine.open()
    machine.write("proc/pressure/io", stall.format(some=1_000_000, full=600_000))
    assert machine.after(pressures)["disk"] == pytest.approx(0.6)


# The whole


def test_what_cannot_be_read_is_not_there(machine: Machine) -> None:
    """No guess is made: a resource without figures has no value, and the others have theirs."""
    pressures = machine.open()
    assert machine.after(pressures).keys() == {"memory"}
    machine.write("proc/stat", "cpu 5 0 0 5 0 0 0 0\n")
    assert machine.after(pressures).keys() == {"memory", "cpu"}


def test_two_readings_within_a_moment_are_one(machine: Machine) -> None:
    """Over less than a tenth of a second the kernel's clock ticks would say 0 or 1."""
    pressures = machine.open()
    machine.write("proc/stat", "cpu 50 0 0 50 0 0 0 0\n")
    first = machine.after(pressures)
    machine.write("proc/stat", "cpu 51 0 0 50 0 0 0 0\n")
    assert machine.after(pressures, 0.01) == first


def test_every_resource_becomes_a_series() -> None:
    """On the real /proc: four resources within their bounds, of which only memory may be above 1."""
    recorder = Recorder()
    source = HostLoad(1 << 30)
    source.open(recorder)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        source._pressures._read_at -= 1  # as if a second had gone by
        source.update()
        found = recorder.families.snapshots[FAMILY]
        if found.keys() >= {("cpu",), ("memory",), ("network",)}:
            break
    else:
        pytest.fail(f"not within 10 s: {found}")
    assert all(0 <= share <= 1 for (name,), share in found.items() if name != "memory")
    assert 0 < found["memory",] < 1


def test_a_host_without_proc_says_what_to_do(tmp_path: Path) -> None:
    """The remedy names the flag."""
    with pytest.raises(Unsupported) as caught:
        HostLoad(1).open(Recorder(paths=Paths(tmp_path, tmp_path)))
    assert "--path.procfs" in caught.value.remedy


def test_the_readings_go_on_while_the_exporter_does_less() -> None:
    """The monitor's interval is not stretched: it tells when the pressure is over."""
    assert (monitor(1).interval, monitor(1).steady) == (INTERVAL, True)


def test_a_speed_is_asked_once_in_a_while_and_forgotten_with_its_link(machine: Machine) -> None:
    """A thousand links that come and go leave no trace."""
    pressures = machine.open()
    for number in range(1000):
        machine.write(f"sys/class/net/veth{number}/speed", "10000\n")
    for number in range(1000):
        machine.now += 1.0
        assert pressures._speed(f"veth{number}") == 1.25e9
    assert len(pressures._speeds) <= 31
