"""The kernel tests pass on kernels other than this machine's: each boots in an emulator (the package `kernels`)."""

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NoReturn

import pytest
from kernels import lane
from kernels.debian import Unavailable
from kernels.machine import Outcome

# Minutes in an emulator: `make test-kernels` and continuous integration ask for them.
pytestmark = [pytest.mark.kernels, pytest.mark.timeout(lane.PREPARATION + lane.LIMIT)]


@dataclass(frozen=True)
class Runs:
    """The machines of the tests that were asked for, after their end."""

    outcomes: dict[str, Future[Outcome]]
    consoles: dict[str, list[str]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, lacking: Callable[[str], NoReturn]) -> Runs:
    """Run the tests on all kernels that were asked for, side by side."""
    try:
        lane.check()
    except Unavailable as reason:
        lacking(str(reason))
    lines = [item.callspec.params["line"] for item in request.session.items if item.path == request.path]
    consoles: dict[str, list[str]] = defaultdict(list)
    return Runs(lane.run_all(lines, lane.tests(), lambda line, text: consoles[line].append(text)), consoles)


@pytest.mark.parametrize("line", lane.LINES)
def test_kernel_tests_pass_on(line: str, runs: Runs, lacking: Callable[[str], NoReturn]) -> None:
    """On this kernel too every family counts exactly what happened, by the hooks that it has."""
    print(*runs.consoles[line], sep="\n")
    try:
        outcome = runs.outcomes[line].result()
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
