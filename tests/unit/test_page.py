"""The landing page as a document: what it says, that it is well-formed, bounded, escaped, of readable colours."""

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topologies import HOSTILE, NOW, Families, families

import exporter
from exporter.drawing import middle
from exporter.page import RULE_LIMIT, LearnedRule, Status, duration, render
from exporter.topology import Rates, Read

STATUS = Status("node-1", "0.1.0", "abcdef0123456789", NOW - 3700, NOW)
_VOID = {"meta", "link", "rect", "path"}


class Document(HTMLParser):
    """A strict reading of the page: elements must be closed in order; text and tags are gathered."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data}\n"

    def attributes(self, name: str) -> set[str]:
        return {value or "" for _, attributes in self.tags for key, value in attributes.items() if key == name}


def page(read: Read, rates: Rates | None = None) -> Document:
    return Document(render(read, STATUS, rates))


def two_readings(count: int) -> Document:
    """Give the page at the second of two readings, ten seconds apart."""
    moments = iter((0.0, 10.0))
    rates = Rates(lambda: next(moments))
    rates.update(families(count))
    return page(families(count, seconds=10.0), rates)


@pytest.mark.parametrize("count", [0, 3, 25, 300])
def test_page_is_well_formed_and_self_contained(count: int) -> None:
    """Every element is closed, there is no script, and nothing is loaded from elsewhere."""
    document = page(families(count))
    names = {tag for tag, _ in document.tags}
    assert not names & {"script", "iframe", "object", "img", "form"}
    assert document.attributes("href") == {"data:,", "/metrics", "/-/healthy", "/-/ready"}
    assert not document.attributes("src")
    assert not any(key.startswith("on") or key == "style" for _, attributes in document.tags for key in attributes)


def test_page_says_who_answers() -> None:
    """Node, version, revision and uptime are in the text."""
    text = page(families(0)).text
    for said in ("node-1", "version 0.1.0", "revision abcdef012345", "up 1 h 1 min"):
        assert said in text


def test_an_empty_node_says_what_to_do() -> None:
    """Without containers there is no empty drawing but a sentence."""
    document = page(families(0))
    assert "No container interface is seen" in document.text
    assert "svg" not in {tag for tag, _ in document.tags}


def test_a_node_without_any_family_has_a_page() -> None:
    """Before the first update of any monitor the page is there already."""
    assert "No monitor has reported yet" in page(lambda _: ()).text


def test_monitors_say_state_mode_and_reason() -> None:
    """Working, on a fallback, resting and absent are told apart in words; the reason stands with them."""
    text = page(families(3)).text
    for said in ("Working", "Fallback", "Resting", "Absent", "netlink", "inotify is not allowed here", "6 min ago"):
        assert said in text
    assert "2 of 4" in text


@pytest.mark.parametrize(("updated", "word"), [(False, "Starting"), (True, "Failing")])
def test_a_monitor_that_never_worked_is_starting(*, updated: bool, word: str) -> None:
    """Down before the first update is a start, behind it a failure."""
    made = Families()
    made.put("cni_exporter_monitor_up", 0, monitor="links")
    if updated:
        made.put("cni_exporter_monitor_last_update_timestamp_seconds", NOW, monitor="links")
    assert word in page(made.read).text


def test_what_needs_attention_is_listed_first() -> None:
    """Orphans, failing monitors, growing losses and held series are named, in that order of weight."""
    document = two_readings(25)
    for said in (
        "vethdead001 on docker0 is orphaned",
        "Monitor cri: resting",
        "is losing packets",
        "4 series are held",
    ):
        assert said in document.text
    assert document.text.index("orphaned") < document.text.index("losing packets")
    assert "120 samples were left out" in page(families(300)).text
    assert "Needs attention" not in page(lambda _: ()).text


def test_invalid_configurations_are_told_with_their_place() -> None:
    """Files in order, which is active, what is wrong with the others and where; what cannot be read is not invalid."""
    made = Families()
    for file, active, valid in (("20-b.conf", 0, 0), ("10-a.conf", 1, 1), ("30-c.conf", 0, None)):
        made.put("cni_config_info", 1, file=file, network="net", plugins="bridge,portmap", cni_version="", sha256="")
        made.put("cni_config_active", active, file=file)
        if valid is not None:
            made.put("cni_config_valid", valid, file=file)
    made.put("cni_config_problem_info", 1, file="20-b.conf", problem="has no type", line="3", column="7")
    made.put(
        "cni_config_problem_info", 1, file="30-c.conf", problem="cannot be read: no permission", line="", column=""
    )
    text = page(made.read).text
    assert "20-b.conf is invalid" in text
    assert text.count("has no type, line 3, column 7") == 2
    assert "no permission" not in text
    table = text[text.index("CNI configurations") :]
    assert table.index("10-a.conf") < table.index("Active") < table.index("20-b.conf") < table.index("Invalid")
    assert "bridge,portmap" in table


def test_the_first_page_shows_totals_and_the_second_rates() -> None:
    """Without an earlier reading bytes are totals; with one they are per second, and the span is said."""
    first = page(families(3)).text
    assert "B/s" not in first
    assert "rates appear with the next reading" in first
    second = two_readings(3).text
    assert "B/s" in second
    assert "over the last 10 s" in second


def test_the_hosts_own_traffic_is_not_the_containers() -> None:
    """The sums at the top leave the host's interfaces out; the drawing shows them below a bar of their own."""
    document = two_readings(3)
    received = document.text.split("Received\n")[1].split("\n")[0]
    assert received == "915 kB/s"
    assert "↓1\N{NO-BREAK SPACE}GB/s" in document.text
    assert "host network" in document.text


