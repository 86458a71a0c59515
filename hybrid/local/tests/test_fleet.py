import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid.bundle import Keeping
from hybrid.local.fleet import Promoted
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
