"""The live feed end to end: `cni-exporter events` beside a real exporter, while real things happen."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import Running
from runtimes import Dockerd

PAIRS = 23


class Follower:
    """The command, following; its lines are read as they come."""

    def __init__(self, path: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "exporter", "events", "--json", "--socket", str(path), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.events.extend(map(json.loads, iter(self.process.stdout.readline, "")))

    def until(self, holds: Callable[[list[dict[str, Any]]], object], seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds(self.events):
            assert time.monotonic() < deadline, f"did not happen within {seconds} s: {self.events}"
            time.sleep(0.02)

    def ended(self) -> tuple[int, str]:
        """Wait for its end; give exit status and what it said."""
        status = self.process.wait(10)
        self._thread.join(10)
        assert self.process.stdout
        assert self.process.stderr
        said = self.process.stderr.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, said


def followed(running: Running, path: Path, count: int, *arguments: str) -> Follower:
    """Start to follow, and wait until the exporter says so."""
    follower = Follower(path, *arguments)
    running.until(lambda scrape: scrape.value("cni_exporter_feed_readers") == count)
    return follower


@pytest.mark.real("dockerd", "root")
def test_the_life_of_a_container_is_seen_with_its_name(
    dockerd: Dockerd, exporter: Callable[..., Running], tmp_path: Path
) -> None:
    """Create, start, die and remove, in this order, for the one container that was asked for."""
    path = tmp_path / "feed" / "events.sock"
    running = exporter(
        {
            "feed": {"socket": str(path)},
            "container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]},
        }
    )
    follower = followed(running, path, 1, "--class", "container", "--container", "watched")
    dockerd.run("other")
    dockerd.run("watched")
    follower.until(lambda events: "start" in [event["kind"] for event in events])
    dockerd.remove("watched")
    follower.until(lambda events: "remove" in [event["kind"] for event in events])
    assert running.stop() == 0
    status, said = follower.ended()
    assert (status, "the exporter ended" in said) == (1, True)
    assert [event["kind"] for event in follower.events] == ["create", "start", "die", "remove"]
    assert {event["container"] for event in follower.events} == {"watched"}
    assert abs(follower.events[0]["time"] - time.time()) < 60
    assert not path.exists()


@pytest.mark.real("root")
def test_every_veth_pair_is_seen_by_every_reader(exporter: Callable[..., Running], tmp_path: Path) -> None:
    """23 pairs made and removed are 46 events of each kind for two readers, none lost; Ctrl-C ends a reader cleanly."""
    path = tmp_path / "feed" / "events.sock"
    running = exporter({"feed": {"socket": str(path)}})
    first = followed(running, path, 1, "--class", "veth", "--count", str(4 * PAIRS))
    second = followed(running, path, 2)
    for number in range(PAIRS):
        name = f"cnitest{number}"
        subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"], check=True, timeout=10)
        subprocess.run(["ip", "link", "del", name], check=True, timeout=10)
    assert first.ended() == (0, "")
    devices = {f"cnitest{number}{side}" for number in range(PAIRS) for side in ("", "p")}
    for kind in ("created", "deleted"):
        of_kind = [event["details"]["device"] for event in first.events if event["kind"] == kind]
        assert sorted(of_kind) == sorted(devices)
    second.until(lambda events: len([event for event in events if event["class"] == "veth"]) == 4 * PAIRS)
    second.process.send_signal(signal.SIGINT)
    assert second.ended() == (0, "\n")
    assert running.until(lambda scrape: scrape.value("cni_exporter_feed_readers") == 0)
    assert running.scrape().value("cni_exporter_feed_lost_total") == 0


def test_a_socket_that_cannot_be_had_does_not_keep_the_exporter_from_starting(
    exporter: Callable[..., Running], tmp_path: Path
) -> None:
    """It says so in its log and in a metric, and a reader learns that there is no feed."""
    place = tmp_path / "taken"
    place.write_text("")
    running = exporter({"feed": {"socket": str(place / "events.sock")}})
    assert running.scrape().value("cni_exporter_feed_up") == 0
    assert "no live feed at" in running.log.read_text()
    command = [sys.executable, "-m", "exporter", "events", "--socket", str(place / "events.sock")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=os.environ)
    assert said.returncode == 1
    assert "cannot follow" in said.stderr


def test_a_feed_that_is_off_is_not_there(exporter: Callable[..., Running], tmp_path: Path) -> None:
    """No socket, no series."""
    path = tmp_path / "feed" / "events.sock"
    running = exporter({"feed": {"enabled": False, "socket": str(path)}})
    assert not path.parent.exists()
    assert not running.scrape().all("cni_exporter_feed_up")
