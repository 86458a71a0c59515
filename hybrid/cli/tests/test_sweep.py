import json
import math
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.sweep import _places, _rows
from hybrid.errors import ConfigError, NotFound

GRID = """
[grid]
epsilon = [2, inf]
server_lr = [0.01, 0.1]
seed = [0, 1]

[fixed]
rounds = 2
"""


def test_a_sweep_leaves_results_a_plot_and_a_ledger_for_each_configuration(project, tmp_path):
    """2 x 2 x 2 configurations, four of them oracles without a ledger; `hybrid privacy` counts the other four."""
    (tmp_path / "grid.toml").write_text(GRID)
    printed = json.loads(project("sweep", "taxi", "--grid", "grid.toml", "--fold", "1/4", "--central", "--json"))
    (run,) = (tmp_path / "runs").iterdir()
    assert printed == json.loads((run / "results.json").read_text())
    assert [each["epsilon"] for each in printed["configurations"]] == [2.0] * 4 + ["inf"] * 4
    assert all(math.isfinite(each["oracle"]["auc"]) for each in printed["configurations"])
    assert {kind: len(seeds) for kind, seeds in printed["references"].items()} == {"server-only": 2, "central": 2}
    assert sorted(file.parent.name for file in run.glob("*/ledger.jsonl")) == ["1", "2", "3", "4"]
    assert json.loads((run / "config.json").read_text())["grid"]["epsilon"] == [2, "inf"]
    assert "no noise" in (run / "plot.svg").read_text()
    project("train", "taxi")
    spent = json.loads(project("privacy", "taxi", "--json"))
    assert spent["composed"]["runs"] == 5
    assert "none: a sweep's configuration" in project("privacy", "taxi")


def test_a_sweep_says_that_tuning_is_not_in_the_epsilon(project, tmp_path):
    """The table is marked oracle; how many looked at the same people, and what all spent together, is said."""
    (tmp_path / "grid.toml").write_text(GRID)
    printed = project("sweep", "taxi", "--grid", "grid.toml")
    assert "held-out users (oracle), mean ± standard deviation of 2 seeds" in printed
    assert "Tuning is not in the epsilon: 8 configurations looked at the same" in printed
    assert "Together the 4 with noise spent epsilon" in printed
    assert "4 had no noise and no privacy at all" in printed
    assert "inf (oracle)" in printed


def test_a_refused_sweep_leaves_no_run(project, tmp_path):
    """More than the model declares, or a file that is not there."""
    (tmp_path / "grid.toml").write_text("[grid]\nepsilon = [5]")
    for file in ("grid.toml", "none.toml"):
        with pytest.raises(ConfigError):
            project("sweep", "taxi", "--grid", file)
    with pytest.raises(NotFound):
        project("sweep", "bus", "--grid", "grid.toml")
    assert not (tmp_path / "runs").exists()


def test_help_teaches_with_an_example():
    """Its last line can be pasted."""
    assert "hybrid sweep coupon --grid examples/coupon/grid.toml" in CliRunner().invoke(app, ["sweep", "--help"]).stdout


def _result(auc, seed, **swept):
    configuration = SimpleNamespace(epsilon=1.0, seed=seed, swept=swept | {"seed": seed})
    return SimpleNamespace(configuration=configuration, oracle={"auc": auc})


def test_rows_are_means_over_seeds_the_best_first():
    """0.6 and 0.8 have mean 0.7 and standard deviation 0.1414; what is not a number comes last."""
    results = [_result(math.nan, 0, clip=1), _result(0.6, 0, clip=2), _result(0.6, 0, clip=3), _result(0.8, 1, clip=2)]
    rows = _rows(SimpleNamespace(results=results))
    assert [row.label for row in rows] == ["clip 2", "clip 3", "clip 1"]
    assert [row.cell("auc") for row in rows[:2]] == ["0.7000 ± 0.1414", "0.6000"]


def test_no_noise_stands_behind_the_largest_epsilon():
    """Epsilons stand by their logarithm to base 2."""
    assert _places([1.0, 8.0, math.inf]) == {1.0: 0.0, 8.0: 3.0, math.inf: 4.0}
    assert _places([math.inf]) == {math.inf: 1.0}
