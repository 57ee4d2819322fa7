"""What tests of CNI plugin runs share: loaded programs, a directory of plugins, and what was counted since.

Flows in: `kernel.Programs` and a directory. Flows out: differences of families, and events with their details.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from recorder import Recorder

from exporter.catalog import PLUGIN_DURATION
from exporter.monitors import kernel
from exporter.monitors.kernel.source import KernelSource

CONTAINER = "c0ffee" * 10 + "beef"
RUNS, FAILURES = "cni_plugin_runs_total", "cni_plugin_failures_total"
Counts = dict[tuple[str, ...], float]


class Running:
    """Loaded programs, their source, and a directory that holds plugins."""

    def __init__(self, programs: kernel.Programs, plugins: Path) -> None:
        self.programs, self.plugins = programs, plugins
        self.recorder = Recorder()
        self.events: list[dict[str, Any]] = []
        self.source = KernelSource(programs, self._tap)
        self.source.open(self.recorder)
        self.base: dict[str, Counts] = {}
        self.since()

    def _tap(self, event: Any, reader: Any) -> None:  # noqa: ANN401 - told to a list only
        about = {"class": event.class_, "pid": event.pid, "comm": event.comm, "netns": event.netns}
        self.events.append(about | dict(reader.details(event) if reader else {}))

    def since(self) -> None:
        """Count from here."""
        self.source.update()
        self.base = {name: dict(series) for name, series in self.recorder.families.snapshots.items()}
        self.times = dict(self.recorder.families.histograms[PLUGIN_DURATION])
        self.events.clear()

    def counted(self, family: str = RUNS) -> Counts:
        """What was added since, without zeros."""
        self.source.update()
        before = self.base.get(family, {})
        now = self.recorder.families.snapshots[family]
        return {key: value - before.get(key, 0) for key, value in now.items() if value != before.get(key, 0)}

    def told(self, class_: str) -> list[dict[str, Any]]:
        """Events of a class since, in order."""
        self.source.update()
        return [event for event in self.events if event["class"] == class_]

    def seconds(self, *key: str) -> float:
        """Sum of durations added since."""
        self.source.update()
        before = self.times.get(key, (0.0,))[-1]
        return self.recorder.families.histograms[PLUGIN_DURATION][key][-1] - before

    def script(self, name: str, text: str) -> Path:
        """Make a plugin of a script."""
        path = self.plugins / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def call(self, name: str, command: str, *arguments: str) -> int:
        """Run a plugin to its end as a runtime would; the answer is its exit status."""
        return subprocess.run(
            [str(self.plugins / name), *arguments],
            env=environment(command),
            input=b'{"cniVersion": "0.4.0"}',
            capture_output=True,
            timeout=60,
            check=False,
        ).returncode


def environment(command: str) -> dict[str, str]:
    """What a runtime tells a plugin."""
    path = {"PATH": os.environ["PATH"]}
    return path | {"CNI_COMMAND": command, "CNI_IFNAME": "eth0", "CNI_CONTAINERID": CONTAINER}
