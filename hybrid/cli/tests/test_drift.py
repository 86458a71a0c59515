import json
import os
import stat
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from hybrid.analytics.drift import Period
from hybrid.cli import app
from hybrid.cli.drift import Every, _period, last_of_each, rows_in
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.network import Network
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.version import TrainingRecord
from hybrid.workspace import Workspace

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)  # a Sunday


def drift(*words):
    return CliRunner().invoke(app, ["drift", *words], catch_exceptions=False)


@pytest.fixture
def periods(project, tmp_path):
    """`taxi`, which may spend 40 a week on two periods, and 300 people each of `early`, `late` and, shifted, `far`."""
    file = tmp_path / "model.py"
    declared = file.read_text().replace("import Clear,", "import Clear, Drift,")
    file.write_text(declared.replace('merge="server"', 'merge="server", drift=Drift(epsilon=40)'))
    project("register", "model.py")
    rng = np.random.default_rng(0)
    for name, mean in (("early", 0.0), ("late", 0.0), ("far", 2.0)):
        rows = pd.DataFrame({"person": np.arange(300), "zone_id": "centre", "trips": rng.normal(mean, 1, 300)})
        rows.to_parquet(f"{name}.parquet")  # without the label, which nobody knows yet
        project("population", "import", f"{name}.parquet", "--user", "person", "--name", name)
    return project


def test_a_model_that_declares_no_budget_is_not_watched(project):
    """What a week may cost is said by the model, or nothing is spent."""
    with pytest.raises(ConfigError, match="add drift=Drift"):
        drift("taxi", "--reference", "taxi", "--population", "taxi", "--reference-until", "2026-01-01")


def test_a_period_is_paid_once_and_one_too_many_is_refused(periods, tmp_path):
    """Two periods use the week up: the shift is found; again it costs nothing; another is refused and costs nothing."""
    words = ("taxi", "--reference", "early", "--seed", "1", "--json")
    shown = json.loads(drift(*words, "--population", "far").stdout)
    assert (shown["drifted"], shown["version"]) == (["trips"], None)
    assert shown["columns"][0]["low"] >= 0.25
    assert shown["privacy"]["epsilon"] == pytest.approx(40, rel=1e-2)
    again = json.loads(drift(*words, "--population", "far").stdout)
    assert again["columns"] == shown["columns"]
    assert (again["reference"]["kept"], again["current"]["kept"]) == (True, True)
    folder = tmp_path / "runs" / shown["privacy"]["run"]
    ledger = (folder / "ledger.jsonl").read_text()
    assert ledger.count('"spent"') == 2
    with pytest.raises(BudgetExceeded):
        drift(*words, "--population", "late")
    assert (folder / "ledger.jsonl").read_text() == ledger
    assert "none: a week of watching for drift" in periods("privacy", "taxi")


def test_metrics_can_be_read_by_prometheus_and_fail_has_a_status_of_its_own(periods, tmp_path):
    """Any may read the file; it says what the table says, and no more names of labels than three."""
    words = ("taxi", "--reference", "early", "--population", "far", "--metrics", "d.prom", "--plot", "d.svg", "--fail")
    done = drift(*words)
    assert done.exit_code == 3
    assert "taxi: drifted: trips" in done.stdout
    assert "protects the device features" in done.stdout
    assert stat.S_IMODE(os.stat("d.prom").st_mode) == 0o644
    families = text_string_to_metric_families((tmp_path / "d.prom").read_text())
    samples = {sample.name: sample for family in families for sample in family.samples}
    labels = {"model": "taxi", "version": "", "column": "trips"}
    assert samples["hybrid_drift_alert"].labels == labels
    assert samples["hybrid_drift_alert"].value == 1
    low, psi, high = (samples[f"hybrid_drift_psi{end}"].value for end in ("_low", "", "_high"))
    assert 0.25 <= low <= psi <= high
    spent, left = (samples[f"hybrid_drift_epsilon_{name}"].value for name in ("spent", "left"))
    assert spent + left == pytest.approx(40)
    assert (tmp_path / "d.svg").read_text().startswith("<?xml")


