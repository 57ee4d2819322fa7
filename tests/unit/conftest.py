"""Fixtures of the unit tests."""

from hosts import host

__all__ = ["host"]
