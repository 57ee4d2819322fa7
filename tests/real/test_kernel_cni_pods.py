"""Runs of CNI plugins that a real containerd calls, and what is counted without eBPF."""

import contextlib
import json
import select
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_runs import FAILURES, RUNS, Running, environment
from recorder import Recorder

from exporter.catalog import PLUGIN_DURATION
from exporter.monitors import kernel, plugins

pytestmark = pytest.mark.real("root")


@pytest.mark.real("busybox")
@pytest.mark.parametrize("rung", [0, 1])
def test_without_ebpf_the_same_families_count_long_runs(need: Callable[[str], str], rung: int) -> None:
    """5 runs of half a second, 2 of them failing: counted by both rungs, the failures by process events alone."""
    recorder = Recorder()
    with tempfile.TemporaryDirectory(prefix="cni-") as directory:
        shutil.copy(need("busybox"), f"{directory}/sleep")
        failing = Path(directory, "failing")
        failing.write_text("#!/bin/sh\nsleep 0.5\nexit 1\n")
        failing.chmod(0o755)
        source = plugins.monitor([directory]).rungs[rung]()
        source.open(recorder)
        try:
            calls = [[f"{directory}/sleep", "0.5"]] * 3 + [[str(failing)]] * 2
            running = [subprocess.Popen(call, env=environment("ADD")) for call in calls]
            deadline = time.monotonic() + 30
            while sum(recorder.families.snapshots.get(RUNS, {}).values()) < 5 and time.monotonic() < deadline:
                for descriptor, receive in source.readers().items():
                    if select.select([descriptor], [], [], 0.02)[0]:
                        receive()
                source.update()
                [process.poll() for process in running]
                time.sleep(0.02)
        finally:
            source.close()
            [process.wait(10) for process in running]
    assert recorder.families.snapshots[RUNS] == {("sleep", "ADD"): 3, ("failing", "ADD"): 2}
    failures = recorder.families.snapshots.get(FAILURES)
    assert failures == (None if rung else {("sleep", "ADD"): 0, ("failing", "ADD"): 2})
    spent = [seconds for _, seconds in recorder.families.observations[PLUGIN_DURATION]]
    assert len(spent) == 5
    assert min(spent) >= 0.49
    assert not recorder.errors


@pytest.fixture
def bin_directory(need: Callable[[str], str]) -> Iterator[Path]:
    """Give a directory with the real plugins, which no other runtime on this machine uses."""
    with tempfile.TemporaryDirectory(prefix="cni-") as directory:
        for path in Path(need("cni-plugins")).iterdir():
            Path(directory, path.name).symlink_to(path)
        yield Path(directory)


@pytest.fixture
def observed(bin_directory: Path, lacking: Callable[[str], None]) -> Iterator[Running]:
    settings = kernel.Settings(programs=("cni",), plugin_directories=(str(bin_directory),), timeout=120)
    programs = kernel.load(settings)
    if not programs.attached:
        lacking(programs.standings[0].reason)
    found = Running(programs, bin_directory)
    yield found
    found.source.close()
    programs.close()


def _containerd(observed: Running, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> Any:  # noqa: ANN401
    """Give a containerd that calls the observed plugins; `change` its network's first plugin."""
    import runtimes  # noqa: PLC0415 - its clients are not on every machine that runs the tests above

    monkeypatch.setattr(runtimes, "_CNI", (str(observed.plugins),))

    def make(directory: Path) -> runtimes.Containerd:
        daemon = runtimes.Containerd(directory, subnet="10.247.0.0/24")
        path = directory / "net.d/10-test.conflist"
        network = json.loads(path.read_text())
        change(network["plugins"][0])
        path.write_text(json.dumps(network))
        return daemon

    return runtimes.running(make)


@pytest.mark.real("containerd", "ctr", "runc", "busybox", "ip", "cni-plugins")
@pytest.mark.timeout(300)
def test_fifty_pods_are_fifty_runs(observed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 pods: 50 ADD of bridge and host-local, 50 DEL at least, no failure, durations between process events."""
    with _containerd(observed, monkeypatch, lambda _: None) as containerd:
        with _heard() as heard:
            pods = [containerd.run_pod(f"pod-{number}") for number in range(50)]
        for pod in pods:
            containerd.remove_pod(pod)
        counted = observed.counted()
        events = observed.told("cni_run")
    assert counted["bridge", "ADD"] == 50
    assert counted["host-local", "ADD"] == 50
    assert counted["bridge", "DEL"] >= 50
    assert observed.counted(FAILURES) == {}
    added = {event["container_id"] for event in events if (event["plugin"], event["command"]) == ("bridge", "ADD")}
    assert added == set(pods)
    own = [event["pid"] for event in events if (event["plugin"], event["command"]) == ("bridge", "ADD")]
    least, most = (sum(heard[pid][end] for pid in own) for end in (0, -1))
    assert 0.95 * least <= observed.seconds("bridge", "ADD") <= 1.05 * most


@contextlib.contextmanager
def _heard() -> Iterator[dict[int, list[float]]]:
    """Note meanwhile by PID when a process' threads ended after its exec, in seconds, as netlink's process events do.

    They tell of an end a little late: its parent knows by then, and may run first.
    """
    connector, over = plugins._Connector(), threading.Event()
    begun: dict[int, float] = {}
    ends: dict[int, list[float]] = {}
    assert connector.subscribe()

    def listen() -> None:
        while not over.is_set():
            if not select.select([connector.fileno()], [], [], 0.1)[0]:
                continue
            what, seconds, _, tgid, _ = plugins._parse(connector.receive())
            if what == plugins._EXEC:
                begun[tgid], ends[tgid] = seconds, []
            elif what == plugins._EXIT and tgid in begun:
                ends[tgid].append(seconds - begun[tgid])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield ends
        time.sleep(0.2)
    finally:
        over.set()
        thread.join(5)
        connector.close()


@pytest.mark.real("containerd", "ctr", "runc", "busybox", "ip", "cni-plugins")
@pytest.mark.timeout(120)
def test_a_broken_configuration_is_the_plugins_failure(observed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bridge whose name is too long: bridge fails at ADD, nothing else does; host-local is not called to add."""

    def impossible(plugin: dict[str, Any]) -> None:
        plugin["bridge"] = "x" * 16

    with _containerd(observed, monkeypatch, impossible) as containerd:
        for number in range(3):
            with pytest.raises(Exception, match="x" * 16):
                containerd.run_pod(f"pod-{number}")
        failures, runs = observed.counted(FAILURES), observed.counted()
    assert failures["bridge", "ADD"] == runs["bridge", "ADD"] == 3
    assert ("host-local", "ADD") not in runs
    assert {plugin for plugin, _ in failures} == {"bridge"}
