"""A promoted version trained further on real devices of this machine: what `hybrid fleet run` runs."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.bundle import Manifest, read_bundle, trusted_key
from hybrid.errors import BadRequest, ConfigError
from hybrid.features import Float32
from hybrid.federation.aggregator import Round
from hybrid.federation.checkin import listening
from hybrid.federation.client_app import client_app
from hybrid.federation.engine import DeviceSide
from hybrid.federation.fleet_aggregator import FleetAggregator, Task
from hybrid.federation.noise import round_settings
from hybrid.federation.population import Population
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.federation.training import check_allowed, check_delta, optimizer_for
from hybrid.local.devices import Opened, People, running
from hybrid.network import Network
from hybrid.plan import Local, Policy
from hybrid.privacy.accountant import noise_multiplier_for
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import Training
from hybrid.version import TrainingRecord, Version

if TYPE_CHECKING:
    from hybrid.workspace import Workspace

NO_TOKENS = (
    "no device sends two updates to one round, which nothing enforces until there are tokens; what the version that "
    "it began from had cost is not in it"
)
OWN_COINS = (
    "each device tosses its own coin for each round, and nobody but the aggregator sees who, or how many, took part"
)
EACH_ROUND = Policy(separation_s=0, participations=1_000_000)  # here a round stands for a day


@dataclass(frozen=True)
class Promoted:
    """A promoted version, to be trained further.

    Attributes:
        version: it.
        network: with its weights; training changes them.
        settings: of its training, with what is asked for in their place.
        bundle: the file that devices have.
        trust: the key that they trust.
        manifest: the bundle's.
    """

    version: Version
    network: Network
    settings: Training
    bundle: Path
    trust: Path
    manifest: Manifest

    @classmethod
    def open(cls, model: str, selector: str | int, workspace: Workspace, **changed: Any) -> Promoted:
        """Reads it.

        Args:
            model: of the registry.
            selector: number or alias.
            workspace: where it was promoted.
            changed: fields of its `Training`.

        Raises:
            NotFound: there is none.
            ConfigError: it cannot be trained on devices; the message says why.
        """
        registry = Registry(workspace)
        declared, found = registry.load_model(model), registry.version(model, selector)
        name = f"{model}:{found.number}"
        if found.definition_hash != registry.definition_hash(model):
            raise ConfigError(f"{name} was trained from another definition than is registered now: train it again")
        bundle, trust = workspace.bundles / f"{model}-{found.number}.bundle", workspace.keys / "bundle-signing.pub"
        if not bundle.is_file():
            raise ConfigError(f"{name} has no bundle: `hybrid promote {model} {found.number} production` makes it")
        manifest = read_bundle(bundle.read_bytes(), trusted_key(trust)).manifest
        if manifest.train is None or found.training.settings is None:
            raise ConfigError(f"the bundle of {name} has no training program; `hybrid promote` says why")
        network = Network.build(declared)
        network.load_weights(found.weights)
        settings = Training(**found.training.settings.model_dump() | changed)
        if settings.separation is not None:
            raise ConfigError(
                f"separation of {name} must be left out on devices: until a token is issued for each turn, nobody sees "
                f"to it that they take turns, got {settings.separation}; train a version by coins"
            )
        return cls(found, network, settings, bundle, trust, manifest)

    @property
    def side(self) -> DeviceSide:
        """What devices train."""
        federated, missing = self.settings.server_tower == "federated", self.settings.tower_dropout > 0
        return DeviceSide(self.network, server_tower=federated, missing=missing)

    def budget(self, epsilon: float | None, devices: int) -> float:
        """The epsilon to spend at most.

        Raises:
            ConfigError: it, or the declared delta, is out of range.
        """
        check_delta(self.network.model, devices)
        allowed = check_allowed(self.network.model, "federated", epsilon, self.settings)
        assert allowed is not None
        return allowed

    def people(self, name: str, devices: int, workspace: Workspace) -> People:
        """The first people of a population, with what the server contributes to each of their rows.

        Raises:
            NotFound: no such population, or some rows have no server features.
            ConfigError: it has too few people, or lacks a column.
        """
        import torch

        from feature_store.offline import join

        model, population = self.network.model, Population.open(name, workspace)
        if devices > population.users:
            raise ConfigError(f"--devices must be at most the {population.users} people of {name!r}, got {devices}")
        rows = slice(0, int(population.offsets[devices]))
        entity = population.column(model.server.entity.join_key)[rows]
        times = None if population.time is None else population.column(population.time)[rows]
        request = {feature: population.column(feature)[rows] for feature in model.request}
        views = join(model, entity, times, workspace.feast)
        try:
            asked = model.request_features.slots(model.request_features.inputs(request))
        except BadRequest as error:
            raise ConfigError(f"population {name!r}: {error}") from None
        slots = np.concatenate([views, asked.reshape(len(views), len(model.request))], axis=1)
        with torch.no_grad():
            embedded = self.network.server_program()(torch.from_numpy(slots)).numpy()
        labels = population.column(model.label.column)[rows].astype(np.float32)
        return People(
            offsets=population.offsets[: devices + 1],
            entity=entity.tolist(),
            request={feature: values.tolist() for feature, values in request.items()},
            features={feature: population.column(feature)[rows].tolist() for feature in model.device},
            server=slots if self.settings.server_tower == "federated" else embedded,
            labels=labels if model.label.absent is None else np.nan_to_num(labels, nan=float(model.label.absent)),
        )

    @contextmanager
    def paid(self, budget: float | None, devices: int, run_dir: Path) -> Iterator[tuple[Round, Ledger | None]]:
        """How a round is noised so that all stay within the budget, and the ledger in which all are reserved.

        Args:
            budget: epsilon at most; None: without noise, and without privacy.
            devices: how many check in.
            run_dir: the ledger's.

        Raises:
            BudgetExceeded: the ledger has not enough left.
            ConfigError: it is another's, or of another budget.
        """
        model, settings = self.network.model, self.settings
        chance = {"sampling": settings.sampling, "planned": settings.sampling * devices}
        if budget is None:
            yield round_settings(model, settings, 0.0, **chance), None
            return
        delta = model.privacy.delta
        with Ledger.open(run_dir, budget_epsilon=budget, delta=delta) as ledger:
            besides = [entry.event for entry in ledger.entries]
            noise = noise_multiplier_for(budget, delta, settings.sampling, settings.rounds, besides=besides)
            found = round_settings(model, settings, noise, **chance)
            ledger.reserve([found.of(settings.rounds)])
            yield found, ledger

    def task(self, round_s: float, *, wanted: int) -> Task:
        """What every round asks of devices; see `Task` for both arguments."""
        assert self.manifest.train is not None
        settings, keeping = self.settings, self.manifest.keeping
        epochs = settings.local_epochs
        local = Local(
            steps=settings.local_steps if epochs is None else None,
            epochs=epochs,
            lr=settings.local_lr,
            batch=settings.local_batch,
            proximal=settings.proximal,
            tower_dropout=settings.tower_dropout,
        )
        return Task(
            model=self.version.model,
            version=self.version.number,
            definition_hash=self.version.definition_hash,
            policy=EACH_ROUND,
            examples=(1, keeping.max_examples),
            seconds=min(60.0, keeping.max_seconds),
            memory_mb=min(512, keeping.max_memory_mb),
            local=local,
            upload=settings.upload,
            parameters=self.manifest.train.size,
            round_s=round_s,
            wanted=wanted,
        )

    def record(self, settings: Round, ledger: Ledger, outcome: Outcome, people: People, **about: str) -> TrainingRecord:
        """How a new version came to be; `about`: its `population` and `run`."""
        spent = ledger.spent()
        return TrainingRecord(
            kind="federated",
            users=people.users,
            examples=int(people.offsets[-1]),
            settings=self.settings,
            epsilon=spent.epsilon,
            delta=self.network.model.privacy.delta,
            noise_multiplier=settings.noise_multiplier,
            clip=settings.clip,
            sampling=settings.sampling,
            rounds=self.settings.rounds - outcome.failed,
            mechanism=f"Gaussian noise on sums of clipped updates, zero-out adjacency; accountant: {spent.method}",
            assumption=NO_TOKENS if settings.sampling == 1 else f"{OWN_COINS}; {NO_TOKENS}",
            unit="device",
            protects=self.network.model.protects,
            **about,
        )


@dataclass
class Outcome:
    """What came of the rounds.

    Attributes:
        rounds: of each, its number, seconds, and by how much it moved the weights.
        failed: how many were not released.
        refused: why uploads were not taken, and how many.
        endings: how the devices' sessions ended, as they say themselves: no fleet tells that.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    failed: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)


