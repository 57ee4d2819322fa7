"""Run every controller over every trace and print the table: `python -m simulation [SECONDS] [SEED]` in tests/."""

import sys
from collections.abc import Callable, Sequence

from simulation.controllers import RIVALS, Controller, Ours
from simulation.traces import standard
from simulation.world import Figures, World

CONTROLLERS: tuple[Callable[[], Controller], ...] = (
    *RIVALS,
    lambda: Ours("thresholds"),
    lambda: Ours("budget"),
)


def main(arguments: Sequence[str]) -> None:
    """Print one line for each run, then the table."""
    seconds = int(arguments[0]) if arguments else 1200
    seed = int(arguments[1]) if len(arguments) > 1 else 1
    runs: dict[str, list[Figures]] = {}
    for index in range(len(standard(seconds, seed))):
        for make in CONTROLLERS:
            trace = standard(seconds, seed)[index]
            controller = make()
            figures = World(trace, controller, seed, brake=isinstance(controller, Ours)).run()
            runs.setdefault(controller.name, []).append(figures)
            print(line(figures), flush=True)
    print()
    for name, found in runs.items():
        print(row(name, found))


def line(figures: Figures) -> str:
    """Say one run."""
    bias = sum(figures.bias.values()) / len(figures.bias)
    return (
        f"{figures.trace:24} {figures.controller:18} loss {figures.loss:7.3%} critical {figures.critical_loss:7.3%} "
        f"adaptations {figures.adaptations:5.1f} worst {figures.worst_minute:3} "
        f"step {' '.join(f'{step:.1f}' for step in figures.step_up[:6]):12} key error {figures.key_error:6.2%} "
        f"use {figures.use:6.1%} bias {bias:+.3%}"
    )


def row(name: str, found: Sequence[Figures]) -> str:
    """Sum up a controller's runs: mean over traces, and the worst."""

    def both(values: list[float]) -> str:
        return f"{sum(values) / len(values):.1%} ({max(values):.1%})"

    steps = [step for figures in found for step in figures.step_up]
    biases = [value for figures in found for value in figures.bias.values()]
    return (
        f"| {name} | {both([one.loss for one in found])} | {both([one.critical_loss for one in found])} "
        f"| {sum(one.adaptations for one in found) / len(found):.1f} | {max(one.worst_minute for one in found)} "
        f"| {sum(steps) / max(len(steps), 1):.1f} ({max(steps, default=0):.1f}) "
        f"| {both([one.key_error for one in found])} | {sum(one.use for one in found) / len(found):.0%} "
        f"| {sum(biases) / len(biases):+.2%} |"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
