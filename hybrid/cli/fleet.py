"""`hybrid fleet`: training on real devices, here on one machine."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer
from pydantic import BaseModel, ValidationError

from hybrid.cli.runs import Where, progress_bar, run_folder
from hybrid.errors import ConfigError, FederationError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.federation.aggregator import Round
    from hybrid.federation.checkin import Tokens
    from hybrid.federation.remote import RemoteAggregator
    from hybrid.local.devices import People
    from hybrid.local.fleet import Outcome, Promoted
    from hybrid.version import TrainingRecord

Separation = Annotated[
    int | None,
    typer.Option(min=1, help="A device takes part once in so many rounds, as it remembers; in place of --sampling."),
]
BufferOf = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Asynchronously: the server steps when K updates came; --rounds, --separation count that."
    ),
]
Staleness = Annotated[int | None, typer.Option(help="With --buffer: steps that may happen while a device trains.")]
Noise = Annotated[
    str | None, typer.Option(help="independent in each round; or correlated, with --separation: banded, or blt.")
]

_Message = TypeVar("_Message", bound=BaseModel)
app = typer.Typer()
group = typer.Typer(help="Train on real devices.", no_args_is_help=True)
app.add_typer(group, name="fleet")


def _asked(
    sampling: float | None, separation: int | None, buffer: int | None, max_staleness: int | None, noise: str | None
) -> dict[str, Any]:
    """Fields of `Training` that were given; refuses those that would do nothing."""
    if separation is not None and sampling is not None:
        raise ConfigError(f"--sampling must be left out with --separation, which is in its place, got {sampling:g}")
    if max_staleness is not None and buffer is None:
        raise ConfigError(f"--max-staleness must be left out without --buffer, got {max_staleness}")
    given = {"sampling": sampling, "separation": separation, "buffer": buffer, "noise": noise}
    return {name: value for name, value in (given | {"max_staleness": max_staleness}).items() if value is not None}


@group.command()
def run(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    devices: Annotated[int, typer.Option(min=1, help="How many: the first people of the population.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    round_s: Annotated[float, typer.Option(min=1, help="Seconds that a round is open; it closes by the clock.")] = 30.0,
    version: Annotated[str, typer.Option(help="Promoted version to begin from: number or alias.")] = "production",
    population: Annotated[
        str | None, typer.Option(help="Whose rows the devices hold; by default the population of the model's name.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy to spend at most; only less than the model declares.")
    ] = None,
    noiseless: Annotated[
        bool, typer.Option("--noiseless", help="Without noise and without privacy: to see what noise costs.")
    ] = False,
    sampling: Annotated[
        float | None, typer.Option(help="Probability with which a device takes part in a round, in (0, 1].")
    ] = None,
    separation: Separation = None,
    buffer: BufferOf = None,
    max_staleness: Staleness = None,
    noise: Noise = None,
    processes: Annotated[int, typer.Option(min=1, help="That the devices share.")] = 2,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the aggregator; 0: a free one.")] = 0,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="An issuer, started for it, gives each person one token a round.")
    ] = False,
    second_devices: Annotated[
        int, typer.Option(min=0, metavar="N", help="So many of the people have a second device, with the same rows.")
    ] = 0,
    federation: Annotated[
        Where | None,
        typer.Option(help="local: over a real Flower SuperLink, two SuperNodes and two aggregators, started for it."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder under runs/ whose ledger pays; by default a new one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Trains a promoted version further on real devices of this machine, over HTTP.

    Each device has an encrypted store with a person's examples and the version's
    signed bundle. It checks in with an aggregator, decides whether it takes part,
    trains with the bundle's program and uploads one clipped update. The aggregator
    sums what comes, writes the ledger, adds the operating system's noise, and lets
    one sum a round out; Flower's ServerApp steps the weights. The result is a new
    version; with --noiseless it is none.

    ServerApp and aggregator are in this process. With `--federation local` each is
    one of its own, as on several machines: see docs/flower.md.

    Example: hybrid fleet run coupon --devices 200 --rounds 3

    Example: hybrid fleet run coupon --federation local

    Example: hybrid fleet run coupon --rounds 20 --separation 5 --buffer 20 --noise banded

    Example: hybrid fleet run coupon --tokens --second-devices 20
    """
    if noiseless and epsilon is not None:
        raise ConfigError("--epsilon must be left out with --noiseless: it trains without privacy")
    if federation is not None and port:
        raise ConfigError(f"--port must be left out with --federation: its aggregators take free ones, got {port}")
    if federation is not None and (tokens or second_devices):
        raise ConfigError(
            "--tokens and --second-devices must be left out with --federation: of its aggregators each would take an "
            "update of a person with two devices"
        )
    if second_devices > devices:
        raise ConfigError(f"--second-devices must be at most the {devices} of --devices, got {second_devices}")
    changed = _asked(sampling, separation, buffer, max_staleness, noise)
    from hybrid.local.fleet import AGGREGATORS, Order, Promoted, train, train_over_flower

    if federation is not None and devices < AGGREGATORS:
        raise ConfigError(f"--devices must be at least {AGGREGATORS}, the aggregators of --federation, got {devices}")
    workspace = Workspace.current()
    promoted = Promoted.open(model, version, workspace, rounds=rounds, **changed)
    budget = None if noiseless else promoted.budget(epsilon, devices)
    people = promoted.people(population or model, devices, workspace)
    folder = run_folder(workspace.runs, run, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}-fleet")
    with folder as run_dir, promoted.paid(budget, devices, run_dir) as (settings, ledger):
        with progress_bar(f"training of {model} on {devices} devices") as progress:
            order = Order(
                promoted,
                settings,
                people,
                round_s,
                processes,
                workspace.keys,
                progress,
                tokens=tokens,
                second=second_devices,
            )
            if federation is None:
                outcome = train(order, ledger, port)
            else:
                outcome = train_over_flower(order, ledger, run_dir, lambda text: typer.echo(text, err=True))
        if outcome.failed == rounds:
            raise FederationError(f"none of the {rounds} rounds was released; run: {run_dir}")
        report = _report(promoted, settings, outcome, people) | {"run": str(run_dir)}
        report |= {"tokens": tokens, "second_devices": second_devices}
        if ledger is not None:
            record = promoted.record(
                settings,
                ledger,
                users=devices,
                examples=int(people.offsets[-1]),
                aggregators=outcome.aggregators,
                tokens=tokens,
                population=population or model,
                run=run_dir.name,
            ).model_copy(update={"rounds": rounds - outcome.failed})
            report |= _register(promoted, record, workspace)
        (run_dir / "fleet.json").write_text(json.dumps(report, indent=2))
    if as_json:
        print(json.dumps(report))
    else:
        _print(report)


