from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid.cli.asking import InProcess, OnDevices, Paying
from hybrid.privacy.accountant import GaussianEvent
from hybrid.privacy.ledger import Ledger

DECLARED = SimpleNamespace(privacy=SimpleNamespace(unit="user"), protects="device features")


@pytest.mark.parametrize(
    ("whom", "unit"),
    [
        (InProcess("p", 0, None), "user"),
        (OnDevices("p", None, None, None, 30.0, Path("keys")), "device"),
        (OnDevices("p", None, None, None, 30.0, Path("keys"), tokens=True), "user"),
    ],
    ids=["simulated", "on devices", "with tokens"],
)
def test_whose_epsilon_it_is_depends_on_who_is_asked(tmp_path, whom, unit):
    """The declared unit is true of people in a simulation; a person with two devices answers twice, without tokens."""
    with Ledger.open(tmp_path, budget_epsilon=8, delta=1e-5) as ledger:
        ledger.spend(GaussianEvent(2.0, 1.0), purpose="analyze", clip=1.0, round_number=1, attempt=1)
        assert Paying(DECLARED, "analyze", whom, tmp_path, ledger, None, 0).spend()["unit"] == unit
