"""The landing page: what the exporter sees and how well it sees, for a person with a browser.

Flows in: a reader of families (as scraped), who and when we are, the rates. Flows out: one HTML document with inline
style and SVG: no scripts, no external resources, every value escaped.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from importlib import resources

from exporter.catalog import HOST
from exporter.drawing import draw
from exporter.topology import Link, Rates, Read, Topology, Workload, build
from exporter.traffic import Traffic, clean, printable, quantity

REFRESH = 30
"""Seconds after which a browser loads the page again; two readings make a rate."""
WORKLOAD_LIMIT = 25
RULE_LIMIT = 10
ATTENTION_LIMIT = 8
CONFIGURATION_LIMIT = 25
_NAME_LIMIT = 12
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_LEVEL_TONES = {"low": "good", "medium": "good"}


@dataclass(frozen=True, slots=True)
class Status:
    """Who answers, and when; times in Unix seconds."""

    node: str
    version: str
    revision: str
    started: float
    now: float


@dataclass(frozen=True, slots=True)
class LearnedRule:
    """A rule that a heavy hitter has got by itself."""

    kind: str
    """container, command or address."""
    name: str
    class_: str
    ratio: float
    """Share of its events that is kept."""
    expires_in: float
    """Seconds that it has to live unless it is renewed."""


@dataclass(frozen=True, slots=True)
class _MonitorState:
    """How a monitor does."""

    name: str
    word: str
    tone: str
    """Class of its badge: good, warn, bad or idle."""
    mode: str
    reason: str
    age: str


def render(read: Read, status: Status, rates: Rates | None = None, learned: Sequence[LearnedRule] = ()) -> str:
    """Write the page. Takes a reading for `rates`, so that the next page has them."""
    read, status = printable(read), replace(status, node=clean(status.node))
    topology = build(read, status.node, rates)
    monitors = _monitors(read, status.now)
    main = "".join(
        (
            _tiles(read, topology, monitors),
            _attention(read, topology, monitors),
            _topology(topology),
            _workloads(topology),
            _load(read, learned),
            _monitor_table(monitors),
            _containers(read),
            _configurations(read),
        )
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{REFRESH}"><link rel="icon" href="data:,">'
        f"<title>cni-exporter on {escape(status.node)}</title><style>{_style()}</style></head><body>"
        f"{_header(status)}<main>{main}</main>{_footer(topology)}</body></html>"
    )


@cache
def _style() -> str:
    return resources.files("exporter").joinpath("page.css").read_text(encoding="utf-8")


def _header(status: Status) -> str:
    facts = [f"version {status.version}"]
    if status.revision:
        facts.append(f"revision {status.revision[:12]}")
    facts.append(f"up {duration(status.now - status.started)}")
    links = (("/metrics", "Metrics"), ("/-/healthy", "Health"), ("/-/ready", "Readiness"))
    return (
        f'<header><div><p class="product">cni-exporter</p><h1 title="{escape(status.node)}">{escape(status.node)}</h1>'
        f'<p class="quiet">{escape(" · ".join(facts))}</p></div><nav aria-label="Endpoints">'
        + "".join(f'<a href="{path}">{text}</a>' for path, text in links)
        + "</nav></header>"
    )


def _footer(topology: Topology) -> str:
    span = (
        f"Rates are averages over the last {duration(topology.seconds)}."
        if topology.seconds
        else "Totals are shown; rates appear with the next reading."
    )
    return f"<footer><p>{span} This page loads again every {REFRESH} seconds.</p></footer>"


def _section(title: str, body: str, note: str = "") -> str:
    described = f'<p class="quiet">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{described}{body}</section>"


def _table(columns: Sequence[str], rows: Iterable[str], kind: str) -> str:
    """Make a table from heads (plain text) and rows (HTML)."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    return f'<table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _badge(text: str, tone: str) -> str:
    return f'<span class="badge {tone}">{escape(text)}</span>'


def _sum(read: Read, family: str) -> float:
    return sum(value for _, value in read(family))


def _more(count: int, what: str) -> str:
    return f'<p class="quiet">and {count} more {what}</p>' if count > 0 else ""


