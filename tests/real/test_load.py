"""Load management of a real exporter: the user's filters are exact in the kernel, a reload changes them, off is off."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import Running, Scrape

pytestmark = pytest.mark.real("root", "ip")

ACCOUNT = ("filtered", "sampled_out", "handled")
DROPS = """
import socket, sys
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for port, count in zip(sys.argv[1::2], sys.argv[2::2]):
    for _ in range(int(count)):
        sender.sendto(b"x", ("127.0.0.1", int(port)))
"""


STREAM = """
import socket, time
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end = time.monotonic() + 100
while time.monotonic() < end:
    for _ in range(150):
        sender.sendto(b"x", ("127.0.0.1", 9))
    time.sleep(0.05)
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with loopback, in which nobody listens."""
    name = "cniload"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=10)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)


def send(namespace: str, *counts: int) -> None:
    """Send datagrams that are dropped: port, count, port, count."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", DROPS, *map(str, counts)]
    subprocess.run(command, check=True, timeout=30)


def with_programs(running: Running, lacking: Callable[[str], None]) -> Running:
    if not running.scrape().all("cni_bpf_program_attached", program="drops", rung="tp_btf"):
        lacking("needs programs in the kernel")
    return running


def events(scrape: Scrape, what: str, class_: str = "packet_drop") -> float:
    return sum(value for _, value in scrape.all(f"cni_events_{what}_total", **{"class": class_}))


def test_a_configured_filter_leaves_out_exactly_what_it_is_about(
    exporter: Callable[..., Running], namespace: str, lacking: Callable[[str], None]
) -> None:
    """Of 23 datagrams to one port and 29 to another the 23 are filtered, and every event is accounted for."""
    rule = {"kind": "port", "subject": 19, "classes": ["packet_drop"]}
    running = with_programs(exporter({"load_config": {"kernel_filters": [rule]}}), lacking)
    running.until(lambda scrape: scrape.all("cni_filter_rules", kind="port", origin="configured"))
    before = running.scrape()
    send(namespace, 19, 23, 9, 29)
    after = running.until(lambda scrape: events(scrape, "filtered") >= events(before, "filtered") + 23)
    assert events(after, "filtered") - events(before, "filtered") == 23
    running.until(lambda scrape: scrape.value("cni_filter_rule_matches_total", kind="port", origin="configured") == 23)
    settled = running.until(
        lambda scrape: events(scrape, "seen") == sum(events(scrape, what) for what in (*ACCOUNT, "lost"))
    )
    assert events(settled, "seen") - events(before, "seen") >= 52
    assert settled.value("cni_filter_rules", kind="port", origin="configured") == 1


def test_a_reload_changes_the_filters_and_switches_load_management_off(
    exporter: Callable[..., Running], namespace: str, lacking: Callable[[str], None], tmp_path: Path
) -> None:
    """A rule that is gone filters no more; off, there is no level and no rule, and counters go on where they were."""
    rule = {"kind": "port", "subject": 19, "classes": ["packet_drop"]}
    running = with_programs(exporter({"load_config": {"kernel_filters": [rule]}}), lacking)
    running.until(lambda scrape: scrape.all("cni_filter_rules", kind="port", origin="configured"))
    send(namespace, 19, 23)
    before = running.until(lambda scrape: events(scrape, "filtered") == 23)
    assert before.all("cni_load_level")
    (configuration,) = tmp_path.glob("exporter-*.json")
    configuration.write_text(
        json.dumps({"general": {"enable_load_management": False}, "load_config": {"kernel_filters": [rule]}})
    )
    running.process.send_signal(signal.SIGHUP)
    off = running.until(lambda scrape: scrape.all("cni_events_filtered_total") and not scrape.all("cni_load_level"))
    assert not off.all("cni_filter_rules", kind="port")
    assert events(off, "filtered") == 23
    send(namespace, 19, 29)
    after = running.until(lambda scrape: events(scrape, "seen") >= events(before, "seen") + 29)
    assert events(after, "filtered") == 23


def test_who_stays_heavy_gets_a_rule_and_the_estimate_stays_right(
    exporter: Callable[..., Running], namespace: str, lacking: Callable[[str], None]
) -> None:
    """Thousands of drops a second where 200 events may be kept: a learned rule in metrics and on the page, peers named.

    What the kept events stand for is, within five standard errors, what the kernel counted.
    """
    running = with_programs(exporter({"load_config": {"max_events_per_second": 200}}), lacking)
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", STREAM]
    stream = subprocess.Popen(command)
    try:
        running.until(lambda scrape: sum(value for _, value in scrape.all("cni_filter_rules", origin="learned")), 60)
        page = running.get("/").decode()
        running.until(lambda scrape: events(scrape, "sampled_out") > 10_000, 60)
    finally:
        stream.kill()
        stream.wait(10)
    assert "Learned rule for" in page
    after = running.until(
        lambda scrape: events(scrape, "seen") == sum(events(scrape, what) for what in (*ACCOUNT, "lost"))
    )
    counted = events(after, "seen") - events(after, "filtered") - events(after, "lost")
    error = after.value("cni_events_estimate_standard_error", **{"class": "packet_drop"})
    assert abs(events(after, "estimated") - counted) < 5 * error
    assert error < counted / 5
    assert after.all("cni_top_peer_events_estimated", peer="127.0.0.1", **{"class": "packet_drop"})


def test_an_account_is_there_without_programs_too(exporter: Callable[..., Running]) -> None:
    """The class that needs no kernel has its account, a level is told, and the exporter is healthy."""
    running = exporter({"cni_config": {"use_ebpf": False}})
    scrape = running.until(lambda scrape: scrape.all("cni_load_level"))
    assert {events(scrape, what, "container") for what in ("seen", *ACCOUNT, "lost")} == {0.0}
    assert "steering: hung" not in running.get("/-/healthy").decode()
    assert "<h2>Load</h2>" in running.get("/").decode()
