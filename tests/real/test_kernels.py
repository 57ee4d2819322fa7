"""The kernel tests pass on kernels other than this machine's: each boots in an emulator (the package `kernels`)."""

from collections.abc import Callable
from typing import NoReturn

import click
import pytest
from kernels import lane
from kernels.debian import Unavailable

pytestmark = pytest.mark.kernels  # minutes in an emulator: `make test-kernels` asks for them

# A first run also makes the root file system and fetches the kernel.
_PREPARATION_SECONDS = 240


@pytest.fixture(scope="module")
def command(lacking: Callable[[str], NoReturn]) -> str:
    """Have the emulator and the tools on this machine, and something to run."""
    try:
        lane.prepare()
        return lane.tests()
    except Unavailable as reason:
        lacking(str(reason))


@pytest.mark.timeout(lane.LIMIT + _PREPARATION_SECONDS)
@pytest.mark.parametrize("line", lane.LINES)
def test_kernel_tests_pass_on(line: str, command: str, lacking: Callable[[str], NoReturn]) -> None:
    """On this kernel too every family counts exactly what happened, by the hooks that it has."""
    try:
        outcome = lane.run(line, command, click.echo)
    except Unavailable as reason:
        if lane.LINES[line].optional:
            pytest.skip(str(reason))
        lacking(str(reason))
    assert outcome.status is not None, "the machine ended, or was stopped, before its tests did: see its console"
    cases = lane.cases(outcome.report)
    failed = [f"{case.name}: {case.reason}" for case in cases if case.verdict == "failed"]
    assert not failed, "\n\n".join(failed)
    assert outcome.status == 0
    assert any(case.verdict == "passed" for case in cases)
