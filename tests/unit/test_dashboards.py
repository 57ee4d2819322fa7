"""The dashboards as Grafana loads them: structure, layout, variables, and whether they draw what the catalogue has."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from real.prometheus import DASHBOARDS, alerts, expressions, panels, substitute

from exporter.catalog import FAMILIES, Family, Kind

TYPES = {"timeseries", "stat", "table", "heatmap", "state-timeline"}
COLUMNS = 24
OF_PROMETHEUS = {"job", "instance", "le"}
GRAFANAS_OWN = {"__rate_interval"}

NOT_DRAWN = {
    "cni_container_mount_info": "detail of one container, looked up and not watched",
    "cni_container_annotation_info": "as the labels below",
    "cni_container_label_info": "there to be joined in queries of the user's own",
    "cni_container_environment_info": "detail of one container, looked up and not watched",
}

# One label begins as families do.
_FAMILY = re.compile(r"\b(?!cni_version\b)(cni_[a-z0-9_]+)(?:\{([^}]*)\})?")
_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")
_LISTED = re.compile(r"\b(?:by|on|ignoring|without|group_left|group_right) \(([^)]*)\)")
_VARIABLE = re.compile(r"\$\{?(\w+)")


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def _family(name: str) -> Family:
    """Find the family of a name in a query; KeyError where the catalogue has none."""
    stripped = _SUFFIX.sub("", name)
    if stripped in FAMILIES and FAMILIES[stripped].kind is Kind.HISTOGRAM:
        return FAMILIES[stripped]
    return FAMILIES[name]


def _families(expression: str) -> list[Family]:
    return [_family(name) for name, _ in _FAMILY.findall(expression)]


def _drawn(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in panels(dashboard) if panel["type"] != "row"]


def _queries() -> list[Any]:
    asked = [pytest.param(text, id=where) for where, text in expressions()]
    return asked + [pytest.param(alert["expr"], id=alert["alert"]) for alert in alerts()]


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.name)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each dashboard in turn."""
    return _load(request.param)


def test_the_dashboards_are_found() -> None:
    """The tests below have something to look at."""
    assert {"overview.json", "kernel.json", "sampling.json", "cni-config.json"} <= {path.name for path in DASHBOARDS}


def test_dashboards_are_told_apart() -> None:
    """Each dashboard has a fixed identity of its own, so that provisioning and links hold."""
    identities = [_load(path)["uid"] for path in DASHBOARDS]
    assert len(set(identities)) == len(identities)
    assert all(re.fullmatch(r"[a-z0-9-]{1,40}", identity) for identity in identities)


def test_dashboard_has_what_provisioning_needs(dashboard: dict[str, Any]) -> None:
    """No database id, a schema that Grafana 10.4 and later reads as it is, a title and tags."""
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] == 39
    assert dashboard["title"]
    assert "cni-exporter" in dashboard["tags"]
    assert "__inputs" not in dashboard


def test_panel_ids_are_unique(dashboard: dict[str, Any]) -> None:
    """Rows and panels each have an id of their own."""
    ids = [panel["id"] for panel in panels(dashboard)]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    """Each panel lies inside the 24 columns and on no other; a collapsed row's panels are laid out by themselves."""
    collapsed = [row["panels"] for row in dashboard["panels"] if row.get("panels")]
    for group in [dashboard["panels"], *collapsed]:
        cells = [cell for panel in group for cell in _cells(panel["gridPos"])]
        assert len(set(cells)) == len(cells)
        assert all(0 <= column < COLUMNS for column, _ in cells)


def _cells(place: dict[str, int]) -> list[tuple[int, int]]:
    across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return list(itertools.product(across, down))


def test_panels_are_of_current_types_and_say_what_they_show(dashboard: dict[str, Any]) -> None:
    """No deprecated panel; each has a title of its own, a sentence and a unit."""
    for panel in _drawn(dashboard):
        assert panel["type"] in TYPES, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    titles = [panel["title"] for panel in _drawn(dashboard)]
    assert len(set(titles)) == len(titles)


