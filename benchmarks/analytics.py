"""What can be learned without looking, and how well: `python -m benchmarks.analytics [--json FILE] [--only PART]`.

OULAD's 16,350 students (examples/study_coach) at epsilon 1 a query. A version is trained at epsilon 2; its scores of
held-out submissions are measured by noised queries: against pooled rows, and, over 1,000 seeds, how often intervals
hold what they should. Then label balance with thinned positives, normalisation learned under the ledger, and what a
released embedding of examples/coupon discloses. Everything that is compared with is an oracle: computed of pooled rows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks import balance, measure, normalisation
from benchmarks.accuracy import prepare_oulad
from examples.coupon import folds
from examples.coupon import prepare as prepare_coupon
from hybrid.analytics.asking import EVALUATE, Answer, People, Simulated, phase
from hybrid.analytics.estimates import estimate, quantiles_of
from hybrid.analytics.metrics import evaluate, nodes_for, statistics
from hybrid.federation import metrics as pooled
from hybrid.federation.population import import_table
from hybrid.federation.training import train
from hybrid.network import Network
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.privacy.inversion import inversion
from hybrid.privacy.ledger import Ledger
from hybrid.query import Floats, Histogram, Query, Scores, contributions, squares
from hybrid.workspace import Workspace

Row = dict[str, Any]
Found = tuple[list[Row], dict[str, float]]

EPSILON = 1.0
ROWS = 6  # of a student, at most: nobody has more held-out submissions
RUNS = 20  # whole evaluations, ledger included
SEEDS = 1000  # of noise, and of people drawn anew
CELLS = 512  # of a year before and after the start
DAYS = 365
BALANCE_SEEDS, NORMALISATION_SEEDS = 10, 5


@dataclass(frozen=True)
class World:
    """The students' held-out submissions, scored.

    Attributes:
        people: their columns "score" and "label".
        registered: (n,) days from registration to the start, of all submissions.
        offsets: (students + 1,) of `registered`.
        delta: for so many students.
    """

    people: People
    registered: NDArray[np.float64] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    delta: float

    @classmethod
    def prepare(cls, folder: Path, data: Path | None) -> World:
        """Trains a version at epsilon 2 and scores with it."""
        split, population, _ = prepare_oulad(data, folder)
        trained = train(split.model, split.train, split.test, epsilon=2.0, run_dir=folder / "runs" / "version")
        assert trained.test_predictions is not None
        people = People({"score": trained.test_predictions, "label": split.test.labels}, split.test.offsets)
        registered = population.column("date_registration").astype(np.float64)
        return cls(people, registered, population.offsets, split.model.privacy.delta)

    @property
    def noise_multiplier(self) -> float:
        """Of a query at `EPSILON`."""
        return noise_multiplier_for(EPSILON, self.delta, 1.0, 1)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="in place of the OULAD table that the example ships")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="this part alone; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, folds.progress(Console(stderr=True)) as bar:
        for name in arguments.only or PARTS:
            more, found = PARTS[name](Path(folder) / name, arguments.data, bar)
            rows, figures = rows + more, figures | found
    measure.show("Learned without looking (oracle: what it is compared with)", rows, figures)
    measure.write(arguments.json, rows, figures)


def queries(folder: Path, data: Path | None, bar: Progress) -> Found:
    """Errors of metrics and of a median, and how often intervals hold."""
    task = bar.add_task("queries: preparing", total=2 + 2 * SEEDS)
    world = World.prepare(folder, data)
    exact = exact_metrics(world.people)
    bar.advance(task)
    measured = [_evaluated(world, folder / "runs" / f"evaluate-{seed}", seed) for seed in range(RUNS)]
    bar.advance(task)
    noise = _coverage(world, exact, Redrawn(world, redraw=False), bar, task)
    full = _coverage(world, exact, Redrawn(world, redraw=True), bar, task)
    rows: list[Row] = []
    errors = {}
    for name, value in exact.items():
        errors[name] = float(np.mean([abs(one[name] - value) for one in measured]))
        row = {"metric": name, "exact (oracle)": value, "mean error": errors[name]}
        rows.append(row | {"noise interval holds": noise[name], "full interval holds": full[name]})
    return rows, {
        "auc_error": errors["auc"],
        "calibration_error": errors["calibration"],
        "log_loss_error": errors["log_loss"],
        "median_rank_error": median_rank_error(world),
        "coverage_noise_min": min(noise.values()),
        "coverage_noise_max": max(noise.values()),
        "coverage_full_min": min(full.values()),
    }


def exact_metrics(people: People) -> dict[str, float]:
    """Of pooled rows: an oracle."""
    label, score = (np.asarray(people.columns[name], np.float64) for name in ("label", "score"))
    rate, chosen = float(label.mean()), score > 0.5
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    loss = pooled.log_loss(label, score)
    return {
        "auc": pooled.auc(label, score),
        "log_loss": loss,
        "normalised_entropy": float(loss / entropy),
        "calibration": float(score.mean() / rate),
        "mean_prediction": float(score.mean()),
        "mean_label": rate,
        "precision": float(label[chosen].mean()),
        "recall": float(label[chosen].sum() / label.sum()),
    }


def median_rank_error(world: World, seeds: int = 100) -> float:
    """How far 0.5 is from [F(m-), F(m)] of the noised median m of each student's first row, on average."""
    edges = np.linspace(-DAYS, DAYS, CELLS + 1)
    part = Histogram(column="registered", edges=tuple(edges.tolist()), cumulative=True)
    query = Query(parts=(part,), rows=1, take="first")
    people = People({"registered": world.registered}, world.offsets)
    total, sd = people.sum(query), world.noise_multiplier * query.norm
    first = world.registered[world.offsets[:-1]]
    known = first[~np.isnan(first)]
    errors = []
    for seed in range(seeds):
        noise = np.random.default_rng(seed).normal(0.0, sd, query.size)
        median = quantiles_of(Answer(query, total + noise, sd, len(people)), edges, [0.5])[0].value
        below, upto = (known < median).mean(), (known <= median).mean()
        errors.append(max(below - 0.5, 0.5 - upto, 0.0))
    return float(np.mean(errors))


