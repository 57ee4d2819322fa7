"""The exporter end to end: real containers, counted packets, restarts of the runtimes, bad clients."""

import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import Running, Scrape
from runtimes import Containerd, Dockerd

DATAGRAMS = 23
TRANSMIT = "cni_veth_transmit_packets_total"
RECEIVE = "cni_veth_receive_packets_total"
_SEND = "import socket;s=socket.socket(2,2);[s.sendto(b'x'*100,('{}',9)) for _ in range({})]"


def only_docker(dockerd: Dockerd) -> dict[str, object]:
    return {"container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]}}


def only_cri(containerd: Containerd) -> dict[str, object]:
    return {"container_config": {"cri_sockets": [str(containerd.socket)], "container_runtimes": ["containerd"]}}


def statistic(device: str, name: str) -> int:
    return int(Path(f"/sys/class/net/{device}/statistics/{name}").read_text())


def send_from(pid: int, address: str, count: int) -> None:
    """Send datagrams from a process's network namespace to an address of the test's own bridge."""
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "/usr/bin/python3", "-c", _SEND.format(address, count)]
    subprocess.run(command, check=True, timeout=20)


def quiet(device: str) -> None:
    """Wait until nothing goes over a device on its own (neighbour discovery of the first seconds)."""
    last, since, deadline = -1, time.monotonic(), time.monotonic() + 20
    while time.monotonic() - since < 1.5:
        assert time.monotonic() < deadline, f"{device} does not come to rest"
        now = statistic(device, "rx_packets") + statistic(device, "tx_packets")
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)


def counted(running: Running, device: str, pid: int, gateway: str, **workload: str) -> None:
    """Send from a container and compare with the kernel's own statistics, direction included."""
    quiet(device)
    sent = statistic(device, "rx_packets")
    received = statistic(device, "tx_packets")
    before = running.scrape()
    send_from(pid, gateway, DATAGRAMS)
    quiet(device)
    after = running.scrape()
    rise = after.value(TRANSMIT, device=device, **workload) - before.value(TRANSMIT, device=device, **workload)
    assert rise == statistic(device, "rx_packets") - sent
    assert rise >= DATAGRAMS
    rise = after.value(RECEIVE, device=device, **workload) - before.value(RECEIVE, device=device, **workload)
    assert rise == statistic(device, "tx_packets") - received
    assert after.value(TRANSMIT, device=device, **workload) == statistic(device, "rx_packets")


def gateway_of(device: str) -> str:
    """Give the address of the bridge that a device is on."""
    bridge = Path(f"/sys/class/net/{device}/master").resolve().name
    shown = subprocess.run(["ip", "-4", "-o", "addr", "show", bridge], capture_output=True, text=True, check=True)
    return shown.stdout.split()[3].partition("/")[0]


@pytest.mark.real("dockerd", "root")
def test_twenty_containers_have_their_veths_and_packets_are_counted_exactly(
    dockerd: Dockerd, exporter: Callable[..., Running]
) -> None:
    names = [f"box-{number}" for number in range(20)]
    for name in names:
        dockerd.run(name)
    running = exporter(only_docker(dockerd))
    scrape = running.until(lambda scrape: len(named(scrape)) >= 20)
    assert set(names) <= named(scrape)
    assert scrape.value("cni_containers", runtime="docker", state="running") == 20
    ((labels, _),) = scrape.all(TRANSMIT, container="box-7")
    pid = dockerd.client.containers.get("box-7").attrs["State"]["Pid"]
    counted(running, labels["device"], pid, gateway_of(labels["device"]), namespace="", pod="", container="box-7")


def named(scrape: Scrape) -> set[str]:
    return {labels["container"] for labels, _ in scrape.all(TRANSMIT)}


@pytest.mark.real("containerd", "cni-plugins", "root")
def test_a_pod_of_the_cri_has_its_namespace_and_name_and_packets_are_counted_exactly(
    containerd: Containerd, exporter: Callable[..., Running]
) -> None:
    sandbox, _ = containerd.run("cart-1", "app", "shop")
    containerd.run("neighbour", "app", "shop")
    running = exporter(only_cri(containerd))
    scrape = running.until(lambda scrape: scrape.all(TRANSMIT, pod="cart-1") and scrape.all(TRANSMIT, pod="neighbour"))
    ((labels, _),) = scrape.all(TRANSMIT, pod="cart-1")
    assert (labels["namespace"], labels["container"]) == ("shop", "")
    assert scrape.all("cni_container_memory_working_set_bytes", namespace="shop", pod="cart-1", container="app")
    ((info, _),) = scrape.all("cni_container_info", container_id=sandbox)
    device = labels["device"]
    pid = process_in(scrape, info["container_id"])
    ((neighbour, _),) = scrape.all("cni_container_network_info", pod="neighbour", container="")
    counted(running, device, pid, neighbour["ip"], namespace="shop", pod="cart-1", container="")


