import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid import Label, Privacy, Training
from hybrid.analytics.asking import Answer, Exact, People
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.federation.balance import (
    analytic_shift,
    keep_for,
    prior_of,
    prior_query,
    residuals_query,
    rest_of,
)
from hybrid.federation.checkpoint import Checkpoint
from hybrid.federation.grid import Grid
from hybrid.federation.metrics import calibration
from hybrid.federation.sweep import sweep
from hybrid.federation.training import Rounds, train
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.query import Residuals, contributions

DELTA = {"privacy": Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user")}
HIDDEN = Label(column="clicked", visible_to="device")
QUICK = Training(rounds=40, sampling=1.0, local_lr=2.0, server_lr=0.05, server_tower="federated", balance=0.5)


@pytest.mark.parametrize(
    ("prior", "balance", "keep"),
    [
        (0.2, 0.5, (0.25, 1.0)),  # of 100 rows 20 of each: 80 x 0.25
        (0.8, 0.5, (1.0, 0.25)),
        (0.1, 0.25, (1 / 3, 1.0)),  # 10 beside 30 of the 90
        (0.5, 0.8, (0.25, 1.0)),  # 50 beside 12.5
        (0.3, 0.3, (1.0, 1.0)),
    ],
)
def test_the_label_of_which_there_is_too_little_is_kept_whole(prior, balance, keep):
    """And of the other as much as makes the share that was asked for."""
    assert keep_for(prior, balance) == pytest.approx(keep)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_shift_undoes_what_sampling_does_to_odds(prior, balance, chance):
    """A row that is positive with some chance is so with odds keep_1 / keep_0 as high among what is kept."""
    keep = keep_for(prior, balance)
    assert max(keep) == pytest.approx(1)
    among_kept = keep[1] * chance / (keep[1] * chance + keep[0] * (1 - chance))
    logit = math.log(among_kept / (1 - among_kept)) + analytic_shift(keep)
    assert 1 / (1 + math.exp(-logit)) == pytest.approx(chance)


def test_a_count_that_noise_swallows_is_as_large_as_the_noise():
    """8 and 2 are a fifth; with noise of deviation 3 a count of -7 stands for 3: 3 of 103."""
    query = prior_query(10)
    assert prior_of(Answer(query, np.array([8.0, 2.0]), 0.0, 5)) == pytest.approx(0.2)
    assert prior_of(Answer(query, np.array([100.0, -7.0]), 3.0, 5)) == pytest.approx(3 / 103)


def _people(prior, shift, deviation=1.0, users=20_000):
    """Whose label's logit is so far from the score's: the expected label, as a row of each kind with its weight."""
    logit = math.log(prior / (1 - prior)) + np.random.default_rng(0).normal(0, deviation, users)
    score = 1 / (1 + np.exp(-logit))
    label = np.random.default_rng(1).random(users) < 1 / (1 + np.exp(-logit - shift))
    return People({"score": score, "label": label.astype(np.float32)}, np.arange(users + 1))


@pytest.mark.parametrize("shift", [-1.0, -0.5, 0.0, 0.5])
@pytest.mark.parametrize("prior", [0.05, 0.3])
def test_the_rest_makes_predictions_add_up_to_the_positives(prior, shift):
    """Without noise, for scores that spread over some nats: to half a percent."""
    people = _people(prior, shift)
    found = rest_of(Exact(people)(residuals_query(1)))
    score, label = people.columns["score"], people.columns["label"]
    shifted = 1 / (1 + np.exp(-np.log(score / (1 - score)) - found))
    assert shifted.mean() / label.mean() == pytest.approx(1, abs=0.005)
    assert found == pytest.approx(shift, abs=0.1)


ALIKE = (26.894, 50.0, 73.106)  # sums of 100 scores of 0.5, their logits shifted by -1, 0 and 1


def test_a_sum_that_was_asked_for_is_met_exactly():
    """100 rows of a score of 0.5, of which 26.894 are positive, as after a shift by -1: residuals of -23.106."""
    found = rest_of(Answer(residuals_query(1), np.array([-23.106, *ALIKE]), 0.0, 100))
    assert found == pytest.approx(-1)


def test_a_person_s_residuals_are_sums_over_its_rows():
    """Scores 0.5 and 0.1 of labels 1 and 0: 0.5 - 0.1, then sums of scores; a row without a label counts nowhere.

    Odds of 1 and 1/9 are by e higher or lower after a shift by 1. No row adds more than a score of 1 of a label of 0.
    """
    columns = {"score": [0.5, 0.1, 0.9], "label": [1, 0, math.nan]}
    (found,) = contributions(residuals_query(10), columns, np.array([0, 3]))
    sums = [1 / (1 + math.exp(-b)) + 1 / (1 + 9 * math.exp(-b)) for b in (-1, 0, 1)]
    np.testing.assert_allclose(found, [[0.4, *sums]])
    rows = {"score": [0.0, 0.5, 1.0, 0.0, 0.5, 1.0], "label": [0, 0, 0, 1, 1, 1]}
    (each,) = contributions(residuals_query(1), rows, np.arange(7))
    assert np.linalg.norm(each, axis=1).argmax() == 2
    assert np.linalg.norm(each[2]) == pytest.approx(Residuals().row_norm)


def test_the_rest_is_drawn_to_nothing_by_as_much_as_it_is_uncertain():
    """100 scores of 0.5 add up to 25 more for each nat: with noise of 25 both deviations are a nat, half is left."""
    answer = Answer(residuals_query(1), np.array([-23.106, *ALIKE]), 25.0, 100)
    assert rest_of(answer) == pytest.approx(-0.5, abs=1e-4)
    assert rest_of(replace(answer, sd=1e6)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "sums",
    [
        (-60.0, *ALIKE),
        (60.0, *ALIKE),
        (-49.9, *ALIKE),
        (0.0, -5.0, 50.0, 73.0),
        (0.0, 30.0, -1.0, 73.0),
        (0.0, 70.0, 50.0, 30.0),
    ],
    ids=["fewer than none", "more than all", "more than 3 nats", "negative scores", "negative sum", "falling"],
)
def test_noised_sums_that_make_no_sense_give_no_rest(sums):
    """Of 100 rows with a score of 0.5: no shift leads there, or one that is larger than the noise could make likely."""
    assert rest_of(Answer(residuals_query(1), np.array(sums), 10.0, 100)) is None


@pytest.fixture(scope="module")
def rare(tiny_examples):
    """A fifth of the positives: some 16 % of rows."""

    def build(users, seed):
        examples = tiny_examples(users, seed=seed)
        return examples.with_labels((examples.labels == 0) | (np.random.default_rng(seed).random(len(examples)) < 0.2))

    return build(1500, 0), build(1500, 1)


@pytest.fixture(scope="module")
def trained(tiny_model, rare, tmp_path_factory):
    """By devices that alone know the label; and the run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "hidden"
    return train(tiny_model(label=HIDDEN, **DELTA), *rare, run_dir=folder, settings=QUICK), folder


def test_predictions_of_a_balanced_training_are_calibrated_after_its_correction(trained, rare):
    """On held-out people the mean prediction is the mean label's within a tenth; without the shift a half too high."""
    result, said = trained[0], trained[0].record.balance
    labels, predictions = rare[1].labels, result.test_predictions
    assert calibration(labels, predictions).ratio == pytest.approx(1, abs=0.1)
    shift = float(result.weights["correction.shift"])
    assert shift == pytest.approx(said.analytic + said.estimated, abs=1e-6)
    logits = np.log(predictions) - np.log1p(-predictions) - shift
    assert calibration(labels, 1 / (1 + np.exp(-logits))).ratio > 1.5
    assert said.analytic == pytest.approx(math.log(said.keep[0] / said.keep[1]))
    assert said.prior == pytest.approx(labels.mean(), rel=0.3)


def test_prior_training_and_rest_are_paid_from_one_budget(trained):
    """The ledger has one question before and one after 40 rounds; together they are the record's epsilon, below 8."""
    result, folder = trained
    account = Ledger.read(folder)
    assert [entry.purpose for entry in account.entries] == ["label-prior", *["train"] * 40, "recalibrate"]
    assert result.record.epsilon == epsilon([entry.event for entry in account.entries], 1e-4).epsilon
    assert 0.99 * 8 < result.record.epsilon <= 8
    assert "labels and of scores" in result.record.mechanism


def test_a_run_holds_the_corrected_weights(trained):
    """Its last checkpoint is what the version is, its shift included."""
    result, folder = trained
    for name, value in Checkpoint.read(folder).weights.items():
        np.testing.assert_array_equal(result.weights[name], value)


def test_a_label_that_the_server_sees_is_counted_exactly_and_for_nothing(tiny_model, rare, tmp_path):
    """No question before the training, and the prior is what the server would count; the scores are still asked for."""
    result = train(tiny_model(**DELTA), *rare, run_dir=tmp_path, settings=QUICK.model_copy(update={"rounds": 3}))
    assert [entry.purpose for entry in Ledger.read(tmp_path).entries] == [*["train"] * 3, "recalibrate"]
    (negatives, positives) = Exact(People({"label": rare[0].labels}, rare[0].offsets))(prior_query(1024)).total
    assert result.record.balance.prior == pytest.approx(positives / (negatives + positives))
    assert result.record.balance.prior_exact


def test_a_server_tower_fitted_on_every_label_learns_with_the_correction(tiny_model, rare, tmp_path):
    """Before the first round, in which the head is as the server fitted it, predictions are of everybody already."""
    changed = QUICK.model_copy(update={"rounds": 1, "server_tower": "central", "server_lr": 1e-9})
    result = train(tiny_model(**DELTA), *rare, run_dir=tmp_path, settings=changed)
    said = result.record.balance
    assert said.analytic < -1
    assert abs(said.estimated) < 0.3
    assert calibration(rare[1].labels, result.test_predictions).ratio == pytest.approx(1, abs=0.15)


def test_without_noise_nothing_is_paid_and_the_correction_is_exact(tiny_model, rare, tmp_path):
    """An oracle: no ledger, and the mean prediction for the people it learned from is their mean label's to 5 %."""
    result = train(
        tiny_model(label=HIDDEN, **DELTA), rare[0], rare[0], kind="noiseless", run_dir=tmp_path / "run", settings=QUICK
    )
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert calibration(rare[0].labels, result.test_predictions).ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["central", "server-only"])
def test_a_reference_on_pooled_data_takes_examples_as_they_come(tiny_model, tiny_examples, tmp_path, kind):
    """No shift, and nothing about balance in its record."""
    changed = QUICK.model_copy(update={"server_tower": "central"})
    result = train(tiny_model(**DELTA), tiny_examples(40), kind=kind, run_dir=tmp_path, settings=changed)
    assert result.weights["correction.shift"] == 0
    assert result.record.balance is None


