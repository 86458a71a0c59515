import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.workspace import Workspace


def seeded(words):
    """Whether it is a question to a simulation: its answers here are always the same."""
    return words[0] == "evaluate" and "--devices" not in words


@pytest.fixture(scope="module")
def trained(begun, tmp_path_factory):
    """(*words) -> what a command prints, in a folder with four versions of taxi, which the tests leave as they are.

    1, production, and 2, canary, held out fold 1/4; 3 nobody; 4 fold 2/4. The run of N is "runN".
    """
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_HOME", str(folder / ".hybrid"))
        patch.chdir(folder)
        hybrid = begun(folder)
        for version, fold in enumerate((("--fold", "1/4"), ("--fold", "1/4"), (), ("--fold", "2/4")), start=1):
            hybrid("train", "taxi", *fold, "--seed", str(version), "--run", f"run{version}")
        registry = Registry(Workspace.current())
        registry.set_alias("taxi", 1, "production")
        registry.set_alias("taxi", 2, "canary")
        yield lambda *words: hybrid(*words, *(("--seed", "0") if seeded(words) else ()))


@pytest.fixture
def runs():
    """The folder of all runs."""
    return Workspace.current().runs


def test_a_version_is_measured_on_the_people_it_held_out(trained, runs):
    """Every metric with both intervals, curves, the purpose "evaluate" in the ledger, and the answer kept."""
    shown = json.loads(trained("evaluate", "taxi", "--epsilon", "4", "--run", "monday", "--json"))
    assert shown["versions"] == [{"version": 1, "aliases": ["production"]}]
    assert (shown["fold"], shown["notes"]) == ("1/4", [])
    assert 15 < shown["people"] < 40
    (found,) = shown["evaluations"]
    names = ["auc", "log_loss", "normalised_entropy", "calibration"]
    names += ["mean_prediction", "mean_label", "precision", "recall"]
    assert list(found["metrics"]) == names
    known = [metric for metric in found["metrics"].values() if metric["value"] is not None]  # noise may leave no rows
    assert len(known) >= 6
    for metric in known:
        assert metric["full"][0] <= metric["noise"][0] <= metric["value"] <= metric["noise"][1] <= metric["full"][1]
    assert {len(found["roc"][name]) for name in ("x", "y", "low", "high")} == {101}
    assert {len(found["deciles"][name]) for name in ("x", "y", "low", "high")} == {10}
    purposes = [entry.purpose for entry in Ledger.read(runs / "monday").entries]
    assert purposes == ["evaluate", "evaluate"]
    assert json.loads((runs / "monday" / "results" / "evaluate-0001.json").read_text())["shown"] == shown


def test_two_versions_are_measured_on_the_same_rows(trained):
    """Both, and the first's less the second's of each metric but the mean label; in the terminal and as a picture."""
    words = ("evaluate", "taxi@canary", "--against", "production", "--epsilon", "4")
    shown = json.loads(trained(*words, "--json"))
    assert [one["version"] for one in shown["versions"]] == [2, 1]
    first, second = (found["metrics"] for found in shown["evaluations"])
    for name, one in shown["differences"].items():
        if all(0 < (version[name]["value"] or 0) < 1 for version in (first, second)):
            assert one["value"] == pytest.approx(first[name]["value"] - second[name]["value"])
    assert "mean_label" not in shown["differences"]
    printed = trained(*words, "--no-full", "--plot", "roc.svg")
    assert "taxi:2 (canary) against taxi:1 (production), on" in printed
    assert "taxi:2 (canary) against taxi:1 (production), on" in trained(*words[:3], "taxi:1", *words[4:], "--no-full")
    assert "difference" in printed
    assert "full: not asked for" in printed


def test_metrics_on_people_that_a_version_learned_from_are_said_to_flatter(trained):
    """A version that held out nobody is measured on everybody, and that is said; not so of other people."""
    shown = json.loads(trained("evaluate", "taxi:3", "--epsilon", "1", "--json"))
    assert (shown["fold"], shown["people"]) == (None, 100)
    assert "these people were in the training of taxi:3" in shown["notes"][0]
    trained("population", "import", "rows.parquet", "--user", "person", "--name", "others")
    assert (
        json.loads(trained("evaluate", "taxi:3", "--epsilon", "1", "--population", "others", "--json"))["notes"] == []
    )


def test_another_label_column_can_be_taken(trained):
    """Of 200 rows, half have one: only they are measured."""
    rows = pd.read_parquet("rows.parquet")
    rows["later"] = np.where(np.arange(len(rows)) % 100 < 50, rows.rode, np.nan)
    rows.to_parquet("later.parquet")
    trained("population", "import", "later.parquet", "--user", "person", "--name", "later")
    shown = json.loads(
        trained("evaluate", "taxi", "--epsilon", "4", "--population", "later", "--label", "later", "--json")
    )
    assert shown["label"] == "later"
    low, high = shown["evaluations"][0]["rows"]["noise"]
    assert low <= 100 <= high


REFUSED = [
    (("taxi", "--epsilon", "4.5"), ConfigError, "--epsilon must be > 0 and at most the 4 that 'taxi' declares"),
    (("taxi@canary2", "--epsilon", "1"), NotFound, "taxi has no alias 'canary2'; it has: canary, production"),
    (("taxi:7", "--epsilon", "1"), NotFound, "taxi has no version 7"),
    (("taxi", "--against", "9", "--epsilon", "1"), NotFound, "taxi has no version 9"),
    (("taxi", "--against", "bus:1", "--epsilon", "1"), ConfigError, "--against must be an alias or a version of taxi"),
    (
        ("taxi", "--fold", "2/4", "--epsilon", "1"),
        ConfigError,
        "--fold must be people that taxi:1 did not learn from: it held out fold 1/4, got 2/4",
    ),
    (
        ("taxi", "--against", "4", "--epsilon", "1"),
        ConfigError,
        "must have held out the same people, got folds 1/4 and 2/4",
    ),
    (("taxi", "--threshold", "1", "--epsilon", "1"), ConfigError, r"--threshold must be in \(0, 1\), got 1"),
    (
        ("taxi", "--devices", "9", "--against", "canary", "--epsilon", "1"),
        ConfigError,
        "--against must be left out with --devices: a device has one version, got 'canary'",
    ),
    (("taxi", "--devices", "9", "--label", "l", "--epsilon", "1"), ConfigError, "--label must be left out with --dev"),
    (("taxi", "--devices", "9", "--epsilon", "1"), ConfigError, "has no bundle: `hybrid promote taxi 1 production`"),
]


def test_what_cannot_be_measured_is_refused(trained, runs):
    """In a sentence; nothing is spent, and no run left. In the run of a training there is nothing left to spend."""
    spent = (("taxi", "--epsilon", "1", "--run", "run1"), BudgetExceeded, r"run 'run1' has epsilon \S+ left of 4")
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    for words, error, message in [*REFUSED, spent]:
        with pytest.raises(error, match=message):
            trained("evaluate", *words)
    assert {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()} == before


def test_help_teaches_with_an_example():
    """Of both commands."""
    for command in ("analyze", "evaluate"):
        assert f"Example: hybrid {command} coupon" in CliRunner().invoke(app, [command, "--help"]).stdout