def _tiles(read: Read, topology: Topology, monitors: Sequence[_MonitorState]) -> str:
    running = sum(value for labels, value in read("cni_containers") if labels.get("state") == "running")
    total = _sum(read, "cni_containers")
    orphans = sum(link.state == "orphaned" for link in topology.links)
    traffic, unit = _traffic(link for link in topology.links if link.contained)
    present = [monitor.tone for monitor in monitors if monitor.tone != "idle"]
    tiles = (
        ("Containers running", quantity(running), f"of {quantity(total)} known"),
        ("Interfaces", quantity(len(topology.links) + topology.omitted), f"{orphans} orphaned"),
        ("Received", quantity(traffic.receive_bytes, unit), "by containers"),
        ("Sent", quantity(traffic.transmit_bytes, unit), "by containers"),
        ("Dropped", quantity(traffic.dropped) + ("/s" if unit == "B/s" else ""), "packets"),
        ("Monitors", f"{present.count('good')} of {len(present)}", "work at their best"),
    )
    return (
        '<dl class="tiles">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note in tiles
        )
        + "</dl>"
    )


def _traffic(links: Iterable[Link]) -> tuple[Traffic, str]:
    """Add up links: per second where there are rates, else in total; give the unit of the bytes too."""
    links = tuple(links)
    rates = [link.rate for link in links if link.rate]
    sums = Traffic()
    for traffic in rates or [link.traffic for link in links]:
        sums = sums.plus(traffic)
    return sums, "B/s" if rates else "B"


def _attention(read: Read, topology: Topology, monitors: Sequence[_MonitorState]) -> str:
    """List what a person should know first: orphans, monitors that fail, growing losses, series left out."""
    items = [
        (monitor.tone, f"Monitor {monitor.name}: {monitor.word.lower()}", monitor.reason)
        for monitor in monitors
        if monitor.tone in ("bad", "warn")
    ]
    for link in topology.links:
        if link.state == "orphaned":
            where = f" on {link.bridge}" if link.bridge else ""
            items.append(
                (
                    "bad",
                    f"{link.device}{where} is orphaned",
                    "No live process is behind it; if it stays, ip link delete removes it.",
                )
            )
        elif link.rate and link.rate.dropped + link.rate.errors > 0:
            items.append(("warn", f"{link.title} is losing packets", f"{link.device}: {link.remark} so far."))
    items += [("bad", f"{file} is invalid", f"{reason}.") for file, reason in _invalid(read).items()]
    held, dropped = _sum(read, "cni_exporter_series_held"), _sum(read, "cni_exporter_series_dropped_total")
    if held:
        items.append(("idle", f"{quantity(held)} series are held back", "Their workload is not known yet."))
    if dropped:
        items.append(("warn", f"{quantity(dropped)} samples were left out", "A family is at its limit of series."))
    if not items:
        return ""
    items.sort(key=lambda item: ("bad", "warn", "idle").index(item[0]))
    shown = "".join(
        f'<li class="{tone}"><strong>{escape(title)}</strong> <span>{escape(text)}</span></li>'
        for tone, title, text in items[:ATTENTION_LIMIT]
    )
    return _section("Needs attention", f'<ul class="attention">{shown}</ul>{_more(len(items) - ATTENTION_LIMIT, "")}')


def _topology(topology: Topology) -> str:
    alone = [workload.title for workload in topology.unlinked if workload.container != HOST]
    if not topology.links and not alone:
        text = "No container interface is seen on this node. Start a container, or look at the monitors below."
        return _section("Topology", f'<p class="empty">{text}</p>')
    note = "↓ received and ↑ sent, from the container's point of view · ▲ packets dropped or with errors"
    drawing = f'<div class="drawing">{draw(topology)}</div>' if topology.links else ""
    if topology.omitted:
        drawing += _more(topology.omitted, "interfaces")
    if alone:
        names = ", ".join(alone[:_NAME_LIMIT])
        rest = f" and {len(alone) - _NAME_LIMIT} more" if len(alone) > _NAME_LIMIT else ""
        drawing += f'<p class="quiet wrap">Without an interface that is known: {escape(names)}{rest}</p>'
    return _section("Topology", drawing, note)


