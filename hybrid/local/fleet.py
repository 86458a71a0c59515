"""A promoted version trained further on real devices of this machine: what `hybrid fleet run` runs."""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.analytics.results import describe
from hybrid.bundle import Manifest, read_bundle, signing_key, trusted_key
from hybrid.errors import BadRequest, ConfigError
from hybrid.features import Float32
from hybrid.federation.aggregator import PURPOSE, Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.checkin import Service as CheckInService
from hybrid.federation.checkin import Tokens, Turns, listening
from hybrid.federation.client_app import client_app
from hybrid.federation.engine import DeviceSide
from hybrid.federation.fleet_aggregator import Audience, FleetAggregator, Task
from hybrid.federation.flower_app import Job
from hybrid.federation.issuer import RemoteIssuer
from hybrid.federation.noise import check_delta, least_noise, planned_cohort, round_settings
from hybrid.federation.population import Population
from hybrid.federation.resume import Place
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.federation.training import (
    AT_ONCE,
    check_allowed,
    check_linear,
    mechanism_of,
    optimizer_for,
)
from hybrid.local.devices import Opened, People, running
from hybrid.local.flower import Site, run_job
from hybrid.local.process import free_ports
from hybrid.network import Network
from hybrid.plan import Local, Policy
from hybrid.privacy.accountant import epsilon
from hybrid.privacy.ledger import Ledger, costs
from hybrid.privacy.matrix import Banded, Buffered
from hybrid.registry import Registry
from hybrid.spec import Training
from hybrid.version import TrainingRecord, Version

if TYPE_CHECKING:
    from hybrid.workspace import Workspace

BEGAN = "what the version that it began from had cost is not in it"
NO_TOKENS = f"no device sends two updates to one round, which nothing enforces without tokens; {BEGAN}"
OWN_COINS = (
    "each device tosses its own coin for each round, and nobody but the aggregator sees who, or how many, took part"
)
TOKENS = f"no account has two updates in one round, whatever devices it has: the issuer of tokens sees to that; {BEGAN}"
ACCOUNT_COINS = (
    "one device of each account, which has the account's token, tosses a coin for each round, and nobody but the "
    "aggregator sees who, or how many, took part"
)
ACCOUNT_TURNS = (
    "each account is in at most one of any {separation} {what} one after another and in at most {most}, in a fixed "
    "horizon of {rounds}, whatever devices it has: the issuer of tokens sees to that; who takes part may be known: no "
    "sampling is assumed"
)
TURNS = (
    "each device is in at most one of any {separation} {what} one after another and in at most {most}, in a fixed "
    "horizon of {rounds}, by what its store remembers, which nothing else enforces without tokens; who takes "
    "part may be known: no sampling is assumed"
)
REST_S = 1.0  # of a device between two sessions, where training is asynchronous: here a flush stands for hours
AGGREGATORS = 2  # of a federation on this machine
SLACK_S = 60.0  # of a round over Flower, for all but two times its length
OWN_NOISE = "noise is of each aggregator for its own devices, so that the largest of their epsilons is everybody's"
PROCESSES = 2  # that devices share which are asked
EACH_ROUND = Policy(separation_s=0, participations=1_000_000)  # here a round stands for a day


