"""The audit of towers that tell everything, or nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

import hybrid.privacy.inversion
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Noised, Numeric, Privacy, Server, View
from hybrid.errors import ConfigError
from hybrid.federation.engine import embed, predict
from hybrid.federation.population import Examples
from hybrid.network import Network
from hybrid.privacy.inversion import PRIOR, inversion
from hybrid.privacy.mechanisms import local_epsilon
from hybrid.privacy.profiles import slots_of

WORDS, OTHERS = ("a", "b", "c"), ("x", "y")


def _linear():
    from torch import nn

    return nn.LazyLinear(4)


def _constant():
    import torch

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rest = torch.nn.LazyLinear(4)

        def forward(self, rows):
            return 0.0 * self.rest(rows) + 1.0

    return Constant()


def _head():
    import torch

    class Product(torch.nn.Module):
        def forward(self, server, device):
            return (server * device).sum(-1)

    return Product()


@pytest.fixture(scope="module")
def network():
    """(**changes) -> a network with two words on the device, whose linear tower tells both."""

    def build(**changes):
        fields = {
            "name": "tiny",
            "server": Server(
                service="tiny_service",
                entity=Entity(name="offer", join_key="offer_id"),
                views=(View(name="offers", source="offers.parquet", features={"rate": Numeric()}),),
                max_feature_age=timedelta(days=1),
            ),
            "device": {"word": Categorical(vocabulary=WORDS), "other": Categorical(vocabulary=OTHERS)},
            "server_tower": _linear,
            "device_tower": _linear,
            "head": _head,
            "label": Label(column="clicked", visible_to="server"),
            "privacy": Privacy(epsilon=8, delta=1e-3, clip=1.0, unit="user"),
            "merge": "server",
            "release": Clear(reason="a test of the audit"),
        }
        return Network.build(HybridModel(**fields | changes))

    return build


@pytest.fixture(scope="module")
def examples():
    """(network, users, seed) -> three rows each; six in ten have the first word, eight in ten the second other."""

    def build(network, users, seed=0, words=(0.6, 0.3, 0.1)):
        rng = np.random.default_rng(seed)
        rows = 3 * users
        slots = np.stack([rng.choice(3, rows, p=words), rng.choice(2, rows, p=[0.2, 0.8])], axis=1).astype(np.float32)
        rate = rng.normal(size=rows)
        server = np.stack([rate, 0 * rate], axis=1).astype(np.float32)
        device = network.model.device_features.encode(slots)
        unlabelled = Examples(server, device, np.zeros(rows, np.float32), 3 * np.arange(users + 1))
        labels = predict(network, unlabelled) + 0.1 * rng.normal(size=rows) > 0.5
        return replace(unlabelled, labels=labels.astype(np.float32))

    return build


def test_a_clear_embedding_that_tells_everything_is_recovered_whole(network, examples):
    """Every row; the gain is what the prior, the share of the commonest value, leaves, and nothing costs AUC."""
    tells = network()
    attacked = examples(tells, 40, seed=1)
    report = inversion(tells, attacked, examples(tells, 200), sigmas=())
    (clear,) = report.levels
    assert (clear.sigma, clear.declared, clear.epsilon, clear.whole) == (0.0, True, np.inf, 1.0)
    truth = slots_of(tells.model.device_features, attacked.device)
    for found, common in zip(clear.recovered, ((truth[:, 0] == 0).mean(), (truth[:, 1] == 1).mean()), strict=True):
        assert (found.recovery, found.prior) == (1.0, pytest.approx(common))
        assert found.gain.mean == pytest.approx(1 - common)
        assert found.gain.low < found.gain.mean < found.gain.high
    assert (clear.auc_cost.mean, clear.auc_cost.low, clear.auc_cost.high) == (0, 0, 0)
    assert clear.most.feature == "word"
    assert report.hidden_from is None


def test_a_tower_that_says_the_same_of_everybody_gives_nothing_away(network, examples):
    """All profiles fit as well, clear and noised: each attack guesses as the prior does, and none is chosen over it."""
    silent = network(device_tower=_constant)
    report = inversion(silent, examples(silent, 40, seed=1), examples(silent, 200), sigmas=(0, 1))
    assert [found.attack for level in report.levels for found in level.recovered] == [PRIOR] * 4
    assert [found.gain.mean for level in report.levels for found in level.recovered] == [0.0] * 4
    assert report.hidden_from is report.clear


def test_with_noise_that_drowns_it_nothing_is_recovered_and_auc_is_lost(network, examples):
    """sigma 100: guesses are the prior's, to a point, and scores are noise; sigma 0 lies below it in the ladder."""
    tells = network()
    report = inversion(tells, examples(tells, 300, seed=1), examples(tells, 300), sigmas=(100.0,))
    clear, noised = report.levels
    assert [level.sigma for level in report.levels] == [0.0, 100.0]
    assert all(abs(found.gain.mean) < 0.01 for found in noised.recovered)
    assert abs(noised.auc - 0.5) < 0.05 < clear.auc - 0.5
    assert noised.auc_cost.low > 0
    assert noised.auc_cost.mean == pytest.approx(clear.auc - noised.auc)
    assert clear.auc_shrunk == clear.auc
    assert report.hidden_from is noised


