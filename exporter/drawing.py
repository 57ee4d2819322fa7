"""The topology as inline SVG: node, bridges as bars, links below them with their workloads, traffic and trouble.

Flows in: a topology. Flows out: two drawings, for wide and for narrow windows, of which the page's style shows one; a
drawing is bounded, so that three hundred containers stay legible. Colours come from the page's style, by class.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from exporter.topology import HOST_NETWORK, NO_BRIDGE, NO_HOST_SIDE, Link, Topology, importance, summary
from exporter.traffic import Traffic, quantity

GROUP_LIMIT = 20
"""Bridges that are drawn at most."""
_PITCH = 46
_BOX = 38
_BAR = 32
_GAP = 24
_NODE = 44
_LINE = 11  # font size of the workload's second line
_MONO = 0.602  # width of a character of the monospace fonts in ems (DejaVu Sans Mono; others are not wider)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What differs between the drawings; lengths in CSS pixels."""

    name: str
    width: int
    columns: int
    font: int
    """Size of names: 11 or 12, as the style has them."""
    indent: int
    limit: int
    """Links that are drawn at most."""

    @property
    def pill(self) -> float:
        """Width of a device: a name has 15 characters at most (IFNAMSIZ, linux/if.h)."""
        return 15 * self.font * _MONO + 12


@dataclass(frozen=True, slots=True)
class _Group:
    """Links that hang below one bar."""

    name: str
    real: bool
    """A bridge; False for the bars that stand for the lack of one."""
    links: tuple[Link, ...]


def draw(topology: Topology) -> str:
    """Draw the topology, wide and narrow, as HTML with inline SVG; every text in it is escaped."""
    imagined = (NO_BRIDGE, NO_HOST_SIDE, HOST_NETWORK)
    groups = [_Group(name, name not in imagined, links) for name, links in topology.groups]
    count = len(topology.links)
    roomy = 16  # links up to which two columns do
    wide = _Shape("wide", 1140, 2, 12, 36, 90) if count <= roomy else _Shape("wide", 1140, 3, 11, 36, 90)
    return "".join(_drawing(topology, groups, shape) for shape in (wide, _Shape("narrow", 358, 1, 11, 16, 40)))


def _drawing(topology: Topology, groups: Sequence[_Group], shape: _Shape) -> str:
    ranked = sorted(topology.links, key=importance, reverse=True)
    chosen = {id(link) for link in ranked[: shape.limit]}
    parts: list[str] = []
    top, bars = float(_NODE + _GAP), []
    for group in groups[:GROUP_LIMIT]:
        bars.append(top + _BAR / 2)
        parts.append(_bar(group, top, shape))
        height, links = _links([link for link in group.links if id(link) in chosen], top + _BAR, shape)
        parts.append(links)
        top += _BAR + height
        rest = [link for link in group.links if id(link) not in chosen]
        if rest:
            parts.append(_text(shape.indent + 14, top + 20, f"and {len(rest)} more: {_rates(rest)}", "note"))
            top += 28
        top += _GAP
    if len(groups) > GROUP_LIMIT:
        parts.append(_text(shape.indent, top, f"and {len(groups) - GROUP_LIMIT} more bridges", "note"))
        top += _GAP
    body = _trunk(bars, shape) + "".join(parts) + _node(topology, shape)
    ident = f"topology-{shape.name}"
    return (
        f'<svg class="{shape.name}" viewBox="0 0 {shape.width} {top - _GAP + 4:.0f}" role="img" '
        f'aria-labelledby="{ident}-title {ident}-text"><title id="{ident}-title">Topology of {escape(topology.node)}'
        f'</title><desc id="{ident}-text">{escape(summary(topology))}. The tables below say the same in text.</desc>'
        f"{body}</svg>"
    )


def _node(topology: Topology, shape: _Shape) -> str:
    width = min(shape.width - 2, 340)
    name = middle(topology.node, int((width - 28) / (13 * _MONO)))
    return (
        f'<g><title>{escape(topology.node)}</title><rect class="node" x="1" y="1" width="{width}" height="{_NODE - 2}" '
        f'rx="8"/>{_text(15, 19, "node", "on-node small")}{_text(15, 35, name, "on-node mono strong")}</g>'
    )


def _trunk(bars: Sequence[float], shape: _Shape) -> str:
    """Join the node with every bar."""
    x = shape.indent / 2
    return "".join(
        f'<path class="wire" d="M{x:g} {_NODE}V{y - 8:g}q0 8 {min(8, x):g} 8H{shape.indent}"/>' for y in bars
    )


def _bar(group: _Group, top: float, shape: _Shape) -> str:
    x, width = shape.indent, shape.width - shape.indent - 1
    room = int((width - 24) / (13 * _MONO))
    count = f"{len(group.links)} link{'s' * (len(group.links) != 1)}"
    total = f"{count} · {_rates(group.links)}" if shape.columns > 1 else count
    name = middle(group.name, room - len(count) - 2)
    return (
        f"<g><title>{escape(group.name)}: {escape(count)}, {escape(_rates(group.links))}</title>"
        f'<rect class="{"bar" if group.real else "bar absent"}" rx="6" x="{x}" y="{top:g}" width="{width}" '
        f'height="{_BAR}"/>'
        f"{_text(x + 12, top + 20.5, name, 'mono strong')}"
        f"{_text(x + width - 12, top + 20.5, total, 'end small')}</g>"
    )


