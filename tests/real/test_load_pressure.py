"""Pressure made for real: a CPU hog, a memory balloon, a saturated veth, a disk at full write; seen and released.

How long each took is printed; the tests themselves only wait until it has happened.
"""

import contextlib
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Running, Scrape

MIB = 1 << 20
REASONS = "cni_load_adaptations_total"
SEEN, RELEASED = 30.0, 75.0  # seconds: a quiet machine needs 3, and 15 of calm and then a step
CALM, CALM_SHARE = 3.0, 0.6
FULL = {"memory": 1.0}
"""Shares from which a resource is under pressure, where that is not 0.8."""
SENDER = """
import socket, sys, time
target, block, end = ("10.213.0.2", 9), bytes(65000), time.monotonic() + 60
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while time.monotonic() < end:
    sock.sendto(block, target)
"""
BALLOON = """
import sys, time
held = bytearray(int(sys.argv[1]))
for page in range(0, len(held), 4096):
    held[page] = 1
time.sleep(60)
"""


def pressure(scrape: Scrape, resource: str) -> float:
    """Share of a resource in use; 0 before the first reading."""
    return max((value for _, value in scrape.all("cni_load_pressure_ratio", resource=resource)), default=0.0)


def adaptations(scrape: Scrape, reason: str) -> float:
    """How often something was changed for a reason."""
    return scrape.value(REASONS, reason=reason)


def calm(scrape: Scrape, resource: str) -> bool:
    """Whether there is no pressure, and what there may have been is over: every beginning has its end."""
    return pressure(scrape, resource) < CALM_SHARE and adaptations(scrape, resource) % 2 == 0


def seen_acted_on_and_released(
    running: Running, resource: str, hog: contextlib.AbstractContextManager[object]
) -> Scrape:
    """One adaptation when the pressure comes, one when it has gone, and none more: nothing flaps.

    The answer is what was told when it had been acted on.
    """
    running.until(lambda scrape: calm(scrape, resource), RELEASED)
    before = adaptations(running.scrape(), resource)
    started = time.monotonic()
    with hog:
        running.until(lambda scrape: pressure(scrape, resource) >= FULL.get(resource, 0.8), SEEN)
        seen = time.monotonic() - started
        told = running.until(lambda scrape: adaptations(scrape, resource) == before + 1, SEEN)
        acted = time.monotonic() - started
    started = time.monotonic()
    running.until(lambda scrape: adaptations(scrape, resource) == before + 2, RELEASED)
    released = time.monotonic() - started
    time.sleep(CALM)
    after = running.scrape()
    reasons = ", ".join(f"{labels['reason']} {count:.0f}" for labels, count in after.all(REASONS) if count)
    print(
        f"\n{resource}: seen after {seen:.1f} s, acted on after {acted:.1f} s, released {released:.1f} s after; "
        f"adaptations since the start: {reasons}"
    )
    assert adaptations(after, resource) == before + 2
    return told


@contextlib.contextmanager
def processes(*commands: list[str]) -> Iterator[None]:
    """Run these as long as the context lasts."""
    started = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait(10)


def python(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", program, *arguments]


def test_a_cpu_hog(exporter: Callable[..., Running], lacking: Callable[[str], None]) -> None:
    """A busy loop on each CPU halves what is kept, and a while after its end all is kept again."""
    running = exporter({"cni_config": {"use_ebpf": False}})
    deadline = time.monotonic() + RELEASED
    while not calm(running.scrape(), "cpu"):
        if time.monotonic() > deadline:
            lacking("needs a machine that is not busy with something else")
        time.sleep(0.5)
    hogs = [python("while True: pass")] * (os.cpu_count() or 1)
    seen_acted_on_and_released(running, "cpu", processes(*hogs))


@pytest.fixture
def group(lacking: Callable[[str], None]) -> Iterator[Path]:
    """A memory control group of 256 MiB of our own."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").exists()
    home = root / "cni-exporter-test" if v2 else root / "memory" / "cni-exporter-test"
    try:
        home.mkdir(exist_ok=True)
        (home / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(256 * MIB))
    except OSError as error:
        lacking(f"no memory control group can be made: {error}")
    yield home
    deadline = time.monotonic() + 10
    while home.exists() and time.monotonic() < deadline:  # empty a moment after the last process has ended
        with contextlib.suppress(OSError):
            home.rmdir()
        time.sleep(0.05)


@pytest.mark.real("root")
def test_a_memory_balloon_in_our_control_group(exporter: Callable[..., Running], group: Path) -> None:
    """A neighbour that leaves little of the group's limit turns debug events off; when it has gone they come back."""
    inside = ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh")
    running = exporter({"cni_config": {"use_ebpf": False}}, command=inside)
    balloon = processes([*inside, *python(BALLOON, str(195 * MIB))])
    told = seen_acted_on_and_released(running, "memory", balloon)
    assert pressure(told, "memory") >= 1
    ratios = {labels["class"]: ratio for labels, ratio in told.all("cni_sampling_target_ratio")}
    assert ratios["connection_close"] == ratios["syscall"] == 0 < ratios["packet_drop"]
    running.until(lambda scrape: scrape.value("cni_sampling_target_ratio", **{"class": "connection_close"}) > 0)


@pytest.fixture
def veth() -> Iterator[str]:
    """A veth on the host with an address, its peer in a namespace that takes what comes.

    Its driver tells 10 Gbit/s of any veth; with packets of 64 KiB one processor sends several times that.
    """
    commands = (
        "ip netns add cnipressure",
        "ip link add cnipress0 mtu 65535 type veth peer name cnipress1 mtu 65535 netns cnipressure",
        "ip addr add 10.213.0.1/24 dev cnipress0",
        "ip -n cnipressure addr add 10.213.0.2/24 dev cnipress1",
        "ip link set cnipress0 up",
        "ip -n cnipressure link set cnipress1 up",
    )
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, timeout=10)
        yield "cnipress0"
    finally:
        subprocess.run(["ip", "link", "del", "cnipress0"], check=False, timeout=10)
        subprocess.run(["ip", "netns", "del", "cnipressure"], check=False, timeout=10)


@pytest.mark.real("root", "ip")
def test_a_saturated_veth(exporter: Callable[..., Running], veth: str) -> None:
    """A flood of datagrams fills a link; events about the network come first then."""
    running = exporter({"cni_config": {"use_ebpf": False}})
    seen_acted_on_and_released(running, "network", processes(python(SENDER)))


def _write(path: Path, number: int, stop: threading.Event) -> None:
    with mmap.mmap(-1, MIB) as block:  # O_DIRECT wants memory at a page's edge
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        try:
            while not stop.is_set():
                for place in range(8):
                    os.pwrite(descriptor, block, (8 * number + place) * MIB)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def writers(path: Path) -> Iterator[None]:
    """Write to a disk past the page cache, from several threads, 64 MiB over and over."""
    stop = threading.Event()
    threads = [threading.Thread(target=_write, args=(path, number, stop)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


def test_a_disk_at_full_write(exporter: Callable[..., Running], tmp_path: Path, lacking: Callable[[str], None]) -> None:
    """A disk that always has work thins events about programs and files."""
    device = tmp_path.stat().st_dev
    disk = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not (disk / "device").exists() and not (disk.resolve().parent / "device").exists():
        lacking("needs a directory of temporary files that is on a disk")
    running = exporter({"cni_config": {"use_ebpf": False}})
    seen_acted_on_and_released(running, "disk", writers(tmp_path / "written"))
