"""A real Prometheus scrapes a target and answers every query that we ship.

The target is synthetic, made from the catalogue: every family, with values that grow. Point the same tests at a running
exporter with EXPORTER_URL, or import them into another module that has its own fixture `exporter_url`.
"""

import itertools
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import lacking
from real.prometheus import Prometheus, alerts, expressions

from exporter.catalog import FAMILIES, Family, Kind

pytestmark = pytest.mark.real("prometheus", "promtool")

OPERATOR_LABELS = {"namespace": "monitoring", "pod": "cni-exporter-x7", "container": "cni-exporter"}
"""What the Prometheus operator puts on a target; `honor_labels` must keep it away from the workloads."""

# Two workloads: a container in a pod and one of Docker's. Labels not named here are the same for both.
WORKLOADS = (
    {
        "namespace": "shop",
        "pod": "web-0",
        "container": "app",
        "netns": "4026532001",
        "device": "veth1",
        "pinned": "true",
    },
    {"namespace": "", "pod": "", "container": "db", "netns": "4026532002", "device": "veth2", "pinned": "false"},
)
ENUMERATIONS = {
    "state": ("running", "established", "orphaned", "attached", "host", "used", "free"),
    "type": ("net", "pid"),
    "shared": ("true", "false"),
    "monitor": ("links", "runtimes", "kernel", "cni_config"),
    "family": ("cni_veth_info", "cni_containers"),
    "direction": ("outgoing", "incoming"),
    "fault": ("retransmit", "reset_sent"),
    "command": ("ADD", "DEL"),
    "program": ("drops", "netns"),
    "operation": ("create", "modify"),
    "level": ("low", "medium", "high", "critical"),
    "resource": ("cpu", "memory", "network", "disk"),
    "origin": ("configured", "learned"),
}
OF_PROGRAMS = [
    *(name for name, family in FAMILIES.items() if family.owner in {"kernel", "plugins"}),
    *("cni_events_lag_seconds", "cni_top_peer_events_estimated"),
]
"""Families that nothing but programs in the kernel can fill."""
SELECTOR = re.compile(r"\b(?:cni_\w+|up\b)(?:\{[^}]*\})?")


def _label_sets(family: Family) -> Iterator[dict[str, str]]:
    enumerated = [label for label in family.exported if label in ENUMERATIONS]
    workloads = WORKLOADS if set(family.exported) & set(WORKLOADS[0]) else WORKLOADS[:1]
    for workload in workloads:
        for values in itertools.product(*(ENUMERATIONS[label] for label in enumerated)):
            chosen = workload | dict(zip(enumerated, values, strict=True))
            if family.hidden == ("netns_id",) and workload["pod"]:
                chosen["container"] = ""
            yield {label: chosen.get(label, f"{label}-1") for label in family.exported}


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    text = ",".join(f'{label}="{part}"' for label, part in labels.items())
    return f"{name}{{{text}}} {value}" if text else f"{name} {value}"


def _samples(family: Family, labels: dict[str, str], scrapes: int) -> Iterator[str]:
    if family.kind is Kind.HISTOGRAM:
        for number, bound in enumerate((*map(str, family.buckets), "+Inf"), start=1):
            yield _sample(f"{family.name}_bucket", labels | {"le": bound}, number * scrapes)
        yield _sample(f"{family.name}_sum", labels, 60 * scrapes)
        yield _sample(f"{family.name}_count", labels, (len(family.buckets) + 1) * scrapes)
    elif family.kind is Kind.COUNTER:
        yield _sample(family.name, labels, 7 * scrapes)
    elif family.name.endswith("_timestamp_seconds"):
        yield _sample(family.name, labels, time.time())
    else:
        yield _sample(family.name, labels, 1)


def exposition(scrapes: int = 1) -> str:
    """Every family of the catalogue in the text format 0.0.4, as the scrape of this number sees it."""
    lines = []
    for family in FAMILIES.values():
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind.value}"]
        lines += [line for labels in _label_sets(family) for line in _samples(family, labels, scrapes)]
    return "\n".join(lines) + "\n"


