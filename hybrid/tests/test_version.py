"""What a training record says of its privacy."""

from __future__ import annotations

from hybrid.features import Categorical, Numeric
from hybrid.spec import Training
from hybrid.version import Balance, Learned, TrainingRecord, constants_of

RECORD = TrainingRecord(
    kind="federated",
    run="r1",
    population="riders",
    users=30,
    examples=90,
    epsilon=3.5,
    delta=1e-5,
    noise_multiplier=2.0,
    clip=1.0,
    sampling=0.5,
    rounds=70,
    mechanism="Gaussian noise; accountant: PRV",
    assumption="nobody sees who took part",
    unit="user",
    protects="device features",
)


def test_an_epsilon_is_told_with_all_that_it_means():
    """Delta, unit, what it protects, mechanism, rounds, sampling, assumption."""
    assert RECORD.privacy_lines() == (
        "epsilon 3.500 at delta 1e-05 per user; protects the device features",
        "Gaussian noise; accountant: PRV; 70 rounds, each person in each with probability 0.5",
        "assumes: nobody sees who took part",
    )
    assert "70 rounds, everybody in each" in RECORD.model_copy(update={"sampling": 1.0}).privacy_lines()[1]


def test_without_a_mechanism_nothing_is_claimed():
    """A reference has one line, and no epsilon in it."""
    record = TrainingRecord(kind="central", run="r1", population="riders", users=30, examples=90)
    assert record.privacy_lines() == ("none: a reference of a simulation, trained without a mechanism",)


def test_a_record_s_settings_are_read_as_they_were_written():
    """Options of every type included; a record without settings, as they were before, is read too."""
    settings = Training(server_options={"betas": (0.9, 0.99), "nesterov": True, "momentum": 0.5}, tower_dropout=0.1)
    record = RECORD.model_copy(update={"settings": settings})
    read = TrainingRecord.model_validate_json(record.model_dump_json())
    assert read == record
    assert read.settings.server_options == {"betas": (0.9, 0.99), "nesterov": True, "momentum": 0.5}
    assert TrainingRecord.model_validate_json(RECORD.model_dump_json(exclude={"settings"})) == RECORD


def test_a_label_balance_is_told_with_prior_keep_and_shift():
    """What the noise made of the estimated part is said, whichever it is."""
    balance = Balance(prior=0.0512, prior_exact=False, keep=(0.054, 1.0), analytic=-2.919, estimated=-0.08)
    assert balance.line() == (
        "label prior 0.0512 (noised); devices keep 0.054 of label 0 and 1 of label 1; logits are shifted by -2.919, "
        "and -0.080 as estimated after the training"
    )
    exact = balance.model_copy(update={"prior_exact": True, "estimated": None})
    assert "(exact)" in exact.line()
    assert "and nothing that makes sense as estimated" in exact.line()
    record = RECORD.model_copy(update={"balance": balance})
    assert TrainingRecord.model_validate_json(record.model_dump_json()) == record


def test_learned_constants_are_told_with_what_they_cost():
    """Of which features, whose ledger paid, and from how much of each person; exact ones are an oracle's."""
    spent = Learned(transforms={"trips": Numeric(mean=3)}, users=30, run="r0", rows=4, epsilon=0.25, delta=1e-5)
    line = "constants of trips: epsilon 0.250 at delta 1e-05 of run r0, from the last 4 rows of each person"
    assert RECORD.model_copy(update={"learned": spent}).privacy_lines() == (*RECORD.privacy_lines(), line)
    exact = Learned(transforms={"trips": Numeric(mean=3)}, users=30, run="r0")
    assert exact.line() == "constants of trips: exact, from pooled rows (oracle)"


def test_a_record_comes_back_from_json_with_its_constants():
    """Bit for bit, as every side computes with them."""
    learned = Learned(transforms={"trips": Numeric(mean=0.1, std=1 / 3)}, users=30, run="r1")
    record = RECORD.model_copy(update={"learned": learned})
    assert TrainingRecord.model_validate_json(record.model_dump_json()) == record


def test_places_that_no_text_was_found_for_are_not_told():
    """Of three places two were filled: both texts, and nothing of the third."""
    assert constants_of(Categorical(discover=3).learned(["north", "east"])) == "north, east"
    assert constants_of(Categorical(discover=3).learned([])) == "no text is frequent"
