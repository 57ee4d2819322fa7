"""The share of a processor that reading events may take, with injected time."""

import pytest

from exporter.monitors.kernel.reader import Pace


class Machine:
    """A clock, a CPU clock, and pieces of work that take 4 ms."""

    def __init__(self, share: float) -> None:
        self.now = self.used = 0.0
        self.pieces = 0
        self.rests: list[float] = []
        self.pace = Pace(share, spent=lambda: self.used, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def piece(self) -> None:
        self.pieces += 1
        self.used += 0.004
        self.now += 0.004


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25])
def test_what_never_ends_takes_its_share(share: float) -> None:
    """Asked without end, work takes the share, and no rest is so long that other descriptors wait."""
    machine = Machine(share)
    while machine.now < 100:
        machine.pace.work(machine.piece)
    assert machine.used / machine.now == pytest.approx(share, rel=0.01)
    assert max(machine.rests) <= 0.05


def test_what_comes_seldom_never_rests() -> None:
    """Ten pieces a second at a quarter of a processor: each is done when it comes."""
    machine = Machine(0.25)
    for _ in range(10):
        machine.pace.work(machine.piece)
        machine.now += 0.1
    assert (machine.pieces, machine.rests) == (10, [])


def test_a_whole_processor_needs_no_rest() -> None:
    """From a share of 1 on, work is done whenever it is asked for."""
    machine = Machine(4.0)
    for _ in range(10):
        machine.pace.work(machine.piece)
    assert (machine.pieces, machine.rests) == (10, [])


def test_a_failure_is_the_callers() -> None:
    """What a piece raises comes out."""

    def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        Pace(0.1).work(fail)
