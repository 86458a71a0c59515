"""Many federated trainings of one model, those with the same cohorts as one batch.

Each configuration is a run of its own: own mechanism, own noise, own ledger,
own server optimiser. It gives what `hybrid.federation.training.train` gives
with its settings and seed. Flower's loop is left out: in a simulation it only
carries weights and sums from one part of this process to another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.aggregator import PaidMechanism, local_stream, takes_part
from hybrid.federation.central import fit_everything, fit_server_side
from hybrid.federation.engine import DeviceSide, Engine, predict
from hybrid.federation.grid import Configuration
from hybrid.federation.noise import check_delta, least_noise, planned_cohort, round_settings
from hybrid.federation.optimizers import TailAverage
from hybrid.federation.population import Examples
from hybrid.federation.strategy import NoisedSum
from hybrid.federation.training import (
    Progress,
    check_allowed,
    engine_for,
    fallbacks,
    optimizer_for,
    oracle,
    threads_for,
    write_json,
)
from hybrid.network import Network
from hybrid.privacy.accountant import Event, Spent, epsilon
from hybrid.privacy.ledger import Ledger, costs
from hybrid.privacy.mechanisms import ClippedSum
from hybrid.spec import HybridModel

TOGETHER = 128  # configurations at most: each has a ledger open
Metrics = dict[str, float]


@dataclass(frozen=True)
class Result:
    """What became of one configuration.

    Attributes:
        name: of its folder in the sweep's.
        configuration: how it was trained.
        epsilon: that it alone spent; infinite for an oracle.
        noise_multiplier: standard deviation of the noise over the clip.
        oracle: metrics on held-out users.
        seconds: its share of the time of those it was trained with.
    """

    name: str
    configuration: Configuration
    epsilon: float
    noise_multiplier: float
    oracle: Metrics
    seconds: float


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
        results: one a configuration, in the order they were given.
        references: "server-only" and, if asked for, "central" -> metrics on held-out users of each seed.
        composed: what everything in the sweep's ledgers costs together, were the noise of each its own: in a
            simulation, configurations of one seed draw the same. Oracles, without noise, are not in it.
        delta: at which.
        users: from how many people all of them learned.
        exact: features whose constants were not declared and are those of pooled rows: an oracle's.
    """

    results: tuple[Result, ...]
    references: Mapping[str, tuple[Metrics, ...]]
    composed: Spent
    delta: float
    users: int
    exact: tuple[str, ...] = ()


def sweep(
    model: HybridModel,
    configurations: Sequence[Configuration],
    examples_train: Examples,
    examples_test: Examples,
    *,
    run_dir: Path,
    central: bool = False,
    progress: Progress | None = None,
) -> Swept:
    """Trains every configuration by federated rounds, in one process, on a population it can see whole.

    Each has a folder in `run_dir` with config.json and, unless it is an oracle,
    ledger.jsonl. What needs no federated round, the server side's fit and the
    references, is done once a seed.

    Args:
        model: what to train.
        configurations: at least one; see `hybrid.federation.grid.Grid`.
        examples_train: of the users to learn from.
        examples_test: of held-out users, for metrics only.
        run_dir: of the sweep; made where it is missing. Its folders must not have ledgers yet.
        central: whether to train the model on pooled data too, as a reference.
        progress: called with how many rounds of all configurations are done, of how many.

    Raises:
        ConfigError: a configuration, delta or label does not allow this training. Nothing was spent.
        BudgetExceeded: a folder has a ledger that has not enough left.
    """
    for each in configurations:
        check_allowed(model, "federated", None if each.is_oracle else each.epsilon, each.settings)
        optimizer_for(each.settings, np.zeros(2, np.float32))
        if each.settings.balance is not None:
            raise ConfigError(
                "balance must be left out of a sweep, whose configurations share cohorts and the rows in them; "
                f"`hybrid train --balance` tries one, got {each.settings.balance:g}"
            )
        if each.settings.buffer is not None:
            raise ConfigError(
                f"buffer must be left out of a sweep, whose configurations share cohorts, got {each.settings.buffer}"
            )
    check_delta(model, examples_train.users)
    people = _People(model, examples_train, examples_test)
    total = sum(each.settings.rounds for each in configurations)
    done = 0
    results: dict[int, Result] = {}
    events: list[Event] = []
    for places in _groups(configurations):
        named = {_name(place, len(configurations)): configurations[place] for place in places}

        def on_round(size: int = len(named)) -> None:
            nonlocal done
            done += size
            if progress:
                progress(done, total)

        group = _Group(people, named, run_dir)
        found, spent = group.run(on_round)
        results.update(zip(places, found, strict=True))
        events += spent
    seeds = sorted({each.seed for each in configurations})
    references = {"server-only": tuple(people.server_only(seed) for seed in seeds)}
    if central:
        references["central"] = tuple(people.central(seed) for seed in seeds)
    return Swept(
        results=tuple(results[place] for place in range(len(configurations))),
        references=references,
        composed=epsilon(events, model.privacy.delta),
        delta=model.privacy.delta,
        users=examples_train.users,
    )


