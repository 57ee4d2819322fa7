"""A real Prometheus with our rules on the loopback, and every query that we ship in a form that it can be asked.

Flows in: targets to scrape, the dashboards and rules. Flows out: `Prometheus` (query, wait_for, rules, targets),
`expressions()` of the dashboards and `alerts()`.
"""

import http.client
import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from urllib.parse import urlencode

import yaml
from conftest import need
from running import end

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
RULES = sorted((ROOT / "alerts").glob("*.rules.yaml"))

START_SECONDS = 20.0
REQUEST_SECONDS = 10.0

GRAFANA = {"__rate_interval": "10s", "__interval": "1s", "__range": "60s"}
"""What Grafana puts for its own variables, at a scrape each second; a dashboard's variables are set to all."""

_VARIABLE = re.compile(r"\$\{?(\w+)(?::\w+)?\}?")
_LABEL_VALUES = re.compile(r"label_values\((.+), *(\w+)\)")


def substitute(expression: str) -> str:
    """Put values for Grafana's variables as Grafana does where everything is chosen."""
    return _VARIABLE.sub(lambda found: GRAFANA.get(found[1], ".*"), expression)


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel, rows among them, also those inside a collapsed row."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, PromQL) for each query of each panel and variable; all of them answer with data on a busy node."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for variable in dashboard["templating"]["list"]:
            if found := _LABEL_VALUES.fullmatch(variable.get("definition", "")):
                yield f"{path.name}: variable {variable['name']}", substitute(found[1])
        for panel in panels(dashboard):
            for target in panel.get("targets", ()):
                yield f"{path.name}: {panel['title']} {target['refId']}", substitute(target["expr"])


def alerts() -> Iterator[dict[str, Any]]:
    """Yield every alert as the rules say it: `alert`, `expr`, `for`, `labels`, `annotations`."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """One Prometheus process with its own storage, scraping each second; use it with `with`.

    `targets` are URLs (http://HOST:PORT/PATH), all of one job. `labels` are put on each target, as service discovery
    does. `rules` are files; `alertmanager` is the address (HOST:PORT) of whoever is told of alerts.
    """

    def __init__(
        self,
        targets: Sequence[str],
        labels: Mapping[str, str] | None = None,
        job: str = "cni-exporter",
        rules: Sequence[Path] = RULES,
        alertmanager: str | None = None,
    ) -> None:
        """Describe the process; nothing runs before `start`."""
        self._rules = rules
        self._alertmanager = alertmanager
        self._targets = targets
        self._labels = dict(labels or {})
        self._job = job
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: TextIO | None = None
        self.port = 0

    def _config(self) -> dict[str, Any]:
        scrapes = []
        for number, target in enumerate(self._targets):
            address, _, path = target.removeprefix("http://").partition("/")
            scrape = {
                "job_name": f"target-{number}",
                "honor_labels": True,
                "metrics_path": f"/{path or 'metrics'}",
                "static_configs": [{"targets": [address], "labels": {**self._labels, "job": self._job}}],
            }
            scrapes.append(scrape)
        every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        told = [{"static_configs": [{"targets": [self._alertmanager]}]}] if self._alertmanager else []
        rules = [str(path) for path in self._rules]
        return {
            "global": every,
            "rule_files": rules,
            "scrape_configs": scrapes,
            "alerting": {"alertmanagers": told},
        }

    def start(self) -> None:
        """Start and wait until it is ready. Raises RuntimeError with its log where it does not get there in time."""
        program = need("prometheus")
        self._home = tempfile.TemporaryDirectory(prefix="prometheus-")
        home = Path(self._home.name)
        config = home / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config()))
        self.port = _free_port()
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={home}/data"]
        command += [f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn"]
        self._log = (home / "log").open("w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (home / "log").read_text()
                self.stop()
                raise RuntimeError(f"Prometheus did not start on port {self.port}: {said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the process (our own child only) and remove its storage."""
        if self._process:
            end(self._process)
            self._process = None
        if self._log:
            self._log.close()
        if self._home:
            self._home.cleanup()

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _ready(self) -> bool:
        try:
            return self._get("/-/ready")[0] == http.HTTPStatus.OK
        except OSError:
            return False

    def _api(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - the shape differs with each endpoint
        _, body = self._get(f"/api/v1/{path}?{urlencode(parameters)}")
        answer = json.loads(body)
        if answer["status"] != "success":
            raise ValueError(f"{answer['errorType']}: {answer['error']} in {parameters or path}")
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Answer an instant query by a list of {"metric": labels, "value": [time, text]}.

        Raises ValueError for what Prometheus does not understand.
        """
        data = self._api("query", query=expression)
        if data["resultType"] == "scalar":
            return [{"metric": {}, "value": data["result"]}]
        result: list[dict[str, Any]] = data["result"]
        return result

    def wait_for(self, expression: str, timeout: float = 15.0) -> list[dict[str, Any]]:
        """Ask until the answer is not empty. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (answer := self.query(expression)):
            if time.monotonic() > deadline:
                errors = [target["lastError"] for target in self.targets()]
                raise TimeoutError(f"no data within {timeout} s for {expression}; errors of the targets: {errors}")
            time.sleep(0.1)
        return answer

    def rules(self) -> dict[str, dict[str, Any]]:
        """Loaded alerts by name, with `health` (unknown, ok, err), `lastError` and `alerts`."""
        return {rule["name"]: rule for group in self._api("rules")["groups"] for rule in group["rules"]}

    def targets(self) -> list[dict[str, Any]]:
        """Scrape targets, with `health` (unknown, up, down) and `lastError`."""
        active: list[dict[str, Any]] = self._api("targets", state="active")["activeTargets"]
        return active
