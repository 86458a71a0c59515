"""`hybrid train`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.asking import columns_of
from hybrid.cli.runs import (
    Where,
    examples_of,
    interrupted,
    people_of,
    preparing,
    progress_bar,
    run_folder,
    server_slots,
)
from hybrid.errors import ConfigError, FederationError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.federation.population import Population
    from hybrid.federation.training import Federation, Kind, OnFleet
    from hybrid.spec import HybridModel, Training
    from hybrid.version import Learned, TrainingRecord

app = typer.Typer()

SILENT = (
    "{feature}: no text stood out from the noise, so that the feature will say nothing. More people, a larger "
    "--epsilon or --normalise-share would help, or a vocabulary written by hand; Ctrl-C saves the rounds' epsilon"
)


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    population: Annotated[
        str | None, typer.Option(help="What to learn from; by default the population of the model's name.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy to spend at most; only less than the model declares.")
    ] = None,
    fold: Annotated[
        str | None, typer.Option(metavar="K/N", help="Hold out the users of one fold of N and measure on them.")
    ] = None,
    central: Annotated[
        bool, typer.Option("--central", help="The same model on pooled data, without privacy: the reference.")
    ] = False,
    server_only: Annotated[
        bool, typer.Option("--server-only", help="The baseline: the model's own head with no device embedding.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything random in this simulation; 0 by default.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Federated rounds.")] = None,
    sampling: Annotated[
        float | None, typer.Option(help="Probability that a user takes part in a round, in (0, 1].")
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="Gradient steps a user takes in a round.")] = None,
    local_epochs: Annotated[
        int | None, typer.Option(help="How often a user takes each example in a round, in place of --local-steps.")
    ] = None,
    local_batch: Annotated[int | None, typer.Option(help="Examples of a step; by default all of the user's.")] = None,
    local_lr: Annotated[float | None, typer.Option(help="Learning rate of those steps.")] = None,
    proximal: Annotated[
        float | None, typer.Option(help="FedProx: how strongly users are held near the round's weights.")
    ] = None,
    server_optimizer: Annotated[
        str | None, typer.Option(help="A class of torch.optim, e.g. SGD, Adam; or Yogi.")
    ] = None,
    server_lr: Annotated[float | None, typer.Option(help="Its learning rate.")] = None,
    server_options: Annotated[
        list[str] | None,
        typer.Option(
            "--server-option", metavar="NAME=VALUE", help="Its other settings, e.g. momentum=0.9 or betas=0.9,0.99."
        ),
    ] = None,
    average_last: Annotated[
        float | None, typer.Option(help="Share of the rounds, the last ones, whose weights are averaged.")
    ] = None,
    separation: Annotated[
        int | None, typer.Option(help="Users take part in every so-manieth round, by a schedule, not by --sampling.")
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Asynchronously: the server steps when K updates came; --rounds, --separation count that."
        ),
    ] = None,
    max_staleness: Annotated[
        int | None, typer.Option(help="With --buffer: steps that may happen while a device trains.")
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option(help="independent in each round; or correlated, with --separation: banded, or blt."),
    ] = None,
    noise_memory: Annotated[
        int | None, typer.Option(help="Vectors that correlated noise remembers: bands - 1, or buffers of blt.")
    ] = None,
    clip_quantile: Annotated[
        float | None, typer.Option(help="Let the clip follow this quantile of the updates' norms, privately.")
    ] = None,
    server_tower: Annotated[
        str | None,
        typer.Option(help="central: fitted on the server's label, then frozen; frozen: as built; federated."),
    ] = None,
    tower_dropout: Annotated[
        float | None, typer.Option(help="Share of rows that train without one side, for each side.")
    ] = None,
    upload: Annotated[
        str | None, typer.Option(help="How updates travel: float32, or int8, in 8 bits a weight.")
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(help="Share of positives that devices train with, e.g. 0.5; predictions are corrected for it."),
    ] = None,
    balance_epsilon: Annotated[
        float | None,
        typer.Option(help="With --balance: of the budget, for what must be asked; by default a quarter of it."),
    ] = None,
    normalise_share: Annotated[
        float | None, typer.Option(help="Of epsilon, what learning the constants of features may cost, where declared.")
    ] = None,
    normalise_rows: Annotated[
        int | None, typer.Option(help="Of a person, the last ones, that count in it at most.")
    ] = None,
    fleet: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE", help="Simulate devices that are away, slow or lost: a trace file, or `phones` for ours."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="With --fleet: seconds until a round closes, by default 60; with --buffer: a device gives up, 600."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="With --buffer: devices that train at once; by default 4 for each update of it.")
    ] = None,
    federation: Annotated[
        Where | None,
        typer.Option(help="local: over a real Flower SuperLink, two SuperNodes and two aggregators, started for it."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where users of federated rounds are trained, as torch names it: cpu, cuda, cuda:1.")
    ] = "cpu",
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Folder under runs/ whose ledger pays; by default a new one with a new budget."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with an interrupted training: that of --run, or the only one there is."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the new version as JSON.")] = False,
) -> None:
    """Trains a new version of a model on a population, and registers it.

    By default federated, under user-level differential privacy: the server
    tower is fitted on the label that the server sees, then device tower and head
    learn from noised sums of clipped updates. The last options stand for fields
    of the model's `training`. Everything about the run is in one folder under
    `runs/`, its privacy ledger included: with --run, trainings share one budget,
    and one that would pass it is refused. Whatever is measured on held-out users
    is marked "oracle": only a simulation can see it.

    A federated training that was stopped or killed, at whatever point, goes on
    with --resume, and gives the version that it would have given, bit by bit on
    the same machine; no round is charged twice. With --federation it goes on, too,
    with noise that is drawn anew. How it was started is read from its run: an
    option given again must say the same.

    Example: hybrid train coupon --epsilon 4 --fold 1/5

    Example: hybrid train coupon --resume --run monday
    """
    kind = _kind(central=central, server_only=server_only, epsilon=epsilon)
    changed = {
        "rounds": rounds,
        "sampling": sampling,
        "local_steps": local_steps,
        "local_epochs": local_epochs,
        "local_batch": local_batch,
        "local_lr": local_lr,
        "proximal": proximal,
        "server_optimizer": server_optimizer,
        "server_lr": server_lr,
        "server_options": _options(server_options) if server_options else None,
        "average_last": average_last,
        "separation": separation,
        "buffer": buffer,
        "max_staleness": max_staleness,
        "noise": noise,
        "noise_memory": noise_memory,
        "clip_quantile": clip_quantile,
        "server_tower": server_tower,
        "tower_dropout": tower_dropout,
        "upload": upload,
        "balance": balance,
        "balance_epsilon": balance_epsilon,
        "normalise_share": normalise_share,
        "normalise_rows": normalise_rows,
    }
    from hybrid.network import Network
    from hybrid.registry import Registry

    workspace = Workspace.current()
    registry = Registry(workspace)
    declared, digest = registry.load_model(model), registry.definition_hash(model)
    folder: AbstractContextManager[Path]
    if resume:
        found = interrupted(workspace.runs, model, run, registry)
        folder, order = nullcontext(found), _Order.started(found)
    else:
        new = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}-{kind}"
        folder, order = run_folder(workspace.runs, run, new), _Order.new(declared)
    order = order.but(
        kind=kind if central or server_only else None,
        population=population,
        fold=fold,
        epsilon=epsilon,
        seed=seed,
        federation=federation,
    )
    order = order.with_settings(changed).with_fleet(fleet, deadline, concurrency)
    if max_staleness is not None and order.settings.buffer is None:
        raise ConfigError(f"--max-staleness must be left out without --buffer, got {max_staleness}")
    if sampling is not None and order.settings.separation is not None:
        raise ConfigError(f"--sampling must be left out with --separation, which is in its place, got {sampling:g}")
    if not declared.device_features.pending and (normalise_share, normalise_rows) != (None, None):
        raise ConfigError(
            f"--normalise-share and --normalise-rows must be left out: "
            f"{model} declares all its constants, and learns none"
        )
    with preparing(f"{order.kind} training of {model}"):
        Network.build(declared, seed=order.seed).check_registered(registry.definition(model)["network"])
        from hybrid.federation.training import check_allowed
        from hybrid.federation.training import train as train_model

    budget = check_allowed(declared, order.kind, order.epsilon, order.settings)
    with folder as run_dir, _resumable(model, run_dir), progress_bar(f"{order.kind} training of {model}") as progress:
        learned = _learned(declared, order, run_dir, workspace, budget=budget, resume=resume)
        for feature in () if learned is None else learned.silent:
            typer.echo(SILENT.format(feature=feature), err=True)
        encoding = declared.with_learned({} if learned is None else learned.transforms)
        train_on, held_out = examples_of(encoding, order.population, order.fold, workspace)
        trained = train_model(
            declared,
            train_on,
            held_out,
            kind=order.kind,
            epsilon=order.epsilon,
            seed=order.seed,
            run_dir=run_dir,
            settings=order.settings,
            progress=progress,
            fleet=order.fleet,
            federation=None if order.federation is None else _local_flower(registry.model(model).file),
            about={"fold": order.fold, "registered": digest},
            device=device,
            resume=resume,
            learned=learned,
        )
        version = registry.create_version(
            model, weights=trained.weights, training=trained.record, curves=trained.curves, expected_hash=digest
        )
    _print(model, version, run_dir, trained.record, as_json=as_json)


def _learned(
    model: HybridModel, order: _Order, run_dir: Path, workspace: Workspace, *, budget: float | None, resume: bool
) -> Learned | None:
    """Constants that the model declares to be learned; of what would be refused anyway, nothing is asked."""
    if not model.device_features.pending:
        return None
    from hybrid.analytics.normalisation import learned
    from hybrid.federation.noise import check_delta
    from hybrid.federation.population import Population
    from hybrid.federation.resume import check_free

    people = people_of(model, order.population, order.fold, workspace)
    _check_rows(model, Population.open(order.population, workspace), workspace)
    if not resume:
        check_free(run_dir)
    if budget is not None:
        check_delta(model, len(people))
    return learned(
        model,
        people,
        run_dir,
        budget=budget,
        share=order.settings.normalise_share,
        rows=order.settings.normalise_rows,
        seed=order.seed,
        resume=resume,
    )


def _check_rows(model: HybridModel, population: Population, workspace: Workspace) -> None:
    """What a training would refuse of rows once constants are learned, and paid for.

    Raises:
        ConfigError: a column is absent or of the wrong type, or the model was not applied to the feature store.
        NotFound: some rows have no server features at their time.
    """
    declared = [name for name in (*model.request, *model.device) if name not in model.device_features.pending]
    columns_of(model, population, declared, workspace)
    server_slots(model, population, workspace)


@dataclass(frozen=True)
class _Order:
    """What to train, and how: see `hybrid.federation.training.train`."""

    kind: Kind
    population: str
    fold: str | None
    epsilon: float | None
    seed: int
    settings: Training
    fleet: OnFleet | None
    federation: Where | None

    @classmethod
    def new(cls, model: HybridModel) -> _Order:
        """As the model declares it."""
        return cls("federated", model.name, None, None, 0, model.training, None, None)

    @classmethod
    def started(cls, run: Path) -> _Order:
        """As the training in a run was started."""
        from hybrid.federation.fleet import Trace
        from hybrid.federation.resume import started
        from hybrid.federation.training import OnFleet
        from hybrid.spec import Training

        config = started(run)
        fleet, federation = config.get("fleet"), config.get("federation")
        return cls(
            config["kind"],
            config["population"],
            config.get("fold"),
            config.get("epsilon"),
            config["seed"],
            Training(**config["training"]),
            None if fleet is None else OnFleet(**fleet | {"trace": Trace(**fleet["trace"])}),
            None if federation is None else Where(federation),
        )

    def but(self, **given: Any) -> _Order:
        """With what was given; None was not."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def with_settings(self, given: Mapping[str, Any]) -> _Order:
        """With these fields of `Training`; None was not given."""
        from hybrid.spec import Training

        changed = {name: value for name, value in given.items() if value is not None}
        return replace(self, settings=Training(**self.settings.model_dump() | changed))

    def with_fleet(self, trace: Path | None, deadline: float | None, concurrency: int | None) -> _Order:
        """On the fleet of a trace file, and with another deadline or concurrency, where they were given."""
        from hybrid.federation.fleet import PHONES, Trace
        from hybrid.federation.training import OnFleet

        fleet, asynchronous = self.fleet, self.settings.buffer is not None
        if concurrency is not None and not asynchronous:
            raise ConfigError(f"--concurrency must be left out without --buffer, got {concurrency}")
        if deadline is not None and fleet is None and trace is None and not asynchronous:
            raise ConfigError(f"--deadline must be left out without --fleet or --buffer, got {deadline:g}")
        if trace is not None or (fleet is None and asynchronous):
            fleet = OnFleet.of(self.settings, Trace.load(PHONES if trace in (None, Path("phones")) else trace))
        if fleet is not None and deadline is not None:
            fleet = replace(fleet, deadline_s=deadline)
        if fleet is not None and concurrency is not None:
            fleet = replace(fleet, concurrency=concurrency)
        return replace(self, fleet=fleet)


