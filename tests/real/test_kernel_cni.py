"""Runs of CNI plugins, processes of containers and system calls, as BPF programs count them on the running kernel.

Plugins are real programs in a directory of the test's own, so that nothing else on the machine is counted.
"""

import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from kernel_programs import EMULATED, GETPRIORITY
from plugin_runs import CONTAINER, FAILURES, RUNS, Running, environment

from exporter.catalog import FAMILIES, PLUGIN_DURATION
from exporter.monitors import kernel
from exporter.monitors.kernel.controls import Controls
from exporter.monitors.kernel.programs import PLUGINS

pytestmark = pytest.mark.real("root")
_OF_OTHERS = ("packet_drop", "tcp_fault", "connection", "connection_close")
"""Classes of events that would share the ring with those looked at here."""


@pytest.fixture(scope="module")
def running(
    need: Callable[[str], str], lacking: Callable[[str], None], programs: kernel.Programs, plugin_directory: Path
) -> Iterator[Running]:
    busybox = need("busybox")
    if not all(map(programs.serves, ("cni", "process", "syscalls"))):
        lacking("; ".join(f"{one.program}: {one.reason}" for one in programs.standings if not one.attached))
    for name in ("true", "false", "sleep"):
        shutil.copy(busybox, plugin_directory / name)
    controls = Controls(programs.manifest.maps)
    for class_ in _OF_OTHERS:
        controls.set_ratio(class_, 0.0)
    found = Running(programs, plugin_directory)
    yield found
    found.source.close()
    for class_ in _OF_OTHERS:
        controls.set_ratio(class_, 1.0)


@pytest.fixture(autouse=True)
def _from_here(request: pytest.FixtureRequest) -> None:
    """Count each test's own."""
    if "running" in request.fixturenames:
        request.getfixturevalue("running").since()


# Plugins


def test_runs_and_failures_are_exact(running: Running) -> None:
    """23 ADD that succeed, 7 ADD that fail, 5 DEL: as many are counted, each once."""
    for _ in range(23):
        assert running.call("true", "ADD") == 0
    for _ in range(7):
        assert running.call("false", "ADD") == 1
    for _ in range(5):
        running.call("true", "DEL")
    assert running.counted() == {("true", "ADD"): 23, ("false", "ADD"): 7, ("true", "DEL"): 5}
    assert running.counted(FAILURES) == {("false", "ADD"): 7}
    assert running.recorder.families.snapshots[FAILURES]["true", "ADD"] == 0
    assert sum(running.counted("cni_bpf_map_insert_failures_total").values()) == 0
    assert len(running.told("cni_run")) == 35, "each run is an event as well"


def test_a_plugin_that_calls_another_is_a_run_as_well(running: Running) -> None:
    """3 calls of a script that calls another, which fails: 3 runs and 3 failures of each, by their own names."""
    running.script("inner", "#!/bin/sh\nexit 3\n")
    running.script("outer", f"#!/bin/sh\n{running.plugins}/inner\n(:)\nexit $?\n")
    running.script("passes-on", f"#!/bin/sh\nexec {running.plugins}/inner\n")
    for _ in range(3):
        running.call("outer", "CHECK")
    assert running.counted() == {("outer", "CHECK"): 3, ("inner", "CHECK"): 3}
    assert running.counted(FAILURES) == {("inner", "CHECK"): 3}
    running.since()
    assert running.call("passes-on", "GC") == 3
    assert running.counted() == {("passes-on", "GC"): 1, ("inner", "GC"): 1}
    assert running.counted(FAILURES) == {("inner", "GC"): 1}
    assert [(event["plugin"], event["what"]) for event in running.told("cni_run")] == [
        ("passes-on", "replaced"),
        ("inner", "ended"),
    ]


def test_a_process_with_threads_ends_once(running: Running) -> None:
    """A script that env(1) finds an interpreter for, with 5 threads that end before it: one run, its own status."""
    running.script(
        "threads",
        f"#!/usr/bin/env {Path(sys.executable).resolve()}\nimport os, threading, time\n"
        "rest = [threading.Thread(target=time.sleep, args=(n / 50,)) for n in range(5)]\n"
        "[one.start() for one in rest]\nrest[2].join()\n"
        "threading.Thread(target=os._exit, args=(7,)).start()\ntime.sleep(9)\n",
    )
    assert running.call("threads", "ADD") == 7
    assert running.counted() == {("threads", "ADD"): 1}
    assert running.counted(FAILURES) == {("threads", "ADD"): 1}
    assert running.told("cni_run")[-1]["exit_status"] == 7


