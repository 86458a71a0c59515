import json

import numpy as np
import pytest
import torch

from hybrid import Label, Privacy, Training
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.federation.training import train
from hybrid.network import Network

USERS = 500
QUICK = Training(rounds=60, sampling=0.5, local_lr=2.0, server_lr=0.05)


@pytest.fixture(scope="module")
def people(tiny_examples):
    return tiny_examples(USERS), tiny_examples(200, seed=1)


@pytest.fixture(scope="module")
def trained(tiny_model, people, tmp_path_factory):
    """kind -> what it trained, and its run directory."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = ("federated", "server-only", "central")
    return {
        kind: (train(tiny_model(training=QUICK), *people, kind=kind, run_dir=folder / kind), folder / kind)
        for kind in kinds
    }


def test_federated_training_ranks_unseen_users_better_than_the_server_alone(trained):
    """Central is the ceiling, server-only the floor, federated training at epsilon 8 well above it."""
    scores = {kind: result.record.oracle["auc"] for kind, (result, _) in trained.items()}
    assert scores["server-only"] + 0.05 < scores["federated"] < scores["central"] + 0.01


def test_the_record_says_what_was_spent_and_what_it_protects(trained, tiny_model):
    """Epsilon is within the declared 8, at most 1 % below it: the noise is not more than it must be."""
    record = trained["federated"][0].record
    assert 0.99 * 8 < record.epsilon <= 8
    assert (record.delta, record.unit, record.protects) == (1e-3, "user", "device features")
    assert (record.users, record.rounds, record.sampling) == (USERS, 60, 0.5)
    assert "Poisson" in record.assumption


@pytest.mark.parametrize("kind", ["central", "server-only"])
def test_a_reference_claims_no_privacy(trained, kind):
    """No epsilon, and no ledger in its run directory."""
    result, folder = trained[kind]
    assert result.record.epsilon is None
    assert not (folder / "ledger.jsonl").exists()


def test_the_server_tower_is_the_servers_own_and_frozen(trained):
    """Federated training starts from, and ends with, the tower that server-only training fits."""
    federated, server_only = (trained[kind][0].weights for kind in ("federated", "server-only"))
    for name in (name for name in federated if name.startswith("server_tower.")):
        np.testing.assert_array_equal(federated[name], server_only[name])


def test_server_only_is_the_head_with_zeros_for_a_device(tiny_model, people, tmp_path):
    """Also where no device features make the device tower answer zero: its sigmoid never does."""

    def tower():
        return torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Sigmoid())

    test = people[1]
    result = train(tiny_model(device_tower=tower), *people, kind="server-only", run_dir=tmp_path)
    network = Network.build(tiny_model(device_tower=tower))
    network.load_weights(result.weights)
    with torch.no_grad():
        logits = network.head(network.server_tower(torch.tensor(test.server)), torch.zeros(len(test), 3))
    np.testing.assert_allclose(result.test_predictions, torch.sigmoid(logits).numpy(), atol=1e-6)


def test_a_run_directory_holds_the_whole_run(trained):
    """Sixty spent rounds, reserved as one, the last checkpoint's weights, the settings, and metrics marked oracle."""
    result, folder = trained["federated"]
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "spent" for line in lines) == 60
    (reserved,) = (line for line in lines if line["kind"] == "reserved")
    assert [event["count"] for event in reserved["events"]] == [60]
    with np.load(folder / "checkpoint.npz") as checkpoint:
        assert checkpoint["step"] == 60
        for name, value in result.weights.items():
            np.testing.assert_array_equal(checkpoint[name], value)
    assert json.loads((folder / "config.json").read_text())["training"]["rounds"] == 60
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["oracle"] == result.record.oracle
    assert all(name.startswith("oracle_") for name in result.curves)


def test_the_same_seed_trains_the_same_weights(trained, tiny_model, people, tmp_path):
    """Bit by bit, whether or not anybody is held out to watch; another seed does not."""
    again = train(tiny_model(training=QUICK), people[0], run_dir=tmp_path / "again")
    other = train(tiny_model(training=QUICK), people[0], run_dir=tmp_path / "other", seed=1)
    name = "device_tower.0.weight"
    np.testing.assert_array_equal(again.weights[name], trained["federated"][0].weights[name])
    assert (again.weights[name] != other.weights[name]).any()
    assert again.test_predictions is None


def test_less_privacy_to_spend_means_more_noise(tiny_model, people, tmp_path):
    """At epsilon 1 the noise multiplier is several times that at 8."""
    settings = Training(rounds=5, sampling=1.0)
    one = train(tiny_model(), people[0], epsilon=1.0, run_dir=tmp_path / "one", settings=settings).record
    eight = train(tiny_model(), people[0], run_dir=tmp_path / "eight", settings=settings).record
    assert one.epsilon <= 1
    assert one.noise_multiplier > 3 * eight.noise_multiplier


def test_a_run_directory_has_one_budget(tiny_model, people, tmp_path):
    """A second training in it would spend the same budget twice: refused before its first round."""
    settings = Training(rounds=5, sampling=1.0)
    train(tiny_model(), people[0], run_dir=tmp_path, settings=settings)
    with pytest.raises(BudgetExceeded):
        train(tiny_model(), people[0], run_dir=tmp_path, settings=settings)


def test_every_round_is_released_and_charged_whoever_came(tiny_model, tiny_examples, tmp_path):
    """12 users each take part with probability 1/20: in half of 20 rounds nobody comes, and all 20 are charged.

    Were empty rounds withheld and free, whoever sees a release would know that somebody came:
    a person would be in it with more than the 1/20 that the accountant is told.
    """
    few = tiny_examples(12, seed=4)
    model = tiny_model()
    sparse = Training(rounds=20, sampling=0.05, local_lr=0.5, server_lr=0.05)
    record = train(model, few, run_dir=tmp_path, settings=sparse).record
    assert record.rounds == 20
    assert (tmp_path / "ledger.jsonl").read_text().count('"spent"') == 20
    assert record.epsilon == pytest.approx(8, rel=1e-2)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"epsilon": 9.0}, "at most the 8 that 'tiny' declares, got 9"),
        ({}, {"epsilon": 0.0}, "epsilon must be > 0"),
        ({}, {"epsilon": float("nan")}, "epsilon must be > 0"),
        (
            {"privacy": Privacy(epsilon=8, delta=5e-3, clip=1.0, unit="user")},
            {},
            "privacy.delta must be at most 0.0011",
        ),
        ({"label": Label(column="clicked", visible_to="device")}, {}, "only the device sees is not available yet"),
        ({"label": Label(column="clicked", visible_to="device")}, {"kind": "central"}, "not available yet"),
        ({"training": Training(server_optimizer="LBFGS")}, {}, "server_optimizer must step"),
    ],
)
def test_a_training_that_may_not_be_is_refused(tiny_model, people, tmp_path, changes, arguments, message):
    """The message names the setting, its bound and what it got; nothing was spent."""
    with pytest.raises(ConfigError, match=message):
        train(tiny_model(**changes), people[0], run_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