class Redrawn:
    """Asks the students again and again, each time with other noise, and, if `redraw`, with people drawn anew.

    What a student contributes is computed once: it is the same in each draw.
    """

    def __init__(self, world: World, *, redraw: bool) -> None:
        self.query = Query(parts=(Scores(nodes=tuple(nodes_for(None).tolist()), cumulative=True),), rows=ROWS)
        self._sent = np.concatenate(list(contributions(self.query, world.people.columns, world.people.offsets)))
        self._counts, self._whole = self.query.decode(self._sent), world.noise_multiplier
        self.redraw, self._people = redraw, len(world.people)
        self.restart(0)

    def restart(self, seed: int) -> None:
        """Another draw."""
        self._rng = np.random.default_rng([seed, self.redraw])
        self._times: Floats = np.ones(self._people)
        if self.redraw:
            drawn = self._rng.integers(0, self._people, self._people)
            self._times = np.bincount(drawn, minlength=self._people).astype(np.float64)

    def begin(self, shares: Sequence[float]) -> None:
        """Nothing is paid: how often intervals hold is looked at."""

    def __call__(self, query: Query, *, share: float = 1.0, payload: NDArray[np.floating] | None = None) -> Answer:
        """See `hybrid.analytics.asking.Ask`."""
        sd = phase(self._whole, share).noise_multiplier * query.norm
        one = self._sent if payload is None else squares(query, self._counts, payload)
        return Answer(query, self._times @ one + self._rng.normal(0.0, sd, query.size), sd, self._people)


