import json
import warnings

import numpy as np
import pytest
import torch

from hybrid import Label, Numeric, Privacy, Training
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.federation.fleet import PHONES, Trace
from hybrid.federation.training import OnFleet, train
from hybrid.network import Network
from hybrid.privacy.accountant import GaussianEvent, epsilon, noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
from hybrid.version import Learned

USERS = 500
MOMENTUM = {"momentum": 0.9}
QUICK = Training(rounds=60, sampling=0.5, local_lr=2.0, server_lr=0.05)


@pytest.fixture(scope="module")
def people(tiny_examples):
    return tiny_examples(USERS), tiny_examples(200, seed=1)


@pytest.fixture(scope="module")
def trained(tiny_model, people, tmp_path_factory):
    """kind -> what it trained, and its run directory."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = ("federated", "noiseless", "server-only", "central")
    return {
        kind: (train(tiny_model(training=QUICK), *people, kind=kind, run_dir=folder / kind), folder / kind)
        for kind in kinds
    }


def test_federated_training_ranks_unseen_users_better_than_the_server_alone(trained):
    """Central is the ceiling, server-only the floor, federated training at epsilon 8 well above it."""
    scores = {kind: result.record.oracle["auc"] for kind, (result, _) in trained.items()}
    assert scores["server-only"] + 0.05 < scores["federated"] < scores["central"] + 0.01


def test_rounds_without_noise_rank_better_than_with(trained):
    """What noise costs: the same rounds, cohorts and clip, without it, are no worse."""
    scores = {kind: trained[kind][0].record.oracle["auc"] for kind in ("federated", "noiseless")}
    assert scores["noiseless"] > scores["federated"] - 0.005


@pytest.mark.parametrize("kind", ["federated", "central"])
def test_tower_dropout_teaches_what_a_missing_side_means(trained, tiny_model, people, tmp_path, kind):
    """Trained with it, the model ranks without devices about as well as the server alone, and a report says so."""
    settings = QUICK.model_copy(update={"tower_dropout": 0.2})
    result = train(tiny_model(), *people, kind=kind, run_dir=tmp_path, settings=settings)
    alone = trained["server-only"][0].record.oracle["auc"]
    assert result.record.oracle["auc_without_device"] == pytest.approx(alone, abs=0.03)
    assert "auc_without_server" in result.record.oracle
    assert any(np.abs(value).max() > 0 for name, value in result.weights.items() if name.startswith("missing."))


def test_a_training_tells_when_each_point_of_its_curves_was_reached(trained):
    """Seconds ascend, one for each point."""
    result = trained["federated"][0]
    assert len(result.seconds) == len(result.curves["oracle_auc"])
    assert list(result.seconds) == sorted(result.seconds)


def test_the_record_says_what_was_spent_and_what_it_protects(trained, tiny_model):
    """Epsilon is within the declared 8, at most 1 % below it: the noise is not more than it must be."""
    record = trained["federated"][0].record
    assert 0.99 * 8 < record.epsilon <= 8
    assert (record.delta, record.unit, record.protects) == (1e-3, "user", "device features")
    assert (record.users, record.rounds, record.sampling) == (USERS, 60, 0.5)
    assert "Poisson" in record.assumption
    assert record.settings == QUICK


@pytest.mark.parametrize("kind", ["central", "noiseless", "server-only"])
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


def test_a_label_that_only_devices_see_trains_both_towers_by_rounds(tiny_model, people, tmp_path):
    """Nothing is fitted on it outside the rounds: after one round that steps by nothing, all weights are as built."""
    hidden = tiny_model(label=Label(column="clicked", visible_to="device"))
    settings = QUICK.model_copy(update={"server_tower": "federated"})
    record = train(hidden, *people, run_dir=tmp_path / "whole", settings=settings).record
    assert record.protects == "device features and label"
    assert record.oracle["auc"] > 0.7
    still = settings.model_copy(update={"rounds": 1, "server_lr": 1e-30})
    weights = train(hidden, people[0], run_dir=tmp_path / "still", settings=still).weights
    built = Network.build(hidden).weights()
    for name, value in built.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-12)


def test_what_a_run_paid_before_is_made_room_for(tiny_model, people, tmp_path):
    """A release for another purpose costs part of the run's 8: the rounds get more noise, and all fit in 8 together."""
    settings = Training(rounds=5, sampling=1.0)
    alone = train(tiny_model(), people[0], run_dir=tmp_path / "alone", settings=settings).record
    with Ledger.open(tmp_path / "shared", budget_epsilon=8.0, delta=1e-3) as ledger:
        ledger.spend(GaussianEvent(1.0), purpose="label-rates", clip=3.0, round_number=1)
    shared = train(tiny_model(), people[0], run_dir=tmp_path / "shared", settings=settings).record
    assert shared.noise_multiplier > 1.05 * alone.noise_multiplier
    assert 0.99 * 8 < shared.epsilon <= 8


