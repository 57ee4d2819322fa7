"""CNI plugin runs without eBPF: a /proc of plain files and messages as the kernel writes them, no process at all."""

import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from recorder import Recorder

import exporter.catalog  # noqa: F401 - its families join the catalogue
from exporter.contract import Paths, Unsupported
from exporter.monitors import plugins
from exporter.monitors.plugins import DURATION, FAILURES, RUNS, ProcEvents, ProcfsLooks, Runs

if TYPE_CHECKING:
    from collections.abc import Callable

BIN = "/opt/cni/bin"
TICKS = os.sysconf("SC_CLK_TCK")


class Proc:
    """A /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.context = Recorder(Paths(procfs=root))

    def start(
        self, pid: int, *arguments: str, comm: str = "", started: float = 0.0, command: str | None = "ADD"
    ) -> None:
        """Let a process appear; `command` None: its environment has none."""
        directory = self.root / str(pid)
        directory.mkdir(exist_ok=True)
        name = comm or Path(arguments[0]).name[:15]
        (directory / "comm").write_text(f"{name}\n")
        (directory / "cmdline").write_bytes(b"".join(one.encode() + b"\0" for one in arguments))
        (directory / "stat").write_text(f"{pid} ({name}) S " + "0 " * 18 + f"{round(started * TICKS)} 0\n")
        (directory / "environ").write_bytes(b"A=1\0" + (f"CNI_COMMAND={command}\0".encode() if command else b""))

    def end(self, pid: int) -> None:
        """Let a process disappear."""
        shutil.rmtree(self.root / str(pid))

    def runs(self) -> Runs:
        """Count runs of plugins in BIN."""
        return Runs(self.context, frozenset({BIN.encode()}))

    def counted(self, family: str = RUNS) -> dict[tuple[str, ...], float]:
        return self.context.families.snapshots.get(family, {})

    def durations(self) -> list[float]:
        return [round(seconds, 3) for _, seconds in self.context.families.observations.get(DURATION, [])]


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def _message(what: int, pid: int, tgid: int, status: int = 0, seconds: float = 0.0) -> bytes:
    headers = struct.pack("=IHHII IIIIHH", 76, 3, 0, 0, 0, 1, 1, 0, 0, 40, 0)
    return headers + struct.pack("=IIQIIII8x", what, 0, round(seconds * 1e9), pid, tgid, status, 17)


# What is a plugin


@pytest.mark.parametrize(
    ("arguments", "comm", "plugin"),
    [
        ((f"{BIN}/bridge",), "", "bridge"),
        ((f"{BIN}//bridge",), "", "bridge"),
        (("/bin/sh", f"{BIN}/script"), "script", "script"),
        (("/usr/bin/env", "-S", f"{BIN}/script"), "script", "script"),
        ((f"{BIN}/a-name-longer-than-comm",), "", "a-name-longer-than-comm"),
        (("/bin/cat", f"{BIN}/bridge"), "", ""),
        ((f"{BIN}/sub/bridge",), "", ""),
        ((f"{BIN}x/bridge",), "", ""),
        (("bridge",), "", ""),
        (("",), "bridge", ""),
    ],
)
def test_a_plugin_is_known_by_its_path_and_command(
    proc: Proc, arguments: tuple[str, ...], comm: str, plugin: str
) -> None:
    """Programs and scripts straight below the directory; not what only has such an argument."""
    proc.start(7, *arguments, comm=comm)
    runs = proc.runs()
    assert runs.began(7, 1.0) == bool(plugin)
    runs.ended(7, 2.0, 0)
    assert proc.counted() == ({(plugin, "ADD"): 1.0} if plugin else {})


def test_a_program_that_may_be_looked_at_is_known_by_its_own_path(proc: Proc) -> None:
    """Where /proc/PID/exe can be read, what a caller wrote as the first argument does not matter."""
    proc.start(7, "something", comm="bridge")
    (proc.root / "7/exe").symlink_to(f"{BIN}/bridge")
    assert proc.runs().began(7, 1.0)


@pytest.mark.parametrize(("command", "label"), [("DEL", "DEL"), ("del", "other"), (None, "other"), ("GC", "GC")])
def test_commands_are_those_of_the_specification(proc: Proc, command: str | None, label: str) -> None:
    """Anything else is other."""
    proc.start(7, f"{BIN}/bridge", command=command)
    runs = proc.runs()
    runs.began(7, 0.0)
    runs.ended(7, 1.0, 0)
    assert proc.counted() == {("bridge", label): 1.0}


def test_without_the_right_to_trace_the_command_is_unknown(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses the environment of another user's process."""
    proc.start(7, f"{BIN}/bridge")
    read: Callable[[str], bytes] = plugins.procfs.read

    def refuse(path: str) -> bytes:
        if path.endswith("/environ"):
            raise PermissionError(13, "denied")
        return read(path)

    monkeypatch.setattr(plugins.procfs, "read", refuse)
    runs = proc.runs()
    assert runs.began(7, 0.0)
    runs.ended(7, 1.0, 0)
    assert proc.counted() == {("bridge", "unknown"): 1.0}


