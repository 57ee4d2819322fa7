"""The rules of the house as tests: imports, files, documents and the catalogue."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter import __version__
from exporter.catalog import FAMILIES, Family, Kind

ROOT = Path(__file__).parents[2]
_PRODUCED = {"build", "dist", "__pycache__"}
_SOURCE = {".py", ".sh", ".c", ".h"}
_LONGEST = {"exporter": 450, "tests": 800}

# Written in two parts, so that this file does not hold what it looks for.
_UNFINISHED = re.compile(
    r"\b(?:" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b"
)
_MACHINE_PATH = re.compile("/" + r"(?:work|root|home/\w+|tmp/\w+_jobs)/[\w.]")


def _files() -> list[Path]:
    """List the repository's own text files: nothing that is produced, no tool's directory but .ci."""
    found = []
    for directory, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in _PRODUCED and (not name.startswith(".") or name == ".ci")]
        found += [Path(directory, name) for name in files if not re.search(r"_pb2(_grpc)?\.pyi?$|\.pyc$|\.png$", name)]
    return sorted(path for path in found if path.stat().st_size and b"\0" not in path.read_bytes()[:1024])


def _lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


def _targets() -> set[str]:
    """List the targets that `make help` shows."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _documents() -> list[Path]:
    return [path for path in _files() if path.suffix == ".md"]


# Imports


def test_import_contracts() -> None:
    """Imports point down only, monitors are independent, clients stay in the sources that use them."""
    outcome = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("module", ["exporter.cli", "exporter.daemon"])
def test_clients_are_imported_when_their_source_is_opened(module: str) -> None:
    """Starting costs the memory of no client: the module loads neither docker nor grpc nor kubernetes nor bcc."""
    program = (
        f"import sys, {module}; print(*({{'docker', 'grpc', 'kubernetes', 'bcc', 'pyinotify'}} & set(sys.modules)))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split() == []


# Files


def test_nothing_is_marked_unfinished() -> None:
    """No file carries a mark of unfinished work."""
    assert _lines_with(_UNFINISHED) == []


def test_no_path_of_one_machine() -> None:
    """No file names a directory that only its author's machine has."""
    assert _lines_with(_MACHINE_PATH) == []


def test_files_are_short_enough_to_read() -> None:
    """No source file but the catalogue, which is data, is longer than a reader can hold."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in _files()
        if path.suffix in _SOURCE and path.name != "catalog.py"
    }
    limits = {name: _LONGEST["tests" if name.startswith("tests/") else "exporter"] for name in lengths}
    assert {name: length for name, length in lengths.items() if length > limits[name]} == {}


def test_scripts_are_executable_and_parse() -> None:
    """Every script of the repository can be run as it lies there."""
    scripts = [path for path in _files() if path.read_bytes().startswith((b"#!/bin/sh", b"#!/usr/bin/env bash"))]
    assert {"deploy/install", "tests/install", ".ci/run"} <= {str(path.relative_to(ROOT)) for path in scripts}
    for path in scripts:
        assert os.access(path, os.X_OK), path
        subprocess.run(["bash", "-n", path], check=True, timeout=10)


# The tests' own ground


def _run_of(test: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one test file under our conftest, without its grace for what ends by itself."""
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    (directory / "conftest.py").write_text(re.sub(r"(_GRACE_SECONDS =) [\d.]+", r"\1 0.0", conftest), encoding="utf-8")
    (directory / "test_it.py").write_text(test, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if name not in {"CI", "REQUIRE_REAL"}}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-W", "ignore", str(directory)]
    return subprocess.run(
        command, cwd=directory, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_left_behind_fails_the_run(tmp_path: Path) -> None:
    """A test that passes and forgets its child, even one without our environment, makes the whole run fail."""
    outcome = _run_of("import subprocess\ndef test_it():\n    subprocess.Popen(['sleep', '1'], env={})\n", tmp_path)
    assert outcome.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 passed" in outcome.stdout
    assert re.search(r"ERROR: left behind by the tests, .*: process \d+ sleep 1", outcome.stdout)


@pytest.mark.parametrize(
    ("environment", "summary"),
    [({}, "1 skipped"), ({"CI": "true"}, "1 error"), ({"REQUIRE_REAL": "1"}, "1 error")],
    ids=["laptop", "CI", "REQUIRE_REAL"],
)
def test_a_real_component_that_is_missing(environment: dict[str, str], summary: str, tmp_path: Path) -> None:
    """A missing component is a skip on a laptop, and a failure where everything is required."""
    test = "import pytest\n@pytest.mark.real('no-such-program')\ndef test_it():\n    pass\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = real\n", encoding="utf-8")
    outcome = _run_of(test, tmp_path, **environment)
    assert summary in outcome.stdout, outcome.stdout
    assert "needs no-such-program" in outcome.stdout


# Documents


def test_changelog_knows_the_version() -> None:
    """The version of the package has its section in the changelog."""
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def _anchors(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ +(.+?)\s*$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(document: Path) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        file = document.parent / target if target else document
        if not file.exists():
            yield f"{document.name}: {link}: no such file"
        elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
            yield f"{document.name}: {link}: no such heading"


def test_links_between_documents_resolve() -> None:
    """Every relative link of a document leads to a file, and its anchor to a heading."""
    assert [broken for document in _documents() for broken in _broken_links(document)] == []


def _commands(document: Path) -> set[tuple[str, str]]:
    """Calls of make and of the exporter in the fenced blocks of a document, as (program, first argument)."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    calls = re.findall(
        r"^\s*(?:[$#]\s+)?(?:sudo\s+)?(?:\S*/)?(make|cni-exporter)\s+([a-z]+)", "\n".join(blocks), re.MULTILINE
    )
    return set(calls)


def test_commands_in_documents_exist() -> None:
    """What a reader copies from a fenced block is a target of the Makefile or a command of the exporter."""
    from exporter.cli import main  # noqa: PLC0415 - only this test needs the commands

    known = {("make", target) for target in _targets()} | {("cni-exporter", command) for command in main.commands}
    assert set().union(*map(_commands, _documents())) - known == set()


def test_readme_names_every_target() -> None:
    """A reader of the README learns of every target of the Makefile."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {target for target in _targets() if f"make {target}" not in text} == set()


# The catalogue


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_family_follows_the_naming_rules(family: Family) -> None:
    """Names, help and labels are as Prometheus' naming practices ask, and the cap is a bound."""
    assert re.fullmatch(r"cni_[a-z0-9_]+", family.name)
    assert family.name.endswith("_total") == (family.kind is Kind.COUNTER)
    assert family.help[0].isupper() or family.help[0].isdigit()
    assert family.help.endswith(".")
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in family.exported)
    assert len(set(family.key + family.joined)) == len(family.key + family.joined)
    assert family.cap > 0
    assert list(family.buckets) == sorted(set(family.buckets))
    assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM)