@contextmanager
def _resumable(model: str, run: Path) -> Iterator[None]:
    """Where somebody stops it, or its federation ends, says how it goes on."""
    again = f"hybrid train {model} --resume --run {run.name}"
    try:
        yield
    except FederationError as error:
        raise FederationError(f"{error}\n`{again}` goes on") from None
    except KeyboardInterrupt:
        from hybrid.federation.resume import BY_ROUNDS, rounds_done, started
        from hybrid.privacy.ledger import FILE as LEDGER

        config: dict[str, Any] = {}
        with suppress(NotFound):
            config = started(run)
        if config.get("kind") in BY_ROUNDS:
            of = config["training"]["rounds"]
            said = f"with {rounds_done(run, config)} of {of} rounds kept: `{again}` goes on"
        elif (run / LEDGER).exists():
            said = f"before its first round; what was learned is kept: `hybrid train {model} --run {run.name}` uses it"
        else:
            said = "before anything was spent: start it again"
        print(f"stopped {said}", file=sys.stderr)
        raise typer.Exit(130) from None


def _kind(*, central: bool, server_only: bool, epsilon: float | None) -> Kind:
    if central and server_only:
        raise ConfigError("--central and --server-only are two ways to train; give one")
    if not (central or server_only):
        return "federated"
    if epsilon is not None:
        raise ConfigError("--epsilon must be left out with --central or --server-only: they train without privacy")
    return "central" if central else "server-only"