def train(
    promoted: Promoted,
    aggregator: FleetAggregator,
    people: People,
    *,
    planned: float,
    rest_s: float,
    processes: int,
    port: int,
    progress: Callable[[int, int], None],
) -> Outcome:
    """Runs the devices, the aggregator's service and Flower's ServerApp; the network has the last weights afterwards.

    Args:
        promoted: the version.
        aggregator: that devices check in with.
        people: whose devices take part.
        planned: expected number of participants of a round.
        rest_s: no device stays away for longer.
        processes: that the devices share.
        port: of the aggregator; 0: a free one.
        progress: called with how many rounds are done, of how many.

    Raises:
        StackError: a process of devices failed.
    """
    with tempfile.TemporaryDirectory(prefix="hybrid-fleet-") as folder, listening(aggregator, port=port) as bound:
        opened = Opened(promoted.bundle, promoted.trust, f"http://127.0.0.1:{bound}", rest_s)
        with running(opened, people, Path(folder), processes=processes) as started:
            started.wait_ready()
            outcome = _rounds(promoted, aggregator, planned, progress)
            aggregator.stop("the training is over")
            outcome.endings = started.finish()
    outcome.refused = {str(reason): count for reason, count in aggregator.refused.items()}
    return outcome


def _rounds(
    promoted: Promoted, aggregator: FleetAggregator, planned: float, progress: Callable[[int, int], None]
) -> Outcome:
    """Flower's apps in this process."""
    outcome, side, total = Outcome(), promoted.side, promoted.settings.rounds
    strategy = NoisedSum(planned, optimizer_for(promoted.settings, side.flat()))
    begun = time.monotonic()

    def after(number: int, flat: Float32) -> None:
        nonlocal begun
        now = time.monotonic()
        if number:
            moved = float(np.linalg.norm(flat - side.flat()))
            outcome.rounds.append({"round": number, "seconds": round(now - begun, 2), "moved": moved})
        begun = now
        side.load_flat(flat)
        progress(number, total)

    simulate(server_app(strategy, side.flat(), total, after), {1: client_app(aggregator)})
    outcome.failed = strategy.failed_rounds
    return outcome