def test_every_query_asks_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    """No panel, query or variable is tied to the data source of one Grafana."""
    asked = [*_drawn(dashboard), *(target for panel in _drawn(dashboard) for target in panel["targets"])]
    asked += [variable for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    assert {source["datasource"]["uid"] for source in asked} == {"${datasource}"}


def test_queries_of_a_panel_are_told_apart(dashboard: dict[str, Any]) -> None:
    """Each query has a letter of its own, and a legend where the panel draws one."""
    for panel in _drawn(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]
        if panel["type"] in {"timeseries", "heatmap", "state-timeline"}:
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_variables_are_defined_and_used(dashboard: dict[str, Any]) -> None:
    """Queries use the variables of the dashboard, all of them, and no other."""
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    texts = [target["expr"] for panel in _drawn(dashboard) for target in panel["targets"]]
    used = {name for text in texts for name in _VARIABLE.findall(text)} - GRAFANAS_OWN
    assert used == defined - {"datasource"}


def test_choosing_all_includes_workloads_without_a_label(dashboard: dict[str, Any]) -> None:
    """All is any text, the empty one too: a list of the known names would hide Docker's containers and the unknown."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            assert (variable["multi"], variable["includeAll"], variable["allValue"]) == (True, True, ".*")


def test_every_selector_honours_the_choice_of_nodes(dashboard: dict[str, Any]) -> None:
    """Each selector is narrowed by job and instance; a family with workload labels by these too, but for joins."""
    for panel in _drawn(dashboard):
        for target in panel["targets"]:
            for name, matchers in _FAMILY.findall(target["expr"]):
                assert 'job=~"$job", instance=~"$instance"' in matchers, (panel["title"], name)
                if "pod" in _family(name).exported and "unless" not in target["expr"]:
                    assert 'namespace=~"$namespace", pod=~"$pod", container=~"$container' in matchers, panel["title"]


def test_rates_look_back_as_far_as_grafana_says(dashboard: dict[str, Any]) -> None:
    """Every counter and bucket is under rate() or increase() over $__rate_interval, at any zoom and scrape interval."""
    for panel in _drawn(dashboard):
        for target in panel["targets"]:
            counted = [family for family in _families(target["expr"]) if family.kind is not Kind.GAUGE]
            rated = re.findall(r"\b(?:rate|increase)\(cni_[^]]*\[\$__rate_interval\]\)", target["expr"])
            assert len(counted) == len(rated), (panel["title"], target["expr"])


def test_legends_and_columns_name_labels_that_the_query_keeps(dashboard: dict[str, Any]) -> None:
    """A legend's {{label}} and a table's renamed column exist in the answer."""
    for panel in _drawn(dashboard):
        for target in panel["targets"]:
            kept = {label for listed in _LISTED.findall(target["expr"]) for label in listed.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))) <= kept, panel["title"]
        if panel["type"] == "table":
            columns = _columns(panel)
            text = " ".join(target["expr"] for target in panel["targets"])
            families = {label for family in _families(text) for label in family.exported}
            labels = {column for column in columns if not column.startswith(("Value", "Time", "__name__"))}
            assert labels <= families | OF_PROMETHEUS, panel["title"]
            values = {column for column in columns if column.startswith("Value #")}
            letters = {f"Value #{target['refId']}" for target in panel["targets"]}
            assert values == (letters if len(letters) > 1 else set()), panel["title"]


def _columns(panel: dict[str, Any]) -> set[str]:
    organised = panel["transformations"][-1]["options"]
    return set(organised["renameByName"]) | set(organised["excludeByName"])


@pytest.mark.parametrize("expression", _queries())
def test_query_uses_what_the_catalogue_has(expression: str) -> None:
    """Families, labels in matchers and labels in by, on and group_left of dashboards and alerts exist."""
    families = _families(expression)
    for name, matchers in _FAMILY.findall(expression):
        assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers)) <= {*_family(name).exported, *OF_PROMETHEUS}
    known = {label for family in families for label in family.exported} | OF_PROMETHEUS
    listed = {label for part in _LISTED.findall(expression) for label in part.split(", ") if label}
    assert listed <= known


def test_every_family_is_drawn() -> None:
    """Each family of the catalogue is on a panel, but for those with a reason not to be; and none of these is."""
    texts = [target["expr"] for path in DASHBOARDS for panel in _drawn(_load(path)) for target in panel["targets"]]
    drawn = {family.name for text in texts for family in _families(text)}
    assert {family.name for family in FAMILIES.values() if not family.internal} - drawn == set(NOT_DRAWN)


def test_no_variable_of_grafana_is_left_in_an_expression() -> None:
    """What the tests ask Prometheus is what Grafana would ask: nothing is left to put in."""
    assert [where for where, text in expressions() if "$" in text] == []
    assert substitute('rate(x{a=~"$job|"}[$__rate_interval])') == 'rate(x{a=~".*|"}[10s])'


def test_provisioning_file_leads_to_the_dashboards() -> None:
    """The provider is of the kind that reads files, and lets nobody edit by hand what the next start would undo."""
    providers = yaml.safe_load((DASHBOARDS[0].parent / "provisioning.yaml").read_text(encoding="utf-8"))
    (provider,) = providers["providers"]
    assert (providers["apiVersion"], provider["type"], provider["allowUiUpdates"]) == (1, "file", False)
    assert provider["options"]["path"].startswith("/")
