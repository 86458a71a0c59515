"""How good private federated training is: `python -m benchmarks.accuracy [--data FILE] [--json FILE]`.

OULAD (examples/study_coach; FILE is another table with its columns) and coupon
(examples/coupon), five seeds: central training on pooled data against federated
training at epsilon infinity (an oracle: no noise), 8, 2 and 1. OULAD also has epsilon 2
without any claim of sampling, its students taking turns: with noise that is correlated
between rounds (ftrl) and with noise that is not (plain_unamplified). OULAD is tested on
the last fifth of each student's submissions, coupon on one fold of five of its
people per seed. Architectures and settings were chosen on validation rows: for
OULAD the last fifth of each student's training rows, with label rates counted
without them; coupon's were tuned on its folds, as its report says. Takes about
ten minutes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks import measure
from examples.coupon import folds
from hybrid import Label, Privacy
from hybrid.federation.metrics import Compared, auc, calibration, compare, log_loss
from hybrid.federation.population import Examples, Population, examples, import_table
from hybrid.federation.training import Trained, train
from hybrid.privacy.mechanisms import SeededNoise
from hybrid.spec import HybridModel, Training, load_model
from hybrid.workspace import Workspace

EPSILONS = (math.inf, 8.0, 2.0, 1.0)
NEAR_BEST = 0.0005  # of central's best AUC: when it counts as trained
TARGET = 0.008  # below central's AUC, at epsilon 2: when federated training counts as trained
# At epsilon 2, without sampling: every student in each eighth round. Each has the server step that suited it best.
TURNS: Mapping[str, dict[str, Any]] = {
    "ftrl_eps_2": {"separation": 8, "noise": "banded", "server_optimizer": "SGD", "server_lr": 3.0},
    "plain_unamplified_eps_2": {"separation": 8, "server_optimizer": "SGD", "server_lr": 1.0},
}
COUNTS = 4  # stream of a seed that noises label counts


@dataclass(frozen=True)
class Split:
    """One seed's rows to learn from and to test on.

    Attributes:
        model: what to train.
        train, test: its examples.
    """

    model: HybridModel
    train: Examples
    test: Examples


Predictions = dict[str, list[NDArray[np.float32]]]  # of what was trained, by seed


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="in place of the OULAD table that the example ships")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and figures there")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        folds.progress(Console(stderr=True)) as bar,
    ):
        rows, figures = oulad(arguments.data, arguments.seeds, Path(folder) / "oulad", bar)
        more_rows, more_figures = coupon(arguments.seeds, Path(folder) / "coupon", bar)
    rows, figures = rows + more_rows, figures | more_figures
    measure.show("Test rows, means over seeds (oracle: measured on pooled data)", rows, figures)
    measure.write(arguments.json, rows, figures)


def oulad(data: Path | None, seeds: int, folder: Path, bar: Progress) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The study coach's students."""
    from examples.study_coach import prepare

    task = bar.add_task("OULAD: preparing", total=1 + seeds * (2 + len(EPSILONS) + len(TURNS)))
    split, population, assessments = prepare_oulad(data, folder)
    declared = load_model(prepare.MODEL)
    bar.advance(task)
    predictions: Predictions = {"lr": [logistic_regression(split)]}
    times: dict[str, list[float]] = {"central": [], "eps_2": [], "eps_inf": []}
    for seed in range(seeds):
        central = _train(split, folder, seed, bar, task, kind="central")
        times["central"].append(_seconds_to(central, max(_curve(central)) - NEAR_BEST))
        _keep(predictions, "central", central)
        for epsilon in EPSILONS:
            name = f"eps_{epsilon:g}"
            trained = _train(split, folder, seed, bar, task, epsilon=epsilon)
            _keep(predictions, name, trained)
            if name in times:
                times[name].append(_seconds_to(trained, central.record.oracle["auc"] - TARGET))
        for name, changes in TURNS.items():
            _keep(predictions, name, _train(split, folder, seed, bar, task, epsilon=2.0, name=name, changes=changes))
        hidden = _declared(declared, population.users, visible_to="device")
        run = folder / "runs" / f"label-private-{seed}"
        noise = SeededNoise(seed, COUNTS)
        counts = prepare.noised_counts(population, assessments, hidden, run, noise)
        private = _split(hidden, population, counts, assessments, folder / f"noised-{seed}")
        _keep(predictions, "eps_2_label_private", _train(private, run, seed, bar, task, epsilon=2.0))
    rows = _rows("OULAD", [split.test] * seeds, predictions)
    found = {row["trained"]: row for row in rows}
    figures = {f"oulad.{name}.auc": found[name]["AUC"] for name in ("central", "lr")}
    for name in ("eps_inf", "eps_8", "eps_2", "eps_1", "eps_2_label_private", *TURNS):
        figures[f"oulad.{name}.gap"] = found["central"]["AUC"] - found[name]["AUC"]
    figures["oulad.eps_2.log_loss_gap"] = found["eps_2"]["log-loss"] / found["central"]["log-loss"] - 1
    figures["oulad.central.seconds"] = float(np.mean(times["central"]))
    figures["oulad.eps_2.seconds"] = float(np.mean(times["eps_2"]))
    figures["oulad.time_ratio"] = figures["oulad.eps_2.seconds"] / figures["oulad.central.seconds"]
    figures["oulad.eps_inf.seconds"] = float(np.mean(times["eps_inf"]))
    return rows, figures


