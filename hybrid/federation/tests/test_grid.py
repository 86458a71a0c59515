import math

import pytest

from hybrid.errors import ConfigError
from hybrid.federation.grid import Grid

GRID = """
[grid]
server_lr = [0.01, 0.1]
epsilon = [1, inf]
seed = [0, 1, 2]

[fixed]
rounds = 7
clip = 0.5
"""


@pytest.fixture
def load(tmp_path):
    """(text) -> the grid of a file that holds it."""

    def write(text):
        (tmp_path / "grid.toml").write_text(text)
        return Grid.load(tmp_path / "grid.toml")

    return write


def test_every_combination_is_a_configuration(load, tiny_model):
    """2 x 2 x 3 are 12; the last list changes first; what no list names is fixed or the model's."""
    grid = load(GRID)
    configurations = grid.configurations(tiny_model())
    assert len(grid) == len(configurations) == 12
    assert [each.seed for each in configurations[:4]] == [0, 1, 2, 0]
    assert dict(configurations[4].swept) == {"server_lr": 0.01, "epsilon": math.inf, "seed": 1}
    assert {each.settings.rounds for each in configurations} == {7}
    assert {each.settings.local_lr for each in configurations} == {tiny_model().training.local_lr}
    assert {each.of(tiny_model()).privacy.clip for each in configurations} == {0.5}
    assert [each.is_oracle for each in configurations] == [False, False, False, True, True, True] * 2


def test_what_the_grid_leaves_out_is_the_models(load, tiny_model):
    """Budget and clip as declared, seed 0."""
    (one,) = load("[grid]\nrounds = [3]").configurations(tiny_model())
    assert (one.epsilon, one.clip, one.seed) == (8.0, 1.0, 0)


def test_configurations_that_differ_in_rates_clip_or_noise_alone_are_trained_together(load, tiny_model):
    """Of 2 x 2 x 2 x 2 there are as many groups as seeds times batches: 4."""
    grid = load("[grid]\nlocal_lr = [0.1, 1]\nepsilon = [1, 2]\nseed = [0, 1]\nlocal_batch = [2, 3]")
    assert len({each.shared for each in grid.configurations(tiny_model())}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one field, got none"),
        ("[grid]\nserver_rate = [1]", "got 'server_rate'"),
        ("[grid]\nserver_lr = []", "server_lr must list at least one value"),
        ("[grid]\nserver_lr = 0.1", r"server_lr must be a list of values to try, got 0\.1"),
        ("[grid]\nserver_lr = [0.1, 0.1]", "server_lr must list each value once"),
        ("[grid]\nserver_lr = ['0.1']", r"server_lr must be a number, got '0\.1'"),
        ("[grid]\nserver_lr = ['fast']", "server_lr.*got 'fast'"),
        ("[grid]\nserver_lr = [-1]", "server_lr.*got -1"),
        ("[grid]\nrounds = [true]", "rounds must be a number, got True"),
        ("[grid]\nepsilon = [9]", "epsilon must be > 0 and at most the 8 that 'tiny' declares, or inf"),
        ("[grid]\nepsilon = ['1']", "epsilon must be a number, got '1'"),
        ("[grid]\nepsilon = [nan]", "epsilon must be > 0"),
        ("[grid]\nclip = [0]", "clip must be finite and > 0, got 0"),
        ("[grid]\nseed = [0.5]", r"seed must be an integer >= 0, got 0\.5"),
        ("[grid]\nseed = [1]\n[fixed]\nseed = 2", "seed must be in .grid. or in .fixed."),
        ("[grid]\nseed = [1]\n[more]\nseed = 2", r"must have the tables \[grid\] and \[fixed\] only, got \['more'\]"),
        ("[grid]\nproximal = [20]", "lr x proximal must be at most 1"),
        (f"[grid]\nseed = {list(range(11))}\nrounds = {list(range(1, 101))}", "at most 1000 configurations, got 1100"),
        ("[grid", "grid.toml must be TOML"),
        ("grid = 1", "grid must be a table"),
    ],
)
def test_a_wrong_grid_is_refused(load, tiny_model, text, message):
    """The message names the field, what it must be and what it got."""
    with pytest.raises(ConfigError, match=message):
        load(text).configurations(tiny_model())


def test_a_grid_must_be_a_file(tmp_path):
    """The message names it."""
    with pytest.raises(ConfigError, match=r"none\.toml' does not exist"):
        Grid.load(tmp_path / "none.toml")
