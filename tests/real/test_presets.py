"""Each preset as a user starts it, on a host with a container: it keeps what its file promises."""

import json
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from running import Running, Scrape
from runtimes import Dockerd, running

from exporter.config import PRESETS, preset_path

pytestmark = pytest.mark.real("dockerd", "root")

DETAILS = ("label", "environment", "mount", "network", "port")
RESOURCES = ("cpu_usage_seconds_total", "memory_working_set_bytes", "pids")
Start = Callable[..., Running]


@pytest.fixture(scope="module")
def dockerd() -> Iterator[Dockerd]:
    """A daemon with one container, for every preset."""
    with running(Dockerd) as daemon:
        daemon.run("box", environment={"LANG": "C"}, labels={"app.kubernetes.io/name": "shop"})
        yield daemon


@pytest.fixture
def start(dockerd: Dockerd, exporter: Start, tmp_path: Path) -> Start:
    """Start an exporter by the name of a preset, or without one; what it writes is kept within the test."""

    def begin(preset: str = "", **settings: object) -> Running:
        places = {
            "container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]},
            "feed": {"socket": str(tmp_path / f"{preset}.sock")},
        }
        started = exporter({**places, **settings}, *([f"--preset={preset}"] if preset else []))
        started.until(lambda scrape: scrape.all("cni_veth_receive_bytes_total", container="box"))
        return started

    return begin


def features(scrape: Scrape) -> dict[str, bool]:
    return {labels["feature"]: bool(value) for labels, value in scrape.all("cni_exporter_feature_enabled")}


def details(scrape: Scrape) -> set[str]:
    return {name for name in DETAILS if scrape.all(f"cni_container_{name}_info")}


def variables(scrape: Scrape) -> set[str]:
    return {labels["name"] for labels, _ in scrape.all("cni_container_environment_info")}


def levels(started: Running) -> set[str]:
    """Levels of the log's lines, which have the form that the preset sets."""
    lines = started.log.read_text().splitlines()
    return {json.loads(line)["level"] if line.startswith("{") else line.split("level=")[1].split()[0] for line in lines}


def resident(started: Running) -> int:
    """Give the memory of the process, in bytes."""
    status = Path(f"/proc/{started.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_development_shows_everything_soon(start: Start) -> None:
    """Debug log for people, names of all variables, eBPF, no Kubernetes."""
    started = start("development")
    scrape = started.until(lambda scrape: variables(scrape) >= {"LANG", "PATH"} and details(scrape) >= {"label"})
    assert features(scrape)["ebpf"]
    assert not features(scrape)["kubernetes"]
    assert features(scrape)["metadata_collection"]
    assert scrape.all("cni_bpf_program_info")
    assert "level=info logger=exporter" in started.log.read_text()


def test_production_says_least_and_keeps_an_audit_log(start: Start, tmp_path: Path) -> None:
    """JSON log from info on, not even names of variables, a private audit log; resources are measured."""
    path = tmp_path / "audit.jsonl"
    started = start("production", audit={"path": str(path)})
    scrape = started.until(lambda scrape: all(scrape.all(f"cni_container_{name}") for name in RESOURCES))
    assert variables(scrape) == set()
    assert details(scrape) >= {"label", "network"}
    assert scrape.value("cni_exporter_audit_up") == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert '"container":"box"' in path.read_text()
    assert "environment" not in path.read_text()
    assert levels(started) <= {"info", "warning", "error"}
    assert all(json.loads(line) for line in started.log.read_text().splitlines())


def test_production_keeps_its_audit_log_where_logs_are() -> None:
    """The directory is the one that the systemd unit makes (LogsDirectory)."""
    preset = yaml.safe_load(preset_path("production").read_text())
    unit = (preset_path("production").parents[1] / "systemd" / "cni-exporter.service").read_text()
    assert preset["audit"]["path"].startswith("/var/log/cni-exporter/")
    assert "LogsDirectory=cni-exporter\n" in unit


def test_high_performance_spends_series_on_traffic_alone(start: Start) -> None:
    """No details of containers, room for thousands of devices, a quiet log; traffic and resources as ever."""
    started = start("high-performance")
    scrape = started.until(lambda scrape: all(scrape.all(f"cni_container_{name}") for name in RESOURCES))
    assert details(scrape) == set()
    assert features(scrape)["ebpf"]
    assert scrape.value("cni_exporter_series_limit", family="cni_veth_info") == 20000
    assert levels(started) <= {"warning", "error"}


def test_minimal_shows_traffic_and_costs_less(start: Start) -> None:
    """Neither eBPF nor details nor resources; less memory and fewer series than without a preset in the same minute."""
    ordinary, small = start(), start("minimal")
    for _ in range(10):  # what a scrape needs is allocated by then
        ordinary.scrape()
        scrape = small.scrape()
    assert details(scrape) == set()
    assert not any(scrape.all(f"cni_container_{name}") for name in RESOURCES)
    assert not scrape.all("cni_bpf_program_attached")
    assert not any(features(scrape)[name] for name in ("ebpf", "kubernetes", "resource_monitoring", "load_management"))
    assert not scrape.all("cni_namespaces")
    monitors = {labels["monitor"] for labels, _ in scrape.all("cni_exporter_monitor_up")}
    assert monitors == {"links", "docker", "cgroup", "cni_config"}
    assert scrape.all("cni_veth_info")
    assert levels(small) <= {"warning", "error"}
    assert len(scrape.samples) < len(ordinary.scrape().samples)
    assert resident(small) < resident(ordinary)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_which_one_it_is(start: Start, name: str, tmp_path: Path) -> None:
    """It starts, is healthy, tells its name, obeys what lies above it, and ends in time."""
    started = start(name, audit={"path": str(tmp_path / "audit.jsonl")}, cni_config={"use_ebpf": False})
    scrape = started.scrape()
    ((labels, _),) = scrape.all("cni_exporter_config_info")
    assert labels["preset"] == name
    assert not features(scrape)["ebpf"]
    assert not scrape.all("cni_bpf_program_attached")
    started.get("/-/healthy")
    began = time.monotonic()
    assert started.stop() == 0
    assert time.monotonic() - began < 20
