"""What is known of the configurations, told as families; and what changed since the last look.

Flows in: trees of files. Flows out: the families of owner `cni_config`, and a line of log per change. A change is one
of content: it is the same whether it was heard of or found. The records outlive the source that fills them, so that
nothing is counted twice or missed when the monitor moves from one rung to another.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from exporter.contract import Context, Key
from exporter.monitors.cni_config.active import Rule, active
from exporter.monitors.cni_config.files import Found, Tree
from exporter.monitors.cni_config.ipam import Pool
from exporter.monitors.cni_config.plugins import available

log = logging.getLogger(__name__)

CHANGES, OVERFLOWS, RESCANS = (
    "cni_config_changes_total",
    "cni_config_watch_overflows_total",
    "cni_config_rescans_total",
)
OPERATIONS = ("create", "modify", "delete", "rename")
_LINES = 20  # changes of one look that are logged one by one
_RUNTIMES = ("containerd", "cri-o")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the configuration says."""

    directories: tuple[str, ...]
    bin_directories: tuple[str, ...]
    poll_interval: float = 30.0
    runtime: str = "auto"
    """Whose rule holds: containerd, cri-o, or auto: CRI-O's where of all sockets only its own is there."""
    max_conf_num: int = 1
    default_network: str = ""
    sockets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Where the runtimes listen."""

    def telling_sockets(self) -> Iterator[str]:
        """Give the sockets that decide whose rule holds."""
        if self.runtime == "auto":
            yield from (path for paths in self.sockets.values() for path in paths)

    def rule(self) -> Rule:
        """Find out whose rule holds now."""
        runtime = self.runtime
        if runtime == "auto":
            there = [name for name in _RUNTIMES if any(_exists(path) for path in self.sockets.get(name, ()))]
            runtime = there[0] if there else "containerd"
        return Rule(runtime, self.max_conf_num, self.default_network)


@dataclass(frozen=True, slots=True)
class Change:
    """A file whose content is another than before."""

    directory: str
    operation: str
    path: str
    network: str


@dataclass(slots=True)
class Records:
    """The last look, and what it is compared with."""

    settings: Settings
    clock: Callable[[], float] = time.time
    trees: Sequence[Tree] = ()
    _content: dict[str, tuple[str, Found]] | None = None
    """By path: the configured directory, and the file; only of those with content. None before the first look."""
    _problems: dict[str, str] = field(default_factory=dict)
    _changed: dict[str, float] = field(default_factory=dict)

    def take(self, trees: Sequence[Tree], context: Context) -> None:
        """Take a look over: count and log what changed, tell what is there."""
        first = self._content is None
        before = self._content or {}
        self._content = _content(trees, before)
        if first:
            for directory in self.settings.directories:
                for operation in OPERATIONS:
                    context.families.add(CHANGES, (directory, operation), 0)
            for family in (OVERFLOWS, RESCANS):
                context.families.add(family, (), 0)
            self._changed = {tree.directory: _newest(tree) for tree in trees}
        else:
            self._count(list(changes(before, self._content)), context)
        self.trees = trees
        self._tell(context)

    def tell_surroundings(self, context: Context) -> None:
        """Tell what depends on other directories: which plugins are there, how full the pools are."""
        binaries = {name for _, found in _files(self.trees) for name in found.configuration.binaries}
        plugins = available(binaries, self.settings.bin_directories)
        rule = self.settings.rule()
        in_force = [active(tree.files, rule, plugins) for tree in self.trees]
        context.families.replace(
            {
                "cni_config_active": {
                    (found.path,): float(found.path in paths)
                    for tree, paths in zip(self.trees, in_force, strict=True)
                    for found in tree.files
                },
                "cni_config_plugin_available": {(name,): float(there) for name, there in plugins.items()},
                "cni_ipam_addresses": dict(self._addresses(context)),
            }
        )

    def _addresses(self, context: Context) -> Iterator[tuple[Key, float]]:
        for pool in pools(self.trees):
            try:
                counted = [(known, known.used()) for known in pool.known()]
            except FileNotFoundError:  # Flannel does not know its subnet yet
                continue
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "the subnet file is not as expected"
                context.error("leases", f"leases of network {pool.network} cannot be counted: {reason}")
                continue
            for known, used in counted:
                yield (known.network, known.subnets, "used"), float(used)
                yield (known.network, known.subnets, "free"), float(max(0, known.size - used))

    def _count(self, found: Sequence[Change], context: Context) -> None:
        for change in found:
            context.families.add(CHANGES, (change.directory, change.operation))
            self._changed[change.directory] = self.clock()
        for change in islice(found, _LINES):
            log.info("CNI configuration: %s of %r (network %r)", change.operation, change.path, change.network)
        if len(found) > _LINES:
            log.info("CNI configuration: %d more changes at the same time", len(found) - _LINES)

    def _tell(self, context: Context) -> None:
        files = [found for _, found in _files(self.trees)]
        context.families.replace(
            {
                "cni_config_info": {_info(found): 1.0 for found in files},
                "cni_config_valid": {
                    (found.path,): float(found.configuration.problem is None) for found in files if found.readable
                },
                "cni_config_problem_info": {_problem(found): 1.0 for found in files if found.configuration.problem},
                "cni_config_last_change_timestamp_seconds": {
                    (directory,): moment for directory, moment in self._changed.items() if moment
                },
            }
        )
        problems = {found.path: str(found.configuration.problem) for found in files if found.configuration.problem}
        for path, problem in islice((problems.items() - self._problems.items()), _LINES):
            log.warning("CNI configuration %r: %s", path, problem)
        self._problems = problems
        for tree in self.trees:
            if not tree.complete:
                context.error("directory", f"{tree.directory!r} cannot be listed whole: too large, or no permission")


def changes(before: Mapping[str, tuple[str, Found]], now: Mapping[str, tuple[str, Found]]) -> Iterator[Change]:
    """Compare two looks: content that is gone under one name and new under another was renamed."""
    gone: dict[str, list[str]] = {}
    for path in before.keys() - now.keys():
        gone.setdefault(before[path][1].sha256, []).append(path)
    for path in sorted(now):
        directory, found = now[path]
        network = found.configuration.network
        if path in before:
            if before[path][1].sha256 != found.sha256:
                yield Change(directory, "modify", path, network)
        elif gone.get(found.sha256):
            gone[found.sha256].pop()
            yield Change(directory, "rename", path, network)
        else:
            yield Change(directory, "create", path, network)
    for path in sorted(path for paths in gone.values() for path in paths):
        directory, found = before[path]
        yield Change(directory, "delete", path, found.configuration.network)


def pools(trees: Iterable[Tree]) -> tuple[Pool, ...]:
    """Give the pools of all configurations; files that say the same have one."""
    return tuple(dict.fromkeys(pool for _, found in _files(trees) for pool in found.configuration.pools))


def _content(trees: Iterable[Tree], before: Mapping[str, tuple[str, Found]]) -> dict[str, tuple[str, Found]]:
    """Give what has content; of what may not be read any more, what it had."""
    content = {}
    for tree, found in _files(trees):
        if found.sha256:
            content[found.path] = (tree.directory, found)
        elif not found.readable and found.path in before:
            content[found.path] = before[found.path]
    return content


def _files(trees: Iterable[Tree]) -> Iterator[tuple[Tree, Found]]:
    for tree in trees:
        for found in (*tree.files, *tree.parts):
            yield tree, found


def _newest(tree: Tree) -> float:
    """When the content that is there was written, as far as the files say."""
    return max((found.changed for found in (*tree.files, *tree.parts)), default=0.0)


def _info(found: Found) -> Key:
    configuration = found.configuration
    return (
        found.path,
        configuration.network,
        ",".join(configuration.plugins),
        configuration.version,
        found.sha256,
    )


def _problem(found: Found) -> Key:
    problem = found.configuration.problem
    return (found.path, problem.text, str(problem.line or ""), str(problem.column or "")) if problem else ()


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False
