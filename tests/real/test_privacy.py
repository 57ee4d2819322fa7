"""Nothing that leaves the exporter holds a secret: real containers and pods full of them, every way out looked at."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import HARMLESS, SECRETS
from prometheus_client.parser import text_string_to_metric_families
from running import Running
from runtimes import Containerd, Dockerd
from runtimes import running as started

BATCH = 50
"""Values in one container: it may have 64 labels."""
FOLLOWERS = 2
PATHS = ("/metrics", "/", "/topology.json", "/-/healthy", "/-/ready")
HARMLESS_VALUES = [value for _, value in HARMLESS]


def batches(values: list[str], prefix: str) -> list[dict[str, str]]:
    """Give values names that say nothing, a batch for each container."""
    named = [{f"{prefix}{number:03}": value} for number, value in enumerate(values)]
    return [
        {name: value for one in named[start : start + BATCH] for name, value in one.items()}
        for start in range(0, len(named), BATCH)
    ]


def fill_docker(dockerd: Dockerd, values: list[str], prefix: str) -> None:
    """Plant in labels, variables and command lines."""
    for number, batch in enumerate(batches(values, prefix)):
        variables = {name.upper(): value for name, value in batch.items()}
        arguments = ["/bin/sh", "-c", "sleep 100000; :", *batch.values()]
        dockerd.run(f"{prefix}{number}", *arguments, labels=batch, environment=variables)


def fill_pods(containerd: Containerd, values: list[str], prefix: str) -> None:
    """Plant in labels and annotations of pods, and in variables and command lines of their containers."""
    for number, batch in enumerate(batches(values, prefix)):
        name = f"{prefix}{number}"
        sandbox = containerd.run_pod(name, labels=batch, annotations={f"x/{key}": batch[key] for key in batch})
        arguments = ["/bin/sh", "-c", "sleep 100000; :", *batch.values()]
        variables = {key.upper(): value for key, value in batch.items()}
        container = containerd.create(sandbox, "app", *arguments, pod=name, environment=variables, annotations=batch)
        containerd.start_container(container)


def fill_networks(directory: Path) -> None:
    """Plant in CNI configurations, valid ones and such that cannot be parsed."""
    directory.mkdir()
    for number, secret in enumerate(SECRETS):
        plugin = {"type": "calico", "kubernetes": {"k8s_auth_token": secret.text, "api": secret.text}, "x": secret.text}
        text = json.dumps({"cniVersion": "0.4.0", "name": f"net-{number}", "plugins": [plugin]})
        broken = number % 5 == 0
        (directory / f"{number:03}.conflist").write_text(text[:-3] + secret.text if broken else text)


@contextlib.contextmanager
def following(socket: Path, output: Path) -> Iterator[None]:
    """Follow the live feed into a file, as JSON and as text."""
    command = [sys.executable, "-m", "exporter", "events", "--socket", str(socket)]
    with output.open("wb") as lines:
        followers = [
            subprocess.Popen([*command, *more], stdout=lines, stderr=subprocess.STDOUT) for more in ([], ["--json"])
        ]
        try:
            yield
        finally:
            for follower in followers:
                follower.terminate()
                follower.wait(10)


def command(*arguments: str) -> str:
    """Run the exporter's command and give what it prints, whatever its status."""
    call = [sys.executable, "-m", "exporter", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=90, check=False)
    return done.stdout + done.stderr


