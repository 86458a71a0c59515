from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from hybrid.bearer import new_token
from hybrid.cli import app
from hybrid.errors import AggregatorError, ConfigError
from hybrid.federation.remote import control_app, controlled
from hybrid.plan import Halt


@contextmanager
def switch(folder):
    """An aggregator's control side, as options of the command, and what it was told to halt."""
    halted = []
    control = control_app(None, new_token(folder / "token"), size=2, folder=folder, halt=halted.append)
    with controlled(control, host="127.0.0.1", port=0) as port:
        yield ["--aggregator", f"http://127.0.0.1:{port}", "--token", str(folder / "token")], halted


def halt(*words):
    return CliRunner().invoke(app, ["fleet", "halt", "coupon", *words], catch_exceptions=False).stdout


def test_versions_are_halted_at_a_running_aggregator(tmp_path):
    """Both, with the reason; the command says so once the aggregator has taken it."""
    with switch(tmp_path) as (aggregator, halted):
        said = halt("--versions", "3", "--versions", "4", "--reason", "it is wrong", *aggregator)
    assert halted == [Halt(model="coupon", versions=(3, 4), reason="it is wrong")]
    assert said.startswith("coupon: version 3, 4 is halted at http://127.0.0.1:")


def test_a_halt_that_was_not_taken_is_an_error(tmp_path):
    """Nobody is there; it is no halt; or the address is open to others without TLS."""
    empty = pytest.raises(ConfigError, match="reason: String should have at least 1 character, got ''")
    with switch(tmp_path) as (aggregator, _), empty:
        halt("--versions", "3", "--reason", "", *aggregator)
    with pytest.raises(AggregatorError, match="did not take the halt"):
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