@group.command()
def prepare(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    folder: Annotated[Path, typer.Option(help="A new one, for what the processes read.")],
    devices: Annotated[int, typer.Option(min=1, help="Expected to check in, over all aggregators.")],
    aggregators: Annotated[int, typer.Option(min=1, help="How many, each with devices of its own.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    round_s: Annotated[
        float, typer.Option(min=1, help="Seconds that a round is open; it closes by the clock.")
    ] = 3600.0,
    version: Annotated[str, typer.Option(help="Promoted version to begin from: number or alias.")] = "production",
    population: Annotated[str, typer.Option(help="What the version's record calls the people.")] = "devices",
    epsilon: Annotated[
        float | None, typer.Option(help="Privacy to spend at most; only less than the model declares.")
    ] = None,
    sampling: Annotated[
        float | None, typer.Option(help="Probability with which a device takes part in a round, in (0, 1].")
    ] = None,
    separation: Separation = None,
    buffer: BufferOf = None,
    max_staleness: Staleness = None,
    noise: Noise = None,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder under runs/ whose ledger pays; by default a new one."),
    ] = None,
    issuer: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of the control side of an issuer, whose tokens updates then need."),
    ] = None,
    issuer_name: Annotated[
        str | None, typer.Option(metavar="HOST", help="With --issuer: by which devices know it.")
    ] = None,
    issuer_authority: Annotated[
        Path | None,
        typer.Option(help="With --issuer: PEM file of who signed its certificate, where the aggregator runs."),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="With --issuer: its windows are numbered in; by default the model's name.")
    ] = None,
) -> None:
    """Prepares a training on devices for servers that you start yourself, on several machines.

    It writes what an aggregator's process and Flower's ServerApp read, and
    charges the run for all rounds: from then on no process can spend more.
    docs/flower.md says how to start them; then `hybrid fleet finish`.

    With --issuer an account is in a sum at most once, whatever devices it has
    (docs/tokens.md), and the version's record says so; of one aggregator.

    Example: hybrid fleet prepare coupon --devices 20000 --aggregators 2 --folder spring

    Example: hybrid fleet prepare coupon --devices 9000 --folder may --issuer https://issuer:8093 --issuer-name a.b
    """
    from hybrid.local.fleet import Promoted
    from hybrid.local.prepared import prepare as write

    workspace = Workspace.current()
    changed = _asked(sampling, separation, buffer, max_staleness, noise)
    tokens = _tokens(issuer, issuer_name, issuer_authority, scope, model)
    promoted = Promoted.open(model, version, workspace, rounds=rounds, **changed)
    budget = promoted.budget(epsilon, devices)
    runs = run_folder(workspace.runs, run, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}-fleet")
    with runs as run_dir, promoted.paid(budget, devices, run_dir) as (settings, ledger):
        assert ledger is not None
        prepared = write(
            folder,
            promoted,
            settings,
            ledger,
            round_s=round_s,
            devices=devices,
            aggregators=aggregators,
            population=population,
            run=run_dir.name,
            tokens=tokens,
        )
    print("privacy: " + "\n  ".join(prepared.record.privacy_lines()))
    print(f"run: {run_dir}")
    print(f"Next: start the servers on {folder} (docs/flower.md), then `hybrid fleet finish {folder}`.")


