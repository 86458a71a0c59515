import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

import serving

FOLDER = Path(serving.__file__).parent / "dashboards"
DASHBOARD = json.loads((FOLDER / "hybrid-drift.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((FOLDER / "hybrid-drift.rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
SHOWN = {
    "model": "shop",
    "version": 2,
    "time": "2026-11-29T12:00:00+00:00",
    "columns": [{"column": "age", "psi": 0.3, "low": 0.26, "high": 0.4, "verdict": "drifted"}],
    "privacy": {"epsilon": 0.5, "left": 0.5},
}
EXPRESSIONS = [
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *(rule["expr"] for rule in RULES),
    *(variable["query"] for variable in DASHBOARD["templating"]["list"]),
]


@pytest.fixture(scope="module")
def exposed():
    """Metric -> its labels, as `hybrid drift --metrics` writes them."""
    from hybrid.cli.drift import _fill

    registry = CollectorRegistry()
    _fill(registry, SHOWN)
    return {sample.name: set(sample.labels) for family in registry.collect() for sample in family.samples}


def test_panels_and_rules_name_metrics_that_are_written_and_leave_none_out(exposed):
    """A misspelt name would stay empty in silence; what nobody can see need not be written."""
    assert {name for text in EXPRESSIONS for name in re.findall(r"hybrid_\w+", text)} == set(exposed)


def test_legends_and_summaries_name_labels_that_their_metric_has(exposed):
    """Else nothing is written in their place."""
    texts = [(t["expr"], t["legendFormat"]) for panel in DASHBOARD["panels"] for t in panel["targets"]]
    texts += [(rule["expr"], rule["annotations"]["summary"]) for rule in RULES]
    for expression, text in texts:
        names = set(re.findall(r"{{ ?(?:\$labels\.)?(\w+) ?}}", text))
        assert names
        assert names <= exposed[re.search(r"hybrid_\w+", expression)[0]]


def test_panels_do_not_overlap_and_say_what_they_show():
    """Grafana would move them; each has a title, a unit and a sentence."""
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