def fetched(running: Running) -> dict[str, str]:
    """Give every path's answer."""
    ways = {path: running.get(path, timeout=30).decode() for path in PATHS}
    ways["OpenMetrics"] = running.get("/metrics", Accept="application/openmetrics-text").decode()
    return ways


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an exporter that may show every label, annotation and variable said, by the way it went."""
    with started(Dockerd) as dockerd, started(Containerd) as containerd:
        return listened(dockerd, containerd, tmp_path_factory.mktemp("said"))


def listened(dockerd: Dockerd, containerd: Containerd, place: Path) -> dict[str, str]:
    """Start an exporter, plant everything before its eyes, and ask it everything."""
    audit, feed, events = place / "audit.jsonl", place / "feed.sock", place / "events"
    settings: dict[str, Any] = {
        "container_config": {"docker_socket": [dockerd.socket], "cri_sockets": [containerd.socket]},
        "cni_config": {"config_paths": [str(place / "net.d")]},
        "privacy": {"container_labels": ["*"], "annotations": ["*"], "environment": ["*"]},
        "audit": {"path": str(audit), "scrape_interval": "0s", "events": ["container", "netns", "veth", "cni_run"]},
        "feed": {"socket": str(feed)},
        "log": {"level": "debug"},
    }
    fill_networks(place / "net.d")
    running = Running(place, settings).ready(60)
    with following(feed, events):
        running.until(lambda scrape: scrape.value("cni_exporter_feed_readers") == FOLLOWERS)
        secrets = [secret.text for secret in SECRETS]
        fill_docker(dockerd, secrets, "planted")
        fill_pods(containerd, secrets, "hidden")
        fill_docker(dockerd, HARMLESS_VALUES, "kept")
        fill_pods(containerd, HARMLESS_VALUES, "plain")
        running.until(complete, 60)
        configuration = f"--config={place / f'exporter-{running.port}.json'}"
        said = fetched(running)
        said |= {name: command(*name.split(), configuration) for name in ("topology", "topology --json", "config show")}
        said["check"] = command("check", configuration, "--web.listen-address=127.0.0.1:0")
    assert running.stop() == 0
    return said | {"audit": audit.read_text(), "events": events.read_text(), "log": running.log.read_text()}


def complete(scrape: Any) -> bool:  # noqa: ANN401 - a Scrape
    """Whether all that was planted has been read: three places in Docker's containers, three and more in pods."""
    labels = {labels["label"] for labels, _ in scrape.all("cni_container_label_info")}
    names = {labels["name"] for labels, _ in scrape.all("cni_container_environment_info")}
    annotations = {labels["annotation"] for labels, _ in scrape.all("cni_container_annotation_info")}
    prefixes = ("planted", "hidden", "kept", "plain")
    wanted = {f"{prefix}{number:03}" for prefix in prefixes for number in range(len(SECRETS))}
    on_pods = {f"x/{name}" for name in wanted if name.startswith(("hidden", "plain"))}
    return labels >= wanted and names >= {name.upper() for name in wanted} and annotations >= on_pods


def beginnings(core: str) -> tuple[str, ...]:
    """Give what tells of a secret: itself, of a long one its ends."""
    return (core[:12], core[-12:]) if len(core) > 24 else (core,)


pytestmark = pytest.mark.real("dockerd", "containerd", "ctr", "runc", "busybox", "ip", "cni-plugins", "root")


@pytest.mark.parametrize(
    "way", [*PATHS, "OpenMetrics", "topology", "topology --json", "config show", "check", "audit", "events", "log"]
)
def test_no_way_out_has_a_secret(ways: dict[str, str], way: str) -> None:
    """None of 200 secrets, planted in eight places each, is in what was said this way; and something was said."""
    text = ways[way]
    assert len(text) > 20
    found = [(secret.kind, secret.text) for secret in SECRETS if any(part in text for part in beginnings(secret.core))]
    assert found == []


def test_harmless_values_are_shown(ways: dict[str, str]) -> None:
    """All of 200 values that look a little alike are exported unharmed, from each place that they were put in."""
    families = {family.name: family.samples for family in text_string_to_metric_families(ways["/metrics"])}
    for kind in ("label", "annotation", "environment"):
        shown = {sample.labels["value"] for sample in families[f"cni_container_{kind}_info"]}
        assert set(HARMLESS_VALUES) - shown == set()


def test_the_audit_log_knows_what_was_read(ways: dict[str, str]) -> None:
    """Each container's variables, labels and annotations are on record by name, with the monitor that read them."""
    records = [json.loads(line) for line in ways["audit"].splitlines()]
    read = [record for record in records if record["record"] == "read"]
    for monitor, names in (("docker", ("planted", "kept")), ("containerd", ("hidden", "plain"))):
        own = [record["what"] for record in read if record["monitor"] == monitor]
        labels = {label for what in own for label in what.get("labels", ())}
        variables = {name for what in own for name in what.get("environment", {"values": ()})["values"]}
        wanted = {f"{name}{number:03}" for name in names for number in range(len(SECRETS))}
        assert labels >= wanted
        assert variables >= {name.upper() for name in wanted}
    annotations = {name for record in read for name in record["what"].get("annotations", ())}
    assert annotations >= {f"x/hidden{number:03}" for number in range(len(SECRETS))}