def test_a_budget_that_the_questions_would_take_is_refused_before_anything_is_spent(tiny_model, rare, tmp_path):
    """Questions at epsilon 2 of a budget of 1 leave nothing for rounds: no entry, and no config of a run that began."""
    changed = QUICK.model_copy(update={"balance_epsilon": 2.0})
    with pytest.raises(BudgetExceeded, match=r"epsilon is 1 at delta 0.0001; what is released besides the 40 rounds"):
        train(tiny_model(label=HIDDEN, **DELTA), *rare, epsilon=1.0, run_dir=tmp_path, settings=changed)
    assert not Ledger.read(tmp_path).entries
    assert not (tmp_path / "config.json").exists()


def test_the_same_seed_balances_to_the_same_bits(trained, tiny_model, rare, tmp_path):
    """Prior, rows, rounds and rest are drawn from the run's seed; with another one they differ."""
    again, other = (
        train(tiny_model(label=HIDDEN, **DELTA), rare[0], run_dir=tmp_path / str(seed), settings=QUICK, seed=seed)
        for seed in (0, 1)
    )
    for name, value in trained[0].weights.items():
        np.testing.assert_array_equal(again.weights[name], value)
    assert other.record.balance.prior != again.record.balance.prior
    assert json.loads((tmp_path / "0" / "balance.json").read_text())["prior"] == again.record.balance.prior


