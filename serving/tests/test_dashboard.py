import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import serving
from hybrid import errors
from hybrid.messages import Predictions
from serving.telemetry import LIVE, Step, Telemetry
from serving.testing import deployment

DASHBOARD = json.loads((Path(serving.__file__).parent / "dashboards" / "hybrid-serving.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]}
EXPRESSIONS["variable model"] = next(v for v in DASHBOARD["templating"]["list"] if v["name"] == "model")["query"]
FUNCTIONS = {"sum", "rate", "histogram_quantile", "count", "by", "on", "group_left", "label_values"}
FUNCTIONS |= {"absent", "increase", "ignoring", "or", "unless", "offset"}
TARGET = {"instance", "job", "namespace"}  # labels that Prometheus adds
ROOT = Path(serving.__file__).parents[1]
CHART = ROOT / "helm" / "hybrid"
ALERTS = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["alerts"]
OURS = [alert for alert in ALERTS if "hybrid_" in alert["expr"]]  # the others are of Triton and kube-state-metrics


@pytest.fixture(scope="module")
def exposed():
    """Sample -> its labels, of a process in which everything has happened once, as Prometheus reads it."""
    telemetry = Telemetry(served=lambda: [("shop", 1)])
    for name in LIVE:
        telemetry.watch(name, lambda: 1)
    telemetry.watch_cache("embeddings", SimpleNamespace(hits=1, misses=1, bytes=1))
    with telemetry.request(None) as asking:
        asking.about(deployment())
        asking.rows = 1
        with asking.stage("decode"):
            pass
    telemetry.sent(1)
    telemetry.answered(
        Predictions(
            "shop",
            1,
            0,
            request_id=np.zeros(2, "V16"),
            status=np.array(["unknown_entity", "ok"], dtype=object),
            fallback=np.array(["constant", "none"], dtype=object),
            prediction=np.zeros(2, np.float32),
            feature_age_ms=np.ones(2, np.int64),
        )
    )
    telemetry.dead_letter("unreadable")
    step = Step()
    with step.stage("poll"), step.part(deployment(), 1, ()).stage("forward"):
        pass
    telemetry.stepped(step, 1)
    telemetry.shadowed(deployment(), 1, "ok", 0.01, np.zeros(1, np.float32))
    families = text_string_to_metric_families(generate_latest(telemetry.registry).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def metrics_of(expression):
    """Metric -> labels that its selector, or the `by` around it, names."""
    plain = re.sub(r'"[^"]*"|\$__\w+|\$\{?\w+\}?|\[[^]]*\]', "", expression)
    grouped = {name for names in re.findall(r"\bby \(([^)]*)\)", plain) for name in names.replace(" ", "").split(",")}
    plain = re.sub(r"\b(by|on|group_left) \([^)]*\)", "", plain)
    if plain.startswith("label_values("):
        plain, label = plain.removesuffix(")").split(", ")
        grouped = {label}
    found = {}
    for name, selector in re.findall(r"([A-Za-z_]\w*)(\{[^}]*\})?", re.sub(r"\b\d[\w.]*", "", plain)):
        if name not in FUNCTIONS:
            found[name] = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) | grouped
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_an_expression_names_metrics_and_labels_that_exist(exposed, expression):
    """Each name is exposed, each label is one of it; a panel of a misspelt name would stay empty in silence."""
    found = metrics_of(expression)
    assert found
    for name, labels in found.items():
        assert name in exposed
        assert labels <= exposed[name] | TARGET


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ('sum by (le, a) (rate(x_bucket{b=~"$c",d!="e{f}"}[$__rate_interval]))', {"x_bucket": {"le", "a", "b", "d"}}),
        ("histogram_quantile(0.5, x) / on () group_left () sum(y)", {"x": set(), "y": set()}),
        ("label_values(x, a)", {"x": {"a"}}),
    ],
)
def test_the_parser_of_this_test_finds_names_and_labels(expression, metrics):
    """Functions, durations, variables and values are neither."""
    assert metrics_of(expression) == metrics


def test_every_metric_has_a_panel(exposed):
    """What nobody can see need not be counted; a histogram is seen by any of its parts."""
    shown = {name for expression in EXPRESSIONS.values() for name in metrics_of(expression)}
    parts = re.compile(r"_(bucket|sum|count|total|created)$")
    ours = {parts.sub("", name) for name in exposed if name.startswith("hybrid_")}
    assert ours - {parts.sub("", name) for name in shown} == set()


def test_a_legend_names_labels_that_its_expression_keeps(exposed):
    """Else Grafana writes nothing in its place."""
    for panel in PANELS:
        for target in panel["targets"]:
            found = metrics_of(target["expr"])
            grouped = any(f"{word} by" in target["expr"] or f"{word}(" in target["expr"] for word in ("sum", "count"))
            kept = set().union(*(found.values() if grouped else (exposed[name] for name in found))) | TARGET
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in kept, panel["title"]


def test_panels_do_not_overlap_and_have_ids_of_their_own():
    """Grafana would move them, or drop one."""
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_panel_says_what_it_shows():
    """A title, a unit and a sentence."""
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.parametrize("alert", OURS, ids=lambda alert: alert["name"])
def test_an_alert_of_the_chart_reads_metrics_and_labels_that_there_are(alert, exposed):
    """What its text names is a label that its expression leaves."""
    for metric, labels in metrics_of(alert["expr"]).items():
        assert labels <= exposed[metric] | TARGET | {"le"}, (metric, labels)
    named = set(re.findall(r"\$labels\.(\w+)", alert["summary"] + alert["description"]))
    assert named <= set().union(*metrics_of(alert["expr"]).values())


def test_nobody_is_called_for_a_fault_of_who_asks():
    """What is left out: codes of status 4xx, of a caller that has gone, and of no error.

    An entity that is not known (404) is counted, since a feature store that was emptied knows none; and so is that
    there is too much to do (429), which more replicas mend.
    """
    expression = next(alert["expr"] for alert in ALERTS if alert["name"] == "HybridErrors")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServingError)]
    theirs = {kind.code for kind in kinds if 400 <= kind.status < 500} - {"unknown_entity", "overloaded"}
    assert set(re.search(r'code!~"([^"]+)"', expression)[1].split("|")) == theirs | {"ok", "cancelled"}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["name"])
def test_each_alert_says_what_to_do(alert):
    """Its runbook is a section of its name."""
    runbooks = (ROOT / "docs" / "operations" / "alerts.md").read_text()
    assert f"\n## {alert['name']}\n" in runbooks


def test_the_chart_has_the_dashboard_as_it_is():
    """Helm reads nothing beside a chart, so it is there twice."""
    assert json.loads((CHART / "dashboards" / "hybrid-serving.json").read_text()) == DASHBOARD
