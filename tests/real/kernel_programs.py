"""All BPF programs, loaded once for the tests that look at what they count.

Loading is compiling: a second on a machine, and a minute of an emulator's time for each file that loads anew. So the
tests share programs and each counts only what was added in its own namespaces and its own plugins since it began.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

import pytest

from exporter.monitors import kernel

EMULATED = "EMULATED" in os.environ
"""Whether this is a virtual machine of the package `kernels`, which has time for one load, and runs nothing else."""
GETPRIORITY = {"x86_64": 140, "aarch64": 141}[os.uname().machine]
"""The system call that is named in the settings."""


def _scope(fixture_name: str, config: pytest.Config) -> Literal["session", "module"]:
    """Elsewhere the programs must not be there while other files test other things."""
    return "session" if EMULATED else "module"


@pytest.fixture(scope=_scope)
def plugin_directory() -> Iterator[Path]:
    """Give the directory whose programs count as CNI plugins."""
    with tempfile.TemporaryDirectory(prefix="cni-") as directory:
        yield Path(directory)


@pytest.fixture(scope=_scope)
def programs(plugin_directory: Path, lacking: Callable[[str], NoReturn]) -> Iterator[kernel.Programs]:
    """Load all, each probe on the best rung that this kernel has."""
    settings = kernel.Settings(
        plugin_directories=(f"{plugin_directory}/", "/usr/lib/cni-not-there", "relative", "/" + "x" * 200),
        syscalls=(GETPRIORITY,),
        ring_bytes=1 << 18,  # soon full
        timeout=300 if EMULATED else 60,
    )
    loaded = kernel.load(settings)
    if not loaded.attached:
        lacking(loaded.manifest.reason or loaded.standings[0].reason)
    yield loaded
    loaded.close()