def test_what_the_model_declares_is_a_level_with_its_own_clip(network, examples):
    """Noised(clip 2, sigma 0.5) among clear and sigma 1; the local epsilon is what `register` prints."""
    tells = network(release=Noised(clip=2.0, sigma=0.5))
    report = inversion(tells, examples(tells, 40, seed=1), examples(tells, 200), sigmas=(0, 1))
    assert [(level.sigma, level.declared) for level in report.levels] == [(0, False), (0.5, True), (1, False)]
    assert report.clip == 2.0
    assert report.levels[1].epsilon == local_epsilon(0.5, 1e-3)


def test_without_a_declared_clip_nine_in_ten_known_embeddings_are_shorter(network, examples):
    """The clip is a quantile of the norms of those whom the attacker knows."""
    tells = network()
    known = examples(tells, 200)
    report = inversion(tells, examples(tells, 40, seed=1), known, sigmas=())
    norms = np.linalg.norm(embed(tells.device_tower, known.device), axis=1)
    assert (norms < report.clip).mean() <= 0.9 <= (norms <= report.clip * (1 + 1e-6)).mean()


def test_no_attack_sees_a_row_of_an_attacked_person(network, examples, monkeypatch):
    """All attacked people have the third word, no known one has: the attacker's rows hold the other two alone."""
    seen = []

    def spied(knows, **settings):
        seen.extend([knows.slots, knows.aside])
        return trained(knows, **settings)

    trained = hybrid.privacy.inversion.trained
    monkeypatch.setattr(hybrid.privacy.inversion, "trained", spied)
    tells = network()
    attacked, known = examples(tells, 40, seed=1, words=(0, 0, 1)), examples(tells, 200, words=(0.5, 0.5, 0))
    inversion(tells, attacked, known, sigmas=())
    learned, aside = seen
    assert len(learned) + len(aside) == len(known)
    assert {0.0, 1.0} == set(learned[:, 0]) == set(aside[:, 0])


def test_the_same_seed_repeats_an_audit(network, examples):
    """Number for number."""
    tells = network()
    attacked, known = examples(tells, 40, seed=1), examples(tells, 100)
    first, second = (inversion(tells, attacked, known, sigmas=(0.3,), rows=50, seed=5) for _ in range(2))
    assert first == second
    assert first.rows == 50
    assert first != inversion(tells, attacked, known, sigmas=(0.3,), rows=50, seed=6)


@pytest.mark.parametrize(
    ("known", "sigma", "message"),
    [
        (200, -1.0, "sigma must be finite and >= 0"),
        (200, np.inf, "sigma must be finite and >= 0"),
        (9, 1.0, "must know at least 10 people, got 9"),
    ],
)
def test_what_cannot_be_audited_is_refused(network, examples, known, sigma, message):
    """In a sentence that says what must be."""
    tells = network()
    with pytest.raises(ConfigError, match=message):
        inversion(tells, examples(tells, 40, seed=1), examples(tells, known), sigmas=(sigma,))
