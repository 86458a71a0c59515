"""Students' submissions as a study coach would hold them, and the label rates of assessments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"
SOURCE = DATA / "oulad.csv.gz"
FOLDS = 5  # of students: a training row's rates are of the students of the other folds
GOOD = 80  # the score from which the label is 1
DAY_0 = pd.Timestamp("2013-02-01", tz="UTC")  # of `event_day`
TEST_SHARE = 0.2
SCOPES = {"": [], "kind_": ["assessment_type"], "course_": ["code_module", "code_presentation", "assessment_type"]}
USUAL_SCORE, USUAL_ROWS = 75.0, 2.0  # a mean score begins with so many rows of it, or of the wider scope's mean
PRIOR_ROWS = 20.0  # how many rows of the wider group a rate begins with

Counts = NDArray[np.floating]


def load(source: Path = SOURCE) -> pd.DataFrame:
    """One row per submission: as published, and what the learner's own device makes of the earlier ones.

    Rows are in the order of student, day and assessment: the last orders what was
    handed in on one day, the same on every machine.

    Columns that are made here:

        good                    label: the score is at least 80
        is_test                 one of the last 20 %, rounded up, of the student's rows
        assessment, module_type which assessment; its module and kind: what label rates are kept for
        fold                    of the student, by a hash, in [0, 5)
        rates_of                key of the server's table: "<assessment>/<fold>" of a training row, whose rates are
                                those of the other folds' students, "<assessment>/all" of a test row
        handed_in               when, in UTC
        mean_score, good_odds, last_score, earlier
                                of the same student's submissions on earlier days: mean score, drawn towards 75; the
                                log-odds of a good one, (good + 1) : (others + 1); last score; how many
        kind_..., course_...    the same four of assessments of the same kind, and of those also in the same course
        mean_lateness           of all of them: days handed in after they were due

    Args:
        source: the published table, or another with its columns.
    """
    rows = pd.read_csv(source, dtype={"id_assessment": str, "id_student": str})
    rows = rows.sort_values(["id_student", "event_day", "id_assessment"], ignore_index=True)
    rows = rows.rename(columns={"id_student": "student", "id_assessment": "assessment"})
    rows = rows.assign(
        good=(rows.score >= GOOD).astype(np.int8),
        semester=rows.code_presentation.str[-1],
        module_type=rows.code_module + "/" + rows.assessment_type,
        fold=rows.student.map({student: fold_of(student) for student in rows.student.unique()}),
        handed_in=DAY_0 + pd.to_timedelta(rows.event_day, unit="D"),
    )
    rows = rows.assign(**history(rows), is_test=last_share(rows))
    return rows.assign(rates_of=rates_key(rows, rows.is_test))


def fold_of(student: str) -> int:
    """In [0, FOLDS), by a hash."""
    digest = hashlib.blake2b(student.encode(), digest_size=8, person=b"study-coach").digest()
    return int.from_bytes(digest, "little") % FOLDS


def last_share(rows: pd.DataFrame, share: float = TEST_SHARE) -> pd.Series:
    """(n,) which rows are among the last of their student's: that share of them, rounded up."""
    grouped = rows.groupby("student", sort=False)
    rest = grouped.cumcount(ascending=False)  # rows after this one
    return rest < np.ceil(share * grouped.student.transform("size") - 1e-9)


def rates_key(rows: pd.DataFrame, unseen: pd.Series) -> pd.Series:
    """(n,) keys of the server's table: of the student's fold, or "all" where the row's label is in no rate."""
    return rows.assessment + "/" + rows.fold.astype(str).where(~unseen, "all")