def process_in(scrape: Scrape, container_id: str) -> int:
    """Give a process of a container, found by its cgroup."""
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if container_id in (directory / "cgroup").read_text():
                return int(directory.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {container_id}")


@pytest.mark.real("dockerd", "root")
def test_a_container_is_seen_within_200_ms_and_gone_in_the_first_scrape(
    dockerd: Dockerd, exporter: Callable[..., Running]
) -> None:
    running = exporter(only_docker(dockerd))
    delays = []
    for number in range(20):
        name = f"quick-{number}"
        events = dockerd.client.events(decode=True, filters={"event": "start", "container": name})
        dockerd.run(name)
        started = next(events)["timeNano"] / 1e9
        events.close()
        while True:
            scrape = running.scrape()
            seen = time.time()
            if scrape.all(TRANSMIT, container=name):
                break
            assert seen - started < 10, f"{name} is not seen"
        delays.append(seen - started)
        dockerd.remove(name)
        assert not re.search(f'container="{name}"', running.scrape().text)
    print(f"seen after {statistics.median(delays) * 1000:.0f} ms, at most {max(delays) * 1000:.0f} ms")
    assert statistics.median(delays) < 0.2


@pytest.mark.real("dockerd", "containerd", "cni-plugins", "root")
def test_runtimes_die_and_come_back_while_scrapes_go_on(
    dockerd: Dockerd, containerd: Containerd, exporter: Callable[..., Running]
) -> None:
    """No scrape fails, no counter goes backwards, modes change and come back."""
    dockerd.run("stays")
    containerd.run("pod-1", "app", "shop")
    settings = {"container_config": {"docker_socket": [str(dockerd.socket)], "cri_sockets": [str(containerd.socket)]}}
    running = exporter(settings)
    running.until(lambda scrape: scrape.all(TRANSMIT, container="stays") and scrape.all(TRANSMIT, pod="pod-1"))
    stop, scrapes, failures = threading.Event(), [], []

    def scrape_on() -> None:
        while not stop.wait(0.2):
            try:
                scrapes.append(running.scrape())
            except OSError as error:
                failures.append(error)

    scraper = threading.Thread(target=scrape_on)
    scraper.start()
    try:
        for runtime, daemon in (("docker", dockerd), ("containerd", containerd)):
            daemon.kill()
            down = running.until(lambda s, name=runtime: mode(s, name) in {"down", "absent"})
            assert down.all(TRANSMIT, container="stays")
            assert down.all(TRANSMIT, pod="pod-1")
            daemon.restart()
            running.until(lambda s, name=runtime: mode(s, name) in {"events", "list"}, 40)
    finally:
        stop.set()
        scraper.join(20)
    assert not failures
    backwards(scrapes)


def mode(scrape: Scrape, monitor: str) -> str:
    return scrape.all("cni_exporter_monitor_mode_info", monitor=monitor)[0][0]["mode"]


def backwards(scrapes: list[Scrape]) -> None:
    """Compare each counter with what it was in the scrape before."""
    last: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for scrape in scrapes:
        now = {
            (name, tuple(sorted(labels.items()))): value
            for name, labels, value in scrape.samples
            if name.endswith("_total")
        }
        fallen = {key: (last[key], value) for key, value in now.items() if value < last.get(key, 0)}
        assert not fallen
        last = now


def test_bad_clients_do_not_keep_good_ones_waiting(exporter: Callable[..., Running]) -> None:
    """32 scrapers at once, one that takes a byte a second, 500 idle connections: a scrape answers in under a second."""
    running = exporter()
    crowd = subprocess.Popen([sys.executable, str(Path(__file__).with_name("crowd.py")), str(running.port)], stdout=-1)
    try:
        assert crowd.stdout
        assert crowd.stdout.readline() == b"ready\n"
        delays = []
        for _ in range(10):
            started = time.monotonic()
            running.scrape()
            delays.append(time.monotonic() - started)
    finally:
        crowd.kill()
        crowd.wait(10)
    assert max(delays) < 1, delays


@pytest.mark.real("promtool")
def test_promtool_has_nothing_to_say_about_a_full_scrape(exporter: Callable[..., Running]) -> None:
    text = exporter().scrape().text
    said = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


@pytest.mark.real("root")
def test_an_ordinary_user_without_capabilities_sees_veths(exporter: Callable[..., Running]) -> None:
    """As uid 65534 the same families come from the same netlink rung, fewer from the rest."""
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")
    pair = ["ip", "link", "add", "cnitest0", "type", "veth", "peer", "name", "cnitest1"]
    subprocess.run(pair, check=True, timeout=10)
    try:
        scrape = exporter(None, command=as_nobody).scrape()
    finally:
        subprocess.run(["ip", "link", "del", "cnitest0"], check=True, timeout=10)
    assert mode(scrape, "links") == "netlink"
    assert mode(scrape, "namespaces") == "cgroup"
    assert scrape.value("cni_veths", state="host") >= 2


def test_a_hangup_loads_the_configuration_again(exporter: Callable[..., Running], tmp_path: Path) -> None:
    running = exporter({"log": {"level": "info"}})
    (configuration,) = tmp_path.glob("exporter-*.json")
    before = running.scrape().all("cni_exporter_config_info")[0][0]["sha256"]
    configuration.write_text('{"log": {"level": "nonsense"}}')
    running.process.send_signal(signal.SIGHUP)
    running.until(lambda scrape: scrape.value("cni_exporter_config_last_reload_successful") == 0)
    configuration.write_text('{"log": {"level": "warning"}}')
    running.process.send_signal(signal.SIGHUP)
    running.until(lambda scrape: scrape.value("cni_exporter_config_last_reload_successful") == 1)
    assert running.scrape().all("cni_exporter_config_info")[0][0]["sha256"] != before


@pytest.mark.real("dockerd", "root")
def test_a_socket_in_a_directory_that_nobody_may_search_is_reached_as_root(
    dockerd: Dockerd, exporter: Callable[..., Running]
) -> None:
    """Containerd's shim makes such directories; without the capability the reason is told."""
    Path(dockerd.socket).parent.chmod(0o600)
    settings = only_docker(dockerd)
    exporter(settings).until(lambda scrape: mode(scrape, "docker") == "events")
    bare = exporter(settings | {"general": {"keep_capabilities": []}})
    scrape = bare.until(lambda scrape: mode(scrape, "docker") == "absent")
    assert "no permission" in scrape.all("cni_exporter_monitor_mode_info", monitor="docker")[0][0]["reason"]
    assert not scrape.all("cni_exporter_capability")
