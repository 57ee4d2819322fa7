"""A network namespace of a test's own, for traffic that must stay there."""

import os
import subprocess
from collections.abc import Iterator

import pytest


def ip(*arguments: str) -> None:
    """Configure links and namespaces with iproute2. Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    """Give the name of a namespace whose loopback is up; it is gone after the test."""
    name = f"cnik{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)