@dataclass(frozen=True)
class Promoted:
    """A promoted version, to be trained further.

    Attributes:
        version: it.
        network: with its weights; training changes them.
        settings: of its training, with what is asked for in their site.
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
        network = Network.of(declared, found)
        settings = Training(**found.training.settings.model_dump() | changed)
        check_linear(settings)
        return cls(found, network, settings, bundle, trust, manifest)

    @property
    def side(self) -> DeviceSide:
        """What devices train."""
        return device_side(self.network, self.settings)

    @property
    def buffer(self) -> Buffer | None:
        """Of an asynchronous training."""
        settings = self.settings
        return None if settings.buffer is None else Buffer(settings.buffer, settings.max_staleness)

    def budget(self, epsilon: float | None, devices: int) -> float:
        """The epsilon to spend at most.

        Raises:
            ConfigError: it, or the declared delta, is out of range.
        """
        check_delta(self.network.model, devices)
        allowed = check_allowed(self.network.model, "federated", epsilon, self.settings)
        assert allowed is not None
        return allowed

    def people(
        self, name: str, devices: int, workspace: Workspace, *, among: NDArray[np.bool_] | None = None
    ) -> People:
        """The first people of a population, with what the server contributes to each of their rows.

        Args:
            name: of the population.
            devices: how many.
            workspace: with the population and the feature store.
            among: (users,) whom they are taken of; None: of all.

        Raises:
            NotFound: no such population, or some rows have no server features.
            ConfigError: it has too few people, or lacks a column.
        """
        import torch

        from feature_store.offline import join

        model, population = self.network.model, Population.open(name, workspace)
        users = np.ones(population.users, bool) if among is None else among
        if devices > (found := np.count_nonzero(users)):
            raise ConfigError(f"--devices must be at most the {found} people of {name!r}, got {devices}")
        users, counts = users & (np.cumsum(users) <= devices), np.diff(population.offsets)
        rows = np.repeat(users, counts)
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
            offsets=np.concatenate([[0], np.cumsum(counts[users])]),
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
            ConfigError: it is another's, or of another budget; or the buffer is larger than the fleet.
        """
        model, settings = self.network.model, self.settings
        if settings.buffer is not None and settings.buffer > devices:
            raise ConfigError(f"buffer must be at most the {devices} devices, got {settings.buffer}")
        chance = {"sampling": settings.sampling, "planned": planned_cohort(settings, devices)}
        if budget is None:
            yield round_settings(model, settings, 0.0, **chance), None
            return
        delta = model.privacy.delta
        with Ledger.open(run_dir, budget_epsilon=budget, delta=delta) as ledger:
            noise = least_noise(settings, budget, delta, sampling=settings.sampling, besides=costs(ledger.entries))
            found = round_settings(model, settings, noise, **chance)
            ledger.reserve([found.of(settings.rounds)])
            describe(run_dir, model.name, "fleet")
            yield found, ledger

    def planned(self, devices: int, aggregators: int = 1) -> float:
        """Expected number of participants of a round: what sums are divided by. Each aggregator fills a buffer."""
        return planned_cohort(self.settings, devices) * (1 if self.buffer is None else aggregators)

    def audience(self, round_s: float, *, wanted: int, policy: Policy = EACH_ROUND) -> Audience:
        """Whose devices are asked, by a training or by queries.

        Args:
            round_s: how long a round is open, or a flush waits at most.
            wanted: how many devices are to check in to one.
            policy: of who may take part.
        """
        return Audience(
            model=self.version.model,
            version=self.version.number,
            definition_hash=self.version.definition_hash,
            policy=policy,
            seconds=min(60.0, self.manifest.keeping.max_seconds),
            round_s=round_s,
            wanted=wanted,
        )

    def task(self, round_s: float, *, devices: int, policy: Policy = EACH_ROUND) -> Task:
        """What every round of the training asks of devices.

        Args:
            round_s: how long a round is open, or a flush waits at most.
            devices: that check in to its aggregator.
            policy: of who may take part.
        """
        assert self.manifest.train is not None
        wanted = devices if self.buffer is None else AT_ONCE * self.buffer.updates
        settings, keeping = self.settings, self.manifest.keeping
        epochs, balance = settings.local_epochs, self.version.training.balance
        local = Local(
            steps=settings.local_steps if epochs is None else None,
            epochs=epochs,
            lr=settings.local_lr,
            batch=settings.local_batch,
            proximal=settings.proximal,
            tower_dropout=settings.tower_dropout,
            keep=None if balance is None else balance.keep,  # as the version's correction says; nobody is asked again
        )
        return Task(
            **self.audience(round_s, wanted=wanted, policy=policy).model_dump(),
            examples=(1, keeping.max_examples),
            memory_mb=min(512, keeping.max_memory_mb),
            local=local,
            upload=settings.upload,
            parameters=self.manifest.train.size,
        )

    def job(self, round_s: float, *, planned: float, nodes: int) -> Job:
        """What a ServerApp is told. A round that an aggregator lost by a crash fits into its time once more.

        Args:
            round_s: how long a round is open.
            planned: expected number of its participants, over all nodes.
            nodes: how many there are.
        """
        timeout_s, rounds = 2 * round_s + SLACK_S, self.settings.rounds
        return Job(
            rounds=rounds, planned_cohort=planned, training=self.settings, nodes=nodes, round_timeout_s=timeout_s
        )

    def record(
        self,
        settings: Round,
        ledger: Ledger,
        *,
        users: int,
        examples: int | None,
        aggregators: int,
        tokens: bool = False,
        **about: str,
    ) -> TrainingRecord:
        """How a new version came to be, if all of its rounds are released.

        Args:
            settings: of a round.
            ledger: that paid for them.
            users: whose devices check in.
            examples: that they hold; None: nobody knows.
            aggregators: each with devices of its own.
            tokens: whether each update needed a token of its account's; of one aggregator.
            about: the record's `population` and `run`.
        """
        spent, matrix = ledger.spent(), settings.matrix
        assert not tokens or aggregators == 1  # of several each would take a person's update
        coins, taken = (ACCOUNT_COINS, ACCOUNT_TURNS) if tokens else (OWN_COINS, TURNS)
        assumes = [coins] if settings.sampling < 1 else []
        if matrix is not None:
            people, what = matrix.participation, "rounds" if self.buffer is None else "flushes"
            turns = {"separation": people.separation, "most": people.most, "rounds": people.rounds, "what": what}
            assumes = [taken.format(**turns)]
        assumes += [OWN_NOISE] if aggregators > 1 else []
        once = TOKENS if tokens else NO_TOKENS
        assumes += [once if matrix is None else BEGAN]
        return TrainingRecord(
            kind="federated",
            users=users,
            examples=examples,
            settings=self.settings,
            epsilon=spent.epsilon,
            delta=self.network.model.privacy.delta,
            noise_multiplier=settings.noise_multiplier,
            clip=settings.clip,
            sampling=None if matrix else settings.sampling,
            rounds=self.settings.rounds,
            mechanism=f"{mechanism_of(self.settings)}, zero-out adjacency; accountant: {spent.method}",
            assumption="; ".join(assumes),
            unit="user" if tokens else "device",
            protects=self.network.model.protects,
            balance=self.version.training.balance,
            learned=self.version.training.learned,
            **about,
        )