def test_names_and_runs_are_bounded(proc: Proc) -> None:
    """The 201st name is ~other; the 4,097th run at once is counted as shed."""
    runs = proc.runs()
    for number in range(plugins._PLUGINS + 2):
        proc.start(1, f"{BIN}/p{number}")
        runs.began(1, 0.0)
        runs.ended(1, 1.0, 0)
    assert proc.counted()["~other", "ADD"] == 2.0
    assert len(proc.counted()) == plugins._PLUGINS + 1
    proc.start(1, f"{BIN}/bridge")
    runs.running.update(dict.fromkeys(range(10, 10 + plugins._UNDER_WAY), plugins._Run("x", "ADD", 0.0, 0)))
    assert not runs.began(1, 0.0)
    assert proc.context.shed == 1


def test_a_plugin_that_becomes_another_is_two_runs(proc: Proc) -> None:
    """By exec without fork: the first ends well, the outcome is the second's; becoming no plugin ends nothing."""
    runs = proc.runs()
    for arguments in ((f"{BIN}/first",), (f"{BIN}/second",), ("/usr/bin/python3",)):
        proc.start(7, *arguments)
        runs.began(7, 1.0)
    runs.ended(7, 2.0, 0x100)
    assert proc.counted() == {("first", "ADD"): 1.0, ("second", "ADD"): 1.0}
    assert proc.counted(FAILURES) == {("first", "ADD"): 0.0, ("second", "ADD"): 1.0}


# By process events


@pytest.fixture
def events(proc: Proc) -> ProcEvents:
    """A source that has a /proc and no socket."""
    now = [0.0]
    source = ProcEvents([BIN], lambda: now[0])
    plugins._Plugins.open(source, proc.context)
    source._next = 10.0
    source.now = now  # type: ignore[attr-defined]
    return source


def test_exec_and_the_leaders_exit_are_a_run(proc: Proc, events: ProcEvents) -> None:
    """Threads' ends and ends of others count nothing; time and status are the kernel's."""
    proc.start(7, f"{BIN}/bridge")
    events._handle(_message(2, 7, 7, seconds=1.0))
    events._handle(_message(0x80000000, 9, 7, seconds=1.1))
    assert proc.counted() == {}
    events._handle(_message(0x80000000, 7, 7, status=9, seconds=1.25))
    events._handle(_message(0x80000000, 8, 8, seconds=1.3))
    assert (proc.counted(), proc.counted(FAILURES)) == ({("bridge", "ADD"): 1.0}, {("bridge", "ADD"): 1.0})
    assert proc.durations() == [0.25]


def test_a_run_that_is_over_before_it_is_looked_at_is_missed(proc: Proc, events: ProcEvents) -> None:
    """Nothing is guessed about a process that is gone."""
    events._handle(_message(2, 7, 7))
    events._handle(_message(0x80000000, 7, 7))
    assert proc.counted() == {}
    assert not proc.context.errors


def test_an_end_that_was_lost_is_found_out(proc: Proc, events: ProcEvents) -> None:
    """The run counts, with no duration and no outcome; one that still runs goes on."""
    for pid in (7, 8, 9):
        proc.start(pid, f"{BIN}/bridge", started=1.0)
        events._handle(_message(2, pid, pid))
    proc.end(7)
    proc.start(8, "/bin/other", started=2.0)
    events.update()
    assert proc.counted() == {}
    events.now[0] = 10.0  # type: ignore[attr-defined]
    events.update()
    assert proc.counted() == {("bridge", "ADD"): 2.0}
    assert set(events.runs.running) == {9}
    assert proc.durations() == []


