"""Five folds by user: the same model trained three ways on the same people, compared on people it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.coupon import prepare
from hybrid.federation.metrics import Compared, auc, calibration, log_loss
from hybrid.federation.metrics import compare as compare_models
from hybrid.federation.population import Examples, Population, examples
from hybrid.spec import HybridModel, load_model
from hybrid.version import TrainingRecord, Version
from hybrid.workspace import Workspace

MODEL = Path(__file__).parent / "model.py"
KINDS = ("server_only", "central", "federated")


@dataclass(frozen=True)
class Fold:
    """One fold: the rows to learn from and the rows of unseen users.

    Attributes:
        number: from 1.
        model: whose offers have acceptance rates of this fold's training users only.
        train, test: examples.
        held_out: (users,) of the population, the unseen ones.
    """

    number: int
    model: HybridModel
    train: Examples
    test: Examples
    held_out: NDArray[np.bool_]


@dataclass(frozen=True)
class Outcome:
    """What five folds showed, and fold 1's served version.

    Attributes:
        folds: by fold and kind, {"auc": ..., "log_loss": ...}.
        difference_low: lower 95 % bound of federated minus server only, AUC.
        calibration_ratio, reliability: by kind, all folds pooled.
        curves: of fold 1's federated training.
        served_predictions: (n,) offline predictions of the served version for fold 1's unseen rows.
        users, rows: of the population.
    """

    folds: Sequence[Mapping[str, Mapping[str, float]]]
    difference_low: float
    calibration_ratio: Mapping[str, float]
    reliability: Mapping[str, NDArray[np.float64]]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    served_predictions: NDArray[np.float32]
    users: int
    rows: int

    def figures(self) -> dict[str, Any]:
        """For report.json: means over folds, and fold 1 by itself."""
        means = {
            metric: {kind: float(np.mean([fold[kind][metric] for fold in self.folds])) for kind in KINDS}
            for metric in ("auc", "log_loss")
        }
        means["auc"]["federated_minus_server_only_low"] = self.difference_low
        first = {metric: {kind: self.folds[0][kind][metric] for kind in KINDS} for metric in ("auc", "log_loss")}
        return {**means, "fold_1": first}


def progress(console: Console) -> Progress:
    """A bar for long work."""
    columns = (TextColumn("       {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def prepare_folds(workspace: Workspace, folds: int, bar: Progress) -> list[Fold]:
    """Each fold's offers go through a Feast store of its own; fold 1's are also the ones that will be served."""
    population, model = Population.open("coupon", workspace), load_model(MODEL)
    prepare.write_offers(population, ~population.fold(1, folds))
    task = bar.add_task("point-in-time joins through Feast", total=folds)
    made = []
    for number in range(1, folds + 1):
        made.append(_fold(number, folds, population, model, workspace.root / "folds" / str(number)))
        bar.advance(task)
    return made


def _fold(number: int, folds: int, population: Population, model: HybridModel, folder: Path) -> Fold:
    from feature_store.materialize import apply
    from feature_store.offline import join

    held_out = population.fold(number, folds)
    model = _with_source(model, prepare.write_offers(population, ~held_out, folder / "offers.parquet"))
    apply(model, folder / "feast")
    slots = join(model, population.column("offer_id"), None, folder / "feast", now=datetime.now(UTC))
    rows = examples(model, population, slots)
    return Fold(number, model, rows.of(~held_out), rows.of(held_out), held_out)


def _with_source(model: HybridModel, source: Path) -> HybridModel:
    (view,) = model.server.views
    server = model.server.model_copy(update={"views": (view.model_copy(update={"source": source}),)})
    return model.model_copy(update={"server": server})


def compare(folds: Sequence[Fold], served: Version, folder: Path, bar: Progress) -> Outcome:
    """Trains every fold three ways and scores the rows of unseen users.

    Args:
        folds: from `prepare_folds`.
        served: the version trained on fold 1, whose predictions are compared with the served ones.
        folder: run directories of these trainings.
        bar: shows how far it is.
    """
    from hybrid.federation.training import train

    task = bar.add_task("trainings", total=len(folds) * len(KINDS))
    predictions: list[dict[str, NDArray[np.float32]]] = []
    curves: Mapping[str, Sequence[tuple[int, float]]] = {}
    for fold in folds:
        predictions.append({})
        for kind in KINDS:
            bar.update(task, description=f"fold {fold.number}, {kind.replace('_', ' ')}")
            run = folder / f"{fold.number}-{kind}"
            trained = train(fold.model, fold.train, fold.test, kind=kind.replace("_", "-"), run_dir=run)
            predictions[-1][kind] = trained.test_predictions
            if fold.number == 1 and kind == "federated":
                curves = trained.curves
            bar.advance(task)
    return _outcome(folds, predictions, curves, offline_predictions(folds[0], served))


def epsilon_by_round(training: TrainingRecord, points: int = 20) -> list[tuple[int, float]]:
    """(round, epsilon) as the mechanism spends it, by the same accountant."""
    from hybrid.privacy.accountant import GaussianEvent, epsilon

    rounds = np.unique(np.linspace(1, training.rounds, points).astype(int)).tolist()
    events = [GaussianEvent(training.noise_multiplier, training.sampling, count) for count in rounds]
    return [(event.count, epsilon([event], training.delta).epsilon) for event in events]


def offline_predictions(fold: Fold, version: Version) -> NDArray[np.float32]:
    """(n,) what the version says of the fold's unseen rows, computed without any server."""
    from hybrid.federation.engine import predict
    from hybrid.network import Network

    return predict(Network.of(fold.model, version), fold.test)


def _outcome(
    folds: Sequence[Fold],
    predictions: Sequence[Mapping[str, NDArray[np.float32]]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    served_predictions: NDArray[np.float32],
) -> Outcome:
    labels = [fold.test.labels for fold in folds]
    scores = [
        {kind: {"auc": auc(y, p[kind]), "log_loss": log_loss(y, p[kind])} for kind in KINDS}
        for y, p in zip(labels, predictions, strict=True)
    ]
    pairs = [
        Compared(fold.test.labels, p["federated"], p["server_only"], fold.test.user_of_row)
        for fold, p in zip(folds, predictions, strict=True)
    ]
    known = np.concatenate(labels)
    pooled = {kind: calibration(known, np.concatenate([p[kind] for p in predictions])) for kind in KINDS}
    return Outcome(
        folds=scores,
        difference_low=compare_models(pairs)["auc"].low,
        calibration_ratio={kind: found.ratio for kind, found in pooled.items()},
        reliability={kind: np.stack([found.predicted, found.observed], axis=1) for kind, found in pooled.items()},
        curves=curves,
        served_predictions=served_predictions,
        users=len(folds[0].held_out),
        rows=len(folds[0].train) + len(folds[0].test),
    )