def _workloads(topology: Topology) -> str:
    """Tabulate workloads by traffic, each with its links added up."""
    groups: dict[Workload, list[Link]] = defaultdict(list)
    for link in topology.links:
        if link.workload and link.state in ("attached", "direct"):
            groups[link.workload].append(link)
    if not groups:
        return ""
    ranked = sorted(groups.items(), key=lambda group: _traffic(group[1])[0].bytes, reverse=True)
    rows = [_workload_row(workload, links) for workload, links in ranked[:WORKLOAD_LIMIT]]
    # Roles, because the style turns the rows into grids where the window is narrow, and they would be lost.
    heads = "".join(
        f'<th role="columnheader" scope="col">{name}</th>'
        for name in ("Workload", "Received", "Sent", "Drops", "Errors")
    )
    table = (
        f'<table class="workloads" role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
    )
    return _section("Workloads by traffic", table + _more(len(ranked) - WORKLOAD_LIMIT, "workloads"))


def _workload_row(workload: Workload, links: Sequence[Link]) -> str:
    total = Traffic()
    for link in links:
        total = total.plus(link.traffic)
    now, unit = _traffic(links)
    cells = [
        f'<td role="cell">{escape(quantity(value, unit))}'
        + (f"<small>{escape(quantity(whole, 'B'))}</small></td>" if unit == "B/s" else "</td>")
        for value, whole in (
            (now.receive_bytes, total.receive_bytes),
            (now.transmit_bytes, total.transmit_bytes),
        )
    ]
    cells += [
        f'<td role="cell" class="{"warn" if value else "zero"}">{escape(quantity(value))}</td>'
        for value in (total.dropped, total.errors)
    ]
    where = " · ".join(dict.fromkeys(link.device + (f" on {link.bridge}" if link.bridge else "") for link in links))
    detail = " · ".join(text for text in (where, workload.detail) if text)
    return (
        f'<tr role="row"><th role="rowheader" scope="row" title="{escape(f"{workload.title}: {detail}")}">'
        f"<span>{escape(workload.title)}</span><small>{escape(detail)}</small></th>{''.join(cells)}</tr>"
    )


def _load(read: Read, learned: Sequence[LearnedRule]) -> str:
    """Say how many events there are, what share of them is kept, and which rules were learned."""
    level = next((labels["level"] for labels, value in read("cni_load_level") if value), "")
    if not level:
        return ""
    load, forecast = _sum(read, "cni_load_events_per_second"), _sum(read, "cni_load_forecast_events_per_second")
    kept = f"{1 - _sum(read, 'cni_drop_ratio'):.0%} kept"
    note = f"{quantity(load)} events/s, {quantity(forecast)} planned for · {kept}"
    thinned = sorted((value, labels["class"]) for labels, value in read("cni_sampling_target_ratio") if value < 1)
    body = f'<p>{_badge(level, _LEVEL_TONES.get(level, "warn"))} <span class="quiet">{escape(note)}</span></p>'
    if thinned:
        said = ", ".join(f"{class_} {ratio:.3g}" for ratio, class_ in thinned)
        body += f'<p class="quiet wrap">Ratios below 1: {escape(said)}</p>'
    if learned:
        rows = [
            f'<tr><th scope="row">{escape(clean(rule.name))}</th><td>{escape(rule.kind)}</td>'
            f"<td>{escape(rule.class_)}</td><td>{rule.ratio:.3g}</td><td>{duration(rule.expires_in)}</td></tr>"
            for rule in learned[:RULE_LIMIT]
        ]
        body += _table(("Learned rule for", "Kind", "Events", "Kept", "Ends in"), rows, "rules")
        body += _more(len(learned) - RULE_LIMIT, "rules")
    return _section("Load", body)


def _by_monitor(read: Read, family: str) -> dict[str, float]:
    return {labels.get("monitor", ""): value for labels, value in read(f"cni_exporter_monitor_{family}")}


def _monitors(read: Read, now: float) -> list[_MonitorState]:
    up, fallback, resting = (_by_monitor(read, name) for name in ("up", "fallback", "circuit_open"))
    updated = _by_monitor(read, "last_update_timestamp_seconds")
    modes = {
        labels.get("monitor", ""): (labels.get("mode", ""), labels.get("reason", ""))
        for labels, value in read("cni_exporter_monitor_mode_info")
        if value
    }
    states = []
    for name in sorted(up.keys() | modes.keys()):
        mode, reason = modes.get(name, ("", ""))
        word, tone = _judge(up.get(name), bool(fallback.get(name)), bool(resting.get(name)), name in updated)
        age = f"{duration(now - updated[name])} ago" if name in updated else "never"
        states.append(_MonitorState(name, word, tone, mode, reason, age))
    return states