def device_side(network: Network, settings: Training) -> DeviceSide:
    """What devices train."""
    return DeviceSide(network, server_tower=settings.server_tower == "federated", missing=settings.tower_dropout > 0)


def service(
    task: Task,
    settings: Round,
    rounds: int,
    delta: float | None,
    *,
    buffer: Buffer | None = None,
    tokens: Tokens | None = None,
) -> CheckInService:
    """What the process of an aggregator is told: a budget of exactly so many rounds.

    Args:
        task: what each asks.
        settings: of each.
        rounds: how many.
        delta: None: without noise.
        buffer: of an asynchronous training.
        tokens: the issuer whose tokens updates need.
    """
    turns, spent = None, None
    if settings.matrix is not None:
        factor = settings.matrix.factor
        assert isinstance(factor, Banded | Buffered)
        turns = Turns(factor=factor, separation=settings.matrix.participation.separation, buffer=buffer)
    if delta is not None:
        # Above 0, as a ledger's budget must be; and by what another machine's arithmetic may make of the same cost.
        spent = max(1e-12, (1 + 1e-9) * epsilon([settings.of(rounds)], delta).epsilon)
    return CheckInService(
        task=task,
        sampling=settings.sampling,
        clip=settings.clip,
        noise_multiplier=settings.noise_multiplier,
        minimum=settings.minimum,
        turns=turns,
        rounds=rounds,
        epsilon=spent,
        delta=delta,
        tokens=tokens,
    )


def pay_ahead(ledger: Ledger | None, settings: Round, rounds: int) -> None:
    """Charges a run for all rounds before the first: its aggregators are processes with ledgers of their own.

    Raises:
        BudgetExceeded: not enough is left.
    """
    if ledger is None:
        return
    for number in range(1, rounds + 1):
        attempt, step = ledger.next_attempt(PURPOSE, number), None if settings.matrix is None else number
        ledger.spend(
            settings.event, purpose=PURPOSE, clip=settings.clip, round_number=number, attempt=attempt, step=step
        )


