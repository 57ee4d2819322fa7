"""Runs the kernel tests, or any shell command, in virtual machines: `python -m kernels [-k KERNEL]... [COMMAND]`.

Flows in: names of kernels and a command. Flows out: the consoles as they come, a summary; exit status 0: all passed.
"""

import sys
import time
from concurrent.futures import Future

import click

from kernels import lane
from kernels.debian import Unavailable
from kernels.machine import Outcome


@click.command()
@click.option("-k", "--kernel", "kernels", multiple=True, type=click.Choice(list(lane.LINES)), help="Default: all.")
@click.option("-t", "--timeout", default=lane.LIMIT, show_default=True, help="Seconds for one machine.")
@click.option("-j", "--jobs", default=len(lane.LINES), show_default=True, help="Machines at a time.")
@click.argument("command", required=False)
def main(kernels: tuple[str, ...], timeout: float, jobs: int, command: str | None) -> None:
    """Run the kernel tests, or the shell command COMMAND, on kernels in virtual machines."""
    start = time.monotonic()
    try:
        lane.check()
        runs = lane.run_all(kernels or lane.LINES, command or lane.tests(), _show, timeout, jobs)
    except Unavailable as reason:
        raise click.ClickException(str(reason)) from reason
    verdicts = {line: _verdict(line, run) for line, run in runs.items()}
    for line, (_, words) in verdicts.items():
        click.echo(f"kernel {line}: {words}")
    click.echo(f"{time.monotonic() - start:.0f} s in all")
    sys.exit(not all(passed for passed, _ in verdicts.values()))


def _verdict(line: str, run: Future[Outcome]) -> tuple[bool, str]:
    """Give whether the whole may pass, and a verdict in words."""
    try:
        outcome = run.result()
    except Unavailable as reason:
        return lane.LINES[line].optional, f"not run: {reason}"
    return outcome.status == 0, f"{_words(outcome)} in {outcome.seconds:.0f} s"


def _show(line: str, text: str) -> None:
    click.echo(f"[{line}] {text}")


def _words(outcome: Outcome) -> str:
    if outcome.status is None:
        return "ended without a result"
    verdicts = [case.verdict for case in lane.cases(outcome.report)]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in sorted(set(verdicts))]
    return f"exit status {outcome.status}{', ' * bool(counts)}{', '.join(counts)}"


if __name__ == "__main__":
    main()