@dataclass(frozen=True)
class _People:
    """What all configurations share, and what those of one seed do."""

    model: HybridModel
    examples: Examples
    test: Examples
    _fitted: dict[int, Network] = field(default_factory=dict)
    _server_only: dict[int, Metrics] = field(default_factory=dict)

    def network(self, configuration: Configuration) -> Network:
        """With the weights that the rounds start from; its user puts them back."""
        if configuration.settings.server_tower == "central":
            return self.fitted(configuration.seed)
        return Network.build(self.model, seed=configuration.seed)

    def fitted(self, seed: int) -> Network:
        """After the fit of the server side, which depends on the seed alone."""
        if seed not in self._fitted:
            network = Network.build(self.model, seed=seed)
            with threads_for(network):
                fit_server_side(network, self.examples, seed=seed)
                self._server_only[seed] = oracle(self.test, predict(network, self.test, without="device"))
            self._fitted[seed] = network
        return self._fitted[seed]

    def server_only(self, seed: int) -> Metrics:
        """Of the server side alone, on held-out users."""
        self.fitted(seed)
        return self._server_only[seed]

    def central(self, seed: int) -> Metrics:
        """Of everything trained on pooled data, on held-out users."""
        network = Network.build(self.model, seed=seed)
        with threads_for(network):
            fit_everything(network, self.examples, seed=seed)
            return oracle(self.test, predict(network, self.test)) | fallbacks(network, self.test)


class _Run:
    """One configuration between rounds.

    Attributes:
        configuration: how it trains.
        flat: (p,) the weights that its next round starts from.
        weights: (p,) what its model is.
        mechanism: its own.
        noise_multiplier: of it.
        rounds: what each of its rounds is.
        ledger: that pays; None for an oracle.
    """

    def __init__(
        self, configuration: Configuration, model: HybridModel, users: int, start: Float32, ledger: Ledger | None
    ) -> None:
        settings = configuration.settings
        planned, delta = planned_cohort(settings, users), model.privacy.delta
        self.configuration, self.ledger, self.flat, self.weights = configuration, ledger, start, start
        self.noise_multiplier = (
            0.0 if ledger is None else least_noise(settings, configuration.epsilon, delta, sampling=settings.sampling)
        )
        self.rounds = round_settings(
            configuration.of(model), settings, self.noise_multiplier, sampling=settings.sampling, planned=planned
        )
        if ledger is not None:
            ledger.reserve([self.rounds.of(settings.rounds)])
        self.mechanism = PaidMechanism(self.rounds, ledger, seed=configuration.seed, size=len(start))
        self._strategy = NoisedSum(planned, optimizer_for(settings, start))
        self._average = TailAverage(settings.average_last)

    def step(self, number: int, attempt: int, total: ClippedSum) -> None:
        """Pays for, noises and applies a round's sum."""
        release = self.mechanism.release(number, attempt, lambda _: total)
        self.flat = self._strategy.step(release.sum)
        self.weights = self._average(self.flat)