@dataclass
class Outcome:
    """What came of the rounds.

    Attributes:
        rounds: of each, its number, seconds, and by how much it moved the weights.
        failed: how many were not released.
        refused: why uploads were not taken, and how many; None where only the aggregators' logs say it.
        endings: how the devices' sessions ended, as they say themselves: no fleet tells that.
        aggregators: how many there were, each with devices of its own.
    """

    rounds: list[dict[str, float]] = field(default_factory=list)
    failed: int = 0
    refused: dict[str, int] | None = None
    endings: Counter[str] = field(default_factory=Counter)
    aggregators: int = 1


@dataclass(frozen=True)
class Order:
    """How a version is trained on devices of this machine.

    Attributes:
        promoted: the version; its network has the last weights afterwards.
        settings: of every round.
        people: whose devices take part.
        round_s: how long a round is open, or a flush waits at most; no device stays away for longer.
        processes: that the devices share.
        keys: folder of the control plane's signing key.
        progress: called with how many rounds are done, of how many.
        tokens: whether an issuer gives each person one token a round, which their update needs.
        second: how many of the people have a second device, with the same rows.
    """

    promoted: Promoted
    settings: Round
    people: People
    round_s: float
    processes: int
    keys: Path
    progress: Callable[[int, int], None] = field(repr=False)
    tokens: bool = False
    second: int = 0

    def opened(self, port: int) -> Opened:
        """What devices have whose aggregator is at that port."""
        rest_s = self.round_s if self.promoted.buffer is None else min(self.round_s, REST_S)
        return Opened(self.promoted.bundle, self.promoted.trust, f"http://127.0.0.1:{port}", rest_s)

    def noted(self, outcome: Outcome) -> Callable[[int, Float32], None]:
        """What is called with each round's number and the weights after it: loads them, and says so."""
        side, total = self.promoted.side, self.promoted.settings.rounds
        begun = time.monotonic()

        def after(number: int, flat: Float32) -> None:
            nonlocal begun
            now = time.monotonic()
            if number:
                moved = float(np.linalg.norm(flat - side.flat()))
                outcome.rounds.append({"round": number, "seconds": round(now - begun, 2), "moved": moved})
            begun = now
            side.load_flat(flat)
            self.progress(number, total)

        return after


def train(order: Order, ledger: Ledger | None, port: int) -> Outcome:
    """Runs the devices, one aggregator's service and Flower's ServerApp, these in this process.

    Args:
        order: what to train.
        ledger: pays for each round; None without noise.
        port: of the aggregator; 0: a free one.

    Raises:
        StackError: a process of devices failed.
    """
    outcome, promoted, buffer = Outcome(), order.promoted, order.promoted.buffer
    owners = [*range(order.people.users), *range(order.second)]
    task = promoted.task(order.round_s, devices=len(owners))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybrid-fleet-")))
        issued = stack.enter_context(issuing(folder / "issuer", order.people.users)) if order.tokens else None
        aggregator = FleetAggregator(
            task,
            order.settings,
            ledger,
            signing_key(order.keys),
            noise_state=folder / "noise.state",  # which no other process goes on with
            buffer=buffer,
            windows=None if issued is None else issued.windows,
        )
        opened = order.opened(stack.enter_context(listening(aggregator, port=port)))
        if issued is not None:
            opened = replace(opened, issuer=issued.url, accounts=[issued.keys[owner] for owner in owners])
        devices = running(opened, order.people.twice(order.second), folder, processes=order.processes)
        started = stack.enter_context(devices)
        started.wait_ready()
        initial = promoted.side.flat()
        planned = promoted.planned(order.people.users)
        strategy = NoisedSum(planned, optimizer_for(promoted.settings, initial))
        app = server_app(strategy, initial, promoted.settings.rounds, order.noted(outcome))
        simulate(app, {1: client_app(aggregator)})
        aggregator.stop("the training is over")
        outcome.endings = started.finish()
    outcome.failed = strategy.failed_rounds
    outcome.refused = {str(reason): count for reason, count in aggregator.refused.items()}
    return outcome


@dataclass(frozen=True)
class Issued:
    """An issuer of tokens on this machine.

    Attributes:
        url: that devices ask.
        windows: at its control side.
        keys: of each account.
    """

    url: str
    windows: RemoteIssuer
    keys: Sequence[str] = field(repr=False)