def _links(links: Sequence[Link], top: float, shape: _Shape) -> tuple[float, str]:
    """Draw links in columns, filled one after the other; give the height and the drawing."""
    if not links:
        return 0.0, ""
    columns = min(shape.columns, len(links))
    rows = math.ceil(len(links) / columns)
    parts = []
    for column in range(columns):
        inside = links[column * rows : (column + 1) * rows]
        if not inside:
            continue
        x = shape.indent + column * (shape.width - shape.indent) / shape.columns + 14
        last = top + 10 + (len(inside) - 1) * _PITCH + _BOX / 2
        parts.append(f'<path class="wire" d="M{x:g} {top:g}V{last - 6:g}"/>')
        parts += (_link(link, x, top + 10 + row * _PITCH, shape) for row, link in enumerate(inside))
    return 10 + (rows - 1) * _PITCH + _BOX, "".join(parts)


def _link(link: Link, x: float, top: float, shape: _Shape) -> str:
    """Draw one link: stub, device, line as thick as its traffic, workload."""
    middle_y, pill_x = top + _BOX / 2, x + 14
    pill_end = pill_x + shape.pill
    box_x = pill_end + 18
    box_width = x - 14 + (shape.width - shape.indent) / shape.columns - box_x - (10 if shape.columns > 1 else 1)
    state = " orphan" if link.state == "orphaned" else " apart" if link.state in ("direct", "host") else ""
    title = middle(link.title, int((box_width - 18) / (shape.font * _MONO)))
    traffic = _rates([link])
    return (
        f"<g><title>{escape(_tooltip(link))}</title>"
        f'<path class="wire" d="M{x:g} {middle_y - 6:g}q0 6 6 6H{pill_x:g}"/>'
        f'<path class="flow{state}" stroke-width="{_thickness(link):.1f}" d="M{pill_end:g} {middle_y:g}H{box_x:g}"/>'
        f'<rect class="pill{state}" x="{pill_x:g}" y="{middle_y - 11:g}" width="{shape.pill:.0f}" height="22" rx="11"/>'
        f'<text class="mono mid f{shape.font}" x="{pill_x + shape.pill / 2:.1f}" y="{middle_y + 4:g}">'
        f"{escape(middle(link.device, 15))}</text>"
        f'<rect class="box{state}" x="{box_x:.1f}" y="{top:g}" width="{box_width:.1f}" height="{_BOX}" rx="6"/>'
        f'<text class="name{state} f{shape.font}" x="{box_x + 9:.1f}" y="{top + 16:g}">'
        f"{escape(title)}</text>"
        f"{_text(box_x + 9, top + 30, traffic, 'rate')}{_trouble(link, box_x + box_width - 9, top + 30)}</g>"
    )


def _trouble(link: Link, x: float, y: float) -> str:
    """Mark packets that were dropped or had errors; plainer where they no longer are."""
    total = link.traffic.dropped + link.traffic.errors
    if not total:
        return ""
    now = link.rate is None or link.rate.dropped + link.rate.errors > 0
    return _text(x, y, f"\N{BLACK UP-POINTING TRIANGLE}{quantity(total)}", f"end {'warn' if now else 'note'}")


def _tooltip(link: Link) -> str:
    """Say everything about a link: what the drawing had to shorten as well."""
    detail = link.workload.detail if link.workload else ""
    facts = (f"{link.device} {link.kind}".rstrip(), link.title, detail, _rates([link]), link.remark)
    return "; ".join(fact for fact in facts if fact)


def _rates(links: Iterable[Link]) -> str:
    """Write the traffic of links together: per second where there are rates, else in total."""
    links = tuple(links)
    rates = [link.rate for link in links if link.rate]
    sums, unit = Traffic(), "B/s" if rates else "B"
    for traffic in rates or [link.traffic for link in links]:
        sums = sums.plus(traffic)
    # No-break spaces: SVG folds plain ones.
    text = f"↓{quantity(sums.receive_bytes, unit)} ↑{quantity(sums.transmit_bytes, unit)}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _thickness(link: Link) -> float:
    """Between one and four pixels, by the decades of bytes per second between 100 B/s and 100 MB/s."""
    if link.rate is None:
        return 1.5
    return 1.0 + min(max(math.log10(link.rate.bytes + 1) - 2, 0), 6) / 2


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def middle(text: str, size: int) -> str:
    """Shorten a name in its middle: the ends of pods' and devices' names are what tells them apart."""
    if len(text) <= size:
        return text
    tail = max((size - 1) // 2, 0)
    return f"{text[: max(size - 1 - tail, 0)]}…{text[len(text) - tail :]}"