def test_drawings_have_a_name_and_a_description() -> None:
    """Each SVG is an image with title and description, under ids that are used once."""
    document = page(families(25))
    drawings = [attributes for tag, attributes in document.tags if tag == "svg"]
    ids = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    assert "24 veths, 3 interfaces, 1 orphan" in document.text


def test_every_link_of_a_small_node_is_drawn() -> None:
    """Each device is in both drawings, orphans marked in words, losses with a sign."""
    document = two_readings(25)
    devices = [text for text in document.text.split("\n") if re.fullmatch(r"veth\w+", text)]
    assert all(devices.count(device) == 2 for device in devices)
    assert len(set(devices)) == 24
    assert document.text.count("orphaned: no live process\n") >= 2
    assert "▲84" in document.text


def test_a_large_node_is_bounded_and_says_what_is_left_out() -> None:
    """Three hundred containers make no endless page; orphans are drawn, the quiet rest is summed up."""
    html = render(families(300), STATUS)
    assert len(html) < 250_000
    document = Document(html)
    assert re.search(r"and \d+ more: ↓", document.text)
    assert re.search(r"and 27\d more workloads", document.text)
    assert "vethdead001" in document.text


def test_many_bridges_are_bounded() -> None:
    """A hundred compose networks are not a hundred bars."""
    made = Families()
    for number in range(100):
        made.put("cni_veth_info", 1, device=f"veth{number}", netns=f"{number}", bridge=f"br-{number}", kind="veth")
    assert "and 80 more bridges" in page(made.read).text


def test_hostile_names_are_text() -> None:
    """Markup in names is shown as it is; control characters and lone surrogates are not in the page."""
    html = render(families(25, hostile=True), Status(HOSTILE[:60], "<v>", "<r>", NOW, NOW))
    document = Document(html)
    html.encode()
    assert not {tag for tag, _ in document.tags} & {"script", "img", "b", "v", "r"}
    assert "<script>window.hacked=1</script>" in document.text
    assert "\x1b" not in html
    assert not any(key.startswith("on") for _, attributes in document.tags for key in attributes)