def test_two_trainings_of_a_run_each_ask_for_themselves(tiny_model, rare, tmp_path):
    """The second pays for a prior and a rest of its own, and has less left for its rounds."""
    changed = QUICK.model_copy(update={"rounds": 2, "balance_epsilon": 0.5})
    first = train(tiny_model(label=HIDDEN, **DELTA), rare[0], epsilon=2.0, run_dir=tmp_path, settings=changed)
    with pytest.raises(BudgetExceeded):
        train(tiny_model(label=HIDDEN, **DELTA), rare[0], epsilon=2.0, run_dir=tmp_path, settings=changed)
    assert first.record.epsilon <= 2
    assert [entry.purpose for entry in Ledger.read(tmp_path).entries].count("label-prior") == 1


class Nowhere:
    """A federation that must not be asked."""

    name, assumption = "nowhere", "none"

    def train(self, rounds: Rounds, after):
        pytest.fail("it trained")


def test_where_balance_cannot_be_it_is_refused_with_a_reason(tiny_model, rare, tmp_path):
    """On a federation and in a sweep."""
    model = tiny_model(label=HIDDEN, **DELTA)
    swept = Grid({"clip": (0.1, 1.0)}, {"balance": 0.5, "server_tower": "federated"}).configurations(model)
    with pytest.raises(ConfigError, match=r"balance must be left out with a federation: .*, got 0.5"):
        train(model, *rare, run_dir=tmp_path / "run", settings=QUICK, federation=Nowhere())
    with pytest.raises(ConfigError, match=r"balance must be left out of a sweep, .*, got 0.5"):
        sweep(model, swept, *rare, run_dir=tmp_path / "sweep")
