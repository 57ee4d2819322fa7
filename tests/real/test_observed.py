"""The same questions as in test_prometheus.py, asked of the real exporter on a host with a real container."""

import contextlib
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real.test_prometheus import (
    prometheus,
    test_dashboard_query_answers_with_data,
    test_every_rule_is_loaded_and_healthy,
    test_target_is_up_without_an_error,
    test_what_an_alert_reads_is_there,
    test_workload_labels_survive_those_of_the_target,
)
from running import Running
from runtimes import Dockerd, running

__all__ = [
    "prometheus",
    "test_dashboard_query_answers_with_data",
    "test_every_rule_is_loaded_and_healthy",
    "test_target_is_up_without_an_error",
    "test_what_an_alert_reads_is_there",
    "test_workload_labels_survive_those_of_the_target",
]

pytestmark = pytest.mark.real("prometheus", "promtool", "dockerd", "root")


# Inside the container: a refused datagram, a refused connection, one that succeeds, and one to a full queue
# (its SYN is sent again after a second).
TROUBLE = """
import socket, time
udp = socket.socket(2, 2); udp.sendto(b'x', ('127.0.0.1', 9))
refused = socket.socket(); refused.connect_ex(('127.0.0.1', 9))
server = socket.create_server(('127.0.0.1', 0), backlog=0)
clients = [socket.socket() for _ in range(3)]
for client in clients:
    client.setblocking(False); client.connect_ex(server.getsockname())
time.sleep(1.3)
"""


@contextlib.contextmanager
def happening(pid: int, plugins: Path) -> Iterator[None]:
    """Have every second what the kernel programs look for: drops, connections, namespaces, plugin runs."""
    stop = threading.Event()

    def happen() -> None:
        while not stop.is_set():
            inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "/usr/bin/python3", "-c", TROUBLE]
            subprocess.run(inside, timeout=30, check=True)
            subprocess.run(["unshare", "-n", "true"], timeout=30, check=True)
            for plugin in ("true", "false"):
                environment = {"CNI_COMMAND": "ADD", "CNI_IFNAME": "eth0", "CNI_CONTAINERID": "c0ffee"}
                subprocess.run([plugins / plugin], env=environment, timeout=30, check=False)

    thread = threading.Thread(target=happen, name="happening")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


def configurations(place: Path) -> Path:
    """Make a directory with a configuration in force, of whose addresses one is leased, and one that is broken."""
    leases = place / "leases"
    (leases / "pods").mkdir(parents=True)
    (leases / "pods" / "10.99.0.2").write_text("c0ffee\r\neth0")
    ipam = {"type": "host-local", "subnet": "10.99.0.0/24", "dataDir": str(leases)}
    network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge", "ipam": ipam}]}
    directory = place / "net.d"
    directory.mkdir()
    (directory / "10-pods.conflist").write_text(json.dumps(network))
    (directory / "90-broken.conflist").write_text('{"cniVersion": ')
    return directory


@pytest.fixture(scope="module")
def exporter_url(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an exporter that watches a container with limits and a published port."""
    need("dockerd")
    with running(Dockerd) as dockerd:
        limits = {"mem_limit": "64m", "cpu_period": 100_000, "cpu_quota": 50_000}
        dockerd.run("limited", ports={"80/tcp": ("127.0.0.1", None)}, **limits)
        pid = dockerd.client.containers.get("limited").attrs["State"]["Pid"]
        plugins, place = tmp_path_factory.mktemp("plugins"), tmp_path_factory.mktemp("cni")
        for name in ("true", "false"):
            shutil.copy(need("busybox"), plugins / name)
        settings = {
            "container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]},
            "cni_config": {"bin_paths": [str(plugins)], "config_paths": [str(configurations(place))]},
            "audit": {"path": str(tmp_path_factory.mktemp("audit") / "audit.jsonl")},
        }
        exporter = Running(tmp_path_factory.mktemp("observed"), settings).ready(60)
        with happening(pid, plugins):
            exporter.until(lambda scrape: scrape.all("cni_tcp_faults_total", container="limited", fault="retransmit"))
            yield f"{exporter.url}/metrics"
        assert exporter.stop() == 0