@given(st.text(), st.text())
def test_any_name_makes_a_well_formed_page(name: str, device: str) -> None:
    """Whatever the names are, the document stays one and can be encoded."""
    made = Families()
    made.put("cni_netns_info", 1, netns="1", pinned="false", namespace="", pod="", container=name)
    made.put("cni_veth_info", 1, device=device, netns="1", bridge=name, kind=device)
    made.put("cni_exporter_monitor_mode_info", 1, monitor=name, mode=name, reason=name)
    made.put("cni_containers", 1, runtime=name, state=name)
    html = render(made.read, STATUS)
    html.encode()
    Document(html)


def test_long_names_are_whole_in_their_titles() -> None:
    """A name that the drawing shortens can be read in full by pointing at it."""
    name = "p" * 253
    made = Families()
    made.put("cni_netns_info", 1, netns="1", pinned="false", namespace="", pod="", container=name)
    made.put("cni_veth_info", 1, device="veth0", netns="1", bridge="docker0", kind="veth")
    html = render(made.read, STATUS)
    assert f"<title>veth0 veth; {name};" in html
    assert f'title="{escape(name)}:' in html


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [("abcdef", 6, "abcdef"), ("abcdefgh", 5, "ab…gh"), ("abcdefgh", 4, "ab…h"), ("abc", 1, "…"), ("abc", 0, "…")],
)
def test_names_are_shortened_in_their_middle(text: str, size: int, shown: str) -> None:
    """Both ends stay."""
    assert middle(text, size) == shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (90000, "1 d 1 h"), (1e8, "1157 d 9 h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    """Seconds to days."""
    assert duration(seconds) == text


# Colours


def _luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb` (WCAG 2.1)."""
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_enough_contrast(scheme: int) -> None:
    """Each text colour on each ground it is used on reaches 4.5:1 (WCAG 2.1, level AA)."""
    style = Path(exporter.__file__).with_name("page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", block))
    pairs = [(text, ground) for text in ("ink", "quiet") for ground in ("ground", "card", "soft")]
    pairs += [("accent", "card"), ("accent", "ground"), ("warn", "card"), ("bad", "bad-bg"), ("quiet", "bad-bg")]
    pairs += [(tone, f"{tone}-bg") for tone in ("good", "warn", "bad")]
    for text, ground in pairs:
        bright, dark = sorted((_luminance(colours[text]), _luminance(colours[ground])), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


LOAD: dict[str, list[tuple[dict[str, str], float]]] = {
    "cni_load_level": [({"level": "low"}, 0.0), ({"level": "critical"}, 1.0)],
    "cni_load_events_per_second": [({}, 61_000.0)],
    "cni_load_forecast_events_per_second": [({}, 70_000.0)],
    "cni_drop_ratio": [({}, 0.85)],
    "cni_sampling_target_ratio": [({"class": "exec"}, 0.25), ({"class": "netns"}, 1.0)],
}


def test_load_is_told_with_what_is_thinned_and_the_learned_rules() -> None:
    """Level, load and forecast, ratios below 1, and each learned rule with its name, ratio and time to live."""
    rules = [
        LearnedRule("command", "<b>curl</b>", "connection", 0.0123456, 59.4),
        *(LearnedRule("address", f"192.0.2.{number}", "exec", 0.1, 60) for number in range(RULE_LIMIT + 4)),
    ]
    text = Document(render(lambda name: LOAD.get(name, []), STATUS, None, rules)).text
    for said in ("critical", "61k events/s, 70k planned for · 15% kept", "exec 0.25", "0.0123", "59 s", "5 more rules"):
        assert said in text
    assert "<b>curl</b>" in text
    assert "netns 1" not in text
    assert "Learned rule" not in render(lambda name: LOAD.get(name, []), STATUS)


def test_without_load_management_nothing_is_said_of_load() -> None:
    """No level, no block."""
    assert "<h2>Load</h2>" not in render(lambda _: [], STATUS)
