"""The study coach: its history, its split, its label rates, and what its tables leave out."""

import math

import numpy as np
import pandas as pd
import pytest

from examples.study_coach import prepare, submissions
from examples.study_coach.submissions import LabelCounts
from hybrid.federation.population import import_table
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import SeededNoise
from hybrid.spec import load_model
from hybrid.workspace import Workspace


@pytest.fixture(scope="module")
def rows():
    return submissions.load()


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study_coach")
    file = prepare.write_population(folder / "population.parquet")
    return import_table(file, user="student", name="study_coach", workspace=Workspace(folder / ".hybrid"))


def student(*days_and_scores):
    """One student's rows in one course, all of one kind, due on the day before they were handed in."""
    return pd.DataFrame(
        [
            {"student": "s", "event_day": d, "submitted_day": d, "due_day": d - 1.0, "score": s, "good": int(s >= 80)}
            for d, s in days_and_scores
        ]
    ).assign(code_module="AAA", code_presentation="2013J", assessment_type="TMA")


def test_the_data_is_as_its_source_says(rows):
    """120,581 rows of 16,350 students, one a student and assessment."""
    assert (len(rows), rows.student.nunique()) == (120_581, 16_350)
    assert not rows.duplicated(["student", "assessment"]).any()


def test_history_is_of_earlier_days_only():
    """Of 90 on day 1 and 50 and 70 on day 2, the rows of day 2 know the 90 alone; day 3 knows all three."""
    made = submissions.history(student((1, 90), (2, 50), (2, 70), (3, 100)))
    assert made["earlier"].tolist() == [0, 1, 1, 3]
    assert made["last_score"].fillna(-1).tolist() == [-1, 90, 90, 70]
    assert made["mean_score"].tolist() == pytest.approx([75, (90 + 150) / 3, (90 + 150) / 3, (210 + 150) / 5])
    assert made["good_odds"].tolist() == pytest.approx([0, math.log(2), math.log(2), math.log(2 / 3)])
    assert made["mean_lateness"].fillna(-1).tolist() == [-1, 1, 1, 1]


def test_a_narrower_scope_begins_at_the_wider_one_s_mean():
    """A 90 and two rows of 75: 80. Of this kind, the 90 and two rows of 80: 250 / 3; of this course, two of those."""
    made = submissions.history(student((1, 90), (2, 0)))
    assert made["kind_mean_score"][1] == pytest.approx((90 + 2 * 80) / 3)
    assert made["course_mean_score"][1] == pytest.approx((90 + 2 * 250 / 3) / 3)


def test_changing_a_score_changes_no_earlier_row(rows):
    """Turning every score of test rows leaves the history of training rows as it was."""
    some = rows[rows.fold == 0].reset_index(drop=True)
    turned = some.assign(score=some.score.where(~some.is_test, 100 - some.score), good=some.good ^ some.is_test)
    before, after = submissions.history(some), submissions.history(turned)
    for name, values in before.items():
        pd.testing.assert_series_equal(values[~some.is_test], after[name][~some.is_test])


def test_the_last_fifth_of_each_student_s_rows_is_test(rows):
    """ceil(n / 5) of n rows, and none is before a training row of the same student."""
    size = rows.groupby("student").is_test.agg(["size", "sum"])
    assert (size["sum"] == np.ceil(size["size"] / 5)).all()
    days = rows.groupby(["student", "is_test"]).event_day.agg(["min", "max"]).unstack()
    both = days.dropna()
    assert (both["max"][False] <= both["min"][True]).all()


def test_a_rate_counts_other_folds_and_is_drawn_towards_its_like():
    """All good in fold 0, 100 rows in fold 1 of which 50 good: fold 0's key sees fold 1 alone."""
    total, good = np.zeros((5, 2)), np.zeros((5, 2))
    total[0, 0], good[0, 0] = 100, 100
    total[1, 0], good[1, 0] = 100, 50
    counts = LabelCounts(np.array(["a", "b"], dtype=object), total, good)
    table = submissions.label_rates(counts, np.array(["m", "m"])).set_index("rates_of")
    assert table.assessment_odds["a/0"] == pytest.approx(0.0)
    overall = (150 + 20 * 0.5) / 220
    wide = (150 + 20 * overall) / 220
    rate = (150 + 20 * wide) / 220
    assert table.assessment_odds["a/all"] == pytest.approx(math.log(rate / (1 - rate)))
    assert table.assessment_odds["b/all"] == pytest.approx(math.log(wide / (1 - wide)))
    assert set(table.index) == {f"{name}/{key}" for name in "ab" for key in [*"01234", "all"]}


def test_noise_draws_a_rate_further_towards_its_like():
    """60 of 100 where everything else is at one half: a rate from noised counts keeps less of the difference."""
    total, good = np.full((5, 9), 20.0), np.full((5, 9), 10.0)
    good[:, 0] = 12.0
    names = np.array([f"a{number}" for number in range(9)], dtype=object)
    odds = [
        submissions.label_rates(LabelCounts(names, total, good, sd), np.array(["m"] * 9)).set_index("rates_of")
        for sd in (0.0, 10.0)
    ]
    exact, noised = (table.assessment_odds["a0/all"] for table in odds)
    assert 0 < noised < exact < math.log(0.6 / 0.4)


def test_no_training_sees_a_test_label(rows, population):
    """The label is missing in exactly the test rows, and theirs is in a column of its own."""
    unlabelled = np.isnan(population.column("good"))
    np.testing.assert_array_equal(unlabelled, population.column("is_test"))
    np.testing.assert_array_equal(unlabelled, ~np.isnan(population.column("good_later")))
    assert unlabelled.sum() == rows.is_test.sum()


def test_test_labels_are_in_no_rate(population):
    """The exact counts are of as many rows as there are training rows."""
    counts = prepare.exact_counts(population, prepare.catalogue(population))
    labels = population.column("good")
    assert counts.rows.sum() == (~np.isnan(labels)).sum()
    assert counts.good.sum() == np.nansum(labels)


def test_noised_rates_are_paid_for_by_the_run(population, tmp_path):
    """One entry in the ledger, and counts that differ from the exact ones by noise of about 8 rows and clipping."""
    model, assessments = load_model(prepare.MODEL), prepare.catalogue(population)
    counts = prepare.noised_counts(population, assessments, model, tmp_path, SeededNoise(0, 1))
    assert counts.sd == prepare.COUNTS_CLIP * prepare.COUNTS_NOISE
    assert [entry.noise_multiplier for entry in Ledger.read(tmp_path).entries] == [prepare.COUNTS_NOISE]
    exact = prepare.exact_counts(population, assessments)
    assert (counts.rows != exact.rows).all()
    assert counts.rows.sum() < exact.rows.sum() + 5 * counts.sd * math.sqrt(2 * counts.rows.size)


def test_every_row_has_its_assessment_and_every_feature_its_column(rows, population, tmp_path):
    """The server's table has the key of each row, the declared features, and the population the rest."""
    model, assessments = load_model(prepare.MODEL), prepare.catalogue(population)
    file = prepare.write_assessments(
        prepare.exact_counts(population, assessments), assessments, tmp_path / "assessments.parquet"
    )
    table = pd.read_parquet(file)
    assert not table.rates_of.duplicated().any()
    assert set(rows.rates_of) <= set(table.rates_of)
    assert set(model.server.features.names) <= set(table.columns)
    assert set(model.device_features.names) <= set(population.table.column_names)
    assert "student" not in population.table.column_names