@contextmanager
def issuing(folder: Path, accounts: int) -> Iterator[Issued]:
    """Serves an issuer of tokens from threads of this process until the block ends.

    Args:
        folder: new, its own.
        accounts: how many it knows.
    """
    from serving.access import Access, ApiKey, ApiKeys
    from serving.issuer import Issuer, application, control_application
    from serving.issuer import listening as issuer_listening

    lines, keys = zip(*(ApiKey.issue(f"person-{number}") for number in range(accounts)), strict=True)
    token = secrets.token_urlsafe(32)
    with ExitStack() as stack:
        issuer = stack.enter_context(Issuer(folder))
        (folder / "api-keys").write_text("\n".join(map(str, lines)))
        apps = (application(issuer, Access(ApiKeys(folder / "api-keys"))), control_application(issuer, token))
        devices, control = (f"http://127.0.0.1:{stack.enter_context(issuer_listening(app))}" for app in apps)
        name = devices.removeprefix("http://")
        yield Issued(devices, RemoteIssuer(name=name, url=control, token=token, scope="fleet"), keys)


@contextmanager
def asking(
    promoted: Promoted, people: People, ledger: Ledger, keys: Path, *, round_s: float, tokens: bool = False
) -> Iterator[FleetAggregator]:
    """Runs the devices and an aggregator, in this process, that asks them: see `hybrid.analytics.fleet.FleetAsk`.

    Args:
        promoted: the version that devices have.
        people: whose they are.
        ledger: pays for each query.
        keys: folder of the control plane's signing key.
        round_s: how long a query is open.
        tokens: whether an issuer gives each person one token a query, which their answer needs.

    Raises:
        StackError: a process of devices failed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybrid-fleet-")))
        issued = stack.enter_context(issuing(folder / "issuer", people.users)) if tokens else None
        audience, windows = promoted.audience(round_s, wanted=people.users), None if issued is None else issued.windows
        aggregator = FleetAggregator(audience, None, ledger, signing_key(keys), windows=windows)
        bound = stack.enter_context(listening(aggregator))
        opened = Opened(promoted.bundle, promoted.trust, f"http://127.0.0.1:{bound}", round_s)
        if issued is not None:
            opened = replace(opened, issuer=issued.url, accounts=issued.keys)
        started = stack.enter_context(running(opened, people, folder, processes=PROCESSES))
        started.wait_ready()
        yield aggregator
        aggregator.stop("everything is asked")
        started.finish()


@contextmanager
def reporting(
    promoted: Promoted,
    people: People,
    ledger: Ledger,
    keys: Path,
    *,
    round_s: float,
    tokens: bool = False,
    not_charging: int = 0,
) -> Iterator[tuple[FleetAggregator, Callable[[], None]]]:
    """Devices that take part last week, by their own clocks, and an aggregator, in this process, that asks how far.

    What they train is summed as in any round, and given to nobody: there is nothing to pay for.

    Args:
        promoted: the version that devices have.
        people: whose they are.
        ledger: pays for what they report.
        keys: folder of the control plane's signing key.
        round_s: how long the training's round and the query are open.
        tokens: whether an issuer gives each person one token, which their report needs.
        not_charging: so many of the devices never are, and cannot train.

    Yields:
        The aggregator, and what lets the devices take part, to be called once before it asks.

    Raises:
        StackError: a process of devices failed.
    """
    with ExitStack() as stack:
        folder, key = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hybrid-fleet-"))), signing_key(keys)
        issued = stack.enter_context(issuing(folder / "issuer", people.users)) if tokens else None
        unpaid = Round(sampling=1.0, clip=promoted.network.model.privacy.clip, noise_multiplier=0.0, minimum=0)
        training = FleetAggregator(promoted.task(round_s, devices=people.users), unpaid, None, key)
        windows = None if issued is None else issued.windows
        asking = FleetAggregator(promoted.audience(round_s, wanted=people.users), None, ledger, key, windows=windows)
        urls = [f"http://127.0.0.1:{stack.enter_context(listening(each))}" for each in (training, asking)]
        opened = Opened(promoted.bundle, promoted.trust, urls[0], round_s / 10)
        opened = replace(opened, reports=urls[1], not_charging=not_charging)
        if issued is not None:
            opened = replace(opened, issuer=issued.url, accounts=issued.keys)
        started = stack.enter_context(running(opened, people, folder, processes=PROCESSES))

        def take_part() -> None:
            started.wait_ready()
            training.run_round(1, promoted.side.flat())

        yield asking, take_part
        for each in (training, asking):
            each.stop("everything is asked")
        started.finish()


def train_over_flower(order: Order, ledger: Ledger | None, run_dir: Path, say: Callable[[str], None]) -> Outcome:
    """Runs the devices, and, each in a process of its own, two aggregators, their SuperNodes, and a SuperLink.

    Each aggregator has half of the devices, and a whole mechanism: noise of the full variance, and a ledger with a
    budget of exactly the rounds. So the run's ledger is charged for all of them before the first.

    Args:
        order: what to train.
        ledger: of the run; None without noise.
        run_dir: keeps ledgers and logs of the federation.
        say: is told what happens.

    Raises:
        BudgetExceeded: the run's ledger has not enough left.
        FederationError: a server failed again and again, or the ServerApp ended before its last round.
        StackError: a process of devices failed.
    """
    outcome, rounds = Outcome(aggregators=AGGREGATORS), order.promoted.settings.rounds
    cuts = np.linspace(0, order.people.users, AGGREGATORS + 1).astype(int).tolist()
    ports = free_ports(AGGREGATORS)
    halves = [order.people.of(range(first, end)) for first, end in pairwise(cuts)]
    delta = None if ledger is None else ledger.delta
    promoted, buffer = order.promoted, order.promoted.buffer
    fewest = min(half.users for half in halves)
    if buffer is not None and buffer.updates > fewest:
        raise ConfigError(f"buffer must be at most the {fewest} devices of an aggregator, got {buffer.updates}")
    asks = [promoted.task(order.round_s, devices=half.users) for half in halves]
    services = [service(task, order.settings, rounds, delta, buffer=buffer) for task in asks]
    pay_ahead(ledger, order.settings, rounds)

    @contextmanager
    def devices() -> Iterator[None]:
        each = max(1, order.processes // AGGREGATORS)
        with tempfile.TemporaryDirectory(prefix="hybrid-fleet-") as folder, ExitStack() as stack:
            started = []
            for port, half in zip(ports, halves, strict=True):
                own = Path(folder, str(port))
                own.mkdir(mode=0o700)
                started.append(stack.enter_context(running(order.opened(port), half, own, processes=each)))
            for some in started:
                some.wait_ready()
            yield
            for some in started:
                outcome.endings += some.finish()

    outcome.failed = run_job(
        Place.new(run_dir).folder,
        promoted.job(order.round_s, planned=promoted.planned(order.people.users, AGGREGATORS), nodes=AGGREGATORS),
        promoted.side.flat(),
        _Fronting(services, ports, order.keys, say),
        after=order.noted(outcome),
        say=say,
        beside=devices(),
    )
    return outcome


@dataclass(frozen=True)
class _Fronting:
    """Aggregators that front devices: see `hybrid.local.flower.Aggregators`."""

    services: Sequence[CheckInService]
    ports: Sequence[int]
    keys: Path
    say: Callable[[str], None] = field(repr=False)

    def write(self, index: int, site: Site) -> None:
        (site.folder / "settings.json").write_text(self.services[index].model_dump_json(indent=2))
        self.say(
            f"Aggregator {index + 1}: devices at http://127.0.0.1:{self.ports[index]}, "
            f"control side at https://127.0.0.1:{site.port}, token in {site.token}"
        )

    def command(self, index: int, site: Site) -> Sequence[str]:
        chain, key = site.certificate
        options = {
            "--settings": site.folder / "settings.json",
            "--folder": site.folder,
            "--keys": self.keys,
            "--token": site.token,
            "--port": self.ports[index],
            "--control-port": site.port,
            "--control-tls-cert": chain,
            "--control-tls-key": key,
        }
        words = [str(word) for pair in options.items() for word in pair]
        return [sys.executable, "-P", "-m", "hybrid.federation.checkin", *words]