def _options(words: list[str]) -> dict[str, Any]:
    """["betas=0.9,0.99", "nesterov=true"] -> {"betas": (0.9, 0.99), "nesterov": True}."""
    options: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            values = [_option(part) for part in text.split(",")]
        except ValueError:
            raise ConfigError(f"--server-option must be NAME=NUMBER, NAME=true or NAME=A,B, got {word!r}") from None
        options[name] = tuple(values) if len(values) > 1 else values[0]
    return options


def _option(text: str) -> float | bool:
    return text == "true" if text in {"true", "false"} else float(text)


def _local_flower(file: Path) -> Federation:
    from hybrid.local.flower import LocalFlower

    return LocalFlower(file, say=lambda text: typer.echo(text, err=True))


def _print(model: str, version: int, run_dir: Path, record: TrainingRecord, *, as_json: bool) -> None:
    if as_json:
        shown = {"model": model, "version": version, "run": str(run_dir), "training": record.model_dump(mode="json")}
        print(json.dumps(shown))
        return
    print(f"{model}:{version}, {record.kind}, from {record.users} users and {record.examples} examples (oracle)")
    print("privacy: " + "\n  ".join(record.privacy_lines()))
    if record.balance is not None:
        print(f"label balance: {record.balance.line()}")
    on_fleet = {name: value for name, value in record.oracle.items() if name.startswith("fleet_")}
    held_out = {name: value for name, value in record.oracle.items() if name not in on_fleet}
    for title, found in (("held-out users (oracle)", held_out), ("simulated fleet (oracle)", on_fleet)):
        if found:
            print(f"{title}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    print(f"run: {run_dir}")
    if record.kind == "federated":
        print(f"Next: `hybrid promote {model} {version} production`.")
    else:
        print("A reference to compare with: only a federated version can be promoted.")
