"""The coupon example: its tables, and what its report says of them."""

import json
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from examples.coupon import prepare, report, survey
from hybrid.federation.population import import_table
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

FIGURES = {
    "auc": {"server_only": 0.71, "central": 0.76, "federated": 0.74, "federated_minus_server_only_low": 0.02},
    "log_loss": {"server_only": 0.61, "central": 0.57, "federated": 0.59},
    "fold_1": {"auc": {"server_only": 0.71, "central": 0.76, "federated": 0.74}},
    "epsilon": 7.9,
    "requests": 2500,
    "answered": 2500,
    "predicted": 2500,
    "max_abs_difference": 1e-7,
    "latency_ms": {"p50": 20.0, "p99": 50.0},
    "kafka": {"version": "4"},
    "triton": {"version": "2"},
    "broker_records": 900,
}


def test_a_run_of_equal_profiles_is_one_user():
    """The survey's 12,684 rows are of 587 people (see data/SOURCE.md), and each person's rows are contiguous."""
    rows = survey.load()
    assert (len(rows), rows.user.nunique()) == (12_684, 587)
    assert (rows.user != rows.user.shift()).sum() == 587


def test_an_offer_s_rate_counts_the_given_rows_only():
    """Two of three take the coffee within a day: 2/3; the other offer has a rate of its own."""
    offers = [("Coffee House", "1d", 1), ("Coffee House", "1d", 1), ("Coffee House", "1d", 0), ("Bar", "2h", 0)]
    rows = pd.DataFrame(offers, columns=["coupon", "expiration", "Y"]).assign(offer_id=["c", "c", "c", "b"])
    rates = survey.offers(rows).set_index("offer_id").acceptance_rate
    assert rates.to_dict() == {"b": 0.0, "c": pytest.approx(2 / 3)}


def test_held_out_labels_are_in_no_rate(tmp_path):
    """Turning every label of the held-out people leaves the offers' table as it was."""
    rows = survey.load()
    tables = []
    for turned in (False, True):
        workspace = Workspace(tmp_path / str(turned) / ".hybrid")
        file = tmp_path / f"{turned}.parquet"
        rows.to_parquet(file)
        population = import_table(file, user="user", name="coupon", workspace=workspace)
        held_out = population.fold(1, 5)
        if turned:
            mine = np.repeat(held_out, np.diff(population.offsets))
            labels = np.where(mine, 1 - population.column("Y"), population.column("Y"))
            place = population.table.column_names.index("Y")
            object.__setattr__(population, "table", population.table.set_column(place, "Y", [labels]))
        tables.append(pd.read_parquet(prepare.write_offers(population, ~held_out, tmp_path / "offers.parquet")))
    pd.testing.assert_frame_equal(*(table.drop(columns="event_timestamp") for table in tables))


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"answered": 2499}, ["every request is answered with a prediction"]),
        ({"requests": 10, "answered": 10, "predicted": 10}, ["every request is answered with a prediction"]),
        ({"max_abs_difference": None}, ["served predictions are the offline ones"]),
        ({"max_abs_difference": 2e-4}, ["served predictions are the offline ones"]),
        ({"broker_records": 0}, ["records went through the broker"]),
        ({"epsilon": 8.1}, ["the budget is kept"]),
        ({"log_loss": {"server_only": 0.6, "federated": 0.6}}, ["federated beats server only in log-loss"]),
        (
            {"auc": {"federated_minus_server_only_low": -0.001}},
            ["federated beats server only in AUC by more than chance"],
        ),
    ],
)
def test_the_demo_says_which_promise_is_broken(change, broken):
    """Each figure out of its range is named, and none that is within."""
    assert report.broken_promises(FIGURES | change) == broken


def test_the_report_is_one_page_that_fetches_nothing():
    """Well-formed, four plots inline, no reference to anything outside, and the privacy sentence in it."""
    training = TrainingRecord(
        kind="federated",
        run="r",
        population="coupon",
        users=469,
        examples=10_000,
        epsilon=7.9,
        delta=9e-4,
        rounds=200,
        mechanism="Gaussian <on> samples",
        assumption="coins",
        unit="user",
        protects="device features",
    )
    line = np.array([[0.2, 0.25], [0.8, 0.75]])
    findings = report.Findings(
        report=deepcopy(FIGURES),
        calibration_ratio=dict.fromkeys(report.KINDS, 1.0),
        reliability=dict.fromkeys(report.KINDS, line),
        curves={"oracle_auc": [(0, 0.7), (200, 0.74)]},
        epsilon_by_round=[(1, 0.3), (200, 7.9)],
        latency_ms=np.arange(1.0, 100.0),
        users=587,
        rows=12_684,
        release="as it is",
        training=training,
    )
    page = report.html(findings)
    seen = _Seen()
    seen.feed(page)
    assert seen.tags.count("svg") == 4
    assert not seen.fetched
    assert "epsilon 7.900 at delta 0.0009 per user; protects the device features" in page
    assert "200 rounds" in page
    assert "Gaussian &lt;on&gt; samples" in page
    json.dumps(findings.report)


class _Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = ("src", "href", "xlink:href")
        self.fetched += [value for name, value in attributes if name in names and not value.startswith("#")]
