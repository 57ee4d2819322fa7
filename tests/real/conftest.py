"""Fixtures of the tests on real components."""

from running import exporter
from runtimes import containerd, dockerd

__all__ = ["containerd", "dockerd", "exporter"]
