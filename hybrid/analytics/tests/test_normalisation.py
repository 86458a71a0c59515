"""Learned constants are near the exact ones where people are many, usable where they are few, and always paid for."""

from __future__ import annotations

import json
import math
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid import Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, View
from hybrid.analytics import normalisation
from hybrid.analytics.asking import NORMALISE, Exact, People, Simulated
from hybrid.analytics.normalisation import FILE, exact, learn, learned, mean_and_sd
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.privacy.ledger import Ledger
from hybrid.version import Learned

PENDING = {
    "score": Numeric(normalise="federated", low=0, high=100, clip=3),
    "trips": Log1p(normalise="federated", low=0, high=1000),
    "zone": Categorical(discover=5),
}
MODEL = HybridModel(
    name="taxi",
    server=Server(
        service="zones",
        entity=Entity(name="zone", join_key="zone_id"),
        views=(View(name="zones", source="zones.parquet", features={"demand": Numeric()}),),
        max_feature_age=timedelta(hours=1),
    ),
    device={"habit": Numeric(std=2), **PENDING},
    server_tower=lambda: None,
    device_tower=lambda: None,
    head=lambda: None,
    label=Label(column="rode", visible_to="server"),
    privacy=Privacy(epsilon=4, delta=1e-5, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="for a test of constants"),
)


def people_of(users: int, seed: int = 0) -> People:
    """Two rows each; scores around 75 with a tail, few trips, two zones."""
    rng, rows = np.random.default_rng(seed), 2 * users
    columns = {
        "score": np.clip(rng.normal(75, 10, rows), 0, 100),
        "trips": np.floor(rng.exponential(5, rows)),
        "zone": rng.choice(np.array(["centre", "port", None], dtype=object), rows, p=[0.6, 0.3, 0.1]),
    }
    columns["score"][::10] = np.nan
    return People(columns, 2 * np.arange(users + 1))


def ask_of(people, ledger, epsilon=1.0, seed=0):
    return Simulated(people, ledger, purpose=NORMALISE, epsilon=epsilon, seed=seed)


def test_mean_and_standard_deviation_from_three_sums():
    """Of 0, 1/2 and 1/2: the sums are 3, 1 and 1/2; mean 1/3, variance 1/6 - 1/9 = 1/18."""
    assert mean_and_sd(np.array([3.0, 1.0, 0.5]), 0.0) == pytest.approx((1 / 3, math.sqrt(1 / 18)))


@given(st.tuples(*[st.floats(-1e6, 1e6)] * 3), st.floats(0, 1e5))
def test_noise_never_leaves_an_unusable_constant(sums, noise):
    """A mean within the bounds and a standard deviation above 0, at most half their width, whatever was drawn."""
    mean, sd = mean_and_sd(np.array(sums), noise)
    assert 0 <= mean <= 1
    assert 1e-3 <= sd <= 0.5


def test_a_variance_that_the_noise_could_hide_is_not_believed():
    """100 rows at 1/2 seem to have none; noise of 5 rows hides one of 5 / 105 x sqrt(1 + 1 + 1 / 16) = 0.068."""
    _, sd = mean_and_sd(np.array([100.0, 50.0, 25.0]), 5.0)
    assert sd == pytest.approx(math.sqrt(0.068), rel=0.02)


def test_without_noise_constants_are_those_of_the_rows():
    """Each person's last row, within the bins that hold some: mean and standard deviation as NumPy has them."""
    rng = np.random.default_rng(1)
    values = rng.uniform(20, 60, 400)
    people = People({"score": values, "trips": np.tile([0.0, 8.0], 200)}, np.arange(401))
    found = learn(Exact(people), {name: PENDING[name] for name in ("score", "trips")}, rows=1)
    assert found["score"] == Numeric(mean=found["score"].mean, std=found["score"].std, clip=3)
    kept = np.clip(values.astype(np.float32), 100 * 6 / 32, 100 * 20 / 32)
    assert (found["score"].mean, found["score"].std) == pytest.approx((kept.mean(), kept.std()), rel=1e-5)
    half = math.log(9) / 2  # the mean of log 1 and log 9, and their distance from it
    assert (found["trips"].mean, found["trips"].std) == pytest.approx((half, half), rel=1e-5)


def test_exact_constants_are_of_all_rows():
    """Pooled, within the declared bounds: (5 + 100) / 2 of 5 and 300; the most frequent texts."""
    columns = {"score": [5.0, 300.0, None], "trips": [0.0, 0.0, 0.0], "zone": ["port", "port", "centre"]}
    found = exact(PENDING, People(columns, np.array([0, 2, 3])))
    assert (found["score"].mean, found["score"].std) == pytest.approx((52.5, 47.5))
    assert found["zone"] == PENDING["zone"].learned(("port", "centre"))
    assert found["trips"].mean == 0.0
    assert found["trips"].std > 0