def _tokens(url: str | None, name: str | None, authority: Path | None, scope: str | None, model: str) -> Tokens | None:
    """The issuer, where one was given; refuses what would do nothing."""
    from hybrid.federation.checkin import Tokens

    given = {"--issuer-name": name, "--issuer-authority": authority, "--scope": scope}
    if url is None:
        if more := [option for option, value in given.items() if value is not None]:
            raise ConfigError(f"{more[0]} must be left out without --issuer")
        return None
    if name is None:
        raise ConfigError("--issuer needs --issuer-name: devices are told it in plans, and hold it against their app's")
    if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
        raise ConfigError(f"--issuer must be https://HOST:PORT of its control side, got {url!r}")
    return Tokens(name=name, url=url, scope=scope or model, authority=authority)


@group.command()
def finish(folder: Annotated[Path, typer.Argument(help="Of `hybrid fleet prepare`, after its last round.")]) -> None:
    """Registers the version that a prepared training gave.

    Example: hybrid fleet finish spring
    """
    from hybrid.local.prepared import finish as register

    number, prepared = register(folder, Workspace.current())
    name = prepared.model
    print("privacy: " + "\n  ".join(prepared.record.privacy_lines()))
    print(f"{name}:{number}, from {name}:{prepared.version}")
    print(f"Next: `hybrid promote {name} {number} production`.")


AggregatorOf = Annotated[str, typer.Option(metavar="URL", help="Of its control side.")]
TokenOf = Annotated[Path, typer.Option(help="File with the control side's token.")]
AuthorityOf = Annotated[
    Path | None, typer.Option(help="PEM file of who signed its certificate, where that is no public authority.")
]
Reason = Annotated[str, typer.Option(help="For people and logs, at most 500 characters.")]
TrainingOf = Annotated[str, typer.Argument(help="Whose training.")]


@group.command()
def halt(
    model: Annotated[str, typer.Argument(help="Whose versions.")],
    *,
    versions: Annotated[list[int], typer.Option(min=1, help="To halt; may be given several times.")],
    reason: Reason,
    aggregator: AggregatorOf,
    token: TokenOf,
    authority: AuthorityOf = None,
) -> None:
    """Stops versions on devices, for good: the kill switch of a running aggregator.

    Each device with one of them is told so at its next check-in, by a signed
    message, and stops to predict and to train until it has another version. A
    round that trains one of them ends unreleased. The aggregator keeps it on its
    disk, and stays halted when it is started again. It cannot be taken back: give
    devices a newer version. Where there are several aggregators, tell each.

    Example: hybrid fleet halt coupon --versions 3 --reason "it is wrong" --aggregator https://a.example:8091 --token F
    """
    from hybrid.plan import Halt

    said = _said(Halt, model=model, versions=tuple(versions), reason=reason)
    _control(aggregator, token, authority).halt(said)
    print(f"{model}: version {', '.join(map(str, versions))} is halted at {aggregator}")


