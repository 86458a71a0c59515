"""What learned constants cost in accuracy: `python -m benchmarks.analytics --only normalisation`.

OULAD (examples/study_coach): all numeric device features are normalised with
constants that one question at epsilon 1 learned, of bounds that anybody could write down, against the exact constants
of pooled rows; then the same training at epsilon 2 of both. Tested on the last fifth of each student's submissions.
Which regions are found, without a list of them, at epsilon 0.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.accuracy import Split, prepare_oulad
from hybrid import Log1p, Numeric
from hybrid.analytics.asking import NORMALISE, People, Simulated
from hybrid.analytics.normalisation import learned
from hybrid.analytics.vocabulary import discover, phases
from hybrid.federation.metrics import auc
from hybrid.federation.population import Population
from hybrid.federation.training import train
from hybrid.privacy.ledger import Ledger
from hybrid.spec import HybridModel

EPSILON = 2.0  # of each training; the question's is beside it
QUESTION = 1.0
REGIONS = 0.2
ROWS = 4
KNOWN: Mapping[str, tuple[float, float]] = {
    "num_of_prev_attempts": (0, 10),
    "studied_credits": (0, 700),  # a year has 120; some students carry several
    "date_registration": (-365, 270),  # days from the start: a year before, to the end
    "mean_lateness": (-100, 100),
    "mean_score": (0, 100),
    "last_score": (0, 100),
    "good_odds": (-4, 4),  # the logarithm of at most 50 to 1
    "earlier": (0, 50),
}


def oulad(data: Path | None, seeds: int, folder: Path, bar: Progress) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and figures: one row of each way to have constants, one of how far the learned ones are from the exact."""
    task = bar.add_task("OULAD: preparing", total=1 + 2 * seeds)
    split, population, _ = prepare_oulad(data, folder)
    bar.advance(task)
    declared = split.model.model_copy(update={"device": learning(split.model)})
    people = people_of(declared, population)
    scores: dict[str, list[float]] = {"exact": [], "federated": []}
    away: list[float] = []
    for seed in range(seeds):
        constants = {}
        for name, budget in (("exact", None), ("federated", QUESTION)):
            bar.update(task, description=f"OULAD: seed {seed}, {name} constants")
            run = folder / "runs" / f"{name}-{seed}"
            found = learned(declared, people, run / "constants", budget=budget, share=1.0, rows=ROWS, seed=seed)
            assert found is not None
            constants[name] = found.transforms
            model = declared.with_learned(found.transforms)
            encoded = _encoded(split, model, population)
            trained = train(model, encoded.train, encoded.test, epsilon=EPSILON, seed=seed, run_dir=run / "training")
            assert trained.test_predictions is not None
            scores[name].append(auc(encoded.test.labels, trained.test_predictions))
            bar.advance(task)
        away.append(_away(constants["exact"], constants["federated"]))
    gaps = np.subtract(scores["exact"], scores["federated"])
    rows = [
        {"constants": name, "seeds": seeds, "AUC": float(np.mean(of)), "AUC sd": float(np.std(of))}
        for name, of in scores.items()
    ]
    figures = _regions(declared, population, folder / "regions") | {
        "normalisation_auc_gap": float(gaps.mean()),
        "normalisation_auc_gap_max": float(gaps.max()),
        "normalisation_auc_exact": rows[0]["AUC"],
        "normalisation_auc_federated": rows[1]["AUC"],
        "normalisation_mean_error_sds": max(away),
    }
    return rows, figures


def _regions(model: HybridModel, population: Population, folder: Path) -> dict[str, float]:
    """How many of the students' regions are found, of how many, and texts that are none."""
    values = population.column("region")
    with Ledger.open(folder, budget_epsilon=REGIONS, delta=model.privacy.delta) as ledger:
        people = People({"region": values}, population.offsets)
        ask = Simulated(people, ledger, purpose=NORMALISE, epsilon=REGIONS, seed=0)
        ask.begin(phases())
        found = {each.text for each in discover(ask, "region", 20)}
    there = set(values[population.offsets[1:] - 1])
    return {
        "vocabulary_found": len(found & there) / len(there),
        "vocabulary_invented": float(len(found - there)),
    }


def learning(model: HybridModel) -> dict[str, Any]:
    """The model's device features, with the constants of all numeric ones to be learned within `KNOWN` bounds."""
    found: dict[str, Any] = dict(model.device)
    for name, each in model.device.items():
        if isinstance(each, Numeric):
            low, high = KNOWN[name.removeprefix("kind_").removeprefix("course_")]
            kind = Log1p if isinstance(each, Log1p) else Numeric
            found[name] = kind(normalise="federated", low=low, high=high, clip=each.clip)
    return found


def people_of(model: HybridModel, population: Population) -> People:
    """Everybody, with the rows that are trained on."""
    known = ~np.isnan(population.column(model.label.column).astype(np.float32))
    columns = {name: population.column(name)[known] for name in model.device_features.pending}
    return People(columns, np.concatenate([[0], np.cumsum(known)])[population.offsets])


def _encoded(split: Split, model: HybridModel, population: Population) -> Split:
    """The same rows with other constants on the device's side."""
    features = model.device_features
    device = features.encode(features.slots(features.inputs({n: population.column(n) for n in model.device})))
    known = {name: ~np.isnan(population.column(name).astype(np.float32)) for name in ("good", "good_later")}
    train_rows = replace(split.train, device=device[known["good"]])
    return Split(model, train_rows, replace(split.test, device=device[known["good_later"]]))


def _away(exact: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """By how many standard deviations a mean is off, at most."""
    return max(abs(found[name].mean - exact[name].mean) / exact[name].std for name in exact)