def prepare_oulad(data: Path | None, folder: Path) -> tuple[Split, Population, Any]:
    """The students' rows with label rates counted exactly, which the server may where it sees the label.

    Args:
        data: another table than the one that the example ships.
        folder: for the files between.

    Returns:
        The split, the population and the table of assessments that it is from.
    """
    from examples.study_coach import prepare, submissions

    workspace = Workspace(folder / ".hybrid")
    table = prepare.write_population(_made(folder) / "population.parquet", data or submissions.SOURCE)
    population = import_table(table, user="student", name=prepare.NAME, workspace=workspace)
    assessments = prepare.catalogue(population)
    seen = _declared(load_model(prepare.MODEL), population.users, visible_to="server")
    counts = prepare.exact_counts(population, assessments)
    return _split(seen, population, counts, assessments, folder / "exact"), population, assessments


def coupon(seeds: int, folder: Path, bar: Progress) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The survey's drivers; each seed holds out another fifth of them."""
    from examples.coupon import prepare

    task = bar.add_task("coupon: preparing", total=seeds * (2 + len(EPSILONS)))
    workspace = Workspace(folder / ".hybrid")
    table = prepare.write_population(_made(folder) / "population.parquet")
    import_table(table, user="user", name="coupon", workspace=workspace)
    splits = [Split(fold.model, fold.train, fold.test) for fold in folds.prepare_folds(workspace, max(seeds, 2), bar)]
    predictions: Predictions = {}
    for seed, split in enumerate(splits[:seeds]):
        for kind in ("central", "server-only"):
            _keep(predictions, kind.replace("-", "_"), _train(split, folder, seed, bar, task, kind=kind))
        for epsilon in EPSILONS:
            trained = _train(split, folder, seed, bar, task, epsilon=epsilon)
            _keep(predictions, f"eps_{epsilon:g}", trained)
    rows = _rows("coupon", [split.test for split in splits[:seeds]], predictions)
    found = {row["trained"]: row for row in rows}
    names = ("server_only", "central", "eps_inf", "eps_8", "eps_2", "eps_1")
    return rows, {
        f"coupon.{name}.{key}": found[name][column]
        for name in names
        for key, column in (("auc", "AUC"), ("log_loss", "log-loss"))
    }


def logistic_regression(split: Split) -> NDArray[np.float32]:
    """(n,) probabilities of the test rows, from all features as the towers read them."""
    from sklearn.linear_model import LogisticRegression

    rows = [np.concatenate([part.server, part.device], axis=1) for part in (split.train, split.test)]
    fitted = LogisticRegression(max_iter=2000).fit(rows[0], split.train.labels)
    return fitted.predict_proba(rows[1])[:, 1].astype(np.float32)


