"""What the section `load_config` means: to the governor, to the admission, and in the words of the kernel's maps.

Flows in: the configuration, and whose network namespace is whose. Flows out: settings and rules.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from exporter.config.models import KernelFilter, LoadConfig
from exporter.joins import Workload
from exporter.load.decision import Settings
from exporter.load.filters import Rule as PatternRule
from exporter.monitors.kernel.controls import Rule
from exporter.monitors.kernel.shapes import THINNED

KINDS = {"command": "comm", "address": "prefix", "container": "netns"}
"""What users and metrics call a kind of rule, and what the kernel's maps call it; the others have one name."""
NAMES = {kernel: name for name, kernel in KINDS.items()}

_LEAST = 0.0001  # below this no estimate is worth having; a configured 0 means as few as possible
_SHORTEST_ID = 6  # digits of a container's id that are not a name by chance

Namespaces = Mapping[str, tuple[str, Workload]]
"""Network namespaces by identity (`inode:cookie`): id of the owning container, and the workload's names."""


class KernelFilters:
    """Rules as configured; those about containers hold for the network namespaces that these own at the moment."""

    def __init__(self, filters: Sequence[KernelFilter], namespaces: Callable[[], Namespaces]) -> None:
        """Keep the rules; `namespaces` tells who is there."""
        self._fixed = [_rule(one, KINDS.get(one.kind, one.kind), one.subject) for one in filters if not _named(one)]
        self._named = [one for one in filters if _named(one)]
        self._namespaces = namespaces

    def rules(self) -> list[Rule]:
        """Give the rules for now."""
        present = self._namespaces() if self._named else {}
        return self._fixed + [
            _rule(one, "netns", netns)
            for one in self._named
            for netns, (container_id, workload) in present.items()
            if _means(one.subject, container_id, workload)
        ]


def _named(one: KernelFilter) -> bool:
    return one.kind == "container"


def _means(subject: str, container_id: str, workload: Workload) -> bool:
    """Tell whether a rule speaks of a workload: by its container's name or id, or by namespace and pod."""
    namespace, pod, container = workload
    by_id = len(subject) >= _SHORTEST_ID and container_id.startswith(subject)
    return by_id or subject in {container, f"{namespace}/{pod}"} - {"", "/"}


def _rule(one: KernelFilter, kind: str, subject: str) -> Rule:
    return Rule(kind, subject, one.classes or THINNED, one.ratio, instead=one.ratio > 0)


def settings(section: LoadConfig) -> Settings:
    """Say what the governor is to do."""
    thresholds = section.load_thresholds
    fixed = [(KINDS.get(one.kind, one.kind), one.subject) for one in section.kernel_filters if not _named(one)]
    return Settings(
        strategy=section.strategy,
        max_events_per_second=section.max_events_per_second,
        min_ratio=max(section.min_sampling_rate, _LEAST),
        max_ratio=max(section.max_sampling_rate, _LEAST),
        thresholds=(thresholds.low, thresholds.medium, thresholds.high, thresholds.critical),
        interval=section.adaptation_interval,
        cpu_threshold=section.cpu_threshold / 100,
        forecast=section.enable_intelligent_sampling,
        rule_kinds=counted(section),
        exempt=frozenset(fixed),
    )


def counted(section: LoadConfig) -> tuple[str, ...]:
    """Give the kinds of keys that get rules of their own: containers for fair shares, the others for heavy hitters."""
    if not section.enable_kernel_filtering:
        return ()
    return (("netns",) if section.enable_load_balancing else ()) + (
        ("comm", "prefix") if section.enable_adaptive_filtering else ()
    )


def patterns(section: LoadConfig) -> list[PatternRule]:
    """Give the user's rules for the admission."""
    return [
        PatternRule(one.name, one.priority, tuple(map(re.compile, one.patterns)), one.sampling_rate, one.enabled)
        for one in section.priority_filters
    ]