def history(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """What a device knows of its owner's submissions on earlier days, in each of `SCOPES` and altogether.

    Args:
        rows: in the order of student and day.
    """
    known = rows.assign(lateness=(rows.submitted_day - rows.due_day).clip(-30, 30), one=1)
    made: dict[str, pd.Series] = {"mean_lateness": _before(known, ["student"], ["lateness"])["lateness", "mean"]}
    wider: Any = USUAL_SCORE
    for prefix, same in SCOPES.items():
        earlier = _before(known, ["student", *same], ["score", "good", "one"])
        count, good, total = (earlier[column, "sum"].fillna(0.0) for column in ("one", "good", "score"))
        wider = (total + USUAL_ROWS * wider) / (count + USUAL_ROWS)
        made[f"{prefix}mean_score"] = wider
        made[f"{prefix}good_odds"] = np.log((good + 1) / (count - good + 1))
        made[f"{prefix}last_score"] = earlier["score", "last"]
        made[f"{prefix}earlier"] = count
    return made


def _before(rows: pd.DataFrame, who: list[str], columns: list[str]) -> pd.DataFrame:
    """Of each row: sum, mean and last of `columns` over the rows of `who` on strictly earlier days."""
    days = rows.groupby([*who, "event_day"], sort=True)[columns].agg(["sum", "count", "last"])
    made = {}
    for column in columns:
        by_owner = days[column].groupby(level=who)
        total, count = (by_owner[part].cumsum() - days[column][part] for part in ("sum", "count"))
        made[column, "sum"] = total.where(count > 0)
        made[column, "mean"] = total / count.where(count > 0)
        made[column, "last"] = by_owner["last"].shift().groupby(level=who).ffill()
    keys = pd.MultiIndex.from_frame(rows[[*who, "event_day"]])
    return pd.DataFrame(made).reindex(keys).set_axis(rows.index)


@dataclass(frozen=True)
class LabelCounts:
    """How many rows each assessment has among the students of each fold, and how many of them are good.

    Exact, or noised: nothing that is computed from them needs whole numbers.

    Attributes:
        assessments: (g,) names, in the order of the columns.
        rows, good: (FOLDS, g).
        sd: of the noise of a count of good rows, and of one of other rows, independent of it; 0 where they are exact.
    """

    assessments: NDArray[np.object_]
    rows: Counts
    good: Counts
    sd: float = 0.0


def label_counts(rows: pd.DataFrame, assessments: NDArray[Any]) -> LabelCounts:
    """Counts exactly.

    Args:
        rows: with `fold`, `assessment` and `good`; training rows only, so that no test label comes back as a feature.
        assessments: (g,) names to count, in this order.
    """
    cells = (rows.fold.to_numpy(), pd.Index(assessments).get_indexer(rows.assessment))
    total, good = np.zeros((FOLDS, len(assessments))), np.zeros((FOLDS, len(assessments)))
    np.add.at(total, cells, 1.0)
    np.add.at(good, cells, rows.good.to_numpy())
    return LabelCounts(assessments, total, good)


def label_rates(counts: LabelCounts, module_types: NDArray[Any]) -> pd.DataFrame:
    """The label rates of each key of the server's table: of the other folds, and of all; as log-odds.

    A rate is drawn towards that of the wider group: an assessment's towards that
    of its module and kind, which is drawn towards everything's. So one that nobody has
    handed in yet has the rate of its like, and noise on a small count does little.

    Args:
        counts: of training rows.
        module_types: (g,) of each assessment.

    Returns:
        rates_of, assessment, assessment_odds, module_type_odds.
    """
    codes, kinds = pd.factorize(module_types)
    parts = []
    for name in [*map(str, range(FOLDS)), "all"]:
        kept = np.array([str(fold) != name for fold in range(FOLDS)])
        rows, good = counts.rows[kept].sum(axis=0), counts.good[kept].sum(axis=0)
        variance = counts.sd**2 * kept.sum()
        overall = _drawn(rows.sum(), good.sum(), 0.5, variance * len(rows))
        wide = (np.bincount(codes, part, len(kinds)) for part in (rows, good))
        wide_rates = _drawn(*wide, overall, variance * np.bincount(codes))[codes]
        odds = {
            "assessment_odds": _log_odds(_drawn(rows, good, wide_rates, variance)),
            "module_type_odds": _log_odds(wide_rates),
        }
        parts.append(pd.DataFrame({"assessment": counts.assessments, "key": name, **odds}))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(rates_of=table.assessment + "/" + table.pop("key"))


def _drawn(rows: Any, good: Any, towards: Any, variance: Any) -> Any:
    """The best linear estimate of a rate, where `PRIOR_ROWS` says how alike the rates of one group are.

    Args:
        rows: how many, perhaps noised.
        good: how many of them are good, perhaps noised.
        towards: the wider group's rate.
        variance: of the noise of `good`, and of that of rows - good.
    """
    spread = np.clip(towards * (1 - towards), 0.01, None)
    counted = np.maximum(rows, 1.0)  # noised counts can fall below
    noise = variance * (towards**2 + (1 - towards) ** 2) / spread  # of good - towards * rows, in rows
    excess = np.where(rows > 0, good - towards * rows, 0.0)
    return np.clip(towards + excess / (counted + PRIOR_ROWS * (1 + noise / counted)), 0.01, 0.99)


def _log_odds(rate: Any) -> Any:
    return np.log(rate / (1 - rate))