def _coverage(world: World, exact: Mapping[str, float], ask: Redrawn, bar: Progress, task: Any) -> dict[str, float]:
    """How often each metric's interval holds the value of the students: of the full one, they are the population."""
    named = statistics(nodes_for(None))
    held = dict.fromkeys(exact, 0)
    full = ask.redraw
    bar.update(task, description=f"queries: {'full' if full else 'noise'} intervals")
    for seed in range(SEEDS):
        ask.restart(seed)
        for name, found in estimate(ask, ask.query, named, full=full).estimates.items():
            interval = found.full if found.full is not None else found.noise
            held[name] += exact[name] in interval
        bar.advance(task)
    return {name: count / SEEDS for name, count in held.items()}


def _evaluated(world: World, run: Path, seed: int) -> dict[str, float]:
    """One whole evaluation, paid by a ledger, with both intervals."""
    with Ledger.open(run, budget_epsilon=EPSILON, delta=world.delta) as ledger:
        ask = Simulated(world.people, ledger, purpose=EVALUATE, epsilon=EPSILON, seed=seed)
        found = evaluate(ask, rows=ROWS)
        assert ledger.spent().epsilon <= EPSILON
    return {name: each.value for name, each in found.metrics.items()}


def balanced(folder: Path, data: Path | None, bar: Progress) -> Found:
    """Positives thinned to 5 %: trained as they come, and balanced. See `benchmarks.balance`."""
    task = bar.add_task("balance: preparing", total=2 * BALANCE_SEEDS)
    split, _, _ = prepare_oulad(data, folder)
    bar.update(task, description="balance: training")
    return balance.balance(split, folder, BALANCE_SEEDS, lambda: bar.advance(task))


def normalised(folder: Path, data: Path | None, bar: Progress) -> Found:
    """Constants learned by queries against exact ones of pooled rows. See `benchmarks.normalisation`."""
    return normalisation.oulad(data, NORMALISATION_SEEDS, folder, bar)


def inverted(folder: Path, data: Path | None, bar: Progress) -> Found:
    """What embeddings of coupon's version disclose, clear and noised, of the people of a held-out fold."""
    task = bar.add_task("inversion: preparing", total=None)
    workspace = Workspace(folder / ".hybrid")
    folder.mkdir(parents=True, exist_ok=True)
    table = prepare_coupon.write_population(folder / "population.parquet")
    import_table(table, user="user", name="coupon", workspace=workspace)
    fold = folds.prepare_folds(workspace, 5, bar)[0]
    trained = train(fold.model, fold.train, fold.test, epsilon=8.0, run_dir=folder / "runs" / "version")
    network = Network.build(fold.model)
    network.load_weights(trained.weights)
    bar.update(task, description="inversion: attacking")
    found = inversion(
        network, fold.test, fold.train, progress=lambda done, of: bar.update(task, completed=done, total=of)
    )
    clear, hidden = found.clear, found.hidden_from
    assert clear is not None
    rows: list[Row] = [
        {
            "sigma": level.sigma,
            "local epsilon": level.epsilon if level.sigma else None,
            "largest gain": level.most.gain.mean,
            "of": level.most.feature,
            "whole profiles": level.whole,
            "AUC": level.auc,
            "AUC cost": level.auc_cost.mean,
        }
        for level in found.levels
    ]
    return rows, {
        "inversion_gain_clear": clear.most.gain.mean,
        "inversion_gain_at_noise": min(level.most.gain.mean for level in found.levels)
        if hidden is None
        else hidden.most.gain.mean,
        "inversion_sigma": math.nan if hidden is None else hidden.sigma,
        "inversion_auc_cost": math.nan if hidden is None else hidden.auc_cost.mean,
    }


PARTS: Mapping[str, Callable[[Path, Path | None, Progress], Found]] = {
    "queries": queries,
    "balance": balanced,
    "normalisation": normalised,
    "inversion": inverted,
}


if __name__ == "__main__":
    main()
