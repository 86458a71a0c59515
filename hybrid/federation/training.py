"""Trains one version of a hybrid model, in one of three ways, into one run directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.aggregator import Round, SimulatedAggregator
from hybrid.federation.central import Fitting, fit_everything, fit_server_side
from hybrid.federation.client_app import client_app
from hybrid.federation.engine import DeviceSide, Engine, LocalTraining, predict
from hybrid.federation.metrics import auc, calibration, log_loss
from hybrid.federation.population import Examples
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum, ServerOptimizer
from hybrid.network import Network
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.spec import HybridModel, Training
from hybrid.version import TrainingRecord

Kind = Literal["federated", "central", "server-only"]
Progress = Callable[[int, int], None]  # done, of how many
Curves = dict[str, list[tuple[int, float]]]

POINTS = 50  # of a curve over a federated training
SMALL = 100_000  # parameters below which a second thread costs more than it brings
SAMPLED = "each round the server tosses an independent coin for each user (Poisson), and nobody sees who took part"
SIMULATED = (
    "a seeded simulation, whose noise can be removed by whoever knows the seed (it is in the run's config.json); "
    "per run: repeats and tuning are not composed"
)


@dataclass(frozen=True)
class Trained:
    """What a training made.

    Attributes:
        weights: of the network, "part.name" -> array.
        record: how it was trained and what it cost.
        curves: name -> (round or epoch, value) points; computed on held-out users, so named "oracle_...".
        test_predictions: (n,) probabilities of the held-out rows; None where there were none.
    """

    weights: dict[str, NDArray[np.float32]] = field(repr=False)
    record: TrainingRecord
    curves: Curves = field(repr=False)
    test_predictions: Float32 | None = field(repr=False)


def train(
    model: HybridModel,
    examples_train: Examples,
    examples_test: Examples | None = None,
    *,
    kind: Kind = "federated",
    epsilon: float | None = None,
    seed: int = 0,
    run_dir: Path,
    settings: Training | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Trains a model, in one process, on a population it can see whole: a simulation.

    "federated": server tower and head are fitted on the server's label, then the
    tower is frozen and device tower and head are trained by federated rounds
    under user-level differential privacy. "central": everything on pooled data,
    without privacy. "server-only": server tower and the model's own head, with
    zeros for the device embedding, to fit and to predict. The run directory gets
    config.json, checkpoint.npz, metrics.json where there are held-out users, and
    ledger.jsonl where privacy was spent.

    Args:
        model: what to train.
        examples_train: of the users to learn from.
        examples_test: of held-out users, for curves and metrics only.
        kind: which way.
        epsilon: to spend at most; by default, and at most, what the model declares.
        seed: of everything random; the same seed repeats the training bit by bit on one machine.
        run_dir: made where it is missing; its ledger is shared by every training in it.
        settings: in place of `model.training`.
        progress: called with how much is done, of how much, after each round or epoch; at last with (1, 1).

    Raises:
        ConfigError: the budget, delta, optimiser or label does not allow this training.
        BudgetExceeded: the run directory's ledger has not enough left.
    """
    settings = settings or model.training
    budget = check_allowed(model, kind, epsilon)
    if budget is not None:
        _check_delta(model, examples_train.users)
    run_dir.mkdir(parents=True, exist_ok=True)
    network = Network.build(model, seed=seed)
    run = _Run(kind, network, examples_train, examples_test, seed, run_dir, settings, progress)
    with _threads(network):
        privacy = _TRAINERS[kind](run) if budget is None else _federated(run, budget)
        return _finish(run, privacy)


@dataclass(frozen=True)
class _Run:
    """What every way of training has before it."""

    kind: Kind
    network: Network
    examples: Examples
    test: Examples | None
    seed: int
    folder: Path
    settings: Training
    progress: Progress | None
    curves: Curves = field(default_factory=dict)

    def point(self, step: int) -> None:
        """Measures the network as it is on held-out users."""
        if self.test is None:
            return
        predictions = self.predict(self.test)
        for name, measure in (("oracle_auc", auc), ("oracle_log_loss", log_loss)):
            self.curves.setdefault(name, []).append((step, measure(self.test.labels, predictions)))

    def predict(self, examples: Examples) -> Float32:
        """(n,) probabilities by the network as it is, of what this kind has."""
        return predict(self.network, examples, with_devices=self.kind != "server-only")

    def checkpoint(self, step: int) -> None:
        """Writes the weights after a round or epoch, all or nothing."""
        draft = self.folder / ".checkpoint.npz"
        np.savez(draft, step=np.int64(step), **self.network.weights())  # type: ignore[arg-type]
        os.replace(draft, self.folder / "checkpoint.npz")


def _central(run: _Run) -> dict[str, Any]:
    _write_json(run.folder / "config.json", _config(run))
    run.checkpoint(fit_everything(run.network, run.examples, seed=run.seed, on_epoch=_epochs(run)))
    return {}


def _server_only(run: _Run) -> dict[str, Any]:
    _write_json(run.folder / "config.json", _config(run))
    run.checkpoint(fit_server_side(run.network, run.examples, seed=run.seed, on_epoch=_epochs(run)))
    return {}


_TRAINERS: Mapping[str, Callable[[_Run], dict[str, Any]]] = {"central": _central, "server-only": _server_only}


