"""The alert rules as Prometheus loads them: conventions, unit tests by promtool, a runbook for each."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from real.prometheus import RULES, alerts

ROOT = Path(__file__).parents[2]
UNIT_TESTS = sorted((ROOT / "alerts" / "tests").glob("*.test.yaml"))
RUNBOOKS = ROOT / "docs" / "runbooks.md"
RUNBOOK_URL = "https://github.com/cni-exporter/cni-exporter/blob/main/docs/runbooks.md"
QUESTIONS = ["What it means", "How bad it is", "What to look at first", "How to end it"]
SECONDS = {"s": 1, "m": 60, "h": 3600}

each_alert = pytest.mark.parametrize("alert", list(alerts()), ids=lambda alert: alert["alert"])


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * SECONDS[duration[-1]]


def _promtool(*arguments: str | Path) -> str:
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _cases() -> list[tuple[str, bool]]:
    """List what the unit tests expect: (alert, whether it fires)."""
    tests = [test for path in UNIT_TESTS for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]]
    return [(case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]]


@pytest.mark.real("promtool")
def test_promtool_accepts_the_rules() -> None:
    """Every rule parses, and none is there twice."""
    said = _promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)
    assert f"SUCCESS: {len(list(alerts()))} rules found" in said


@pytest.mark.real("promtool")
@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_rules_fire_where_they_must_and_only_there(path: Path) -> None:
    """The unit tests of the rules hold: labels and texts of what fires, silence in health and across restarts."""
    _promtool("test", "rules", path)


@pytest.mark.real("promtool")
@each_alert
def test_unit_tests_notice_a_rule_that_is_always_or_never_true(alert: dict[str, Any], tmp_path: Path) -> None:
    """Each alert's tests can fail in both ways: none is unreachable, none is always there."""
    for broken in ("vector(1)", "vector(0) > 1"):
        with pytest.raises(AssertionError, match=alert["alert"]):
            _promtool("test", "rules", *_tests_of(alert["alert"], broken, tmp_path))


def _tests_of(name: str, broken: str, directory: Path) -> list[Path]:
    """Write the rules with one expression replaced, and of the unit tests only those of that alert."""
    rules = directory / "broken.rules.yaml"
    changed = [{**alert, "expr": broken, "for": "0s"} for alert in alerts() if alert["alert"] == name]
    rules.write_text(yaml.safe_dump({"groups": [{"name": "broken", "rules": changed}]}), encoding="utf-8")
    written = []
    for path in UNIT_TESTS:
        suite = yaml.safe_load(path.read_text(encoding="utf-8"))
        suite["rule_files"] = [str(rules)]
        suite["tests"] = [test for test in suite["tests"] if test["alert_rule_test"][0]["alertname"] == name]
        if suite["tests"]:
            written.append(directory / path.name)
            written[-1].write_text(yaml.safe_dump(suite), encoding="utf-8")
    return written


@each_alert
def test_alert_has_a_case_where_it_fires_and_one_where_it_does_not(alert: dict[str, Any]) -> None:
    """No alert is without tests of both kinds."""
    assert {fires for name, fires in _cases() if name == alert["alert"]} == {True, False}


def test_unit_tests_are_of_alerts_that_exist() -> None:
    """A misspelt name in a unit test expects silence from nobody."""
    assert {name for name, _ in _cases()} == {alert["alert"] for alert in alerts()}


@each_alert
def test_alert_follows_the_conventions(alert: dict[str, Any]) -> None:
    """Name, severity and texts are as promised, and the texts name the node."""
    assert re.fullmatch(r"Cni[A-Za-z]+", alert["alert"])
    assert alert["labels"] in ({"severity": level} for level in ("critical", "warning", "info"))
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert "$labels.instance" in alert["annotations"]["summary"]
    assert "$labels.instance" in alert["annotations"]["description"]


@each_alert
def test_alert_waits_longer_than_it_looks_back(alert: dict[str, Any]) -> None:
    """One burst fills a range for as long as the range is; an alert that waits longer cannot fire for it."""
    ranges = [_seconds(text) for text in re.findall(r"\[(\w+)\]", alert["expr"])]
    assert _seconds(alert["for"]) > max(ranges, default=0)


@each_alert
def test_alert_survives_a_restart_of_the_exporter(alert: dict[str, Any]) -> None:
    """Families are read over a range, which bridges a gap, and aggregated to labels that a new pod does not change."""
    families = re.findall(r"\bcni_\w+(?:\{[^}]*\})?(\[\w+\])?", alert["expr"])
    assert all(families), "a family is read without a range"
    kept = re.findall(r"\b(?:sum|max) by \(([^)]*)\)", alert["expr"])
    assert kept
    assert all(labels.startswith("job, instance") for labels in kept)


@each_alert
def test_texts_use_labels_that_the_alert_has(alert: dict[str, Any]) -> None:
    """Every $labels.NAME of an annotation is a label that the expression keeps."""
    kept = {label for listed in re.findall(r"\bby \(([^)]*)\)", alert["expr"]) for label in listed.split(", ")}
    used = {label for text in alert["annotations"].values() for label in re.findall(r"\$labels\.(\w+)", text)}
    assert used <= kept
    if "pod" in kept:
        assert {"namespace", "pod", "container", "instance"} <= used


@each_alert
def test_alert_leads_to_its_runbook(alert: dict[str, Any]) -> None:
    """The link's anchor is that of a section, and the section answers the four questions."""
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOK_URL}#{alert['alert'].lower()}"
    sections = re.split(r"^## ", RUNBOOKS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(f"{alert['alert']}\n")]
    assert re.findall(r"^\*\*(.+?)\.\*\*", section, re.MULTILINE) == QUESTIONS


def test_every_runbook_is_of_an_alert() -> None:
    """No section is left behind by an alert that was renamed."""
    headings = re.findall(r"^## (Cni\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == [alert["alert"] for alert in alerts()]
