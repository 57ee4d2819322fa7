"""The audit log of a real exporter: the life of a container on record, bounded, and a disk that cannot take it."""

import contextlib
import json
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Running, Scrape
from runtimes import Dockerd

UP = "cni_exporter_audit_up"
DROPPED = "cni_exporter_audit_records_dropped_total"


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Give the records of a kind, oldest first."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["record"] == kind]


def variables(scrape: Scrape, **labels: str) -> list[str]:
    return [own["name"] for own, _ in scrape.all("cni_container_environment_info", **labels)]


def until(holds: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.real("dockerd", "root")
def test_what_is_read_of_a_container_and_who_is_told_is_on_record(
    dockerd: Dockerd, exporter: Callable[..., Running], tmp_path: Path
) -> None:
    """Start, reading, scrapes, the container's life, a reload, a refused one, the end; in a private file, numbered."""
    path = tmp_path / "log" / "audit.jsonl"
    running = exporter(
        {
            "container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]},
            "privacy": {"environment": ["LANG"], "container_labels": ["app"]},
            "audit": {"path": str(path)},
        }
    )
    container_id = dockerd.run("watched", environment={"LANG": "C", "PIN": "1234"}, labels={"app": "shop", "x": "y"})
    running.until(lambda scrape: "PIN" in variables(scrape, container="watched"))
    running.until(lambda scrape: scrape.all("cni_netns_info", container="watched"))
    running.until(lambda scrape: scrape.all("cni_container_pids", container="watched"))
    running.get("/")
    dockerd.remove("watched")
    until(lambda: any(event["kind"] == "remove" for event in records(path, "event")))
    for content in (running.log.with_suffix(".json").read_text(), "general: 7"):
        running.log.with_suffix(".json").write_text(content)
        before = len(records(path, "reload"))
        running.process.send_signal(signal.SIGHUP)
        until(lambda before=before: len(records(path, "reload")) > before)
    assert running.stop() == 0

    read: dict[str, dict[str, Any]] = {}
    for record in records(path, "read"):
        if record["container_id"] == container_id:
            assert record["container"] in ("watched", "")
            read.setdefault(record["monitor"], {}).update(record["what"])
    assert read["docker"]["environment"] == {"names": 3, "values": ["LANG"]}  # PATH is the image's own
    assert read["docker"]["labels"] == ["app"]
    assert read["links"]["network_namespace"]
    assert "pids" in read["cgroup"]
    assert "1234" not in path.read_text()
    life = [event["kind"] for event in records(path, "event") if event["container_id"] == container_id]
    assert [kind for kind in life if kind != "stop"] == ["create", "start", "die", "remove"]
    told = records(path, "scrape")
    assert {(one["client"], one["path"], one["status"]) for one in told} >= {("127.0.0.1", "/metrics", 200)}
    assert all(one["bytes"] > 0 and (one["series"] > 10) == (one["path"] == "/metrics") for one in told)
    assert "/" in {one["path"] for one in told}
    assert [one["successful"] for one in records(path, "reload")] == [True, False]
    every = [json.loads(line) for line in path.read_text().splitlines()]
    assert (every[0]["record"], every[-1]["record"]) == ("start", "stop")
    assert [one["seq"] for one in every] == list(range(1, len(every) + 1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.real("dockerd", "root")
def test_scrapes_write_no_line_per_container(
    dockerd: Dockerd, exporter: Callable[..., Running], tmp_path: Path
) -> None:
    """Thirty scrapes of five containers add two records of scrapes and not one of a reading."""
    for number in range(5):
        dockerd.run(f"box-{number}")
    path = tmp_path / "audit.jsonl"
    running = exporter(
        {
            "container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]},
            "audit": {"path": str(path), "events": []},
        }
    )
    running.until(lambda scrape: variables(scrape).count("PATH") == 5)
    running.until(lambda scrape: len({one["container"] for one, _ in scrape.all("cni_netns_info")}) > 5)
    readings = {record["container"] for record in records(path, "read")}
    assert readings >= {f"box-{number}" for number in range(5)}
    for _ in range(30):
        running.scrape()
    assert running.stop() == 0
    boxes = [record for record in records(path, "read") if record["container"].startswith("box-")]
    told = [(record["container"], record["monitor"], what) for record in boxes for what in record["what"]]
    assert len(set(told)) == len(told)
    assert sum(one["count"] for one in records(path, "scrape") if one["path"] == "/metrics") > 30
    assert len([one for one in records(path, "scrape") if one["path"] == "/metrics"]) <= 3


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB: more than may wait in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "audit-test", str(place)]
    subprocess.run(mount, check=True, timeout=10)
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=10)


def fill(path: Path) -> None:
    """Take the last byte that there is."""
    with path.open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(64))


@pytest.mark.real("root")
def test_a_full_disk_costs_records_and_nothing_else(tiny_disk: Path, exporter: Callable[..., Running]) -> None:
    """Scrapes go on, up is 0; with room again the waiting records are written, and every line is whole."""
    path = tiny_disk / "audit.jsonl"
    running = exporter({"audit": {"path": str(path), "scrape_interval": "0s"}, "cni_config": {"use_ebpf": False}})
    running.until(lambda scrape: scrape.value(UP) == 1)
    fill(tiny_disk / "ballast")
    running.until(lambda scrape: scrape.value(UP) == 0)
    asked = running.scrape().value("cni_exporter_scrapes_total")
    for _ in range(50):
        running.scrape()
    assert running.scrape().value("cni_exporter_scrapes_total") == asked + 51
    running.get("/-/healthy")
    (tiny_disk / "ballast").unlink()
    running.until(lambda scrape: scrape.value(UP) == 1)
    assert sum(value for _, value in running.scrape().all(DROPPED)) == 0
    assert running.stop() == 0
    lines = path.read_text().splitlines()
    whole = [line for line in lines if line.endswith("}")]
    assert len(lines) - len(whole) <= 2  # torn where the disk was full; each ends before the next begins
    assert sum(json.loads(line)["record"] == "scrape" for line in whole) > 50
    assert running.log.read_text().count("cannot be written") == 1


@pytest.mark.real("root", "setpriv")
def test_a_user_who_may_not_write_there_has_all_else(exporter: Callable[..., Running], tmp_path: Path) -> None:
    """Without the right to its directory the exporter starts, says so and serves."""
    place = tmp_path / "log"
    place.mkdir(0o700)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    running = exporter(command=(*user, "env", f"CNI_EXPORTER_AUDIT_PATH={place / 'audit.jsonl'}"))
    running.until(lambda scrape: scrape.value(UP) == 0)
    assert "Permission denied" in running.log.read_text()
    assert list(place.iterdir()) == []