def test_the_price_of_a_period_can_only_be_lowered(periods):
    """At most what the week may cost; a lower one leaves the rest."""
    words = ("taxi", "--reference", "early", "--population", "late", "--seed", "1")
    with pytest.raises(ConfigError, match=r"--epsilon must be in \(0, 40\]"):
        drift(*words, "--epsilon", "41")
    shown = json.loads(drift(*words, "--epsilon", "5", "--json").stdout)
    assert shown["current"]["epsilon"] == pytest.approx(5, rel=1e-2)
    assert shown["privacy"]["left"] > 30
    assert drift(*words, "--fail").exit_code == 0


def test_scores_of_a_version_are_watched_beside_the_features(periods, tmp_path):
    """Rows need no label; every person has a score."""
    registry, network = Registry(Workspace.current()), Network.build(load_model(tmp_path / "model.py"))
    training = TrainingRecord(kind="federated", run="r", population="early", users=300, examples=300)
    digest = registry.definition_hash("taxi")
    registry.create_version("taxi", weights=network.weights(), training=training, curves={}, expected_hash=digest)
    shown = json.loads(drift("taxi:1", "--population", "late", "--seed", "1", "--json").stdout)
    assert shown["reference"]["population"] == "early"  # what it was trained on
    assert [column["column"] for column in shown["columns"]] == ["trips", "score"]
    assert sum(shown["columns"][1]["current"][:-1]) == pytest.approx(1, abs=0.1)


def test_that_drift_is_not_declared_is_said_first(project):
    """A model without a budget for it has no use for another option yet."""
    with pytest.raises(ConfigError, match="drift of 'taxi' must be declared: add drift=Drift"):
        drift("taxi")


def test_a_population_is_not_compared_with_itself(periods):
    """Nor is one without times cut into periods."""
    with pytest.raises(ConfigError, match="the reference must be another"):
        drift("taxi", "--population", "early")
    with pytest.raises(ConfigError, match="must have a time"):
        drift("taxi", "--population", "early", "--since", "2026-11-01")


@pytest.mark.parametrize(
    ("options", "since", "until"),
    [
        ((None, None, None), None, None),
        (("2026-11-01", None, None), datetime(2026, 11, 1, tzinfo=UTC), None),
        ((None, None, Every.DAY), datetime(2026, 11, 28, tzinfo=UTC), datetime(2026, 11, 29, tzinfo=UTC)),
        ((None, None, Every.WEEK), datetime(2026, 11, 16, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)),
        ((None, "2014-06-16", Every.WEEK), datetime(2014, 6, 9, tzinfo=UTC), datetime(2014, 6, 16, tzinfo=UTC)),
    ],
)
def test_a_period_is_the_last_whole_one(options, since, until):
    """Days and ISO weeks in UTC, before --until, or before now."""
    assert _period(*options, NOW) == (since, until)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("2026-11-02", "2026-11-01", None), "--since must be before --until"),
        (("2026-11-02", None, Every.DAY), "--since must be left out"),
        (("yesterday", None, None), "--since must be a time"),
    ],
)
def test_options_that_say_no_period_are_refused(options, message):
    """Each by its name."""
    with pytest.raises(ConfigError, match=message):
        _period(*options, NOW)


def test_of_each_person_the_last_row_in_the_period_counts():
    """Rows of the 1st to the 6th, people with 3, 1 and 2: from the 2nd to the 5th it is the 3rd, 4th and 5th."""
    days = np.array([f"2026-11-0{day}" for day in range(1, 7)], "datetime64[us]")
    population = SimpleNamespace(name="p", time="day", column=lambda name: days)
    ends = {"since": datetime(2026, 11, 2, tzinfo=UTC), "until": datetime(2026, 11, 6, tzinfo=UTC)}
    rows = rows_in(population, Period(population="p", imported=NOW, **ends), None)
    assert rows.tolist() == [1, 2, 3, 4]
    assert last_of_each(rows, np.array([0, 3, 4, 6])).tolist() == [2, 3, 4]
    assert last_of_each(rows[:2], np.array([0, 3, 4, 6])).tolist() == [2]
