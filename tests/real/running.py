"""A real exporter for tests: the command as a user runs it, scraped over HTTP.

Flows in: flags and a configuration. Flows out: samples by family and labels.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Scrape:
    """The samples of one scrape."""

    text: str
    samples: list[tuple[str, dict[str, str], float]]

    def all(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Give every sample of a name that carries these labels."""
        return [(own, value) for known, own, value in self.samples if known == name and labels.items() <= own.items()]

    def value(self, name: str, **labels: str) -> float:
        """Give the one sample that there is."""
        found = self.all(name, **labels)
        assert len(found) == 1, f"{name}{labels}: {found}"
        return found[0][1]


def free_port() -> int:
    """Give a port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def end(process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    """End a child of ours, at the latest after `seconds` by force."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(seconds)


class Running:
    """An exporter process on a free port of loopback."""

    def __init__(self, directory: Path, settings: dict[str, Any], *flags: str, command: tuple[str, ...] = ()) -> None:
        """Write the configuration and start; `command` goes in front, to run as somebody else."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = directory / f"exporter-{self.port}.log"
        if settings:
            configuration = directory / f"exporter-{self.port}.json"
            configuration.write_text(json.dumps(settings))
            flags = (f"--config={configuration}", *flags)
        address = f"--web.listen-address=127.0.0.1:{self.port}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, sys.executable, "-m", "exporter", "run", address, *flags],
                stdout=log,
                stderr=log,
            )

    def ready(self, seconds: float = 20.0) -> "Running":
        """Wait until every monitor has passed once."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"not ready: {self.log.read_text()}"
            try:
                self.get("/-/ready")
            except OSError:
                time.sleep(0.05)
            else:
                return self

    def get(self, path: str, timeout: float = 10.0, **headers: str) -> bytes:
        """Fetch a path. Raises OSError (urllib.error.URLError) where it is not 200."""
        request = urllib.request.Request(self.url + path, headers=headers)  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310 - loopback
            return bytes(answer.read())

    def scrape(self) -> Scrape:
        """Scrape and parse."""
        text = self.get("/metrics").decode()
        samples = [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
        return Scrape(text, samples)

    def until(self, holds: Callable[[Scrape], object], seconds: float = 15.0) -> Scrape:
        """Scrape until `holds` is true."""
        deadline = time.monotonic() + seconds
        while True:
            scrape = self.scrape()
            if holds(scrape):
                return scrape
            assert time.monotonic() < deadline, f"did not happen within {seconds} s\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Give the CPU time that the process has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> int:
        """End it as a service manager would; the answer is its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
            raise


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start exporters that end with the test."""
    started: list[Running] = []

    def start(settings: dict[str, Any] | None = None, *flags: str, command: tuple[str, ...] = ()) -> Running:
        started.append(Running(tmp_path, settings or {}, *flags, command=command))
        return started[-1].ready()

    yield start
    for running in started:
        if running.process.poll() is None:
            assert running.stop() == 0, running.log.read_text()[-3000:]
