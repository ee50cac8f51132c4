"""Dashboard and alerts: their metrics exist, and promtool runs the tests of the alerts."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.deploy.deploy_support import DEPLOY, check, program

from fidelora.jobs.memory import MemoryStore
from fidelora.server.metrics import Metrics
from fidelora.workers.attempt import AttemptReport
from fidelora.workers.pool import WorkerPool

PROMETHEUS = DEPLOY / "prometheus"
PROMTOOL_PACKAGE = "apt-get install prometheus"
DASHBOARD = json.loads((DEPLOY / "grafana" / "fidelora.json").read_text())
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"][0]["rules"]
PROMETHEUS_METRICS = {"up", "ALERTS"}
WORDS = {  # functions, operators and label names of PromQL in the expressions
    *("and", "by", "count", "delta", "histogram_quantile", "increase", "max", "min", "rate", "sum"),
    "sort_desc",
}


def expressions() -> Iterator[str]:
    """Yield the PromQL of every panel, annotation and alert."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (one["expr"] for one in DASHBOARD["annotations"]["list"])
    yield from (rule["expr"] for rule in RULES)


def exported(folder: Any) -> dict[str, set[str]]:
    """Return the names of the samples of servers and workers, with the names of their labels."""
    store = MemoryStore()
    metrics = Metrics(store, WorkerPool(store, []), {"data": folder})
    metrics.attempt_ended(AttemptReport("a", "failed", "TIMEOUT", 1.0, 1, 1, {}, 1, 1))
    metrics.answered("GET", "/health", 200, 0.1)
    names: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_every_metric_and_label_exists(tmp_path):
    names = exported(tmp_path)
    count = 0
    for expression in expressions():
        for metric, selector in re.findall(
            r"\b(fidelora_\w+|up|ALERTS)(?:\{([^}]*)\})?", expression
        ):
            if metric in PROMETHEUS_METRICS:
                continue
            assert metric in names, f"{metric} is not a metric: {expression}"
            labels = set(re.findall(r"(\w+)\s*(?:=|!=)~?\"", selector))
            assert labels <= names[metric] | {"instance", "job"}, expression
            count += 1
        words = re.sub(r"\"[^\"]*\"|\{[^}]*\}|\[[^]]*\]|\([a-z_, ]+\)", " ", expression)
        left = set(re.findall(r"\b[a-z_]\w*", words)) - WORDS - PROMETHEUS_METRICS - names.keys()
        assert not left, f"{sorted(left)} in {expression}"
    assert count > 30


def test_every_metric_is_on_the_dashboard(tmp_path):
    used = "".join(expressions())
    for name in exported(tmp_path):
        metric = re.sub(r"_(bucket|count|sum)$", "", name)
        assert metric in used, f"no panel shows {metric}"


def test_grouping_uses_existing_labels(tmp_path):
    names = exported(tmp_path)
    for expression in expressions():
        metrics = re.findall(r"\bfidelora_\w+", expression)
        known = {"instance", "job"}.union(*(names[metric] for metric in metrics))
        for group in re.findall(r"by \(([^)]*)\)", expression):
            assert set(group.split(", ")) <= known, expression


def test_panels_do_not_overlap_and_have_titles():
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert panel["title"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in cells, panel["title"]
                cells.add((x, y))
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_alerts_have_severity_summary_and_a_test():
    tested = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    quiet = {one["alertname"] for one in tested[0]["alert_rule_test"]}
    fired = str(tested[1]["promql_expr_test"])
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        assert rule["alert"] in quiet
        assert rule["alert"] in fired


def test_the_page_lists_every_alert():
    page = (DEPLOY.parent / "docs" / "how-to" / "deploy.md").read_text()
    assert re.findall(r"^\| `(Fidelora\w+)` \|", page, flags=re.M) == [
        rule["alert"] for rule in RULES
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "rules.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=["rules", "configuration", "tests"],
)
def test_promtool_accepts(arguments):
    check(program("promtool", PROMTOOL_PACKAGE), *arguments, folder=PROMETHEUS)


def test_promtool_parses_the_expressions_of_the_dashboard(tmp_path):
    promtool = program("promtool", PROMTOOL_PACKAGE)
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "1m")}
        for index, expression in enumerate(expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    check(promtool, "check", "rules", str(file))