def _judge(up: float | None, fallback: bool, resting: bool, updated: bool) -> tuple[str, str]:  # noqa: FBT001 - four states
    """Put a monitor's state in a word, and give its badge."""
    if up is None:
        return "Absent", "idle"
    if not up:
        return ("Resting", "bad") if resting else ("Failing", "bad") if updated else ("Starting", "idle")
    return ("Fallback", "warn") if fallback else ("Working", "good")


def _monitor_table(monitors: Sequence[_MonitorState]) -> str:
    rows = []
    for monitor in monitors:
        kind = ' class="explained"' if monitor.reason else ""
        rows.append(
            f'<tr{kind}><th scope="row">{escape(monitor.name)}</th><td>{_badge(monitor.word, monitor.tone)}</td>'
            f"<td>{escape(monitor.mode)}</td><td>{escape(monitor.age)}</td></tr>"
        )
        if monitor.reason:
            rows.append(f'<tr class="reason"><td colspan="4">{escape(monitor.reason)}</td></tr>')
    if not rows:
        return _section("Monitors", '<p class="empty">No monitor has reported yet.</p>')
    return _section("Monitors", _table(("Monitor", "State", "Mode", "Updated"), rows, "monitors"))


def _containers(read: Read) -> str:
    runtimes: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for labels, value in read("cni_containers"):
        runtimes[labels.get("runtime", "")].append((labels.get("state", ""), value))
    rows = []
    for runtime, states in sorted(runtimes.items()):
        said = ", ".join(f"{quantity(value)} {state}" for state, value in sorted(states) if value)
        total = quantity(sum(value for _, value in states))
        cells = f"<td>{escape(total)}</td><td>{escape(said or 'none')}</td>"
        rows.append(f'<tr><th scope="row">{escape(runtime)}</th>{cells}</tr>')
    if not rows:
        return ""
    return _section("Containers", _table(("Runtime", "Count", "By state"), rows, "containers"))


def _invalid(read: Read) -> dict[str, str]:
    """Say what is wrong with configuration files, and where."""
    invalid = {labels.get("file", "") for labels, value in read("cni_config_valid") if not value}
    reasons = {}
    for labels, _ in read("cni_config_problem_info"):
        if labels.get("file", "") in invalid:
            line, column = labels.get("line", ""), labels.get("column", "")
            place = f", line {line}, column {column}" if line else ""
            reasons[labels.get("file", "")] = labels.get("problem", "") + place
    return reasons


def _configurations(read: Read) -> str:
    """Tabulate the CNI configurations: which is active, which are invalid and why."""
    active = {labels.get("file", "") for labels, value in read("cni_config_active") if value}
    reasons = _invalid(read)
    infos = sorted((labels.get("file", ""), labels) for labels, _ in read("cni_config_info"))
    rows = []
    for file, labels in infos[:CONFIGURATION_LIMIT]:
        word, tone = ("Active", "good") if file in active else ("Not used", "idle")
        badges = _badge(word, tone) + (" " + _badge("Invalid", "bad") if file in reasons else "")
        cells = "".join(f"<td>{escape(labels.get(name, ''))}</td>" for name in ("network", "plugins"))
        kind = ' class="explained"' if file in reasons else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(file)}</th><td>{badges}</td>{cells}</tr>')
        if file in reasons:
            rows.append(f'<tr class="reason"><td colspan="4">{escape(reasons[file])}</td></tr>')
    if not rows:
        return ""
    table = _table(("File", "State", "Network", "Plugins"), rows, "monitors")
    return _section("CNI configurations", table + _more(len(infos) - CONFIGURATION_LIMIT, "files"))


def duration(seconds: float) -> str:
    """Write a span of time with its two largest units: `4 s`, `6 min`, `3 h 12 min`, `2 d 4 h`."""
    whole = max(int(seconds), 0)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"
