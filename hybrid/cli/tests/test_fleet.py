from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from hybrid.bearer import new_token
from hybrid.cli import app
from hybrid.errors import AggregatorError, ConfigError, NotFound
from hybrid.federation.halts import KillSwitch
from hybrid.federation.remote import control_app, controlled
from hybrid.federation.tests.test_fleet_aggregator import FLAT, ROUND_S, SAID, TRUST, built
from hybrid.plan import Halt, open_signed


@contextmanager
def switch(folder):
    """An aggregator's control side, as options of the command, and the aggregator, which has a round open."""
    aggregator, clock = built(model="coupon")
    stopped = KillSwitch(aggregator, "coupon", folder)
    control = control_app(aggregator, new_token(folder / "token"), size=2, folder=folder / "r", switch=stopped)
    with (
        controlled(control, host="127.0.0.1", port=0) as port,
        clock.during(lambda: aggregator.run_round(1, FLAT), ROUND_S),
    ):
        yield ["--aggregator", f"http://127.0.0.1:{port}", "--token", str(folder / "token")], aggregator


def fleet(*words):
    return CliRunner().invoke(app, ["fleet", *words], catch_exceptions=False).stdout


def halt(*words):
    return fleet("halt", "coupon", *words)


def test_versions_are_halted_at_a_running_aggregator(tmp_path):
    """Both, with the reason; the command says so once the aggregator has taken it."""
    with switch(tmp_path) as (options, aggregator):
        said = halt("--versions", "3", "--versions", "4", "--reason", "it is wrong", *options)
        told, _ = open_signed(aggregator.check_in(SAID.model_copy(update={"model": "coupon"})).body, TRUST)
    assert told == Halt(model="coupon", versions=(3, 4), reason="it is wrong")
    assert said.startswith("coupon: version 3, 4 is halted at http://127.0.0.1:")


def test_a_round_is_ended_and_training_halted_and_resumed(tmp_path):
    """The open round by default; then none is, and the command says so. Training stands as it was told to."""
    with switch(tmp_path) as (options, aggregator):
        plan = aggregator.open_plan
        assert f"plan {plan} has ended" in fleet("end-round", "coupon", "--reason", "wrong clip", *options)
        assert f"plan {plan} has ended" in fleet("end-round", "coupon", "--plan", plan, "--reason", "again", *options)
        with pytest.raises(NotFound, match="no round is open at"):
            fleet("end-round", "coupon", "--reason", "wrong clip", *options)
        assert "training is halted" in fleet("halt-training", "coupon", "--reason", "loss rose", *options)
        assert aggregator.suspended == "loss rose"
        assert "training goes on" in fleet("resume-training", "coupon", *options)
        assert aggregator.suspended is None
        with pytest.raises(AggregatorError, match="model must be 'coupon'"):
            fleet("halt-training", "taxi", "--reason", "loss rose", *options)


def test_a_halt_that_was_not_taken_is_an_error(tmp_path):
    """Nobody is there; it is no halt; or the address is open to others without TLS."""
    empty = pytest.raises(ConfigError, match="reason: String should have at least 1 character, got ''")
    with switch(tmp_path) as (aggregator, _), empty:
        halt("--versions", "3", "--reason", "", *aggregator)
    with pytest.raises(AggregatorError, match="did not take it"):
        halt("--versions", "3", "--reason", "it is wrong", *aggregator)
    with pytest.raises(ConfigError, match="must begin with https"):
        halt("--versions", "3", "--reason", "r", "--aggregator", "http://a.example", "--token", str(tmp_path / "token"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--federation", "local", "--port", "8090"), "--port must be left out with --federation"),
        (("--federation", "local", "--devices", "1"), "--devices must be at least 2, the aggregators of --federation"),
        (("--separation", "2", "--sampling", "0.5"), "--sampling must be left out with --separation, .*, got 0.5"),
        (("--federation", "local", "--tokens"), "--tokens and --second-devices must be left out with --federation"),
        (("--devices", "3", "--second-devices", "4"), "--second-devices must be at most the 3 of --devices, got 4"),
        (("--max-staleness", "2"), "--max-staleness must be left out without --buffer, got 2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    """Before anything is opened."""
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["fleet", "run", "coupon", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scope", "spring"), "--scope must be left out without --issuer"),
        (("--issuer-authority", "ca.crt"), "--issuer-authority must be left out without --issuer"),
        (("--issuer", "https://issuer:8093"), "--issuer needs --issuer-name"),
        (("--issuer", "http://issuer:8093", "--issuer-name", "a.example"), "--issuer must be https://HOST:PORT .*got"),
        (("--issuer", "https://issuer:8093", "--issuer-name", "A B"), "name"),
    ],
)
def test_an_issuer_that_cannot_be_is_refused(words, message):
    """Before a run is charged."""
    prepare = ["fleet", "prepare", "coupon", "--devices", "40", "--folder", "spring", *words]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, prepare, catch_exceptions=False)
