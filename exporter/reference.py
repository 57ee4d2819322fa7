"""The reference of metric families, as Markdown, from the catalogue: `cni-exporter metrics` and docs/metrics.md."""

from exporter.catalog import FAMILIES, Family

_INTRO = """# Metric families

Written by `cni-exporter metrics` from `exporter/catalog.py`; `make golden` renews this page.

Receive and transmit are from the container's point of view. A pod's network belongs to the pod: there the label
`container` is empty. Where several containers share a network namespace, its series carry the owner: the sandbox, or
the container that the others joined. `container="(host)"` is the host's own network namespace, which host-network
containers use. All three labels are empty where a namespace belongs to no container. A series is held back until its
workload is known or a short grace is over, and a known workload's labels then never change. Where several namespaces
end up with the same labels, counters are summed and never go backwards.

The limit is the number of series that a family may have; `metrics.series_limits` in the configuration changes it.
"""


def metrics() -> str:
    """Write the page."""
    parts = [_INTRO]
    shown = [family for family in FAMILIES.values() if not family.internal]
    for owner in dict.fromkeys(family.owner for family in shown):
        parts.append(f"\n## {owner}\n\n| family | type | labels | limit | meaning |\n|---|---|---|---|---|\n")
        parts.extend(_row(family) for family in shown if family.owner == owner)
    return "".join(parts)


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.exported)
    return f"| `{family.name}` | {family.kind.value} | {labels} | {family.cap} | {family.help} |\n"