def _federated(run: _Run, budget: float) -> dict[str, Any]:
    """Returns the privacy fields of the record."""
    model, settings, users = run.network.model, run.settings, run.examples.users
    planned = settings.sampling * users
    z = noise_multiplier_for(budget, model.privacy.delta, settings.sampling, settings.rounds)
    # No minimum: amplification by Poisson sampling is claimed for rounds that are released whoever came. A round
    # withheld because few came would make it likelier that one who is in a released round took part.
    rounds = Round(settings.sampling, model.privacy.clip, z, minimum=0)
    fit_server_side(run.network, run.examples, seed=run.seed)
    side = DeviceSide(run.network)
    start = side.flat()
    strategy = NoisedSum(planned, ServerOptimizer(settings.server_optimizer, settings.server_lr, start))
    engine = Engine.build(run.network, run.examples, LocalTraining(settings.local_steps, settings.local_lr))
    with Ledger.open(run.folder, budget_epsilon=budget, delta=model.privacy.delta) as ledger:
        ledger.reserve([replace(rounds.event, count=settings.rounds)])
        _write_json(run.folder / "config.json", _config(run, budget))  # what was refused changes no file
        nodes = {1: client_app(SimulatedAggregator(engine, ledger, rounds, seed=run.seed))}
        simulate(server_app(strategy, start, settings.rounds, _rounds(run, side)), nodes)
        spent = ledger.spent()
    return {
        "epsilon": spent.epsilon,
        "delta": model.privacy.delta,
        "noise_multiplier": z,
        "clip": model.privacy.clip,
        "sampling": settings.sampling,
        "rounds": settings.rounds - strategy.failed_rounds,
        "mechanism": f"Gaussian noise on sums of clipped updates, zero-out adjacency; accountant: {spent.method}",
        "assumption": SIMULATED if settings.sampling == 1 else f"{SAMPLED}; {SIMULATED}",
        "unit": model.privacy.unit,
        "protects": model.protects,
    }


def _rounds(run: _Run, side: DeviceSide) -> Callable[[int, Float32], None]:
    """After a round: the weights into the network; now and then a checkpoint and a point of the curves."""
    total = run.settings.rounds

    def on_round(number: int, flat: Float32) -> None:
        side.load_flat(flat)
        if number % max(1, total // POINTS) == 0 or number == total:
            run.checkpoint(number)
            run.point(number)
        if run.progress:
            run.progress(number, total)

    return on_round


def _epochs(run: _Run) -> Callable[[int], None]:
    def on_epoch(number: int) -> None:
        run.point(number)
        if run.progress:
            run.progress(number, Fitting().epochs)

    return on_epoch


def _finish(run: _Run, privacy: Mapping[str, Any]) -> Trained:
    if run.progress:
        run.progress(1, 1)
    predictions, oracle = None, {}
    if run.test is not None:
        predictions = run.predict(run.test)
        oracle = _oracle(run.test, predictions)
        _write_json(run.folder / "metrics.json", {"oracle": oracle, "curves": run.curves})
    record = TrainingRecord(
        kind=run.kind,
        run=run.folder.name,
        population=run.examples.population,
        users=run.examples.users,
        examples=len(run.examples),
        oracle=oracle,
        **privacy,
    )
    return Trained(run.network.weights(), record, run.curves, predictions)


def _oracle(test: Examples, predictions: Float32) -> dict[str, float]:
    calibrated = calibration(test.labels, predictions)
    return {
        "auc": auc(test.labels, predictions),
        "log_loss": log_loss(test.labels, predictions),
        "calibration_ratio": calibrated.ratio,
        "calibration_error": calibrated.ece,
    }


def check_allowed(model: HybridModel, kind: Kind, epsilon: float | None) -> float | None:
    """Refuses, before any data is read, what `train` would refuse whatever the data.

    Returns:
        The epsilon to spend at most; None where no mechanism is used.

    Raises:
        ConfigError: the label is the device's alone, or epsilon is out of range.
    """
    if model.label.visible_to == "device":
        raise ConfigError(
            "label.visible_to is 'device': training with a label that only the device sees is not available yet"
        )
    if kind != "federated":
        return None
    declared = model.privacy.epsilon
    budget = declared if epsilon is None else epsilon
    if not 0 < budget <= declared:
        raise ConfigError(
            f"epsilon must be > 0 and at most the {declared:g} that {model.name!r} declares, got {budget:g}"
        )
    return budget


def _check_delta(model: HybridModel, users: int) -> None:
    if not users:
        raise ConfigError("training must have at least one user, got none")
    most, declared = users**-1.1, model.privacy.delta
    if declared > most:
        raise ConfigError(f"privacy.delta must be at most {most:.2g}, users^-1.1 at {users}, got {declared:g}")


def _config(run: _Run, budget: float | None = None) -> dict[str, Any]:
    model = run.network.model
    config = {
        "model": model.name,
        "kind": run.kind,
        "seed": run.seed,
        "population": run.examples.population,
        "users": run.examples.users,
        "examples": len(run.examples),
    }
    if budget is None:
        return config
    return config | {"epsilon": budget, "privacy": model.privacy.model_dump(), "training": run.settings.model_dump()}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(content, indent=2))
    os.replace(draft, file)


@contextmanager
def _threads(network: Network) -> Iterator[None]:
    """One thread for small networks."""
    before = torch.get_num_threads()
    if sum(p.numel() for part in network.parts.values() for p in part.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
