"""The virtual machines' lane, without a machine: what comes back from a guest is believed only where it is whole."""

import itertools
from pathlib import Path

import pytest
from kernels import debian, images, lane, machine

MARKER = "result-0123456789abcdef"
REPORT = """<testsuites><testsuite>
<testcase classname="t" name="good"/>
<testcase classname="t" name="bad"><failure message="1 != 2">line 3</failure></testcase>
<testcase classname="t" name="broken"><error message="fixture">line 4</error></testcase>
<testcase classname="t" name="absent"><skipped message="no such hook"/></testcase>
</testsuite></testsuites>"""


def test_status_and_report_come_back() -> None:
    """What stands between the two marks is the report, and the first mark carries the status."""
    text = f"noise\n{MARKER} status 3\n{REPORT}\n{MARKER} end\n"
    assert machine._parse(text, MARKER) == (3, REPORT)


def test_a_command_without_a_report_has_a_status() -> None:
    """An empty report is no error: any command may be run."""
    assert machine._parse(f"{MARKER} status 0\n\n{MARKER} end\n", MARKER) == (0, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{MARKER} status 0\n{REPORT[:40]}",
        f"other status 0\n{REPORT}\nother end\n",
        f"{MARKER} status\n\n{MARKER} end",
    ],
)
def test_a_result_cut_short_is_none(text: str) -> None:
    """A guest that dies in the middle, or says another mark, has not passed."""
    assert machine._parse(text, MARKER) == (None, "")


def test_console_lines_lose_the_terminals_control_sequences() -> None:
    """Colours, resets and carriage returns of a console do not reach a log."""
    assert machine._plain(b"\x1bc\x1b[32mok\x1b[0m\r") == "ok"


def test_verdicts_of_a_report() -> None:
    """Failures and errors are failed, with the reason; skips are told apart."""
    verdicts = [(case.name, case.verdict, case.reason) for case in lane.cases(REPORT)]
    assert verdicts == [
        ("t::good", "passed", ""),
        ("t::bad", "failed", "1 != 2\nline 3"),
        ("t::broken", "failed", "fixture\nline 4"),
        ("t::absent", "skipped", "no such hook"),
    ]


def test_a_report_that_is_not_xml_is_an_error() -> None:
    """A broken report never counts as one without failures."""
    with pytest.raises(ValueError, match="cannot be read"):
        lane.cases(REPORT[:50])


def test_the_newest_kernel_is_chosen_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 6.12.100 is newer than 6.12.99; a name that apt explains is cut to the name."""
    listing = (
        "linux-image-6.12.99+deb12-cloud-amd64 - Linux 6.12\nlinux-image-6.12.100+deb12-cloud-amd64 - Linux 6.12\n"
    )
    monkeypatch.setattr(debian.Release, "_refresh", lambda _: None)
    monkeypatch.setattr(debian.Release, "_apt", lambda *_, **__: listing)
    assert debian.Release("bookworm", tmp_path).newest(r"linux-image-.*") == "linux-image-6.12.100+deb12-cloud-amd64"


def test_a_release_without_the_kernel_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that answers with nothing is a reason that names release and pattern."""
    monkeypatch.setattr(debian.Release, "_refresh", lambda _: None)
    monkeypatch.setattr(debian.Release, "_apt", lambda *_, **__: "")
    with pytest.raises(debian.Unavailable, match="bullseye has no package linux-image-9"):
        debian.Release("bullseye", tmp_path).newest("linux-image-9")


def test_the_partition_table_is_what_a_kernel_reads() -> None:
    """One sector; signature, type, start and length where a master boot record has them; disks told apart."""
    sector = images._partition_table("root", 5000)
    assert len(sector) == 512
    assert sector[510:] == b"\x55\xaa"
    assert f"{int.from_bytes(sector[440:444], 'little'):08x}-01" == images.ROOT_PARTITION
    assert sector[450] == 0x83
    assert [int.from_bytes(sector[at : at + 4], "little") for at in (454, 458)] == [2048, 5000]
    tables = [images._partition_table(label, 1)[440:444] for label in ("root", "modules", "guest")]
    assert all(one != other for one, other in itertools.combinations(tables, 2))


def test_a_host_without_an_emulator_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that is missing is named, with the call that installs them."""
    monkeypatch.setattr(images, "SEARCH_PATH", str(tmp_path))
    (tmp_path / "mke2fs").touch(mode=0o755)
    with pytest.raises(
        debian.Unavailable, match=r"needs qemu-system-x86_64, mmdebstrap, depmod, .*tests/install kernels"
    ):
        lane.check()


def test_the_emulator_leaves_out_what_is_about_the_loader_alone() -> None:
    """The command in the guest names every file of kernel tests, and runs none that is marked host."""
    command = lane.tests()
    assert "-m 'not host'" in command
    assert {"test_kernel.py", "test_kernel_cni.py", "test_kernel_lifecycle.py"} <= {
        Path(word).name for word in command.split()
    }


def test_an_unavailable_kernel_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason of one line is its own result; the others run."""

    def run(line: str, *_: object) -> machine.Outcome:
        if line == "5.10":
            raise debian.Unavailable("the archive is gone")
        return machine.Outcome(0, "", 1.0)

    monkeypatch.setattr(lane, "run", run)
    runs = lane.run_all(["6.1", "5.10"], "true", lambda *_: None, jobs=2)
    assert runs["6.1"].result().status == 0
    with pytest.raises(debian.Unavailable, match="gone"):
        runs["5.10"].result()


def test_a_machine_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit the emulator is killed, the console says why, and there is no status."""
    monkeypatch.setattr(machine.Machine, "_call", lambda *_: ["sh", "-c", "echo booting; exec sleep 60"])
    shown: list[str] = []
    outcome = machine.Machine(tmp_path, (), "").run(0.3, shown.append)
    assert outcome.status is None
    assert outcome.seconds < 10
    assert shown[0] == "booting"
    assert shown[-1].startswith("stopped: ")
