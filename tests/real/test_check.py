"""`cni-exporter check` as a user calls it: what works here, what does not and why, and its exit status."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def check(path: Path, configuration: object, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Run the command; the answer is its exit status, what it says by feature, and all its words."""
    path.write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "exporter", "check", "--config", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    rows = [line.split(None, 1) for line in done.stdout.splitlines() if line.startswith(("ok ", "FAIL "))]
    features = {words.split("  ")[0]: " ".join([mark, *words.split("  ", 1)[1].split()]) for mark, words in rows}
    return done.returncode, features, done.stdout + done.stderr


@pytest.mark.real("root")
def test_every_feature_is_tried(tmp_path: Path) -> None:
    """A machine that can run the exporter is told so, feature by feature, with the rung of each."""
    place = tmp_path / "feed" / "events.sock"
    status, features, words = check(
        tmp_path / "c.json", {"web": {"listen_address": "127.0.0.1:0"}, "feed": {"socket": str(place)}}
    )
    assert status == 0, words
    assert features["links"] == "ok netlink"
    assert features["live feed"] == f"ok {place}"
    assert not place.parent.exists()
    assert {"listen address", "privileges", "namespaces", "kernel", "docker", "containerd", "cri-o", "cgroup"} <= set(
        features
    )


def test_an_address_that_is_taken_fails(tmp_path: Path) -> None:
    """`run` would not work: exit status 1, with the address and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, features, _ = check(
            tmp_path / "c.json", {"web": {"listen_address": address}, "cni_config": {"use_ebpf": False}}
        )
    assert status == 1
    assert features["listen address"].startswith("FAIL none")
    assert "--web.listen-address" in features["listen address"]


def test_a_feed_that_cannot_be_had_is_no_failure(tmp_path: Path) -> None:
    """It is said, with a reason; the exporter runs without."""
    (tmp_path / "taken").write_text("")
    base = {"web": {"listen_address": "127.0.0.1:0"}, "cni_config": {"use_ebpf": False}}
    status, features, _ = check(tmp_path / "c.json", base | {"feed": {"enabled": False}})
    assert (status, features["live feed"]) == (0, "ok none feed.enabled is false")
    feed = {"feed": {"socket": str(tmp_path / "taken" / "events.sock")}}
    status, features, _ = check(tmp_path / "c.json", base | feed)
    assert (status, features["live feed"].partition("below")[0]) == (0, "ok none no socket can be made ")


def test_errors_of_the_configuration_are_told_and_fail(tmp_path: Path) -> None:
    """A wrong call of the command is 2, a wrong configuration 1 with file and key."""
    status, _, words = check(tmp_path / "c.json", {"web": {"listen_adress": ":1"}})
    assert status == 1
    assert "listen_adress" in words
    assert str(tmp_path / "c.json") in words
    assert check(tmp_path / "c.json", {}, "--nothing")[0] == 2
