"""Fixtures of the golden tests."""

from engines import daemon
from hosts import host

__all__ = ["daemon", "host"]
