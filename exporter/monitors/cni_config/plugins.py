"""Plugins' binaries: whether libcni will find them, and whether they can be started.

Flows in: names and the directories to search. Flows out: a truth per name. Rule: libcni takes the first regular file of
that name (pkg/invoke/find.go, FindInPath); one that is not executable hides a good one behind it.
"""

import os
import stat
from collections.abc import Iterable, Sequence


def available(names: Iterable[str], directories: Sequence[str]) -> dict[str, bool]:
    """Look each name up; empty where there is no such directory at all, for then nothing can be said."""
    there = [directory for directory in directories if os.path.isdir(directory)]  # noqa: PTH112 - texts, many
    return {name: _starts(name, there) for name in names} if there else {}


def _starts(name: str, directories: Sequence[str]) -> bool:
    if "/" in name or "\0" in name:
        return False
    for directory in directories:
        try:
            mode = os.stat(f"{directory}/{name}").st_mode  # noqa: PTH116 - as above
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode):
            return bool(mode & 0o111)
    return False
