import json
import math

import numpy as np
import pytest

from hybrid import Label
from hybrid.errors import ConfigError
from hybrid.federation.grid import Grid
from hybrid.federation.sweep import sweep
from hybrid.federation.training import train
from hybrid.privacy.accountant import GaussianEvent, epsilon

LISTS = {
    "clip": (0.1, 1.0),
    "epsilon": (2.0, 8.0),
    "local_lr": (0.3, 1.0),
    "server_optimizer": ("Adam", "Yogi"),
}
FIXED = {"rounds": 6, "local_steps": 3, "local_batch": 2, "server_lr": 0.05}


@pytest.fixture(scope="module")
def people(tiny_examples):
    return tiny_examples(300), tiny_examples(100, seed=1)


def _trained_alone(model, each, people, folder):
    of = each.of(model)
    return train(of, *people, epsilon=each.epsilon, seed=each.seed, settings=each.settings, run_dir=folder).record


@pytest.mark.parametrize(
    ("lists", "fixed"),
    [
        (LISTS, {}),
        ({"seed": (3, 4), "average_last": (0.0, 0.5)}, {"tower_dropout": 0.2}),
        ({"clip_quantile": (0.3, 0.5), "server_lr": (0.01, 0.1)}, {"server_tower": "federated", "server_lr": None}),
        ({"sampling": (0.2, 1.0), "proximal": (0.0, 0.5)}, {"server_tower": "frozen"}),
        (
            {"noise": ("independent", "banded", "blt"), "separation": (3, 5)},
            {"server_optimizer": "SGD", "server_lr": 2.0},
        ),
    ],
    ids=["clip, noise, rates, optimiser", "seed, average", "adaptive clip, both towers", "no two alike", "turns"],
)
def test_each_configuration_is_what_training_it_alone_gives(tiny_model, people, tmp_path, lists, fixed):
    """Metrics on held-out users to 1e-5, epsilon and noise to the last bit."""
    fixed = {name: value for name, value in (FIXED | fixed).items() if value is not None}
    model = tiny_model()
    configurations = Grid(lists, fixed).configurations(model)
    found = sweep(model, configurations, *people, run_dir=tmp_path / "sweep")
    for number, result in enumerate(found.results):
        record = _trained_alone(model, result.configuration, people, tmp_path / f"alone-{number}")
        assert result.oracle == pytest.approx(record.oracle, abs=1e-5)
        assert (result.epsilon, result.noise_multiplier) == (record.epsilon, record.noise_multiplier)
    assert len({round(result.oracle["log_loss"], 6) for result in found.results}) == len(configurations)


def test_every_configuration_has_a_ledger_of_its_own(tiny_model, people, tmp_path):
    """One spent round each for each of 5 rounds, with its own clip; together they cost what their events compose to."""
    configurations = Grid({"clip": (0.1, 1.0), "epsilon": (2.0,)}, {"rounds": 5}).configurations(tiny_model())
    found = sweep(tiny_model(), configurations, *people, run_dir=tmp_path)
    for result, clip in zip(found.results, (0.1, 1.0), strict=True):
        lines = [json.loads(line) for line in (tmp_path / result.name / "ledger.jsonl").read_text().splitlines()]
        assert [(line["round"], line["clip"]) for line in lines if line["kind"] == "spent"] == [
            (number, clip) for number in range(1, 6)
        ]
        assert json.loads((tmp_path / result.name / "config.json").read_text())["clip"] == clip
    events = [GaussianEvent(result.noise_multiplier, 0.5, count=5) for result in found.results]
    assert found.composed == epsilon(events, 1e-3)
    assert found.composed.epsilon > 1.2 * max(result.epsilon for result in found.results)


def test_without_noise_a_configuration_is_an_oracle(tiny_model, people, tmp_path):
    """Epsilon is infinite, no ledger claims anything, and what is composed is of the others alone."""
    configurations = Grid({"epsilon": (2.0, math.inf)}, {"rounds": 5}).configurations(tiny_model())
    private, oracle = sweep(tiny_model(), configurations, *people, run_dir=tmp_path).results
    assert (oracle.epsilon, oracle.noise_multiplier) == (math.inf, 0.0)
    assert private.epsilon <= 2
    assert not (tmp_path / oracle.name / "ledger.jsonl").exists()
    assert json.loads((tmp_path / oracle.name / "config.json").read_text())["epsilon"] == "inf"


def test_references_are_those_of_train(tiny_model, people, tmp_path):
    """Server-only for each seed, central where it is asked for."""
    configurations = Grid({"seed": (0, 5)}, {"rounds": 1}).configurations(tiny_model())
    found = sweep(tiny_model(), configurations, *people, run_dir=tmp_path / "sweep", central=True)
    for kind in ("server-only", "central"):
        for seed, metrics in zip((0, 5), found.references[kind], strict=True):
            record = train(tiny_model(), *people, kind=kind, seed=seed, run_dir=tmp_path / f"{kind}-{seed}").record
            assert metrics == pytest.approx(record.oracle, abs=1e-6)


def test_progress_counts_the_rounds_of_all(tiny_model, people, tmp_path):
    """2 x 2 configurations of 3 rounds, two at a time: 2, 4, ... 12 of 12."""
    seen = []
    configurations = Grid({"seed": (0, 1), "clip": (0.1, 1.0)}, {"rounds": 3}).configurations(tiny_model())
    sweep(tiny_model(), configurations, *people, run_dir=tmp_path, progress=lambda *done: seen.append(done))
    assert seen == [(2 * number, 12) for number in range(1, 7)]


@pytest.mark.parametrize(
    ("changes", "fixed", "message"),
    [
        ({"label": Label(column="clicked", visible_to="device")}, {}, "server_tower must be 'federated' or 'frozen'"),
        ({}, {"server_optimizer": "LBFGS"}, "server_optimizer must step"),
    ],
)
def test_a_sweep_that_may_not_be_is_refused_before_anything_is_spent(
    tiny_model, people, tmp_path, changes, fixed, message
):
    """The message is that of the training; no folder is made."""
    model = tiny_model(**changes)
    configurations = Grid({"seed": (0,)}, fixed).configurations(model)
    with pytest.raises(ConfigError, match=message):
        sweep(model, configurations, *people, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_label_is_fitted_by_no_configuration(tiny_model, people, tmp_path):
    """With steps of nothing, all predict as the network was built, whatever the reference was fitted on."""
    hidden = tiny_model(label=Label(column="clicked", visible_to="device"))
    fixed = {"server_tower": "federated", "rounds": 1, "server_lr": 1e-30}
    (result,) = sweep(hidden, Grid({"seed": (0,)}, fixed).configurations(hidden), *people, run_dir=tmp_path).results
    frozen = Grid({"seed": (0,)}, fixed | {"server_tower": "frozen"}).configurations(tiny_model())
    (built,) = sweep(tiny_model(), frozen, *people, run_dir=tmp_path / "frozen").results
    assert result.oracle == pytest.approx(built.oracle, abs=1e-9)
    assert np.isfinite(result.oracle["log_loss"])