def _declared(model: HybridModel, users: int, *, visible_to: str) -> HybridModel:
    """The example with a label of one side, and the delta of so many people."""
    label = Label(column=model.label.column, visible_to=visible_to)
    epsilon = 8.0 if visible_to == "server" else 2.0
    privacy = Privacy(epsilon=epsilon, delta=(1 - 1e-9) * users**-1.1, clip=model.privacy.clip, unit="user")
    return model.model_copy(update={"label": label, "privacy": privacy})


def _split(model: HybridModel, population: Population, counts: Any, assessments: Any, folder: Path) -> Split:
    """Rows with a label to learn from, and those whose label comes later, joined to the server's table by Feast."""
    from examples.study_coach import prepare
    from feature_store.materialize import apply
    from feature_store.offline import join

    source = prepare.write_assessments(counts, assessments, folder / "assessments.parquet")
    view = model.server.views[0].model_copy(update={"source": source})
    placed = model.model_copy(update={"server": model.server.model_copy(update={"views": (view,)})})
    apply(placed, folder / "feast")
    keys = population.column(model.server.entity.join_key)
    slots = join(placed, keys, None, folder / "feast", now=datetime.now(UTC))
    later = model.model_copy(update={"label": Label(column="good_later", visible_to="server")})
    return Split(model, examples(model, population, slots), examples(later, population, slots))


def _train(
    split: Split,
    folder: Path,
    seed: int,
    bar: Progress,
    task: Any,
    *,
    kind: str = "federated",
    epsilon: float = 0.0,
    name: str | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Trained:
    """One training, as `hybrid train` does it, with `changes` of how the model declares it."""
    name = name or (kind if kind != "federated" else f"epsilon {epsilon:g}")
    bar.update(task, description=f"{split.model.name}: seed {seed}, {name}")
    run = folder if (folder / "ledger.jsonl").exists() else folder / "runs" / f"{name}-{seed}".replace(" ", "-")
    settings: dict[str, Any] = {"kind": kind}
    if kind == "federated":
        settings = {"kind": "noiseless"} if epsilon == math.inf else {"epsilon": epsilon}
        settings["settings"] = Training(**split.model.training.model_dump() | changes)
    trained = train(split.model, split.train, split.test, seed=seed, run_dir=run, **settings)
    bar.advance(task)
    return trained


def _keep(predictions: Predictions, name: str, trained: Trained) -> None:
    assert trained.test_predictions is not None
    predictions.setdefault(name, []).append(trained.test_predictions)


def _curve(trained: Trained) -> list[float]:
    return [value for _, value in trained.curves["oracle_auc"]]


def _seconds_to(trained: Trained, target: float) -> float:
    """Seconds of training until the model first was as good; infinite where it never was."""
    times = zip(trained.seconds, _curve(trained), strict=True)
    return next((seconds for seconds, value in times if value >= target), math.inf)


def _rows(name: str, tests: Sequence[Examples], predictions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means over seeds, and the paired difference to central with its interval under resampled people."""
    rows = []
    for trained, made in predictions.items():
        pairs = list(zip(tests, made, strict=False))
        row: dict[str, Any] = {"data": name, "trained": trained, "seeds": len(pairs)}
        row["AUC"] = _mean(auc(test.labels, p) for test, p in pairs)
        row["AUC sd"] = float(np.std([auc(test.labels, p) for test, p in pairs]))
        row["log-loss"] = _mean(log_loss(test.labels, p) for test, p in pairs)
        row["calibration"] = _mean(calibration(test.labels, p).ratio for test, p in pairs)
        if trained != "central":
            against = [
                Compared(test.labels, p, central, test.user_of_row)
                for (test, p), central in zip(pairs, predictions["central"], strict=False)
            ]
            difference = compare(against, resamples=200)["auc"]
            row["AUC - central"] = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        rows.append(row)
    return rows


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