@pytest.mark.parametrize(
    "changes",
    [
        {"local_epochs": 2, "local_batch": 3},
        {"proximal": 0.1, "local_steps": 3},
        {"server_optimizer": "Yogi", "server_options": {"betas": (0.9, 0.99), "tau": 0.01}},
        {"server_optimizer": "SGD", "server_lr": 1.0, "server_options": {"momentum": 0.9}},
        {"average_last": 0.5},
        {"clip_quantile": 0.5},
        {"server_tower": "federated"},
        {"server_tower": "frozen"},
        {"tower_dropout": 0.2},
        {"upload": "int8"},
        {"separation": 2},
        {"separation": 4, "noise": "banded", "server_optimizer": "SGD", "server_lr": 1.0},
        {"separation": 4, "noise": "blt", "server_optimizer": "SGD", "server_lr": 0.3, "server_options": MOMENTUM},
    ],
    ids="-".join,
)
def test_every_way_of_training_learns_from_devices(trained, tiny_model, people, tmp_path, changes):
    """Each strategy and option ranks unseen users better than the server alone, within the budget."""
    settings = QUICK.model_copy(update=changes)
    record = train(tiny_model(), *people, run_dir=tmp_path, settings=settings).record
    assert record.oracle["auc"] > trained["server-only"][0].record.oracle["auc"] + 0.03
    assert record.epsilon <= 8


def test_an_adaptive_clip_moves_and_says_so(tiny_model, people, tmp_path):
    """From a clip a hundred times too large it shrinks; each round's entry has the norm that clipped it."""
    wide = tiny_model(privacy=Privacy(epsilon=8, delta=1e-3, clip=100.0, unit="user"))
    settings = QUICK.model_copy(update={"clip_quantile": 0.5})
    record = train(wide, people[0], run_dir=tmp_path, settings=settings).record
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    clips = [line["clip"] for line in lines if line["kind"] == "spent"]
    assert clips[0] == 100.0
    assert record.clip < clips[-1] < 10.0
    assert "0.5 quantile" in record.mechanism


@pytest.mark.parametrize("noise", ["independent", "banded", "blt"])
def test_where_users_take_turns_no_sampling_is_claimed(tiny_model, people, tmp_path, noise):
    """20 rounds, 3 apart: seven participations, charged as one exact Gaussian, and each line of the claim says so."""
    settings = Training(rounds=20, separation=3, noise=noise, server_optimizer="SGD", server_lr=1.0)
    record = train(tiny_model(), *people, run_dir=tmp_path, settings=settings).record
    matrix = optimised(noise, 20, 3)
    assert record.epsilon == epsilon([matrix.event(record.noise_multiplier)], 1e-3).epsilon
    assert 0.99 * 8 < record.epsilon <= 8
    assert record.noise_multiplier == pytest.approx(matrix.sensitivity * noise_multiplier_for(8.0, 1e-3, 1.0, 1))
    assert record.sampling is None
    assert "exact Gaussian" in record.mechanism
    assert ("correlated" in record.mechanism) == (noise != "independent")
    assert record.assumption.startswith(
        "each user takes part at most once in any 3 rounds one after another and at most 7 times, in a fixed horizon "
        "of 20 rounds; who takes part may be known: no sampling is assumed"
    )
    assert "20 rounds, each person at most once in any 3 of them" in record.privacy_lines()[1]
    (reserved,) = (json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()[1:2])
    assert [(event["rounds"], event["separation"]) for event in reserved["events"]] == [(20, 3)]