class _Exposition(BaseHTTPRequestHandler):
    scrapes = itertools.count(1)

    def do_GET(self) -> None:
        body = exposition(next(self.scrapes)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def exporter_url() -> Iterator[str]:
    """URL to scrape: EXPORTER_URL, else the synthetic target."""
    if url := os.environ.get("EXPORTER_URL"):
        yield url
        return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Exposition)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="exposition")
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    thread.join(5)
    server.server_close()


@pytest.fixture(scope="module")
def prometheus(exporter_url: str) -> Iterator[Prometheus]:
    """A Prometheus that has scraped often enough for rates to be there and has evaluated every rule."""
    with Prometheus([exporter_url], OPERATOR_LABELS) as server:
        server.wait_for("count_over_time(up[1m]) > 2 and up == 1")
        yield server


def _need_programs(prometheus: Prometheus, expression: str) -> None:
    """End the test where the query is on programs in the kernel, and the target says that none is attached."""
    if any(name in expression for name in OF_PROGRAMS) and not prometheus.query("cni_bpf_program_attached == 1"):
        lacking("needs programs in the kernel")


@pytest.mark.parametrize("expression", [pytest.param(text, id=where) for where, text in expressions()])
def test_dashboard_query_answers_with_data(prometheus: Prometheus, expression: str) -> None:
    """No panel and no variable of a dashboard is empty."""
    _need_programs(prometheus, expression)
    assert prometheus.wait_for(expression, timeout=5)


@pytest.mark.parametrize("expression", [pytest.param(alert["expr"], id=alert["alert"]) for alert in alerts()])
def test_what_an_alert_reads_is_there(prometheus: Prometheus, expression: str) -> None:
    """Each selector inside an alert's expression finds series, and the expression itself can be evaluated."""
    _need_programs(prometheus, expression)
    prometheus.query(expression)
    selectors = set(SELECTOR.findall(expression))
    assert selectors
    assert not [selector for selector in selectors if not prometheus.query(selector)]


def test_every_rule_is_loaded_and_healthy(prometheus: Prometheus) -> None:
    """Prometheus evaluates each of our rules, annotations included, without an error."""
    deadline = time.monotonic() + 10
    while any(rule["health"] == "unknown" for rule in prometheus.rules().values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    rules = prometheus.rules()
    assert {alert["alert"] for alert in alerts()} == set(rules)
    assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}
    texts = [text for rule in rules.values() for alert in rule["alerts"] for text in alert["annotations"].values()]
    assert not [text for text in texts if "error expanding template" in text]


def test_workload_labels_survive_those_of_the_target(prometheus: Prometheus) -> None:
    """With honor_labels an empty label stays empty: the exporter's own pod is never taken for a workload."""
    traffic = '{{__name__=~"cni_.+_(bytes|packets)_total", {}}}'
    assert prometheus.query(traffic.format('pod=""'))
    assert prometheus.query(traffic.format('pod="cni-exporter-x7"')) == []


def test_target_is_up_without_an_error(prometheus: Prometheus) -> None:
    """Prometheus takes the whole scrape."""
    assert [(target["health"], target["lastError"]) for target in prometheus.targets()] == [("up", "")]


@pytest.mark.parametrize("expression", ["sum(", "rate(up)", 'up{job="'])
def test_bad_promql_is_an_error_here(prometheus: Prometheus, expression: str) -> None:
    """The checks above can fail: what Prometheus does not understand is raised, not taken for an empty answer."""
    with pytest.raises(ValueError, match="bad_data"):
        prometheus.query(expression)


def test_a_query_without_data_is_noticed(prometheus: Prometheus) -> None:
    """The checks above can fail: an empty answer ends in a timeout that names the query."""
    with pytest.raises(TimeoutError, match="cni_no_such_family"):
        prometheus.wait_for("cni_no_such_family", timeout=0.3)


def test_promtool_has_nothing_to_say_about_the_catalogue() -> None:
    """Names, types and help of every family follow the conventions of Prometheus."""
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=exposition(), capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)
