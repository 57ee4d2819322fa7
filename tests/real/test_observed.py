"""The same questions as in test_prometheus.py, asked of the real exporter on a host with a real container."""

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


@pytest.fixture(scope="module")
def exporter_url(need: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an exporter that watches a container with limits and a published port."""
    need("dockerd")
    with running(Dockerd) as dockerd:
        limits = {"mem_limit": "64m", "cpu_period": 100_000, "cpu_quota": 50_000}
        dockerd.run("limited", ports={"80/tcp": ("127.0.0.1", None)}, **limits)
        settings = {"container_config": {"docker_socket": [str(dockerd.socket)], "container_runtimes": ["docker"]}}
        exporter = Running(Path(tmp_path_factory.mktemp("observed")), settings).ready()
        yield f"{exporter.url}/metrics"
        assert exporter.stop() == 0
