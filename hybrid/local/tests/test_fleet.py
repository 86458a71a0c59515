import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid.bundle import Keeping
from hybrid.federation.aggregator import Round
from hybrid.local.fleet import Promoted
from hybrid.privacy.matrix import optimised
from hybrid.spec import Training
from hybrid.version import Balance, TrainingRecord, Version

BALANCE = Balance(prior=0.05, prior_exact=False, keep=(0.0526, 1.0), analytic=-2.94, estimated=-0.1)


@pytest.mark.parametrize(
    ("balance", "keep"), [(None, None), (BALANCE, (0.0526, 1.0))], ids=["as they come", "balanced"]
)
def test_devices_keep_of_their_examples_what_the_version_s_correction_is_for(balance, keep):
    """Of the version that is trained further: nobody is asked for the prior anew."""
    record = TrainingRecord(
        kind="federated", run="r", population="p", users=40, examples=None, settings=Training(), balance=balance
    )
    version = Version("kiosk", 4, "cd" * 32, {}, record, {})
    manifest = SimpleNamespace(train=SimpleNamespace(size=3), keeping=Keeping())
    promoted = Promoted(version, SimpleNamespace(), Training(), Path("bundle"), Path("trust"), manifest)
    assert promoted.task(60.0, devices=40).local.keep == keep


def test_what_a_fleet_spends_is_found_although_it_never_gives_a_version(tmp_path):
    """`hybrid privacy` finds a model's runs by their config.json: it is there before the first round can be paid."""
    record = TrainingRecord(kind="federated", run="r", population="p", users=40, examples=None, settings=Training())
    model = SimpleNamespace(name="kiosk", privacy=SimpleNamespace(delta=1e-5, clip=1.0))
    version, manifest = Version("kiosk", 4, "cd" * 32, {}, record, {}), SimpleNamespace()
    promoted = Promoted(version, SimpleNamespace(model=model), Training(), Path("bundle"), Path("trust"), manifest)
    with promoted.paid(2.0, 40, tmp_path / "fleet"):
        assert json.loads((tmp_path / "fleet" / "config.json").read_text())["model"] == "kiosk"


SPENT = SimpleNamespace(spent=lambda: SimpleNamespace(epsilon=1.0, method="exact"))
PROMOTED = Promoted(
    Version(
        "kiosk",
        4,
        "cd" * 32,
        {},
        TrainingRecord(kind="federated", run="r", population="p", users=40, examples=None, settings=Training()),
        {},
    ),
    SimpleNamespace(model=SimpleNamespace(privacy=SimpleNamespace(delta=1e-5), protects="device features")),
    Training(),
    Path("bundle"),
    Path("trust"),
    SimpleNamespace(),
)
ABOUT = {"users": 40, "examples": None, "population": "p", "run": "r"}


@pytest.mark.parametrize("matrix", [None, optimised("independent", 9, 3)], ids=["coins", "turns"])
@pytest.mark.parametrize(("tokens", "unit"), [(True, "user"), (False, "device")])
def test_users_are_protected_only_where_each_account_has_one_token(tokens, unit, matrix):
    """Else a person with two devices is in a round twice; the record says who sees to it, or that nobody does."""
    settings = Round(0.5 if matrix is None else 1.0, 1.0, 1.0, 0, matrix=matrix)
    record = PROMOTED.record(settings, SPENT, aggregators=1, tokens=tokens, **ABOUT)
    assert record.unit == unit
    assert ("nothing enforces" in record.assumption or "nothing else enforces" in record.assumption) != tokens
    assert ("the issuer of tokens sees to that" in record.assumption) == tokens


def test_of_several_aggregators_each_would_count_a_persons_devices():
    with pytest.raises(AssertionError):
        PROMOTED.record(Round(0.5, 1.0, 1.0, 0), SPENT, aggregators=2, tokens=True, **ABOUT)