@pytest.mark.parametrize("length", [0, 35, 36, 40, 60])
def test_a_message_that_is_cut_short_is_an_error(proc: Proc, events: ProcEvents, length: int) -> None:
    """It is counted, not raised."""
    events._handle(_message(2, 7, 7)[:length])
    assert proc.context.error_kinds() == ["record"]


class FakeConnector:
    """Messages, then an error."""

    def __init__(self, *answers: bytes | OSError) -> None:
        self.answers = list(answers)

    def receive(self) -> bytes:
        answer = self.answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer


def test_a_flood_that_the_kernel_cut_is_counted(proc: Proc, events: ProcEvents) -> None:
    """ENOBUFS is said and counted; messages of others (empty here) are passed over."""
    events._receive(FakeConnector(b"", _message(1, 2, 3), BlockingIOError()))  # type: ignore[arg-type]
    assert not proc.context.errors
    events._receive(FakeConnector(OSError(105, "No buffer space available")))  # type: ignore[arg-type]
    assert (proc.context.error_kinds(), proc.context.shed) == (["lost"], 1)


def test_a_kernel_that_refuses_is_no_failure(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission the rung says what it takes, and the next one is tried."""

    def refuse() -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(plugins, "_Connector", refuse)
    with pytest.raises(Unsupported, match="Operation not permitted") as refused:
        ProcEvents([BIN]).open(proc.context)
    assert "CAP_NET_ADMIN" in refused.value.remedy


# By looking


class Looks:
    """A source that looks at the /proc of files, with a clock of its own."""

    def __init__(self, proc: Proc) -> None:
        self.proc, self.now, self.spent = proc, 100.0, 0.0
        self.dear = 0.0
        self.source = ProcfsLooks([BIN], lambda: self.now, self._cost)
        self.source.open(proc.context)

    def _cost(self) -> float:
        self.spent += self.dear
        return self.spent

    def look(self, seconds: float = 0.1) -> None:
        """Let time pass and look."""
        self.now += seconds
        self.source.update()


def test_looks_see_a_run_begin_and_end(proc: Proc) -> None:
    """Begun when /proc says, over when it is gone; the outcome is not known, so no failures family is written."""
    looks = Looks(proc)
    looks.look()
    proc.start(7, f"{BIN}/bridge", started=100.05)
    for _ in range(3):
        looks.look()
    proc.end(7)
    looks.look()
    assert proc.counted() == {("bridge", "ADD"): 1.0}
    assert FAILURES not in proc.context.families.snapshots
    assert proc.durations() == [0.45]


def test_a_process_that_becomes_a_plugin_later_is_seen(proc: Proc) -> None:
    """Between fork and exec it looks like its parent: it is looked at again for a second."""
    looks = Looks(proc)
    proc.start(7, "/usr/bin/containerd")
    looks.look()
    proc.start(7, f"{BIN}/bridge")
    looks.look()
    assert set(looks.source.runs.running) == {7}
    proc.start(8, "/usr/bin/containerd")
    looks.look()
    looks.look(1.2)
    proc.start(8, f"{BIN}/bridge")
    looks.look()
    assert set(looks.source.runs.running) == {7}


def test_who_was_there_before_is_no_run(proc: Proc) -> None:
    """What runs at the start (the dhcp daemon) is left alone."""
    proc.start(7, f"{BIN}/dhcp", "daemon")
    looks = Looks(proc)
    looks.look()
    assert not looks.source.runs.running


def test_a_look_that_is_dear_is_made_less_often(proc: Proc) -> None:
    """10 ms of CPU for a look: the next one comes after half a second, 2 % of a processor."""
    looks = Looks(proc)
    looks.dear = 0.01
    looks.look()
    looks.dear = 0.0
    proc.start(7, f"{BIN}/bridge")
    for _ in range(4):
        looks.look()
    assert not looks.source.runs.running
    looks.look()
    assert looks.source.runs.running


def test_the_monitor_has_both_rungs() -> None:
    """Best first; it is beaten often enough for a look."""
    monitor = plugins.monitor([BIN])
    assert [rung().mode for rung in monitor.rungs] == ["proc_events", "procfs"]
    assert monitor.interval == plugins._LOOK
