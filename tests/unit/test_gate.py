"""The one gate: a secret in every label of every family, in every reason, is on no page, in no command's words."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter import config, daemon, privacy, probe, selection
from exporter.catalog import FAMILIES, Kind
from exporter.contract import Context, Monitor, Source, Unsupported
from exporter.daemon import Exporter
from exporter.privacy import REDACTED
from exporter.supervisor import Standing, Supervisor
from exporter.topology import as_text, build

TOKEN = "gh" + "p_16C7e42F292c6912E7710c838347Ae178B4a"
OWN = "project-orion"
"""Secret by a rule of the user's own."""
A = "a" * 64


class Careless(Source):
    """A source whose failure tells too much."""

    mode = "careless"

    def open(self, context: Context) -> None:
        super().open(context)
        raise Unsupported(f"refused {TOKEN} {OWN}", f"try {TOKEN} {OWN}")

    def update(self) -> None:
        """Never reached."""


@pytest.fixture
def settings(tmp_path: Path) -> config.Loaded:
    """A configuration with a rule of its own, that needs nothing of the host."""
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "privacy": {"deny_values": ["project-[a-z]+"]},
                "metrics": {"identity_grace": "0s"},
                "cni_config": {"use_ebpf": False},
                "feed": {"enabled": False},
                "web": {"listen_address": "127.0.0.1:0"},
            }
        )
    )
    return config.load(path, None, {}, {})


@pytest.fixture
def exporter(settings: config.Loaded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    """An exporter whose families and standings are full of secrets; no monitor runs."""
    monkeypatch.setattr(selection, "monitors", lambda *_: [])
    monkeypatch.setattr(Supervisor, "standings", lambda _: [standing(f"why {TOKEN}"), standing(f"why {OWN}")])
    exporter = Exporter(settings)
    for secret in (TOKEN, OWN):
        for family in FAMILIES.values():
            if family.key and family.owner != "metrics":
                fill(exporter, family.name, secret)
    yield exporter
    exporter.stop()


def standing(reason: str) -> Standing:
    """Say that a monitor stands on a fallback for a reason."""
    return Standing("links", "netlink", True, True, reason, reason, False, False, True)  # noqa: FBT003 - its fields


def fill(exporter: Exporter, name: str, secret: str) -> None:
    """Give a family a series that is a secret all over, of a container that is known under that name."""
    family = FAMILIES[name]
    parts = {"container_id": A, "netns_id": "7:1", "owner": A, "netns": "7"}
    key = tuple(parts.get(part, secret) if part in (*family.hidden, "container_id") else secret for part in family.key)
    writer = exporter.store.owned(family.owner)
    if family.kind is Kind.HISTOGRAM:
        writer.observe(name, 1.0, key)
    elif family.kind is Kind.COUNTER:
        writer.add(name, key)
    else:
        writer.replace({name: {key: 1.0}})


@pytest.mark.parametrize(
    "way",
    [
        lambda one: one.metrics("", "")[1].decode(),
        lambda one: one.metrics("application/openmetrics-text", "")[1].decode(),
        lambda one: one.page(),
        lambda one: json.dumps(one.topology()),
        lambda one: as_text(build(one.store.read, "node")),
        lambda one: one.healthy()[1],
        lambda one: one.ready()[1],
    ],
    ids=["text", "OpenMetrics", "page", "topology.json", "topology", "healthy", "ready"],
)
def test_no_way_out_shows_a_secret(exporter: Exporter, way: Callable[[Exporter], str]) -> None:
    """Neither what looks like a secret nor what the user's own rule says; that something was there can be seen."""
    said = way(exporter)
    assert TOKEN not in said
    assert OWN not in said
    assert REDACTED in said


def test_check_shows_no_secret(settings: config.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reasons and remedies of sources are the words of clients and daemons: they pass the gate too."""
    monkeypatch.setattr(selection, "monitors", lambda *_: [(Monitor("careless", [Careless], 1.0), ())])
    said = probe.as_text(probe.findings(settings.config))
    assert TOKEN not in said
    assert OWN not in said
    assert said.count(REDACTED) == 2


def test_a_reload_brings_new_rules_everywhere(
    exporter: Exporter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a reload with another rule, metrics, health and log go by that one."""
    logged: list[privacy.Rules] = []
    monkeypatch.setattr(daemon.logs, "setup", lambda *arguments: logged.append(arguments[2]))
    changed = json.loads((tmp_path / "config.json").read_text())
    changed["privacy"] = {"deny_values": ["why"]}
    (tmp_path / "next.json").write_text(json.dumps(changed))
    assert f"(why {REDACTED})" in exporter.healthy()[1]
    exporter.reload(lambda: config.load(tmp_path / "next.json", None, {}, {}))
    assert exporter.healthy()[1] == f"links: netlink ({REDACTED})\n" * 2
    assert OWN in exporter.metrics("", "")[1].decode()
    assert [rules.safe_label("why not") for rules in logged] == [REDACTED]