@group.command("end-round")
def end_round(
    model: TrainingOf,
    *,
    reason: Reason,
    aggregator: AggregatorOf,
    token: TokenOf,
    authority: AuthorityOf = None,
    plan: Annotated[
        str | None, typer.Option(metavar="ID", help="Of the plan that devices have; by default the open one's.")
    ] = None,
) -> None:
    """Ends the round that is open at an aggregator: one plan's kill switch.

    Devices are given its plan no more, and what they still upload for it is refused.
    What came is forgotten: nothing is released, and nothing is spent. The next
    round is opened as ever. Naming the plan, the command can be repeated safely.

    Example: hybrid fleet end-round coupon --reason "wrong clip" --aggregator https://a.example:8091 --token F
    """
    from hybrid.federation.remote import Order

    said, control = _said(Order, model=model, reason=reason), _control(aggregator, token, authority)
    found = plan or control.training().plan
    if found is None:
        raise NotFound(f"no round is open at {aggregator}")
    control.end(found, said)
    print(f"{model}: the round of plan {found} has ended at {aggregator}: nothing is released, nothing is spent")


@group.command("halt-training")
def halt_training(
    model: TrainingOf,
    *,
    reason: Reason,
    aggregator: AggregatorOf,
    token: TokenOf,
    authority: AuthorityOf = None,
) -> None:
    """Halts all training at an aggregator: no device is given a plan until it is resumed.

    The open round ends unreleased, nothing is spent, and what devices upload is
    refused. They go on to predict. The aggregator keeps it on its disk. Who trains
    asks on until its time limit, and goes on with the same round once training is
    resumed. Where there are several aggregators, tell each.

    Example: hybrid fleet halt-training coupon --reason "loss rose" --aggregator https://a.example:8091 --token F
    """
    from hybrid.federation.remote import Order

    _control(aggregator, token, authority).suspend(_said(Order, model=model, reason=reason))
    print(f"{model}: training is halted at {aggregator}; `hybrid fleet resume-training` lets it go on")


@group.command("resume-training")
def resume_training(
    model: TrainingOf,
    *,
    aggregator: AggregatorOf,
    token: TokenOf,
    authority: AuthorityOf = None,
) -> None:
    """Lets training that was halted go on: devices are given plans again.

    Versions that were halted stay so.

    Example: hybrid fleet resume-training coupon --aggregator https://a.example:8091 --token F
    """
    from hybrid.federation.remote import Order

    _control(aggregator, token, authority).resume(_said(Order, model=model, reason="resumed"))
    print(f"{model}: training goes on at {aggregator}")


def _control(aggregator: str, token: Path, authority: Path | None) -> RemoteAggregator:
    from hybrid.bearer import read_token
    from hybrid.federation.remote import RemoteAggregator

    return RemoteAggregator(url=aggregator, token=read_token(token), run="control", authority=authority)


def _said(form: type[_Message], **fields: Any) -> _Message:
    """Raises: ConfigError: a field is not what it must be."""
    try:
        return form(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}") from None


def _report(promoted: Promoted, settings: Round, outcome: Outcome, people: People) -> dict[str, Any]:
    """As JSON values."""
    return {
        "model": promoted.version.model,
        "from_version": promoted.version.number,
        "devices": people.users,
        "oracle_examples": int(people.offsets[-1]),
        "sampling": settings.sampling,
        "noise_multiplier": settings.noise_multiplier,
        "rounds": outcome.rounds,
        "failed_rounds": outcome.failed,
        "refused": outcome.refused,
        "oracle_endings": dict(outcome.endings),
    }


def _register(promoted: Promoted, record: TrainingRecord, workspace: Workspace) -> dict[str, Any]:
    from hybrid.registry import Registry

    number = Registry(workspace).create_version(
        promoted.version.model,
        weights=promoted.network.weights(),
        training=record,
        curves={},
        expected_hash=promoted.version.definition_hash,
    )
    return {"version": number, "training": record.model_dump(mode="json"), "privacy": list(record.privacy_lines())}


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    name = report["model"]
    table = Table("round", "seconds", "weights moved by")
    for row in report["rounds"]:
        table.add_row(str(row["round"]), f"{row['seconds']:.1f}", f"{row['moved']:.4g}")
    Console(highlight=False).print(table)
    ended = ", ".join(f"{count} {ending}" for ending, count in sorted(report["oracle_endings"].items()))
    print(f"{report['devices']} devices; oracle: {report['oracle_examples']} examples; sessions: {ended}")
    if report["refused"] is None:
        print("uploads not taken: see the aggregators' logs")
    else:
        print("uploads not taken: " + (", ".join(f"{n} {reason}" for reason, n in report["refused"].items()) or "none"))
    if "version" in report:
        print("privacy: " + "\n  ".join(report["privacy"]))
        print(f"{name}:{report['version']}, from {name}:{report['from_version']}")
        print(f"Next: `hybrid promote {name} {report['version']} production`.")
    else:
        print("privacy: none, --noiseless; no version is registered")
    print(f"run: {report['run']}")