def test_a_training_with_matrix_noise_repeats_with_its_seed(tiny_model, people, tmp_path):
    """Bit by bit; another seed does not."""
    settings = Training(rounds=10, separation=3, noise="banded", server_optimizer="SGD", server_lr=1.0)
    one, again, other = (
        train(tiny_model(), people[0], run_dir=tmp_path / name, settings=settings, seed=seed).weights
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    )
    name = "device_tower.0.weight"
    np.testing.assert_array_equal(one[name], again[name])
    assert (one[name] != other[name]).any()


def test_what_a_run_paid_before_leaves_less_for_a_matrix_mechanism(tiny_model, people, tmp_path):
    """A query of mu 1/2 beside it: together they are within the declared 8, and the noise is more than alone."""
    settings = Training(rounds=10, separation=3, noise="banded", server_optimizer="SGD", server_lr=1.0)
    alone = train(tiny_model(), people[0], run_dir=tmp_path / "alone", settings=settings).record
    with Ledger.open(tmp_path / "beside", budget_epsilon=8, delta=1e-3) as ledger:
        ledger.spend(GaussianEvent(2.0), purpose="label-rates", clip=1.0, round_number=1)
    beside = train(tiny_model(), people[0], run_dir=tmp_path / "beside", settings=settings).record
    assert 0.99 * 8 < beside.epsilon <= 8
    assert beside.noise_multiplier > 1.005 * alone.noise_multiplier


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "Yogi"])
def test_a_server_optimizer_that_is_not_linear_is_warned_of(tiny_model, people, tmp_path, optimizer):
    """Correlated noise cancels in SGD's steps, with or without momentum, and not in those that are rescaled."""
    quick = Training(rounds=2, separation=2, noise="banded", server_optimizer=optimizer)
    with pytest.warns(UserWarning, match=f"server_optimizer should be 'SGD' with noise='banded'.*{optimizer}"):
        train(tiny_model(), people[0], run_dir=tmp_path / optimizer, settings=quick)
    linear = quick.model_copy(update={"server_optimizer": "SGD", "server_options": {"momentum": 0.5}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tiny_model(), people[0], run_dir=tmp_path / "SGD", settings=linear)


def test_an_asynchronous_training_claims_no_sampling_and_counts_flushes(tiny_model, people, tmp_path):
    """On phones, without being told: 20 flushes of 30, 4 apart, so five participations, charged as one Gaussian."""
    settings = Training(
        rounds=20, separation=4, buffer=30, max_staleness=2, noise="banded", server_optimizer="SGD", server_lr=1.0
    )
    record = train(tiny_model(), *people, run_dir=tmp_path, settings=settings).record
    matrix = optimised("banded", 20, 4)
    assert record.epsilon == epsilon([matrix.event(record.noise_multiplier)], 1e-3).epsilon
    assert 0.99 * 8 < record.epsilon <= 8
    assert record.sampling is None
    assert record.assumption.startswith(
        "each user is in at most one of any 4 flushes one after another and in at most 5, in a fixed horizon of 20 "
        "flushes of 30 updates; who takes part, and when an update comes, may be known: no sampling is assumed"
    )
    told = json.loads((tmp_path / "fleet.json").read_text())["oracle"]
    assert len(told["time_s"]) == 20
    assert sum(told["updates"].values()) == 20 * 30
    assert record.oracle["fleet_hours"] > 0
    assert 0 <= record.oracle["fleet_lost"] < 1


def test_where_all_devices_are_alike_a_flush_is_a_round(tiny_model, people, tmp_path):
    """Nobody is slow and all are in each flush: every update is fresh, and the weights are those of rounds with all."""
    alike = {"startup_seconds": 1.0, "seconds_per_example": 0.0, "dropout": 0.0, "spread": 0.0}
    one = Trace.load(PHONES).classes[0].model_copy(update=alike | {"share": 1.0, "availability": (1.0,) * 24})
    trace = Trace.load(PHONES).model_copy(update={"classes": (one,)})
    settings = QUICK.model_copy(update={"separation": 1, "buffer": USERS, "max_staleness": 0})
    fleet = OnFleet(trace, deadline_s=60.0, concurrency=USERS)
    flushes = train(tiny_model(), *people, run_dir=tmp_path, settings=settings, fleet=fleet, kind="noiseless")
    everybody = QUICK.model_copy(update={"sampling": 1.0})
    rounds = train(tiny_model(), *people, run_dir=tmp_path / "rounds", settings=everybody, kind="noiseless")
    assert flushes.record.oracle["fleet_staleness"] == 0
    for name, weights in rounds.weights.items():
        np.testing.assert_allclose(flushes.weights[name], weights, atol=1e-5)


def test_a_buffer_that_would_leave_nobody_is_refused(tiny_model, people, tmp_path):
    """Before anything is spent."""
    settings = Training(rounds=2, separation=10, buffer=USERS)
    with pytest.raises(ConfigError, match=r"buffer x \(separation \+ max_staleness\) must be at most the"):
        train(tiny_model(), people[0], run_dir=tmp_path, settings=settings)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_users_who_take_turns_are_not_on_a_fleet(tiny_model, people, tmp_path):
    """Refused before anything is spent: the simulated fleet tosses coins."""
    settings = Training(rounds=2, separation=2)
    with pytest.raises(ConfigError, match="separation must be left out on a simulated fleet, unless it has a buffer"):
        train(tiny_model(), people[0], run_dir=tmp_path, settings=settings, fleet=OnFleet(Trace.load(PHONES), 60.0))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_on_a_fleet_more_are_asked_than_answer_and_the_more_are_charged(tiny_model, people, tmp_path):
    """The accountant gets the probability with which devices are asked, above that of those wanted."""
    settings = Training(rounds=20, sampling=0.1, local_lr=2.0, server_lr=0.05)
    fleet = OnFleet(Trace.load(PHONES), deadline_s=60.0)
    record = train(tiny_model(), *people, run_dir=tmp_path, settings=settings, fleet=fleet).record
    assert 0.15 < record.sampling <= 1
    assert record.epsilon <= 8
    assert record.oracle["fleet_finished"] == pytest.approx(0.1 * USERS, rel=0.5)
    assert json.loads((tmp_path / "fleet.json").read_text())["over_selection"]["sampling"] == record.sampling


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
        ({"label": Label(column="clicked", visible_to="device")}, {}, "server_tower must be 'federated' or 'frozen'"),
        ({"training": Training(server_optimizer="LBFGS")}, {}, "server_optimizer must step"),
    ],
)
def test_a_training_that_may_not_be_is_refused(tiny_model, people, tmp_path, changes, arguments, message):
    """The message names the setting, its bound and what it got; nothing was spent."""
    with pytest.raises(ConfigError, match=message):
        train(tiny_model(**changes), people[0], run_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


LATER = {"age": Numeric(normalise="federated", low=0, high=100)}
AGE = {"transforms": {"age": Numeric(mean=30, std=10)}, "users": USERS, "run": "r"}


def test_the_record_has_the_constants_that_examples_were_encoded_with(tiny_model, people, tmp_path):
    """And what they cost; the weights are those of a model that declares the same constants."""
    settings = QUICK.model_copy(update={"rounds": 2})
    learned = Learned(**AGE, rows=4, epsilon=0.5, delta=1e-3)
    result = train(tiny_model(device=LATER), people[0], run_dir=tmp_path / "later", settings=settings, learned=learned)
    assert result.record.learned == learned
    by_hand = train(tiny_model(), people[0], run_dir=tmp_path / "hand", settings=settings)
    assert all(np.array_equal(result.weights[name], value) for name, value in by_hand.weights.items())
    assert by_hand.record.learned is None


@pytest.mark.parametrize(
    ("kind", "learned", "message"),
    [
        ("federated", None, r"constants of 'tiny' must be learned of \['age'\]"),
        ("central", None, r"constants of 'tiny' must be learned of \['age'\]"),
        (
            "federated",
            Learned(**AGE),
            "learned must be paid for in a training that claims privacy, got exact constants",
        ),
    ],
)
def test_no_training_goes_without_the_constants_it_needs(tiny_model, people, tmp_path, kind, learned, message):
    """Nor with exact ones where it claims privacy; no run is left."""
    with pytest.raises(ConfigError, match=message):
        train(tiny_model(device=LATER), people[0], kind=kind, run_dir=tmp_path / "run", learned=learned)
    assert not (tmp_path / "run").exists()
