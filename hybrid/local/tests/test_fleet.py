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