@pytest.mark.real("cni-plugins")
def test_plugins_in_go_end_once(running: Running, need: Callable[[str], str]) -> None:
    """11 calls of the real bridge plugin, which has several threads: 11 runs."""
    (running.plugins / "bridge").symlink_to(Path(need("cni-plugins"), "bridge"))
    for _ in range(11):
        assert running.call("bridge", "VERSION") == 0
    assert running.call("bridge", "ADD") == 1
    assert running.counted() == {("bridge", "VERSION"): 11, ("bridge", "ADD"): 1}
    assert running.counted(FAILURES) == {("bridge", "ADD"): 1}


def test_a_plugin_that_is_killed_has_failed(running: Running) -> None:
    """2 runs ended by signals count as failures; their events name the signal."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen([str(running.plugins / "sleep"), "60"], env=environment("DEL")) as process:
            time.sleep(0.1)
            process.send_signal(number)
    assert running.counted() == {("sleep", "DEL"): 2}
    assert running.counted(FAILURES) == {("sleep", "DEL"): 2}
    assert [event["signal"] for event in running.told("cni_run")] == [9, 15]


def test_a_parent_that_does_not_listen_changes_nothing(running: Running) -> None:
    """3 failing runs whose parent ignores SIGCHLD and never waits are counted all the same."""
    deaf = (
        "import os, signal, sys, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "for _ in range(3): os.spawnv(os.P_NOWAIT, sys.argv[1], ['false'])\ntime.sleep(0.5)"
    )
    command = [sys.executable, "-c", deaf, str(running.plugins / "false")]
    subprocess.run(command, env=environment("DEL"), check=True, timeout=20)
    deadline = time.monotonic() + 20
    while sum(running.counted().values()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running.counted() == {("false", "DEL"): 3}
    assert running.counted(FAILURES) == {("false", "DEL"): 3}
    assert running.recorder.families.snapshots["cni_bpf_map_entries"]["cni_running",] == 0


def test_durations_are_those_that_the_caller_measures(running: Running) -> None:
    """5 runs of 0.3 s, 4 of 0.6 s: none is longer than the caller measured, the median 5 % shorter at most.

    (The caller also waits for a processor, before the plugin begins and after it has ended.)
    """
    measured = []
    for seconds in (0.3, 0.3, 0.3, 0.3, 0.3, 0.6, 0.6, 0.6, 0.6):
        path, start = str(running.plugins / "sleep"), time.perf_counter()
        os.waitpid(os.posix_spawn(path, [path, str(seconds)], environment("STATUS")), 0)
        measured.append(time.perf_counter() - start)
    told = [float(event["duration"]) for event in running.told("cni_run")]
    ratios = [ours / callers for ours, callers in zip(told, measured, strict=True)]
    assert max(ratios) <= 1
    if not EMULATED:  # there every step of a process takes longer than 5 % of what it does
        assert statistics.median(ratios) >= 0.95
    assert running.seconds("sleep", "STATUS") == pytest.approx(sum(told))
    counts = running.recorder.families.histograms[PLUGIN_DURATION]["sleep", "STATUS"]
    bounds = FAMILIES[PLUGIN_DURATION].buckets
    assert list(counts[:-1]) == [
        sum(low < seconds <= high for seconds in told) for low, high in pairwise((0.0, *bounds, math.inf))
    ]


def test_commands_are_read_from_any_environment(running: Running) -> None:
    """In front of CNI's variables: none, one of 5,000 bytes, 90 of 100, pieces' exact lengths. Unknown is other."""
    cases: list[dict[str, str]] = [{}, {"A": "x" * 5000}, {f"V{n:02d}": "x" * 100 for n in range(90)}]
    cases += [{"A": "x" * n} for n in (252, 253, 254, 255, 508, 509)]
    for case in cases:
        subprocess.run([str(running.plugins / "true")], env=case | {"CNI_COMMAND": "VERSION"}, check=True, timeout=10)
    assert running.counted() == {("true", "VERSION"): len(cases)}
    running.since()
    for command in ("add", "ADDED", "VERSIONS", "", "CNI_COMMAND=ADD"):
        running.call("true", command)
    subprocess.run([str(running.plugins / "true")], env={}, check=True, timeout=10)
    subprocess.run([str(running.plugins / "true")], env={"XCNI_COMMAND": "ADD"}, check=True, timeout=10)
    assert running.counted() == {("true", "other"): 7}


def test_what_an_event_says(running: Running) -> None:
    """Plugin, command, interface, container, duration and exit status are in the record, beside PID and namespace."""
    running.call("false", "DEL")
    (event,) = running.told("cni_run")
    assert event.pop("duration") < 5
    assert event.pop("pid") > 0
    assert event.pop("netns").startswith(f"{Path('/proc/self/ns/net').stat().st_ino}:")
    assert event == {
        "class": "cni_run",
        "comm": "false",
        "plugin": "false",
        "command": "DEL",
        "what": "ended",
        "exit_status": 1,
        "interface": "eth0",
        "container_id": CONTAINER,
    }


def test_what_is_no_plugin_is_not_counted(running: Running) -> None:
    """Not: programs below a subdirectory, relative paths, other directories that begin alike, one that cannot run."""
    (running.plugins / "sub").mkdir()
    shutil.copy(running.plugins / "true", running.plugins / "sub/true")
    beside = Path(f"{running.plugins}x")
    beside.mkdir()
    try:
        shutil.copy(running.plugins / "true", beside / "true")
        for path in (running.plugins / "sub/true", beside / "true"):
            subprocess.run([str(path)], env=environment("ADD"), check=True, timeout=10)
        subprocess.run(["./true"], env=environment("ADD"), check=True, timeout=10, cwd=running.plugins)
        (running.plugins / "data").write_text("{}")
        with pytest.raises(PermissionError):
            running.call("data", "ADD")
    finally:
        shutil.rmtree(beside)
    assert running.counted() == {}


def test_counting_needs_no_event(running: Running) -> None:
    """With all events of the class thinned away, the count is the same."""
    controls = Controls(running.programs.manifest.maps)
    controls.set_ratio("cni_run", 0)
    try:
        for _ in range(13):
            running.call("true", "ADD")
    finally:
        controls.set_ratio("cni_run", 1)
    assert running.counted() == {("true", "ADD"): 13}
    assert not running.told("cni_run")


@pytest.mark.host
def test_names_of_plugins_are_bounded(running: Running) -> None:
    """Beyond 200 names, runs are counted under ~other, none is lost. (Last of its kind: it uses all names up)."""
    known = {key[0] for key in running.recorder.families.snapshots[RUNS]}
    names = [f"plugin-{number}" for number in range(PLUGINS + 3)]
    for name in names:
        (running.plugins / name).symlink_to("/bin/true")
        running.call(name, "ADD")
    counted = running.counted()
    assert sum(counted.values()) == len(names)
    assert counted["~other", "ADD"] == len(names) - (PLUGINS - len(known))
    assert sum(running.counted("cni_bpf_map_insert_failures_total").values()) == 0


# Processes and system calls


@pytest.mark.real("unshare")
def test_processes_of_containers_are_told(running: Running) -> None:
    """Start and end of what runs in a PID or network namespace of its own, with path, status, duration; not ours."""
    sleep = running.plugins / "sleep"
    script = running.script("script", f"#!/bin/sh\n{sleep} 0.2\nexit 3\n")
    subprocess.run([str(sleep), "0"], check=True, timeout=10)
    inside = subprocess.run(["unshare", "--pid", "--fork", str(script)], timeout=20, check=False, capture_output=True)
    assert inside.returncode == 3
    subprocess.run(["unshare", "--net", str(sleep), "0"], timeout=20, check=True)
    told = running.told("exec")
    begun = {event["pid"]: event for event in told if event.get("file") in (str(sleep), str(script))}
    own = [event for event in told if event["pid"] in begun and event["comm"] in ("script", "sleep")]
    assert [(event["comm"], event["what"]) for event in own] == [
        *(("script", "started"), ("sleep", "started"), ("sleep", "ended"), ("script", "ended")),
        *(("sleep", "started"), ("sleep", "ended")),
    ]
    assert (own[2]["exit_status"], own[3]["exit_status"]) == (0, 3)
    assert own[2]["duration"] >= 0.2
    assert own[1]["parent"] == own[0]["pid"]
    assert own[4]["netns"] != own[0]["netns"]


def test_named_system_calls_are_told(running: Running) -> None:
    """23 calls of getpriority(2) by a process are 23 events; those of the exporter itself are none."""
    script = "import os\nfor _ in range(23): os.getpriority(os.PRIO_PROCESS, 0)\nprint(os.getpid())"
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=20, capture_output=True, text=True)
    for _ in range(5):
        os.getpriority(os.PRIO_PROCESS, 0)
    told = running.told("syscall")
    assert [event["syscall"] for event in told if event["pid"] == int(done.stdout)] == [GETPRIORITY] * 23
    assert not [event for event in told if event["pid"] == os.getpid()]


@pytest.mark.host
def test_system_calls_are_left_alone_unless_named() -> None:
    """Without a name in the settings, nothing hangs on the system calls' tracepoint."""
    programs = kernel.load(kernel.Settings(programs=("process", "syscalls"), timeout=120))
    try:
        assert [standing.program for standing in programs.standings] == ["process"]
    finally:
        programs.close()
