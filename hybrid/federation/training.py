"""Trains one version of a hybrid model, in one of three ways, into one run directory."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.features import Float32
from hybrid.federation.aggregator import PURPOSE, Attended, BufferedAggregator, Round, SimulatedAggregator
from hybrid.federation.balance import Balancing
from hybrid.federation.buffer import Buffer
from hybrid.federation.central import Fitting, fit_everything, fit_server_side
from hybrid.federation.checkpoint import Checkpoint, Checkpoints, Stateful, digest
from hybrid.federation.client_app import client_app
from hybrid.federation.engine import DeviceSide, Engine, device_named, predict
from hybrid.federation.fleet import HOUR, PHONES, Fleet, OverSelection, Trace, Work, over_selection, turnout
from hybrid.federation.flights import Schedule
from hybrid.federation.metrics import auc, calibration, log_loss
from hybrid.federation.noise import check_delta, least_noise, planned_cohort, round_settings
from hybrid.federation.optimizers import ServerOptimizer, TailAverage
from hybrid.federation.population import Examples
from hybrid.federation.resume import BY_ROUNDS, CONFIG, PROCESS, Place, Process, check_free, latest
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.privacy.accountant import Event
from hybrid.privacy.ledger import Ledger, costs
from hybrid.spec import HybridModel, Training, definition_hash
from hybrid.update import length
from hybrid.version import Learned, TrainingRecord

Kind = Literal["federated", "noiseless", "central", "server-only"]
Progress = Callable[[int, int], None]  # done, of how many
Curves = dict[str, list[tuple[int, float]]]

POINTS = 50  # of a curve over a federated training
ROUND_S = 60.0  # after which a round on a simulated fleet closes, by default
ASYNCHRONOUS_S = 600.0  # after which a device of an asynchronous training gives up, by default
AT_ONCE = 4  # devices that are on the way for each place of a buffer, by default
SMALL = 100_000  # parameters below which a second thread costs more than it brings
SAMPLED = (
    "each round the server tosses an independent coin for each user (Poisson), and nobody sees who, or how many, "
    "took part"
)
SCHEDULED = (
    "each user takes part at most once in any {separation} rounds one after another and at most {most} times, in a "
    "fixed horizon of {rounds} rounds; who takes part may be known: no sampling is assumed"
)
FLUSHED = (
    "each user is in at most one of any {separation} flushes one after another and in at most {most}, in a fixed "
    "horizon of {rounds} flushes of {updates} updates; who takes part, and when an update comes, may be known: no "
    "sampling is assumed"
)
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
        seconds: of training until each round or epoch of the curves, time spent on measuring them left out.
        test_predictions: (n,) probabilities of the held-out rows; None where there were none.
    """

    weights: dict[str, NDArray[np.float32]] = field(repr=False)
    record: TrainingRecord
    curves: Curves = field(repr=False)
    seconds: tuple[float, ...] = field(repr=False)
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
    fleet: OnFleet | None = None,
    federation: Federation | None = None,
    device: str = "cpu",
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    learned: Learned | None = None,
) -> Trained:
    """Trains a model on a population it can see whole: a simulation, in one process but for a `federation`.

    "federated": where server_tower is "central", it and the head are fitted on the
    label that the server sees; then device tower and head, and the server tower where the settings say
    so, are trained by federated rounds under user-level differential privacy; what
    the run's ledger already holds besides trainings is paid from the same budget,
    and so is what a label balance asks before the rounds and after (docs/decisions/0029).
    "noiseless": the same rounds without noise, so without privacy: it tells what
    noise costs. "central": everything on pooled data,
    without privacy. "server-only": server tower and the model's own head, with
    zeros for the device embedding, to fit and to predict. The run directory gets
    config.json, checkpoint.npz, metrics.json where there are held-out users, and
    ledger.jsonl where privacy was spent.

    A training by rounds that was killed, wherever, goes on with `resume=True`
    and gives the same weights, record and curves, bit by bit on the same
    machine, and the same ledger entries: rounds after its last checkpoint are
    computed again, to the same releases (docs/decisions/0021).

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
        fleet: simulates devices that are away, slow or lost; by default all who are asked answer, or, with a buffer,
            they are phones.
        federation: runs the federated rounds in place of this process.
        device: where torch trains the users of federated rounds: "cpu", "cuda", "cuda:1". A seed repeats a training
            on the same one only.
        about: what else tells this run from another, as JSON values: kept in config.json, and the same to resume.
        resume: goes on with the training in `run_dir`, of a kind in `BY_ROUNDS`; everything else must be as it was.
            That the code of towers and head is, too, is the caller's to know.
        learned: constants with which the examples were encoded, of a model that declares some to be learned; what
            they cost is in the run's ledger (`hybrid.analytics.normalisation.learned`). Kept in the record.

    Raises:
        FederationError: the federation ended before its last round. What its rounds may cost stays in the ledger;
            `resume=True` goes on with it.
        NotFound: (resume) no training began in the run directory.
        ConfigError: the budget, delta, optimiser, label or device does not allow this training; the run directory
            holds an interrupted one, and it is not to be resumed; or it is, and something is not as it was; or a
            federation is given with what it cannot do; or constants are missing, or exact where privacy is claimed.
        BudgetExceeded: the run directory's ledger has not enough left.
    """
    settings = settings or model.training
    if kind in ("federated", "noiseless"):
        check_linear(settings)
    budget = check_allowed(model, kind, epsilon, settings)
    if fleet is not None and settings.separation is not None and settings.buffer is None:
        raise ConfigError(
            f"separation must be left out on a simulated fleet, unless it has a buffer, got {settings.separation}"
        )
    if kind in BY_ROUNDS and fleet is None and settings.buffer is not None:
        fleet = OnFleet.of(settings, Trace.load(PHONES))
    if budget is not None:
        check_delta(model, examples_train.users)
    if kind in BY_ROUNDS:
        optimizer_for(settings, np.zeros(2, np.float32))
        device_named(device)
    if budget is not None and learned is not None and learned.epsilon is None:
        raise ConfigError("learned must be paid for in a training that claims privacy, got exact constants")
    network = Network.build(model.with_learned({} if learned is None else learned.transforms), seed=seed)
    _check_federation(federation, kind, settings, fleet)
    run = _Run(
        kind, network, examples_train, examples_test, seed, run_dir, settings, progress, fleet, device, federation
    )
    run = replace(run, learned=learned)
    config = _config(run, budget, about or {})
    begun = latest(run_dir, config) if resume else None
    if not resume:
        check_free(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    run = replace(run, config=config, begun=begun, resumed=resume)
    with threads_for(network):
        privacy = _TRAINERS[kind](run) if budget is None else _federated(run, budget)
        return _finish(run, privacy)


def _check_federation(federation: Federation | None, kind: Kind, settings: Training, fleet: OnFleet | None) -> None:
    """Raises: ConfigError: a federation is given with what it cannot do."""
    if federation is None:
        return
    if settings.buffer is not None:
        raise ConfigError(
            f"federation must be left out with a buffer, whose time is simulated in one process, got {settings.buffer}"
        )
    if settings.balance is not None:
        raise ConfigError(
            "balance must be left out with a federation: what it asks of everybody before and after the rounds is "
            f"asked in one process, got {settings.balance:g}"
        )
    if fleet is not None or kind not in BY_ROUNDS:
        raise ConfigError("federation must be left out with a fleet, and where there are no federated rounds")
    if settings.separation is not None:
        raise ConfigError(
            "separation must be left out with a federation: an aggregator that is started again has lost the noise of "
            f"earlier rounds, which later ones need, got {settings.separation}"
        )


def check_linear(settings: Training) -> None:
    """Warns where noise is correlated between rounds, and the server's steps keep it from cancelling."""
    if settings.noise != "independent" and settings.server_optimizer != "SGD":
        warnings.warn(
            f"server_optimizer should be 'SGD' with noise={settings.noise!r}: noise that later rounds take back only "
            f"cancels in steps that are linear in it, which those of {settings.server_optimizer!r} are not",
            stacklevel=3,
        )


@dataclass(frozen=True)
class OnFleet:
    """What a simulated fleet is like, and how long a round waits for it.

    Attributes:
        trace: of device classes and their hours.
        deadline_s: seconds from a round's start to its end, or, with a buffer, until a device gives up; > 0.
        expected_examples: of a user, an assumption made in the open: real counts would make the sampling private.
        concurrency: with a buffer, devices that are on the way at once, at most; None: `AT_ONCE` x buffer.
    """

    trace: Trace
    deadline_s: float
    expected_examples: float = 20.0
    concurrency: int | None = None

    @classmethod
    def of(cls, settings: Training, trace: Trace) -> OnFleet:
        """With the defaults: a minute for a round, ten for a device of an asynchronous training."""
        return cls(trace, ROUND_S if settings.buffer is None else ASYNCHRONOUS_S)


@dataclass(frozen=True)
class Rounds:
    """Federated rounds that run elsewhere.

    Attributes:
        network: as it is before the first round.
        examples: of everybody.
        settings: how users train and the server steps.
        round: how one is sampled, clipped and noised.
        initial: (p,) the weights to start from.
        planned_cohort: expected number of participants of a round.
        seed: of coins.
        device: where users are trained, as torch names it.
        delta: of the account; None: without noise and privacy.
        attempts_before: at any round, at most, by earlier trainings of the run.
        folder: its own, in the run's. It is there where the training goes on, with what `Federation.train` left.
        done: rounds that were handed on before.
    """

    network: Network
    examples: Examples
    settings: Training
    round: Round
    initial: Float32 = field(repr=False)
    planned_cohort: float
    seed: int
    device: str
    delta: float | None
    attempts_before: int
    folder: Path
    done: int = 0


@dataclass(frozen=True)
class Outcome:
    """How rounds that ran elsewhere ended.

    Attributes:
        clip: the L2 norm that the last of them clipped to, the largest where aggregators differ.
        failed_rounds: in which no node answered.
    """

    clip: float
    failed_rounds: int


class Federation(Protocol):
    """Where rounds run, if not in this process."""

    name: str  # in the run's config
    assumption: str  # what its randomness is like and what is not composed, for the record

    def train(self, rounds: Rounds, after: Callable[[int, Float32], None]) -> Outcome:
        """Runs them all, or those that are left.

        Every release must be of an aggregator that has no more of them than rounds, each with noise of its own
        for people of its own: then what the run's ledger was charged before the first round covers everybody.

        Args:
            rounds: what to run.
            after: called with each round's number, from `rounds.done` + 1 on, and the weights after it. What it was
                called with is on the disk when it returns.

        Raises:
            FederationError: it ended before the last round; called again with the same folder it goes on.
        """
        ...


@dataclass
class _Watch:
    """Seconds since it was started, but for those in which it was paused; noted at each pause."""

    started: float = 0.0
    noted: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {"elapsed": time.perf_counter() - self.started, "noted": self.noted}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.started, self.noted[:] = time.perf_counter() - state["elapsed"], state["noted"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        here = time.perf_counter()
        self.noted.append(here - self.started)
        yield
        self.started += time.perf_counter() - here


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
    fleet: OnFleet | None = None
    device: str = "cpu"
    federation: Federation | None = None
    learned: Learned | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    begun: Checkpoint | None = None
    resumed: bool = False
    keep: tuple[float, float] | None = None
    curves: Curves = field(default_factory=dict)
    oracle: dict[str, float] = field(default_factory=dict)
    watch: _Watch = field(default_factory=_Watch)

    def point(self, step: int) -> None:
        """Measures the network as it is on held-out users."""
        if self.test is None:
            return
        with self.watch.paused():
            predictions = self.predict(self.test)
            for name, measure in (("oracle_auc", auc), ("oracle_log_loss", log_loss)):
                self.curves.setdefault(name, []).append((step, measure(self.test.labels, predictions)))

    def predict(self, examples: Examples) -> Float32:
        """(n,) probabilities by the network as it is, of what this kind has."""
        return predict(self.network, examples, without="device" if self.kind == "server-only" else None)

    @property
    def done(self) -> int:
        """Rounds of earlier processes that need not be computed again."""
        return 0 if self.begun is None else self.begun.step

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return {"curves": self.curves, "watch": self.watch.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self.curves.update(state["curves"])
        self.watch.restore(state["watch"])


def _central(run: _Run) -> dict[str, Any]:
    write_json(run.folder / CONFIG, run.config)
    dropout = run.settings.tower_dropout
    best = fit_everything(run.network, run.examples, seed=run.seed, tower_dropout=dropout, on_epoch=_epochs(run))
    Checkpoint(best, run.network.weights()).write(run.folder)
    return {}


def _server_only(run: _Run) -> dict[str, Any]:
    write_json(run.folder / CONFIG, run.config)
    best = fit_server_side(run.network, run.examples, seed=run.seed, on_epoch=_epochs(run))
    Checkpoint(best, run.network.weights()).write(run.folder)
    return {}


def _noiseless(run: _Run) -> dict[str, Any]:
    cohort = _cohort(run)
    rounds = _round(run, 0.0, cohort)
    write_json(run.folder / CONFIG, run.config)
    balancing = _balancing(run, None, None)
    _balanced(run, _process(run, rounds, None), cohort, rounds, balancing)
    return {} if balancing is None else {"balance": balancing.record}


def _federated(run: _Run, budget: float) -> dict[str, Any]:
    """Returns the privacy fields of the record."""
    model, settings = run.network.model, run.settings
    cohort = _cohort(run)  # before the ledger: what is refused leaves none
    with Ledger.open(run.folder, budget_epsilon=budget, delta=model.privacy.delta) as ledger:
        balancing = _balancing(run, budget, ledger)
        besides = [] if balancing is None else balancing.due(ledger.delta)
        rounds = _round(run, _noise_multiplier(run, budget, ledger, cohort, besides), cohort)
        process = _process(run, rounds, ledger)
        if due := [*process.due(rounds.event), *besides]:
            ledger.reserve(due)
        write_json(run.folder / CONFIG, run.config)  # what was refused changes no file
        clip, released = _balanced(run, process, cohort, rounds, balancing)
        spent = ledger.spent()
    return {
        "balance": None if balancing is None else balancing.record,
        "epsilon": spent.epsilon,
        "delta": model.privacy.delta,
        "noise_multiplier": rounds.noise_multiplier,
        "clip": clip,
        "sampling": None if rounds.matrix else rounds.sampling,
        "rounds": released,
        "mechanism": f"{mechanism_of(settings)}{_asked(balancing)}, zero-out adjacency; accountant: {spent.method}",
        "assumption": _assumption(run, rounds),
        "unit": model.privacy.unit,
        "protects": model.protects,
    }


def _balancing(run: _Run, budget: float | None, ledger: Ledger | None) -> Balancing | None:
    model = run.network.model
    return Balancing.of(run.folder, run.config, run.settings, model, budget=budget, ledger=ledger, resumed=run.resumed)


def _asked(balancing: Balancing | None) -> str:
    """What a label balance adds to the mechanism, for the record."""
    if balancing is None:
        return ""
    return ", and on sums of " + ("scores" if balancing.prior_known else "labels and of scores")


def _balanced(
    run: _Run, process: Process, cohort: _Cohort, rounds: Round, balancing: Balancing | None
) -> tuple[float, int]:
    """All rounds that are left, between what a label balance asks before and after them; returns as `_simulate`."""
    if balancing is None:
        return _simulate(run, process, cohort, rounds)
    people = run.network, run.examples, process.ledger, run.seed
    balancing.ask_prior(*people)
    ended = _simulate(replace(run, keep=balancing.keep), process, cohort, rounds)
    balancing.ask_rest(*people)
    last = Checkpoint.read(run.folder)
    replace(last, weights=run.network.weights()).write(run.folder)
    return ended


def _assumption(run: _Run, rounds: Round) -> str:
    """Under which the record's epsilon holds."""
    drawn = SIMULATED if run.federation is None else run.federation.assumption
    if rounds.matrix is not None:
        people = rounds.matrix.participation
        form = SCHEDULED if run.settings.buffer is None else FLUSHED
        said = form.format(
            separation=people.separation, most=people.most, rounds=people.rounds, updates=run.settings.buffer
        )
        return f"{said}; {drawn}"
    return drawn if rounds.sampling == 1 else f"{SAMPLED}; {drawn}"


@dataclass(frozen=True)
class _Ready:
    """What is trained, from how it begins, and how the server steps."""

    engine: Engine
    optimizer: ServerOptimizer


def _prepared(run: _Run) -> _Ready:
    if run.begun is not None:
        run.network.load_weights(run.begun.weights)  # the server tower as it was fitted
    elif run.settings.server_tower == "central":
        fit_server_side(run.network, run.examples, seed=run.seed)
    engine = engine_for(run.network, run.examples, run.settings, run.device, keep=run.keep)
    return _Ready(engine, optimizer_for(run.settings, engine.side.flat()))


def engine_for(
    network: Network,
    examples: Examples,
    settings: Training,
    device: str = "cpu",
    *,
    keep: tuple[float, float] | None = None,
) -> Engine:
    """Trains users as the settings say, on the device, with what is kept of their examples: see `LocalTraining`.

    Raises:
        ConfigError: there is no such device.
    """
    return Engine.build(
        network,
        examples,
        LocalTraining.of(settings, keep),
        federate_server_tower=settings.server_tower == "federated",
        tower_dropout=settings.tower_dropout,
        upload=settings.upload,
        device=device,
    )


def optimizer_for(settings: Training, flat: Float32) -> ServerOptimizer:
    """Steps the server as the settings say, from `flat`, (p,).

    Raises:
        ConfigError: there is no such optimiser, or it has no such option.
    """
    return ServerOptimizer(settings.server_optimizer, settings.server_lr, flat, settings.server_options)


def _process(run: _Run, rounds: Round, ledger: Ledger | None) -> Process:
    return Process.of(
        run.folder,
        run.config,
        run.begun,
        ledger,
        rounds=run.settings.rounds,
        noise_multiplier=rounds.noise_multiplier,
        device=run.device,
        elsewhere=run.federation is not None,
    )


def _simulate(run: _Run, process: Process, cohort: _Cohort, rounds: Round) -> tuple[float, int]:
    """All rounds that are left, through Flower's apps; returns the last clip and how many rounds were released."""
    ready, total = _prepared(run), run.settings.rounds
    if run.federation is not None:
        return _elsewhere(run, process, ready, rounds, cohort.planned)
    aggregator: SimulatedAggregator | BufferedAggregator
    if cohort.flights is not None:
        aggregator = BufferedAggregator(
            ready.engine, process.ledger, rounds, cohort.flights, seed=run.seed, repeats=process.repeats
        )
    else:
        aggregator = SimulatedAggregator(
            ready.engine, process.ledger, rounds, seed=run.seed, fleet=cohort.attended, repeats=process.repeats
        )
    strategy = NoisedSum(cohort.planned, ready.optimizer)
    average = TailAverage(run.settings.average_last)
    parts: dict[str, Stateful] = {PROCESS: process, "run": run, "strategy": strategy}
    parts |= {"average": average, "aggregator": aggregator}
    checkpoints = Checkpoints(run.folder, run.network.weights, parts)
    run.watch.start()
    if run.begun is not None:
        checkpoints.restore(run.begun)
    after = _rounds(run, ready.engine.side, average, checkpoints, moved=process.moved)
    simulate(server_app(strategy, ready.optimizer.weights, total, after, done=run.done), {1: client_app(aggregator)})
    run.oracle.update(cohort.oracle(run) if isinstance(aggregator, SimulatedAggregator) else _flown(run, aggregator))
    return aggregator.clip, total - strategy.failed_rounds


def _elsewhere(run: _Run, process: Process, ready: _Ready, rounds: Round, planned: float) -> tuple[float, int]:
    """All rounds, on other processes; returns as `_simulate`.

    The run's ledger is charged for all of them before the first: aggregators keep ledgers of their own, and what
    they hold when this process dies must not be missing here. People of different aggregators are different
    people, so that what one aggregator's cost is what each is charged, not their sum.
    """
    assert run.federation is not None
    side, average, place = ready.engine.side, TailAverage(run.settings.average_last), Place.new(run.folder)
    parts: dict[str, Stateful] = {PROCESS: process, "run": run, "average": average, "federation": place}
    checkpoints = Checkpoints(run.folder, run.network.weights, parts)
    run.watch.start()
    if run.begun is not None:
        checkpoints.restore(run.begun)
    after, initial = _rounds(run, side, average, checkpoints, moved=False), side.flat()
    after(run.done, initial)  # a checkpoint, before anything is charged
    before = _charge(process, rounds, run.settings.rounds)
    task = Rounds(
        network=run.network,
        examples=run.examples,
        settings=run.settings,
        round=rounds,
        initial=initial,
        planned_cohort=planned,
        seed=run.seed,
        device=run.device,
        delta=None if process.ledger is None else process.ledger.delta,
        attempts_before=before,
        folder=place.folder,
        done=run.done,
    )
    outcome = run.federation.train(task, after)
    return outcome.clip, run.settings.rounds - outcome.failed_rounds


def _charge(process: Process, rounds: Round, total: int) -> int:
    """Pays for all rounds that are not paid for; returns how many attempts at one, at most, were made before them."""
    ledger, paid = process.ledger, {entry.round for entry in process.repeats}
    if ledger is None:
        return 0
    earlier = ledger.entries[: process.since]
    for number in (number for number in range(1, total + 1) if number not in paid):
        attempt = ledger.next_attempt(PURPOSE, number)
        ledger.spend(rounds.event, purpose=PURPOSE, clip=rounds.clip, round_number=number, attempt=attempt)
    return max((entry.attempt for entry in earlier if entry.purpose == PURPOSE), default=0)


_TRAINERS: Mapping[str, Callable[[_Run], dict[str, Any]]] = {
    "noiseless": _noiseless,
    "central": _central,
    "server-only": _server_only,
}


@dataclass(frozen=True)
class _Cohort:
    """Whom a round asks, and how many of them it counts on.

    Attributes:
        sampling: probability that a user is asked, those asked too many included: what is accounted.
        planned: expected number of those who answer: what sums are divided by.
        attended: the fleet; None where all who are asked answer.
        flights: how devices come, of an asynchronous training.
        over: how the fleet's sampling was found.
    """

    sampling: float
    planned: float
    attended: Attended | None = None
    flights: Schedule | None = None
    over: OverSelection | None = None

    def oracle(self, run: _Run) -> dict[str, float]:
        """How the fleet turned out, into a file and in two numbers."""
        if self.attended is None or self.over is None:
            return {}
        found = turnout(
            self.attended.fleet,
            self.attended.tallies,
            sampling=self.sampling,
            expected=self.over.finishing,
            examples=np.diff(run.examples.offsets),
        )
        write_json(run.folder / "fleet.json", {"over_selection": asdict(self.over), "oracle": asdict(found)})
        return {"fleet_finished": found.oracle_finished, "fleet_lost": found.oracle_lost}


def _cohort(run: _Run) -> _Cohort:
    """Those whose coin falls, or whose turn it is; on a fleet more are asked, so that as many as are wanted answer."""
    settings, users = run.settings, run.examples.users
    if run.fleet is None:
        return _Cohort(settings.sampling, planned_cohort(settings, users))
    trace, size = run.fleet.trace, _size(run)
    steps = settings.local_epochs or settings.local_steps
    upload = length(size, settings.upload)
    work = Work(steps=steps, download_bytes=4 * size, upload_bytes=upload, deadline_s=run.fleet.deadline_s)
    if settings.buffer is not None:
        return _Cohort(1.0, settings.buffer, flights=_flights(run, work, settings.buffer))
    over = over_selection(
        trace,
        users=users,
        wanted=settings.sampling * users,
        rounds=range(1, settings.rounds + 1),
        work=work,
        examples=run.fleet.expected_examples,
    )
    return _Cohort(over.sampling, over.expected, Attended(Fleet.draw(trace, users, run.seed), work), over=over)


def _flights(run: _Run, work: Work, updates: int) -> Schedule:
    """How devices come to a buffer for so many updates."""
    assert run.fleet is not None and run.settings.separation is not None  # noqa: PT018
    concurrency = run.fleet.concurrency
    return Schedule(
        fleet=Fleet.draw(run.fleet.trace, run.examples.users, run.seed),
        work=work,
        buffer=Buffer(updates, run.settings.max_staleness),
        separation=run.settings.separation,
        at_once=AT_ONCE * updates if concurrency is None else concurrency,
        examples=np.diff(run.examples.offsets),
        seed=run.seed,
    )


def _flown(run: _Run, aggregator: BufferedAggregator) -> dict[str, float]:
    """How an asynchronous training turned out, into a file and in three numbers."""
    assert run.fleet is not None
    log, trace = aggregator.log, run.fleet.trace
    updates = {one.name: int(count) for one, count in zip(trace.classes, log.updates, strict=True)}
    told = {"time_s": log.time_s, "staleness": log.staleness, "lost": log.lost, "updates": updates}
    write_json(run.folder / "fleet.json", {"oracle": told})
    counted, lost = int(log.updates.sum()), sum(log.lost)
    return {
        "fleet_hours": (log.time_s[-1] - trace.start_s(1)) / HOUR,
        "fleet_staleness": float(np.mean(log.staleness)),
        "fleet_lost": lost / (counted + lost),
    }


def _size(run: _Run) -> int:
    """p, the length of a flat update."""
    federated, missing = run.settings.server_tower == "federated", run.settings.tower_dropout > 0
    return DeviceSide(run.network, server_tower=federated, missing=missing).size


def _noise_multiplier(
    run: _Run, budget: float, ledger: Ledger, cohort: _Cohort, planned: Sequence[Event] = ()
) -> float:
    """The least noise with which all rounds stay within what the budget leaves them; as it was, of a resumed run.

    What is planned besides is left room for too.
    """
    if run.begun is not None:
        return float(run.begun.state[PROCESS]["noise_multiplier"])
    # What else this run's ledger has paid for, label rates say. Other trainings in it are not made room for: refused.
    besides = [*costs(entry for entry in ledger.entries if entry.purpose != PURPOSE), *planned]
    return least_noise(run.settings, budget, run.network.model.privacy.delta, sampling=cohort.sampling, besides=besides)


def _round(run: _Run, noise_multiplier: float, cohort: _Cohort) -> Round:
    """Of this run: see `round_settings`."""
    model, planned = run.network.model, cohort.planned
    return round_settings(model, run.settings, noise_multiplier, sampling=cohort.sampling, planned=planned)


def mechanism_of(settings: Training) -> str:
    """What is added to what, in words, for the record."""
    if settings.noise != "independent":
        return f"{_NAMES[settings.noise]} on sums of clipped updates"
    if settings.clip_quantile is None:
        return "Gaussian noise on sums of clipped updates"
    return (
        "Gaussian noise on sums of updates, clipped at a norm that follows their "
        f"{settings.clip_quantile:g} quantile, and on that quantile, as one release"
    )


_NAMES = {
    "banded": "Gaussian noise correlated by a banded Toeplitz matrix",
    "blt": "Gaussian noise correlated by a buffered linear Toeplitz matrix",
}


def _rounds(
    run: _Run, side: DeviceSide, average: TailAverage, checkpoints: Checkpoints, *, moved: bool
) -> Callable[[int, Float32], None]:
    """After a round: the weights into the network; now and then a point of the curves and a checkpoint."""
    total = run.settings.rounds

    def on_round(number: int, flat: Float32) -> None:
        if number > run.done:
            side.load_flat(average(flat))
        resumed = number == run.done and run.begun is not None  # that round was measured and kept
        if not resumed and (number % max(1, total // POINTS) == 0 or number == total):
            run.point(number)
        if not resumed or moved:
            # The first before anything is spent; elsewhere each, since what it holds is forgotten there.
            checkpoints.after(number, now=number in (run.done, total) or run.federation is not None)
        if run.progress:
            run.progress(number, total)

    return on_round


def _epochs(run: _Run) -> Callable[[int], None]:
    run.watch.start()

    def on_epoch(number: int) -> None:
        run.point(number)
        if run.progress:
            run.progress(number, Fitting().epochs)

    return on_epoch


def _finish(run: _Run, privacy: Mapping[str, Any]) -> Trained:
    if run.progress:
        run.progress(1, 1)
    predictions, measured = None, run.oracle
    if run.test is not None:
        predictions = run.predict(run.test)
        measured = measured | oracle(run.test, predictions)
        if run.kind != "server-only":
            measured |= fallbacks(run.network, run.test)
        write_json(run.folder / "metrics.json", {"oracle": measured, "curves": run.curves})
    record = TrainingRecord(
        kind=run.kind,
        run=run.folder.name,
        population=run.examples.population,
        users=run.examples.users,
        examples=len(run.examples),
        settings=run.settings,
        oracle=measured,
        learned=run.learned,
        **privacy,
    )
    return Trained(run.network.weights(), record, run.curves, tuple(run.watch.noted), predictions)


def oracle(test: Examples, predictions: Float32) -> dict[str, float]:
    """How good predictions of held-out rows are: computed from pooled rows, as only a simulation can."""
    calibrated = calibration(test.labels, predictions)
    return {
        "auc": auc(test.labels, predictions),
        "log_loss": log_loss(test.labels, predictions),
        "calibration_ratio": calibrated.ratio,
        "calibration_error": calibrated.ece,
    }


def fallbacks(network: Network, test: Examples) -> dict[str, float]:
    """How well it ranks where a side does not answer and its missing embedding stands in."""
    sides: tuple[Literal["server", "device"], ...] = ("server", "device")
    return {f"auc_without_{side}": auc(test.labels, predict(network, test, without=side)) for side in sides}


def check_allowed(model: HybridModel, kind: Kind, epsilon: float | None, settings: Training) -> float | None:
    """Refuses, before any data is read, what `train` would refuse whatever the data.

    Returns:
        The epsilon to spend at most; None where no mechanism is used.

    Raises:
        ConfigError: epsilon is out of range, or the server tower would be fitted on a label the server does not see.
    """
    rounds = kind in ("federated", "noiseless")
    if rounds and model.label.visible_to == "device" and settings.server_tower == "central":
        raise ConfigError(
            "server_tower must be 'federated' or 'frozen' where label.visible_to is 'device': "
            "the server has no label to fit it on, got 'central'"
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


def _config(run: _Run, budget: float | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a training gives, as JSON values."""
    model, parts, fleet = run.network.model, run.network.parts.items(), run.fleet
    return {
        "model": model.name,
        "kind": run.kind,
        "seed": run.seed,
        "population": run.examples.population,
        **about,
        **({} if budget is None else {"epsilon": budget, "privacy": model.privacy.model_dump(mode="json")}),
        **({} if run.learned is None else {"learned": run.learned.model_dump(mode="json")}),
        "training": run.settings.model_dump(mode="json"),
        "federation": None if run.federation is None else run.federation.name,
        "fleet": None if fleet is None else asdict(fleet) | {"trace": fleet.trace.model_dump(mode="json")},
        "definition": definition_hash(model.definition() | {"parts": {part: str(module) for part, module in parts}}),
        "data": _data(run.examples),
        "held_out_data": None if run.test is None else _data(run.test),
        "users": run.examples.users,
        "examples": len(run.examples),
    }


def _data(examples: Examples) -> str:
    return digest([examples.server, examples.device, examples.labels, examples.offsets])


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """All or nothing."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(content, indent=2))
    os.replace(draft, file)


@contextmanager
def threads_for(network: Network) -> Iterator[None]:
    """One thread for small networks."""
    before = torch.get_num_threads()
    if sum(p.numel() for part in network.parts.values() for p in part.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
