"""Writes what a team would have before it starts: `python -m examples.study_coach.prepare WHAT`, in this order.

population   examples/study_coach/data/population.parquet, for `hybrid population import --user student`: every
             submission; `good`, the label, is missing in test rows, so that no training sees it, and
             `good_later` has theirs
assessments  examples/study_coach/data/assessments.parquet, the Feast source: what the university says of each
             assessment, and how often training rows of it were good. With --run the label is the device's: the counts
             are noised, and the ledger of that run pays (then `hybrid train study_coach --run` the same).
             With --exact it is the server's
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from examples.study_coach import submissions
from examples.study_coach.submissions import FOLDS, LabelCounts
from hybrid.cli import command_line
from hybrid.federation.population import Population
from hybrid.privacy.mechanisms import NoiseSource, SystemNoise
from hybrid.spec import HybridModel, load_model
from hybrid.workspace import Workspace

MODEL = Path(__file__).parent / "model.py"
POPULATION = submissions.DATA / "population.parquet"
ASSESSMENTS = submissions.DATA / "assessments.parquet"
NAME = "study_coach"
COUNTS_CLIP = 2.0  # rows: the median student has 5 training rows, of different assessments, which is a norm of 2.2
COUNTS_NOISE = 4.0  # times the clip


def write_population(target: Path = POPULATION, source: Path = submissions.SOURCE) -> Path:
    """The submissions, with `good` missing where it is to be predicted and `good_later` missing elsewhere."""
    rows = submissions.load(source)
    known = rows.good.astype(np.float32)
    rows.assign(good=known.mask(rows.is_test), good_later=known.where(rows.is_test)).to_parquet(target, index=False)
    return target


def catalogue(population: Population) -> pd.DataFrame:
    """One row per assessment: what the university publishes about it before anybody hands anything in."""
    names = ["assessment", "code_module", "semester", "assessment_type", "module_type"]
    names += ["weight", "due_day", "module_presentation_length"]
    rows = pd.DataFrame({name: population.column(name) for name in names})
    return rows.drop_duplicates("assessment").sort_values("assessment", ignore_index=True)


def exact_counts(population: Population, assessments: pd.DataFrame) -> LabelCounts:
    """Of a label that the server sees."""
    rows = pd.DataFrame({name: population.column(name) for name in ("assessment", "fold", "good")})
    return submissions.label_counts(rows[rows.good.notna()], assessments.assessment.to_numpy())


def noised_counts(
    population: Population, assessments: pd.DataFrame, model: HybridModel, run_dir: Path, noise: NoiseSource
) -> LabelCounts:
    """Of a label that only devices know: one Gaussian release, which the run's ledger pays for.

    Args:
        population: the imported submissions.
        assessments: of `catalogue`: public, so it says nothing about anybody that these are counted.
        model: whose budget it is.
        run_dir: of the run.
        noise: where it comes from.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    from hybrid.analytics.labels import PURPOSE, noised_label_counts
    from hybrid.analytics.results import describe
    from hybrid.privacy.accountant import GaussianEvent
    from hybrid.privacy.ledger import Ledger

    def pay() -> None:
        number = ledger.next_attempt(PURPOSE, 1)
        ledger.spend(GaussianEvent(COUNTS_NOISE), purpose=PURPOSE, clip=COUNTS_CLIP, round_number=1, attempt=number)

    names = assessments.assessment.to_numpy()
    with Ledger.open(run_dir, budget_epsilon=model.privacy.epsilon, delta=model.privacy.delta) as ledger:
        describe(run_dir, model.name, PURPOSE)  # so that `hybrid privacy` counts it
        counts = noised_label_counts(
            pd.Index(names).get_indexer(population.column("assessment")).astype(np.int64),
            population.column("good"),  # rows without a label count nowhere
            population.offsets,
            number_of_groups=len(names),
            clip=COUNTS_CLIP,
            noise_multiplier=COUNTS_NOISE,
            noise=noise,
            pay=pay,
            fold=population.column("fold")[population.offsets[:-1]],
            folds=FOLDS,
        )
    return LabelCounts(names, counts.rows, counts.positives, counts.sd)


def write_assessments(counts: LabelCounts, assessments: pd.DataFrame, target: Path = ASSESSMENTS) -> Path:
    """The server's table: each assessment once per fold, and once for rows whose label is in no rate."""
    rates = submissions.label_rates(counts, assessments.module_type.to_numpy())
    table = rates.merge(assessments, on="assessment").drop(columns=["assessment", "module_type"])
    target.parent.mkdir(parents=True, exist_ok=True)
    table.assign(event_timestamp=pd.Timestamp(datetime.now(UTC))).to_parquet(target, index=False)
    return target


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("population", help="the submissions")
    rates = what.add_parser("assessments", help="the server's table, once the population is imported")
    whose = rates.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run", metavar="NAME", help="folder under runs/ whose ledger pays for noised label rates")
    whose.add_argument("--exact", action="store_true", help="the label is the server's: exact label rates")
    arguments = parser.parse_args()
    if arguments.what == "population":
        print(f"wrote {write_population()}")
        return
    workspace = Workspace.current()
    population = Population.open(NAME, workspace)
    assessments = catalogue(population)
    if arguments.exact:
        counts = exact_counts(population, assessments)
    else:
        run_dir = workspace.runs / arguments.run
        counts = noised_counts(population, assessments, load_model(MODEL), run_dir, SystemNoise())
    print(f"wrote {write_assessments(counts, assessments)}")


if __name__ == "__main__":
    with command_line():
        main()
