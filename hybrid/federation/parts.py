"""A simulated population that is split over several aggregators, each a process of its own.

Part k of n has the users k, k + n, k + 2n, ... Whether a user takes part in a
round is the coin that one simulation of everybody would toss, so that with no
noise n parts add up to that simulation. Noise is each part's own, drawn from
the operating system: nobody can take it away, and no two sums share it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from hybrid.bearer import read_token
from hybrid.features import Float32
from hybrid.federation.aggregator import PaidMechanism, Round, coins, local_stream
from hybrid.federation.engine import Engine
from hybrid.federation.population import Examples, ExamplesWriter
from hybrid.federation.remote import control_app, controlled
from hybrid.http import Certificate, told_to_end
from hybrid.network import Network
from hybrid.privacy.accountant import GaussianEvent, epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import Release
from hybrid.spec import Declared, Training, load_model

RETRIES = 1000
"""More than any training has attempts at one round: so many numbers apart are the coins of two trainings of one run."""

RELEASE = "release"  # in a part's folder: its latest sum, as it left

Index = Annotated[int, Field(ge=0)]


class Budget(Declared):
    """What the people of one part may be charged by one training.

    Attributes:
        delta: of the account.
        rounds: releases that are paid for, and no more; >= 1.
    """

    delta: float
    rounds: Annotated[int, Field(ge=1)]

    def epsilon(self, event: GaussianEvent) -> float:
        """What so many releases cost, each an `event`; above 0, as a ledger's budget must be."""
        return max(epsilon([event] * self.rounds, self.delta).epsilon, 1e-12)


class Part(Declared):
    """One aggregator of a training, as its process is told.

    Attributes:
        model_file: the team's.
        folder: its own: `examples/`, `network.npz`, `token`, `ledger.jsonl`, `release/`.
        index, of: which of how many parts.
        population: users of all parts.
        seed: of coins and local order.
        attempts_before: at any round, at most, by earlier trainings of the run: their coins are not tossed again.
        training: how users train.
        device: where, as torch names it.
        sampling, clip, noise_multiplier, quantile, planned_cohort: see `hybrid.federation.aggregator.Round`.
        budget: None: without noise, privacy and ledger.
        port: TCP, on loopback.
        certificate, key: PEM files.
    """

    model_file: Path
    folder: Path
    index: Index
    of: Annotated[int, Field(ge=1)]
    population: Index
    seed: Index
    attempts_before: Index
    training: Training
    device: str = "cpu"
    sampling: float
    clip: float
    noise_multiplier: float
    quantile: float | None
    planned_cohort: float
    budget: Budget | None
    port: Annotated[int, Field(ge=1, le=65535)]
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index must be less than the {self.of} parts, got {self.index}")
        return self

    @property
    def tls(self) -> Certificate | None:
        """Of its control side."""
        return None if self.certificate is None or self.key is None else (self.certificate, self.key)

    @property
    def round(self) -> Round:
        """How each of its rounds is sampled, clipped and noised; whoever came, it is released."""
        return Round(self.sampling, self.clip, self.noise_multiplier, 0, self.quantile, self.planned_cohort)


def write_rows(folder: Path, examples: Examples, index: int, of: int) -> None:
    """Writes the rows of one part's users where its process reads them.

    Args:
        folder: of the part.
        examples: of everybody.
        index: of the part.
        of: how many parts there are.
    """
    own = examples.of(np.arange(examples.users) % of == index)
    widths = {"server": own.server.shape[1], "device": own.device.shape[1]}
    with ExamplesWriter(folder / "examples", own.offsets, **widths, population=own.population) as writer:
        writer.write(own.server, own.device, own.labels)


@dataclass
class PartAggregator:
    """Simulates the rounds of one part's users: see `hybrid.federation.client_app.Aggregator`.

    Attributes:
        part: its settings.
        engine: trains its users.
        mechanism: pays for each release, and draws its noise.
    """

    part: Part
    engine: Engine
    mechanism: PaidMechanism = field(repr=False)

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. A round run again is a new attempt, with other coins."""
        part, own = self.part, self.mechanism.next_attempt(number)
        attempt = part.attempts_before * RETRIES + own
        tossed = coins(part.seed, number, attempt, part.population)[part.index :: part.of]
        users = np.flatnonzero(tossed < part.sampling)
        stream = *local_stream(part.seed, number, attempt), part.index
        return self.mechanism.release(
            number, own, lambda norm: self.engine.clipped_sum(flat, users, norm, stream=stream)
        )


def aggregate(part: Part) -> None:
    """What the process of one part does: it serves its aggregator until SIGTERM.

    Raises:
        ConfigError: its ledger is open in another process, or the folder is not what a training wrote.
    """
    from hybrid.federation.training import engine_for, threads_for

    model = load_model(part.model_file)
    network = Network.build(model, seed=part.seed)
    with np.load(part.folder / "network.npz") as weights:
        network.load_weights(dict(weights))
    engine = engine_for(network, Examples.open(part.folder / "examples"), part.training, part.device)
    ledger = open_ledger(part)
    app = control_app(
        PartAggregator(part, engine, paid_mechanism(part, ledger, engine.size)),
        read_token(part.folder / "token"),
        size=engine.size,
        folder=part.folder / RELEASE,
    )
    ended = told_to_end()
    with threads_for(network), controlled(app, host="127.0.0.1", port=part.port, certificate=part.tls):
        ended.wait()
    if ledger is not None:
        ledger.close()


def paid_mechanism(part: Part, ledger: Ledger | None, size: int) -> PaidMechanism:
    """Its mechanism; an adaptive clip goes on from about where a process before left it.

    Args:
        part: its settings.
        ledger: of `open_ledger`.
        size: p, the length of a flat update.
    """
    mechanism = PaidMechanism(part.round, ledger, seed=None, size=size)
    if ledger is not None and ledger.entries:
        mechanism.go_on(ledger.entries[-1].clip)
    return mechanism


def open_ledger(part: Part) -> Ledger | None:
    """Its account, with what is left of the training reserved: also after a crash, nothing beyond is ever spent.

    Raises:
        ConfigError: another process has it open, or it is of another training.
    """
    if part.budget is None:
        return None
    event = part.round.event
    assert isinstance(event, GaussianEvent)  # correlated noise has no federation
    ledger = Ledger.open(part.folder, budget_epsilon=part.budget.epsilon(event), delta=part.budget.delta)
    left = part.budget.rounds - len(ledger.entries)
    if left > 0:
        ledger.reserve([GaussianEvent(**asdict(event) | {"count": left})])
    return ledger
