"""More connections than there is room for in a map: each is counted and timed all the same."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from netns import ip, namespace
from recorder import Recorder

from exporter.catalog import CONNECT_DURATION
from exporter.monitors import kernel
from exporter.monitors.kernel.source import KernelSource

__all__ = ["namespace"]

pytestmark = [pytest.mark.real("root", "ip"), pytest.mark.host]

CONNECTIONS = """
import socket
asking = [socket.socket() for _ in range(200)]
for one in asking:
    one.setblocking(False)
    one.connect_ex(("192.0.2.9", 80))
for one in asking:
    one.close()
for _ in range(300):
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))
with socket.create_server(("127.0.0.1", 0)) as listener:
    for _ in range(23):
        with socket.create_connection(listener.getsockname()), listener.accept()[0]:
            pass
"""


def test_connections_beyond_half_a_map_are_exact(namespace: str, lacking: Callable[[str], None]) -> None:
    """200 connections asked for at once where a map has 256 entries, then 323 one by one: all counted and timed.

    Entries that wait for the next socket take up half of the map at most.
    """
    ip("-n", namespace, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
    ip("-n", namespace, "addr", "add", "192.0.2.1/24", "dev", "v0")
    for device in ("v0", "v1"):
        ip("-n", namespace, "link", "set", device, "up")
    ip("-n", namespace, "neigh", "add", "192.0.2.9", "lladdr", "02:00:00:00:00:09", "dev", "v0")
    programs = kernel.load(kernel.Settings(programs=("tcp",), entries=256))
    if not programs.attached:
        lacking(programs.standings[0].reason)
    source, recorder = KernelSource(programs), Recorder()
    source.open(recorder)
    try:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", CONNECTIONS]
        subprocess.run(command, check=True, timeout=60)
        source.update()
    finally:
        source.close()
        programs.close()
    inode = f"{Path('/run/netns', namespace).stat().st_ino}:"
    counted = {
        (name, key[1]): value
        for name in ("cni_tcp_connection_failures_total", "cni_tcp_connections_opened_total")
        for key, value in recorder.families.snapshots[name].items()
        if key[0].startswith(inode)
    }
    assert counted == {
        ("cni_tcp_connection_failures_total", "outgoing"): 500,
        ("cni_tcp_connections_opened_total", "outgoing"): 23,
        ("cni_tcp_connections_opened_total", "incoming"): 23,
    }
    times = [state for key, state in recorder.families.histograms[CONNECT_DURATION].items() if key[0].startswith(inode)]
    assert [sum(state[:-1]) for state in times] == [23]
    assert 0 < times[0][-1] < 23
    entries = recorder.families.snapshots["cni_bpf_map_entries"]["tcp_connecting",]
    assert 128 <= entries < 140, "somebody else's may be under way"
    assert recorder.families.snapshots["cni_bpf_map_insert_failures_total"]["tcp_connecting",] == 0
