"""The kernels that the exporter is tested on beside the host's own, and one run of a command on one of them.

Flows in: the name of a line of kernels, a shell command. Flows out: console lines, how the run ended, single verdicts.
"""

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.etree import ElementTree as ET

from kernels import images
from kernels.debian import Release, Unavailable
from kernels.machine import Machine, Outcome

LIMIT = 480.0
"""Seconds that one machine may take, unless told otherwise: thrice what it needs where three share two processors."""
PREPARATION = 240.0
"""Seconds that may pass until all disks are made, where the archive is slow."""

_NEEDS = ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "depmod", "setpriv")
# Each test is named when it ends, because a console is watched. A single test has no shorter limit than the machine: on
# a busy host the first one, which loads the programs, may take minutes.
_PYTEST = f"-vv -ra --durations=5 --timeout={LIMIT:.0f} -p no:cacheprovider -m 'not host' --junitxml=$REPORT"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of kernels: its newest package in one release of Debian."""

    release: str
    pattern: str
    optional: bool = False
    """Whether the archive may rightly have it no more."""


LINES = {
    "6.1": Line("bookworm", r"linux-image-6\.1\.0-[0-9]+-cloud-amd64"),
    "6.12": Line("bookworm", r"linux-image-6\.12\.[0-9]+\+deb12-cloud-amd64"),
    "5.10": Line("bullseye", r"linux-image-5\.10\.0-[0-9]+-cloud-amd64", optional=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One test of a report."""

    name: str
    verdict: str
    """passed, failed or skipped."""
    reason: str
    """Why it failed or was skipped."""


def check() -> None:
    """Look for what the host needs. Raises Unavailable where something is missing."""
    missing = [command for command in _NEEDS if not shutil.which(command, path=images.SEARCH_PATH)]
    if missing:
        raise Unavailable(f"needs {', '.join(missing)}; as root: tests/install kernels")


def tests() -> str:
    """Give the command that runs the kernel tests. Raises Unavailable where there are none."""
    files = sorted(images.ROOT.glob("tests/real/test_kernel.py")) + sorted(
        images.ROOT.glob("tests/real/test_kernel_*.py")
    )
    if not files:
        raise Unavailable("the repository has no tests/real/test_kernel.py")
    names = " ".join(str(file.relative_to(images.ROOT)) for file in files)
    return f"python3 -m pytest {_PYTEST} {names}"


def run(line: str, command: str, console: Callable[[str], None], limit: float = LIMIT) -> Outcome:
    """Boot the newest kernel of a line and run a command in a copy of the repository there. Raises Unavailable."""
    chosen = LINES[line]
    with _alone(chosen.release):
        kernel = images.kernel(Release(chosen.release, images.BUILD / f"apt-{chosen.release}"), chosen.pattern)
    with _alone("root"):
        root = images.root_file_system()
    with tempfile.TemporaryDirectory(dir=images.BUILD, prefix="run-") as directory:
        tree = Path(directory, "tree.disk")
        images.working_tree(tree, command)
        disks = (root, kernel.modules, tree)
        return Machine(kernel.image, disks, images.ROOT_PARTITION).run(limit, console)


def run_all(
    lines: Iterable[str],
    command: str,
    console: Callable[[str, str], None],
    limit: float = LIMIT,
    jobs: int = len(LINES),
) -> dict[str, Future[Outcome]]:
    """Run a command on several lines, `jobs` at a time, to the end; `console` gets a line's name and a line of text.

    A machine takes one processor for as long as it runs, and up to 1.7 GiB. On two processors three machines at a time
    end sooner than one after the other with two each: little of what they do can be shared out to two.
    """
    with ThreadPoolExecutor(jobs) as pool:
        return {line: pool.submit(run, line, command, partial(console, line), limit) for line in lines}


def cases(report: str) -> list[Case]:
    """Read a report in JUnit's format; the empty one has no cases. Raises ValueError where it cannot be read."""
    try:
        elements = list(ET.fromstring(report).iter("testcase")) if report else []  # noqa: S314 - written by our guest
    except ET.ParseError as error:
        raise ValueError(f"the report of the tests cannot be read: {error}") from error
    return [_case(element) for element in elements]


def _case(element: ET.Element) -> Case:
    name = f"{element.get('classname')}::{element.get('name')}"
    for tag, verdict in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := element.find(tag)) is not None:
            return Case(name, verdict, f"{found.get('message') or ''}\n{found.text or ''}".strip())
    return Case(name, "passed", "")


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Let one thread of one process at a time make a disk: the others find it made."""
    images.BUILD.mkdir(parents=True, exist_ok=True)
    with (images.BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
