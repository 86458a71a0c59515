from datetime import UTC, datetime

import numpy as np
import pytest

from hybrid.analytics.asking import DRIFT, Exact, People, Simulated
from hybrid.analytics.drift import (
    Counted,
    Period,
    Question,
    cells_of,
    compare,
    count,
    folder_of,
    keep,
    kept,
    unwatched,
    watched,
)
from hybrid.errors import ConfigError
from hybrid.features import Bucketize, Categorical, Hash, Log1p, Numeric
from hybrid.privacy.ledger import Ledger
from hybrid.week import week_of

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
DEVICE = {"colour": Categorical(vocabulary=("red", "blue")), "age": Numeric(mean=40, std=10), "app": Hash(buckets=8)}


def period(population="p", **ends):
    return Period(population=population, imported=NOW, **ends)


def asked(**changes):
    query = watched(DEVICE, score=False)
    return Question(**({"model": "m", "version": None, "period": period(), "query": query} | changes))


def people(number, seed, blue=0.5):
    """One row each."""
    rng = np.random.default_rng(seed)
    colours = np.where(rng.random(number) < blue, "blue", "red").astype(object)
    return People({"colour": colours, "age": rng.normal(40, 10, number)}, np.arange(number + 1))


def exact(number, seed, **how):
    return count(Exact(people(number, seed, **how)), asked(), share=1.0, epsilon=0.0, delta=1e-3, now=NOW)


def test_columns_have_the_cells_that_were_declared():
    """A vocabulary; edges; ten bins of half a standard deviation; of a logarithm none below 0; 20 arcs of scores."""
    device = {**DEVICE, "hours": Bucketize(edges=(1.0, 24.0)), "clicks": Log1p(mean=1.0, std=1.0)}
    colour, age, hours, clicks, score = watched(device, score=True).parts
    assert cells_of(colour) == ("red", "blue", "(unseen)", "(missing)")
    assert age.edges == (20, 25, 30, 35, 40, 45, 50, 55, 60)
    assert cells_of(hours) == ("below 1", "1 to 24", "from 24", "(missing)")
    assert clicks.edges == pytest.approx(np.expm1([0.5, 1, 1.5, 2, 2.5, 3]))
    assert len(score.edges) == 19
    assert score.edges[9] == pytest.approx(0.5)
    assert unwatched(device) == ("app",)


def test_what_cannot_be_asked_is_refused():
    """No cells at all; a feature called like the scores."""
    with pytest.raises(ConfigError, match="other than Hash"):
        watched({"app": Hash(buckets=8)}, score=False)
    with pytest.raises(ConfigError, match="cannot be called 'score'"):
        watched({"score": Numeric()}, score=True)


def test_a_person_counts_by_the_last_row():
    """Three rows, red, red, blue, and one person without any: one blue."""
    rows = People({"colour": ["red", "red", "blue"], "age": [1.0, 2.0, None]}, np.array([0, 3, 3]))
    counted = count(Exact(rows), asked(), share=1.0, epsilon=0.0, delta=1e-3, now=NOW)
    assert counted.columns["colour"].counts.tolist() == [0, 1, 0, 0]
    assert counted.columns["age"].counts.tolist() == [0] * 10 + [1]
    assert counted.people == 2


def test_the_column_that_shifted_has_drifted_and_the_other_has_not():
    """Half of the people, then four in five, are blue: 0.3 log(1.6) + 0.3 log(2.5) = 0.416; ages stay."""
    colour, age = compare(exact(20_000, 0), exact(20_000, 1, blue=0.8))
    assert colour.psi.value == pytest.approx(0.416, abs=0.02)
    assert (colour.psi.verdict, age.psi.verdict) == ("drifted", "stable")
    assert colour.current[1] == pytest.approx(0.8, abs=0.01)


def test_periods_that_are_counted_cost_exactly_the_week(tmp_path):
    """Three periods of a third each come to epsilon 0.5, the week's; the noise is of all columns together."""
    with Ledger.open(tmp_path, budget_epsilon=0.5, delta=1e-5) as ledger:
        for number in range(3):
            ask = Simulated(people(1000, number), ledger, purpose=DRIFT, epsilon=0.5, seed=number)
            counted = count(ask, asked(), share=1 / 3, epsilon=0.2, delta=1e-5, now=NOW)
        assert ledger.spent().epsilon == pytest.approx(0.5, rel=1e-3)
        assert {entry.purpose for entry in ledger.entries} == {"drift"}
        assert counted.sd == pytest.approx(ledger.entries[0].noise_multiplier * np.sqrt(2))


def test_counts_are_kept_and_found_again(tmp_path):
    """As they were, of one model, in any week; a damaged file is named."""
    counted = exact(10, 0)
    for model, week in (("m", "2026-W47"), ("m", "2026-W48"), ("other", "2026-W48")):
        folder = folder_of(tmp_path, model, week)
        folder.mkdir()
        file = keep(counted, folder, 1)
    assert list(kept(tmp_path, "m")) == [counted, counted]
    assert Counted.model_validate_json(file.read_bytes()).question == asked()
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"counted-1\.json cannot be read"):
        list(kept(tmp_path, "other"))


def test_an_answer_is_to_one_question():
    """Another version, period, import or transform is another question."""
    others = [
        asked(version=1),
        asked(period=period(until=NOW)),
        asked(period=Period(population="p", imported=NOW.replace(hour=1))),
        asked(query=watched({"age": Numeric(mean=41)}, score=False)),
    ]
    assert asked() == asked()
    assert len({asked(), *others}) == 5


def test_weeks_are_iso_weeks():
    """The first of January 2027 is in the last week of 2026."""
    assert week_of(datetime(2027, 1, 1, tzinfo=UTC)) == "2026-W53"
    assert week_of(NOW) == "2026-W48"
