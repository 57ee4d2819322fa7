"""An alert's whole way: a flood in the kernel, a real exporter, Prometheus and Alertmanager, a webhook; and back."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from alertmanager import Alertmanager, Webhook
from prometheus import RULES, Prometheus
from running import Running

ALERT = "CniEventsDropRateHigh"
GETPPID = {"x86_64": 110, "aarch64": 173}
"""Number of a system call that nobody else makes by the thousand, by machine."""
FLOOD = "import os, time\nend = time.monotonic() + 90\nwhile time.monotonic() < end:\n    os.getppid()"


def shortened(directory: Path) -> Path:
    """Write our rules with ranges of 10 s and a patience of 11 s; nothing else is changed."""
    (path,) = RULES
    rules = yaml.safe_load(path.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[5m\]", "[10s]", rule["expr"])
            rule["for"] = "11s"
    short = directory / "short.rules.yaml"
    short.write_text(yaml.safe_dump(rules))
    return short


@pytest.mark.real("root", "prometheus", "alertmanager")
@pytest.mark.timeout(240)
def test_a_flood_is_alerted_on_and_the_alert_ends_with_it(
    exporter: Callable[..., Running], tmp_path: Path, lacking: Callable[[str], None]
) -> None:
    """System calls by the hundred thousand per second: most are left out, somebody is told, and told of the end."""
    running = exporter({"kernel": {"syscalls": [GETPPID[os.uname().machine]]}})
    if not running.scrape().all("cni_bpf_program_attached", program="syscalls"):
        lacking("needs programs in the kernel")
    rules = [shortened(tmp_path)]
    with (
        Webhook() as webhook,
        Alertmanager(webhook.url) as alertmanager,
        Prometheus([f"{running.url}/metrics"], rules=rules, alertmanager=alertmanager.address) as prometheus,
    ):
        prometheus.wait_for("cni_load_level")
        started = time.monotonic()
        flood = subprocess.Popen([sys.executable, "-c", FLOOD])
        try:
            fired = webhook.wait_for("firing", ALERT, 60)
            during, after_fired = running.scrape(), time.monotonic() - started
        finally:
            flood.kill()
            flood.wait(10)
        ended = time.monotonic()
        resolved = webhook.wait_for("resolved", ALERT, 60)
        print(f"told after {after_fired:.1f} s of flood, and of its end after {time.monotonic() - ended:.1f} s")
    assert fired["labels"]["instance"] == resolved["labels"]["instance"] == running.url.removeprefix("http://")
    assert "keeps less than half of the events" in fired["annotations"]["summary"]
    assert during.value("cni_drop_ratio") > 0.5
    assert during.value("cni_sampling_target_ratio", **{"class": "syscall"}) < 0.5
    assert sum(value for _, value in during.all("cni_events_lost_total")) == 0
