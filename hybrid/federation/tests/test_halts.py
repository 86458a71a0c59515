import pytest

from hybrid.errors import ConfigError
from hybrid.federation.halts import KillSwitch
from hybrid.federation.remote import Order, Training
from hybrid.federation.tests.test_fleet_aggregator import SAID, TRUST, built
from hybrid.plan import Halt, open_signed

HALT = Halt(model="kiosk", versions=(3,), reason="it is wrong")


def told(aggregator, version):
    reply = aggregator.check_in(SAID.model_copy(update={"version": version}))
    return open_signed(reply.body, TRUST)[0] if reply.status == 200 else None


def test_what_was_halted_stays_halted(tmp_path):
    """By each aggregator that is built on the file afterwards; twice the same is kept once."""
    switch = KillSwitch(built()[0], "kiosk", tmp_path)
    switch.halt(HALT)
    switch.halt(HALT)
    switch.halt(Halt(model="kiosk", versions=(2, 5), reason="so are these"))
    after, _ = built()
    KillSwitch(after, "kiosk", tmp_path)
    assert told(after, 3) == HALT
    assert told(after, 2).reason == told(after, 5).reason == "so are these"
    assert told(after, 1) is None
    assert (tmp_path / "halts.json").read_text().count("it is wrong") == 1


def test_another_models_halt_is_refused_and_not_kept(tmp_path):
    aggregator, _ = built()
    with pytest.raises(ConfigError, match="model must be 'kiosk'"):
        KillSwitch(aggregator, "kiosk", tmp_path).halt(HALT.model_copy(update={"model": "other"}))
    assert not (tmp_path / "halts.json").exists()
    assert told(aggregator, 3) is None


def test_halted_training_stays_halted_until_it_is_resumed(tmp_path):
    """Also by an aggregator that is started anew; both can be said twice, and by nobody for another model."""
    switch = KillSwitch(built()[0], "kiosk", tmp_path)
    assert switch.training() == Training(model="kiosk", plan=None, halted=None)
    for reason in ("loss rose", "loss rose again"):
        switch.suspend(Order(model="kiosk", reason=reason))
    with pytest.raises(ConfigError, match="model must be 'kiosk'"):
        switch.resume(Order(model="other", reason="it is fine"))
    after = KillSwitch(built()[0], "kiosk", tmp_path)
    assert after.training().halted == "loss rose again"
    for _ in range(2):
        after.resume(Order(model="kiosk", reason="it is fine"))
    assert after.training().halted is None
    assert KillSwitch(built()[0], "kiosk", tmp_path).training().halted is None


def test_a_file_of_halts_that_cannot_be_read_keeps_the_aggregator_from_starting(tmp_path):
    (tmp_path / "halts.json").write_text("[{")
    with pytest.raises(ConfigError, match="must be a JSON list of halts"):
        KillSwitch(built()[0], "kiosk", tmp_path)
