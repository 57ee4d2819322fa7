"""Fixtures of the tests on real components."""

from kernel_programs import EMULATED, plugin_directory, programs
from running import exporter

__all__ = ["exporter", "plugin_directory", "programs"]

if not EMULATED:  # a virtual machine has no container runtimes, nor their clients
    from runtimes import containerd, dockerd

    __all__ += ["containerd", "dockerd"]
