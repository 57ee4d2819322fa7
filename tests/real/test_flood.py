"""More events than user space can take, against the exporter as a user runs it: nothing is unaccounted for.

The flood is bounded in count, and stays in a network namespace of the test's own.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import ip, namespace
from plugin_runs import RUNS, environment
from running import Running, Scrape

from exporter.monitors.kernel.shapes import CLASSES

__all__ = ["namespace"]

pytestmark = pytest.mark.real("root", "ip", "busybox")

SENDERS, DATAGRAMS, EXECS = 2, 500_009, 3001
NAMESPACES, PAIRS, PLUGIN_RUNS = 13, 17, 11
LIMIT, SLACK = 0.10, 0.15  # processors: what the exporter is told to use at most, and what else it has to do meanwhile
CRITICAL = ("netns", "veth", "cni_run")

DROPS = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range({DATAGRAMS}):
    s.sendto(b"x", ("127.0.0.1", 9))
"""
EXECS_OF = f"i=0; while [ $i -lt {EXECS} ]; do %s true; i=$((i+1)); done"


@contextlib.contextmanager
def _following(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Have the critical events told by `cni-exporter events`, for which each event of the flood is built, too."""
    classes = [f"--class={name}" for name in CRITICAL]
    command = [sys.executable, "-m", "exporter", "events", "--json", "--socket", str(path), *classes]
    told: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = process.stdout
        thread = threading.Thread(target=lambda: told.extend(map(json.loads, lines)))
        thread.start()
        try:
            yield told
        finally:
            process.terminate()
            thread.join(10)


def _run(namespace: str, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["ip", "netns", "exec", namespace, *command])


def _lives(plugin: Path) -> set[int]:
    """Make and remove namespaces and devices and run a plugin, a known number of each; give the namespaces' inodes."""
    made = set()
    for number in range(NAMESPACES):
        name = f"cnif{os.getpid()}n{number}"
        ip("netns", "add", name)
        made.add(Path("/run/netns", name).stat().st_ino)
    for number in range(PAIRS):
        ip("link", "add", f"cnif{number}", "type", "veth", "peer", "name", f"cnif{number}p")
    for _ in range(PLUGIN_RUNS):
        subprocess.run([plugin], env=environment("ADD"), check=True, timeout=30)
    for number in range(PAIRS):
        ip("link", "del", f"cnif{number}")
    for number in range(NAMESPACES):
        ip("netns", "del", f"cnif{os.getpid()}n{number}")
    return made


def _account(scrape: Scrape) -> dict[str, Counter[str]]:
    """Read what became of the events, by class and part."""
    parts: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
    for part in ("seen", "filtered", "sampled_out", "lost", "handled"):
        for labels, value in scrape.all(f"cni_events_{part}_total"):
            if labels["class"] in parts:
                parts[labels["class"]][part] += int(value)
    return parts


def _balanced(scrape: Scrape) -> bool:
    return all(account["seen"] == account.total() - account["seen"] for account in _account(scrape).values())


@pytest.fixture
def plugin(need: Callable[[str], str]) -> Iterator[Path]:
    """Give a plugin that does nothing, in a directory that no runtime uses."""
    with tempfile.TemporaryDirectory(prefix="cni-") as directory:
        path = Path(directory, "true")
        path.symlink_to(need("busybox"))
        yield path


@pytest.mark.timeout(240)
def test_a_flood_sheds_what_is_not_critical_and_nothing_else(
    exporter: Callable[..., Running],
    namespace: str,
    plugin: Path,
    tmp_path: Path,
    need: Callable[[str], str],
    lacking: Callable[[str], None],
) -> None:
    """1,000,018 drops and 3,001 execs at once: each event is in the account, most drops are sampled out, none is lost.

    13 namespaces, 17 veth pairs and 11 plugin runs in the midst of it are counted and told, each once, and the exporter
    keeps to its CPU limit.
    """
    path, busybox = tmp_path / "feed/events.sock", need("busybox")
    running = exporter(
        {
            "general": {"own_cpu_limit": 100 * LIMIT},
            "feed": {"socket": str(path)},
            "cni_config": {"bin_paths": [str(plugin.parent)]},
        }
    )
    with _following(path) as told:
        before = running.until(lambda scrape: scrape.value("cni_exporter_feed_readers") == 1)
        if not before.all("cni_events_seen_total"):
            lacking("no kernel programs here")
        used, began = -running.cpu_seconds(), time.monotonic()
        senders = [_run(namespace, sys.executable, "-c", DROPS) for _ in range(SENDERS)]
        starter = _run(namespace, busybox, "sh", "-c", EXECS_OF % busybox)
        made = _lives(plugin)
        assert [sender.wait(120) for sender in senders] == [0] * SENDERS
        used, took = used + running.cpu_seconds(), time.monotonic() - began
        assert starter.wait(120) == 0
        after = running.until(_balanced, 60)
        running.until(lambda _: len(told) >= 2 * NAMESPACES + 4 * PAIRS + PLUGIN_RUNS)
    old, new = _account(before), _account(after)
    gained = {name: new[name] - old[name] for name in CLASSES}
    assert gained["packet_drop"]["seen"] >= SENDERS * DATAGRAMS
    assert gained["exec"]["seen"] >= 2 * EXECS
    assert gained["packet_drop"]["sampled_out"] > gained["packet_drop"]["handled"] > 0
    assert not any(account["lost"] for account in new.values())
    assert used / took < LIMIT + SLACK
    created = [event["netns"] for event in told if (event["class"], event["kind"]) == ("netns", "created")]
    assert len(created) == len(set(created))  # an inode, not the whole identity, may come again on a busy machine
    assert made <= {int(identity.partition(":")[0]) for identity in created}
    devices = Counter(event["details"].get("device") for event in told if event["kind"] == "created")
    assert {devices[f"cnif{number}{end}"] for number in range(PAIRS) for end in ("", "p")} == {1}
    assert after.value(RUNS, plugin="true", command="ADD") == PLUGIN_RUNS
    assert gained["netns"]["handled"] >= 2 * NAMESPACES
