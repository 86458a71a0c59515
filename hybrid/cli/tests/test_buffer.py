"""`hybrid buffer`: the K that a target epsilon needs."""

import json

import pytest

from hybrid.errors import ConfigError


def test_a_smaller_epsilon_needs_a_larger_buffer(project):
    """The table and the JSON say the same; the first row is what serves at the epsilon that the model declares, 4."""
    words = ("buffer", "taxi", "--updates", "5", "--people", "100000", "--epsilon", "2", "--epsilon", "1")
    told = json.loads(project(*words, "--json"))
    sizes = [told["declared"], *(each["buffer"] for each in told["needed"])]
    assert [each["epsilon"] for each in told["needed"]] == [2.0, 1.0]
    assert sizes[0]["updates"] == 5 < sizes[1]["updates"] < sizes[2]["updates"]
    assert max(each["step_noise"] for each in sizes) == sizes[0]["step_noise"]
    table = project(*words)
    assert all(f"{each['updates']:,}" in table for each in sizes)
    assert "100,000 people, 3 flushes" in table


def test_where_too_few_come_it_says_so(project):
    """Of the hundred people of the population not even all are enough at epsilon 0.01."""
    told = json.loads(project("buffer", "taxi", "--updates", "4", "--epsilon", "0.01", "--json"))
    assert told["people"] == 100
    assert told["needed"] == [{"epsilon": 0.01, "buffer": None}]
    assert "none: too few people come" in project("buffer", "taxi", "--updates", "4", "--epsilon", "0.01")


def test_what_serves_at_the_declared_epsilon_is_what_was_given(project):
    """Asked for it as a target, too, the row is that of --updates, and there is no other."""
    words = ("buffer", "taxi", "--updates", "5", "--people", "100000", "--epsilon", "4", "--epsilon", "2", "--json")
    told = json.loads(project(*words))
    assert told["declared"]["updates"] == 5
    assert [each["epsilon"] for each in told["needed"]] == [2.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--updates", "5"), "--updates must be at most 4, with 100 people and updates up to 10 flushes late, got 5"),
        (("--updates", "51", "--max-staleness", "0"), "--updates must be at most 50"),
        (("--people", "20"), "20 people are too few .*: --people x --coming must be at least 11, got 10; or lower"),
        (("--epsilon", "5"), "--epsilon must be > 0 and at most the 4 that 'taxi' declares, got 5"),
        (("--epsilon", "0"), "--epsilon must be > 0"),
        (("--coming", "0"), r"--coming must be in \(0, 1\], got 0"),
        (("--noise", "pink"), "noise"),
    ],
)
def test_what_cannot_be_is_refused(project, words, message):
    """By the option's name, its bound and what it got."""
    with pytest.raises(ConfigError, match=message):
        project("buffer", "taxi", *words)
