"""Runs of CNI plugins that a real containerd calls, and what is counted without eBPF."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plugin_runs import FAILURES, RUNS, Running, environment
from recorder import Recorder

from exporter.catalog import PLUGIN_DURATION
from exporter.monitors import kernel, plugins

pytestmark = [pytest.mark.real("root"), pytest.mark.host]


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


@pytest.mark.real("containerd", "ctr", "runc", "busybox", "ip", "cni-plugins", "perf")
@pytest.mark.timeout(300)
def test_fifty_pods_are_fifty_runs(
    observed: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, need: Callable[[str], str]
) -> None:
    """50 pods: 50 ADD of bridge and host-local, 50 DEL at least, no failure; durations are perf's within 5 %."""
    data = tmp_path / "perf.data"
    with _containerd(observed, monkeypatch, lambda _: None) as containerd:
        with _recording(need("perf"), data):
            pods = [containerd.run_pod(f"pod-{number}") for number in range(50)]
        for pod in pods:
            containerd.remove_pod(pod)
        counted = observed.counted()
        events = observed.told("cni_run")
    assert counted["bridge", "ADD"] == 50
    assert counted["host-local", "ADD"] == 50
    assert counted["bridge", "DEL"] >= 50
    assert observed.counted(FAILURES) == {}
    added = {
        event["container_id"]: event for event in events if (event["plugin"], event["command"]) == ("bridge", "ADD")
    }
    assert set(added) == set(pods)
    lives = _lives(need("perf"), data)
    took = [lives[event["pid"]] for event in added.values()]
    assert len(took) == 50
    assert observed.seconds("bridge", "ADD") == pytest.approx(sum(took), rel=0.05)


@contextlib.contextmanager
def _recording(perf: str, data: Path) -> Iterator[None]:
    """Have perf write down when programs start and when threads end, by a ring and a clock of its own."""
    control, commands = os.pipe()
    answers, acknowledge = os.pipe()
    steered = ["--delay=-1", f"--control=fd:{control},{acknowledge}", f"--output={data}"]
    names = "sched:sched_process_exec,sched:sched_process_exit"
    command = [perf, "record", "--quiet", "--all-cpus", "--event", names, *steered]
    with subprocess.Popen(command, pass_fds=(control, acknowledge), stderr=subprocess.DEVNULL) as process:
        try:
            os.write(commands, b"enable\n")
            assert select.select([answers], [], [], 30)[0], "perf does not begin"
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
            for descriptor in (control, commands, answers, acknowledge):
                os.close(descriptor)


def _lives(perf: str, data: Path) -> dict[int, float]:
    """Read perf's record: seconds from a process' exec to the end of its last thread, by PID."""
    command = [perf, "script", "--ns", "--fields=pid,tid,time,event", f"--input={data}"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    begun: dict[int, float] = {}
    lives: dict[int, float] = {}
    for pid, at, what in re.findall(r"(\d+)/\d+ +(\d+\.\d+): +sched:sched_process_(exec|exit)", text):
        if what == "exec":
            begun[int(pid)] = float(at)
        elif int(pid) in begun:
            lives[int(pid)] = float(at) - begun[int(pid)]
    return lives


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