@dataclass(frozen=True)
class _Group:
    """Configurations with the same cohorts and rows."""

    people: _People
    named: Mapping[str, Configuration]
    folder: Path

    def run(self, on_round: Callable[[], None]) -> tuple[list[Result], list[Event]]:
        """Trains and measures them; returns what each of them spent too."""
        began = time.perf_counter()
        configurations, examples = list(self.named.values()), self.people.examples
        first = configurations[0]
        network = self.people.network(first)
        engine = engine_for(network, examples, first.settings)
        start = engine.side.flat()
        with ExitStack() as stack, threads_for(network):
            ledgers = [stack.enter_context(self._ledger(name, each)) for name, each in self.named.items()]
            runs = [
                _Run(each, self.people.model, examples.users, start, ledger)
                for each, ledger in zip(configurations, ledgers, strict=True)
            ]
            for number in range(1, first.settings.rounds + 1):
                self._round(number, engine, runs)
                on_round()
            measured = [self._measure(run, engine.side, network) for run in runs]
            spent = [math.inf if ledger is None else ledger.spent().epsilon for ledger in ledgers]
            events = [event for ledger in ledgers if ledger is not None for event in costs(ledger.entries)]
        engine.side.load_flat(start)
        seconds = (time.perf_counter() - began) / len(runs)
        found = zip(self.named.items(), spent, runs, measured, strict=True)
        return [
            Result(*item, cost, run.noise_multiplier, metrics, seconds) for item, cost, run, metrics in found
        ], events

    def _round(self, number: int, engine: Engine, runs: Sequence[_Run]) -> None:
        seed, attempt = runs[0].configuration.seed, runs[0].mechanism.next_attempt(number)
        settings, step = runs[0].rounds, runs[0].mechanism.released
        sums = engine.clipped_sums(
            np.stack([run.flat for run in runs]),
            takes_part(settings, engine.users, seed=seed, number=number, attempt=attempt, step=step),
            [run.mechanism.clip for run in runs],
            [run.configuration.settings.local_lr for run in runs],
            stream=local_stream(seed, number, attempt),
        )
        for run, total in zip(runs, sums, strict=True):
            run.step(number, attempt, total)

    def _measure(self, run: _Run, side: DeviceSide, network: Network) -> Metrics:
        side.load_flat(run.weights)
        return oracle(self.people.test, predict(network, self.people.test)) | fallbacks(network, self.people.test)

    def _ledger(self, name: str, configuration: Configuration) -> AbstractContextManager[Ledger | None]:
        """Its folder with what it is, and its ledger, or a context that gives None."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"model": self.people.model.name, **described(configuration)})
        if configuration.is_oracle:
            return nullcontext()
        return Ledger.open(folder, budget_epsilon=configuration.epsilon, delta=self.people.model.privacy.delta)


def described(configuration: Configuration) -> dict[str, Any]:
    """As JSON values, which have no infinity."""
    return {
        "epsilon": finite(configuration.epsilon),
        "clip": configuration.clip,
        "seed": configuration.seed,
        "training": configuration.settings.model_dump(mode="json"),
    }


def finite(value: float) -> float | str:
    """A number as JSON has it; "inf" or "nan" else."""
    return value if math.isfinite(value) else str(value)


def _groups(configurations: Sequence[Configuration]) -> Iterator[list[int]]:
    """Places of configurations that can be trained together."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for place, configuration in enumerate(configurations):
        places.setdefault(configuration.shared, []).append(place)
    for group in places.values():
        for begin in range(0, len(group), TOGETHER):
            yield group[begin : begin + TOGETHER]


def _name(place: int, of: int) -> str:
    """From 1, as many digits as the last has.

    >>> _name(8, 12)
    '09'
    """
    return f"{place + 1:0{len(str(of))}}"
