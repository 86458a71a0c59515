"""What label balance brings: `python -m benchmarks.analytics --only balance`.

OULAD (examples/study_coach), the label known to devices only, epsilon 2 for
everything, ten seeds. Each seed drops positives at random, of rows to learn from and of test rows alike, until one row
in twenty is positive; then it trains twice, with examples as they come and with balance=0.5. The label rates among the
server's features are the exact ones of all rows, for both: counted before anything was dropped, as if they were
published. Test rows are the last fifth of each student's submissions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import Split
from hybrid import Label, Privacy
from hybrid.federation.metrics import Compared, auc, calibration, compare
from hybrid.federation.population import Examples
from hybrid.federation.training import Trained, train
from hybrid.network import Network
from hybrid.spec import HybridModel, Training

POSITIVE = 0.05  # share of rows, after positives were dropped
EPSILON = 2.0
BALANCE = 0.5
THINNING = 6  # stream of a seed that drops positives


def balance(
    split: Split, folder: Path, seeds: int, advance: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of a table and figures.

    Args:
        split: OULAD, as `benchmarks.accuracy.prepare_oulad` gives it.
        folder: for the runs.
        seeds: how many.
        advance: called after each of 2 x seeds trainings.
    """
    rows, pairs = [], []
    for seed in range(seeds):
        found, pair = one_seed(split, folder, seed, advance)
        rows += found
        pairs.append(pair)
    return rows, figures_of(rows, pairs)


def one_seed(
    split: Split, folder: Path, seed: int, advance: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], Compared]:
    """Both trainings of a seed, and their predictions of the same test rows; see `balance`."""
    model, rng = _hidden(split.model, split.train.users), np.random.default_rng([seed, THINNING])
    learned, tested = thinned(split.train, rng), thinned(split.test, rng)
    rows: list[dict[str, Any]] = []
    made: list[NDArray[np.float32]] = []
    for name, target in (("as they come", None), ("balanced", BALANCE)):
        settings = Training(**model.training.model_dump() | {"balance": target})
        run = folder / "runs" / f"{name}-{seed}".replace(" ", "-")
        trained = train(model, learned, tested, epsilon=EPSILON, seed=seed, run_dir=run, settings=settings)
        assert trained.test_predictions is not None
        made.append(trained.test_predictions)
        rows.append(_row(name, trained, learned, tested, seed=seed, model=model))
        advance()
    return rows, Compared(tested.labels, made[1], made[0], tested.user_of_row)


def thinned(examples: Examples, rng: np.random.Generator) -> Examples:
    """Positives dropped at random until `POSITIVE` of the rows are."""
    positive = np.flatnonzero(examples.labels > 0)
    left = round(POSITIVE / (1 - POSITIVE) * (len(examples) - len(positive)))
    kept = examples.labels == 0
    kept[rng.choice(positive, size=left, replace=False)] = True
    return examples.with_labels(kept)


def _hidden(model: HybridModel, users: int) -> HybridModel:
    """With a label that only devices know."""
    label = Label(column=model.label.column, visible_to="device")
    privacy = Privacy(epsilon=EPSILON, delta=(1 - 1e-9) * users**-1.1, clip=model.privacy.clip, unit="user")
    return model.model_copy(update={"label": label, "privacy": privacy})


def _row(
    name: str, trained: Trained, learned: Examples, tested: Examples, *, seed: int, model: HybridModel
) -> dict[str, Any]:
    """Of one training."""
    predictions, said = trained.test_predictions, trained.record.balance
    assert predictions is not None
    network = Network.build(model)
    network.load_weights(trained.weights)
    shift = float(network.correction.shift)
    logits = np.log(predictions.astype(np.float64)) - np.log1p(-predictions.astype(np.float64))

    def ratio(by: float) -> float:
        return calibration(tested.labels, 1 / (1 + np.exp(-(logits - shift + by)))).ratio

    keep = (1.0, 1.0) if said is None else said.keep
    return {
        "examples": name,
        "seed": seed,
        "AUC": auc(tested.labels, predictions),
        "kept": float(np.where(learned.labels > 0, keep[1], keep[0]).mean()),
        "calibration": ratio(shift),
        "analytic alone": ratio(0.0 if said is None else said.analytic),
        "uncorrected": ratio(0.0),
        "prior": None if said is None else said.prior,
        "estimated shift": None if said is None else said.estimated,
        "epsilon": trained.record.epsilon,
        "seconds": trained.seconds[-1],
    }


def figures_of(rows: list[dict[str, Any]], pairs: list[Compared]) -> dict[str, float]:
    """Means over seeds; the difference in AUC with its interval under resampled people."""
    plain, even = ([row for row in rows if row["examples"] == name] for name in ("as they come", "balanced"))
    gain = compare(pairs, resamples=200)["auc"]

    def mean(found: list[dict[str, Any]], name: str) -> float:
        return float(np.mean([row[name] for row in found]))

    return {
        "balance_auc": mean(even, "AUC"),
        "balance_auc_plain": mean(plain, "AUC"),
        "balance_auc_gain": gain.mean,
        "balance_auc_gain_low": gain.low,
        "balance_auc_gain_high": gain.high,
        "balance_examples_ratio": mean(even, "kept") / mean(plain, "kept"),
        "balance_seconds_ratio": mean(even, "seconds") / mean(plain, "seconds"),
        "calibration_corrected": mean(even, "calibration"),
        "calibration_corrected_min": min(row["calibration"] for row in even),
        "calibration_corrected_max": max(row["calibration"] for row in even),
        "calibration_analytic": mean(even, "analytic alone"),
        "calibration_uncorrected": mean(even, "uncorrected"),
        "calibration_plain": mean(plain, "calibration"),
    }