def test_of_many_people_constants_are_near_the_exact_ones(tmp_path):
    """10,000 people at epsilon 1: within a twentieth of a standard deviation, and a tenth of it; both zones."""
    people = people_of(10_000)
    with Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger:
        found = learn(ask_of(people, ledger), PENDING, rows=2)
        assert 0.98 < ledger.spent().epsilon <= 1
    reference = exact(PENDING, people)
    for name in ("score", "trips"):
        assert found[name].mean == pytest.approx(reference[name].mean, abs=0.05 * reference[name].std)
        assert found[name].std == pytest.approx(reference[name].std, rel=0.1)
    assert found["zone"] == PENDING["zone"].learned(("centre", "port"))


def test_of_few_people_constants_are_usable(tmp_path):
    """Ten people at epsilon 0.1 tell nothing: means lie within the bounds, and no text is named."""
    with Ledger.open(tmp_path, budget_epsilon=1, delta=1e-5) as ledger:
        found = learn(ask_of(people_of(10), ledger, epsilon=0.1), PENDING, rows=2)
    assert 0 <= found["score"].mean <= 100
    assert 0 < found["score"].std <= 50
    assert found["zone"] == PENDING["zone"].learned(())


def given_to(tmp_path, people, **changes):
    settings = {"budget": 4.0, "share": 0.25, "rows": 2, "seed": 0}
    return learned(MODEL, people, tmp_path / "run", **settings | changes)


def entries(tmp_path):
    return [(entry.purpose, entry.round) for entry in Ledger.read(tmp_path / "run").entries]


def test_the_run_pays_once_and_keeps_what_it_learned(tmp_path):
    """Four releases, together within the share; asked again, also of another share, it is read; the model takes it."""
    (tmp_path / "run").mkdir()
    people = people_of(2000)
    first = given_to(tmp_path, people)
    assert first.epsilon <= 1.0
    assert (first.users, first.run, first.rows, first.delta) == (2000, "run", 2, 1e-5)
    paid = [(NORMALISE, number) for number in range(1, 5)]
    assert entries(tmp_path) == paid
    assert given_to(tmp_path, people, share=0.1, resume=True) == first
    assert entries(tmp_path) == paid
    assert MODEL.with_learned(first.transforms).device_features.pending == ()


def test_other_people_are_asked_anew(tmp_path):
    """What was learned of some is not taken for others', and is paid for again."""
    (tmp_path / "run").mkdir()
    first = given_to(tmp_path, people_of(2000))
    second = given_to(tmp_path, people_of(2000, seed=1))
    assert second.transforms != first.transforms
    assert len(entries(tmp_path)) == 8


def test_a_kill_before_the_disk_is_paid_for_and_asked_anew(tmp_path, monkeypatch):
    """The entries of an answer that nobody saw stay; the next are further queries, with noise of their own."""
    (tmp_path / "run").mkdir()
    seen = []

    def killed(file, content):
        seen.append(Learned.model_validate(json.loads(content)["learned"]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(normalisation, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            given_to(tmp_path, people_of(2000))
    assert len(entries(tmp_path)) == 4
    found = given_to(tmp_path, people_of(2000))
    assert entries(tmp_path) == [(NORMALISE, number) for number in range(1, 9)]
    assert found.transforms["score"] != seen[0].transforms["score"]


def test_what_the_budget_cannot_pay_is_not_asked(tmp_path):
    """The second time the share is more than what is left: nothing is written for it."""
    (tmp_path / "run").mkdir()
    given_to(tmp_path, people_of(500), share=0.9)
    with pytest.raises(BudgetExceeded):
        given_to(tmp_path, people_of(500, seed=1), share=0.9)
    assert len(entries(tmp_path)) == 4


def test_a_reference_has_exact_constants_and_no_ledger(tmp_path):
    """Marked by having no epsilon."""
    found = given_to(tmp_path, people_of(50), budget=None)
    assert found.transforms == exact(PENDING, people_of(50))
    assert (found.epsilon, found.rows) == (None, None)
    assert not (tmp_path / "run").exists()


def test_constants_that_are_gone_or_damaged_are_not_asked_again(tmp_path):
    """A training that goes on had them; a file that cannot be read is no reason to pay again."""
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"\(learned.json\) are gone: start another run"):
        given_to(tmp_path, people_of(50), resume=True)
    for damaged in ("{", json.dumps({"of": 1}), json.dumps([])):
        (tmp_path / "run" / FILE).write_text(damaged)
        with pytest.raises(ConfigError, match=r"learned.json of run 'run' is damaged"):
            given_to(tmp_path, people_of(50))
