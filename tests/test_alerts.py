"""Alerts and dashboard: they speak of metrics that exist, and lead to sections that do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from pages import anchors

import telemetry

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARD = ROOT / "docker" / "grafana" / "mailfleet.json"

KNOWN = {name: (kind, set(labels)) for name, kind, labels, _, _ in telemetry.declared()}
#: A metric with its selector, as it stands in a query.
SELECTED = re.compile(r"(mailfleet_\w+)(?:\{([^}]*)\})?")


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[tuple[str, str]]:
    panels = orjson.loads(DASHBOARD.read_bytes())["panels"]
    shown = [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]
    return [(alert["alert"], alert["expr"]) for alert in alerts()] + shown


def strange(query: str) -> list[str]:
    """What of a query is neither a metric of ours nor one of its labels."""
    found = []
    for name, selector in SELECTED.findall(query):
        kind, labels = KNOWN.get(name) or KNOWN.get(re.sub("_(bucket|sum|count)$", "", name), (None, set()))
        series = kind is not None and (kind == "histogram") == (name not in KNOWN)
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        found += [name] if not series else sorted(used - labels)
    return found


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: value[:40])
def test_every_query_names_metrics_and_labels_that_exist(where: str, query: str) -> None:
    assert SELECTED.search(query), where
    assert strange(query) == [], where


def test_a_query_of_a_metric_or_label_that_does_not_exist_would_be_found() -> None:
    assert strange("rate(mailfleet_emails[5m])") == ["mailfleet_emails"]
    assert strange("mailfleet_emails_total_count") == ["mailfleet_emails_total_count"]
    assert strange("mailfleet_stage_duration_seconds") == ["mailfleet_stage_duration_seconds"]
    assert strange('mailfleet_emails_total{setp="sent"}') == ["setp"]
    assert strange("mailfleet_stage_duration_seconds_bucket") == []


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_every_alert_says_how_urgent_it_is_what_is_seen_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert alert["annotations"]["summary"]
    document, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor in anchors(ROOT / document)


def test_every_alert_is_seen_firing_by_a_unit_test_and_all_are_seen_silent() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yaml").read_text())["tests"]
    expected = [test["promql_expr_test"][0]["exp_samples"] for test in tests]
    fired = {re.findall('"(.+)"', sample["labels"])[0] for samples in expected for sample in samples}
    assert fired == {alert["alert"] for alert in alerts()}
    assert [] in expected


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed: bin/test does so where it may")
def test_the_alerts_unit_tests_pass() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts.test.yaml"]):
        ended = subprocess.run(
            ["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_dashboards_panels_do_not_lie_over_each_other_and_have_ids_of_their_own() -> None:
    panels = orjson.loads(DASHBOARD.read_bytes())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)


# Declarations


def test_the_reference_of_metrics_is_the_one_that_the_declarations_make() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text()
    assert documented == telemetry.reference(), "run: python -m telemetry > docs/metrics.md"


def test_every_metric_has_our_prefix_a_help_and_no_label_for_what_has_no_bound() -> None:
    assert all(name.startswith("mailfleet_") for name in KNOWN)
    assert all(help.endswith(".") for *_, help, _ in telemetry.declared())
    labels = {label for _, _, labels, _, _ in telemetry.declared() for label in labels}
    assert not labels & {"mailbox", "recipient", "sender", "tenant", "id", "error"}
