"""A full node: 1,000 veths of 250 containers. What it costs is measured by `make bench`; here it must be right."""

import subprocess
from collections import Counter
from collections.abc import Callable

import pytest
from running import Running
from scale import crowded

pytestmark = pytest.mark.real("root", "promtool")

RECEIVED = "cni_veth_receive_bytes_total"


def test_a_thousand_veths_have_their_containers_and_no_family_is_over_its_limit(
    exporter: Callable[..., Running],
) -> None:
    with crowded(250, 4) as ids:
        short = {container_id[:12] for container_id in ids}
        running = exporter({"container_config": {"container_runtimes": []}})
        scrape = running.until(
            lambda scrape: sum(labels["container"] in short for labels, _ in scrape.all(RECEIVED)) == 1000
        )
        said = subprocess.run(
            ["promtool", "check", "metrics"], input=scrape.text, capture_output=True, text=True, timeout=30, check=False
        )
    per_container = Counter(labels["container"] for labels, _ in scrape.all(RECEIVED) if labels["container"] in short)
    assert set(per_container.values()) == {4}
    limits = {labels["family"]: value for labels, value in scrape.all("cni_exporter_series_limit")}
    sizes = {labels["family"]: value for labels, value in scrape.all("cni_exporter_series")}
    assert sizes[RECEIVED] >= 1000
    assert not {name: size for name, size in sizes.items() if size > limits[name]}
    assert not [labels for labels, value in scrape.all("cni_exporter_series_dropped_total") if value]
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_more_veths_than_the_limit_are_cut_and_counted(exporter: Callable[..., Running]) -> None:
    """With a limit of 10 series, 10 are kept, the same ones in each scrape, and the others are counted."""
    with crowded(5, 4):
        settings = {"metrics": {"series_limits": {RECEIVED: 10}}, "container_config": {"container_runtimes": []}}
        running = exporter(settings)
        first = running.until(lambda scrape: len(scrape.all(RECEIVED)) == 10)
        second = running.scrape()
        assert {labels["device"] for labels, _ in first.all(RECEIVED)} == {
            labels["device"] for labels, _ in second.all(RECEIVED)
        }
        assert second.value("cni_exporter_series_dropped_total", family=RECEIVED) >= 10
