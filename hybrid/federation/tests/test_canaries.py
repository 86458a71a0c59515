"""A training is audited as it runs: the people, the engine, the paid mechanism, the ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybrid import Training
from hybrid.errors import ConfigError
from hybrid.federation.canaries import audit_training
from hybrid.privacy.ledger import Ledger

SETTINGS = Training(rounds=8, sampling=0.5, local_lr=0.5, server_lr=0.05)


@pytest.fixture
def audited(tiny_model, tiny_examples, tmp_path):
    """(epsilon, users' seed, **changes of the settings) -> what an audit of 1,200 canaries found."""

    def run(epsilon, seed=0, **changes):
        model = tiny_model(training=SETTINGS.model_copy(update=changes))
        return audit_training(
            model,
            tiny_examples(400, seed=seed),
            epsilon=epsilon,
            trials=1200,
            seed=1,
            confidence=0.95,
            folder=tmp_path / str(seed),
        )

    return run


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_quantile": 0.5}, {"separation": 3, "noise": "banded", "server_optimizer": "SGD"}],
    ids=["by coins", "adaptive clip", "by turns"],
)
def test_a_training_keeps_its_claim_and_gives_away_more_than_a_smaller_one(audited, changes):
    """At epsilon 8 the bound is below 8; had it claimed 1 for the same releases, the audit would refute it."""
    finding = audited(8.0, **changes)
    assert not finding.refuted
    assert replace(finding, epsilon=1.0).refuted
    assert finding.rounds == 8


def test_each_audited_training_pays_for_its_rounds(audited, tmp_path):
    """As many ledgers as trainings, each with eight releases and no more than the claim."""
    audited(2.0)
    ledgers = [Ledger.read(folder) for folder in (tmp_path / "0").iterdir()]
    assert len(ledgers) > 1
    for account in ledgers:
        assert [entry.round for entry in account.entries] == list(range(1, 9))
        assert 1.9 < account.spent().epsilon <= 2.0


def test_what_is_found_does_not_depend_on_the_people(audited):
    """Other people with other data, the same canaries and noise: the same bound, to the rounding of sums."""
    first, other = (audited(8.0, seed=seed).bound for seed in (0, 1))
    assert first.epsilon == pytest.approx(other.epsilon, rel=1e-6)


def test_a_claim_beyond_the_models_budget_is_refused(audited):
    """The model declares 8."""
    with pytest.raises(ConfigError, match="at most the 8 that 'tiny' declares, got 9"):
        audited(9.0)
