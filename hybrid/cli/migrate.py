"""`hybrid migrate`: what an upgrade asks for, done once, and harmless done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hybrid.cli import connection as c
from hybrid.errors import HybridError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.registry import Registry
    from serving.connection import Broker

app = typer.Typer()

Outcome = Literal["done", "already", "would", "failed", "skipped"]


@dataclass(frozen=True)
class Step:
    """One thing that an upgrade asks for.

    Attributes:
        what: it is about.
        outcome: "done"; "already": it was so; "would": it was to be shown only; "failed"; "skipped": not ours to do.
        detail: in a sentence.
    """

    what: str
    outcome: Outcome
    detail: str


@app.command()
def migrate(
    *,
    kafka: c.Kafka = None,
    kafka_tls: c.KafkaTls = False,
    kafka_ca: c.KafkaCa = None,
    kafka_cert: c.KafkaCert = None,
    kafka_key: c.KafkaKey = None,
    kafka_sasl: c.KafkaSasl = None,
    kafka_username: c.KafkaUsername = None,
    kafka_password_file: c.KafkaPasswordFile = None,
    kafka_partitions: Annotated[
        int | None, typer.Option(min=1, help="Of the topic of requests, if it is created now; 4 by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; show what would be done.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Brings a deployment to what this version needs: run it after an upgrade, before anything else; again is harmless.

    The workspace's folders are made; MLflow's tables are brought up to date where they are the workspace's own file, of
    which a copy is kept beside it; the Feast objects of every registered model are applied; with --kafka, or
    $HYBRID_KAFKA, topics that are absent are created. Exit status 1 where a step failed, else 0.

        hybrid migrate --kafka kafka:9092
    """
    broker = c.broker_of(
        kafka,
        tls=kafka_tls,
        ca=kafka_ca,
        certificate=kafka_cert,
        key=kafka_key,
        sasl=kafka_sasl,
        username=kafka_username,
        password_file=kafka_password_file,
    )
    workspace = Workspace.current()
    tasks: dict[str, Callable[[], Iterator[Step]]] = {
        "folders": lambda: _folders(workspace, dry_run),
        "registry": lambda: _registry(workspace, dry_run),
        "features": lambda: _features(workspace, dry_run),
        "topics": lambda: _topics(broker, kafka_partitions, dry_run),
    }
    steps = [step for name, task in tasks.items() for step in _told(name, task)]
    failed = any(step.outcome == "failed" for step in steps)
    if as_json:
        print(json.dumps({"ok": not failed, "steps": [asdict(step) for step in steps]}))
    else:
        _print(steps)
    raise typer.Exit(1 if failed else 0)


def _told(name: str, task: Callable[[], Iterator[Step]]) -> Iterator[Step]:
    """Its steps; one that fails is the last of its task, and the others go on."""
    try:
        yield from task()
    except HybridError as error:
        yield Step(name, "failed", str(error))
    except OSError as error:
        yield Step(name, "failed", f"{error.filename or 'a file'}: {error.strerror}")


def _folders(workspace: Workspace, dry_run: bool) -> Iterator[Step]:
    folders = (
        *(workspace.root, workspace.definitions, workspace.mlflow, workspace.feast, workspace.triton),
        *(workspace.bundles, workspace.deployments, workspace.keys, workspace.runs),
    )
    absent = [folder for folder in folders if not folder.is_dir()]
    for folder in absent:
        if not dry_run:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield Step("folders", "would" if dry_run else "done", f"make {folder}")
    if not absent:
        yield Step("folders", "already", f"all of {workspace.root} are there")


def _registry(workspace: Workspace, dry_run: bool) -> Iterator[Step]:
    """MLflow's tables, where they are ours."""
    from hybrid.registry import Registry

    registry = Registry(workspace)
    if not registry.is_own_file:
        yield Step(
            "registry", "skipped", f"{registry.where} is not the workspace's: `mlflow db upgrade` is its owner's"
        )
    elif not registry.database.exists():
        yield Step("registry", "already", "nothing was trained yet: the first training makes its tables")
    else:
        yield from _tables(registry, dry_run)


def _tables(registry: Registry, dry_run: bool) -> Iterator[Step]:
    from hybrid.tracking import revisions, upgrade

    found, expected = revisions(registry.database)
    if found == expected:
        yield Step("registry", "already", f"MLflow's tables are {expected}")
    elif dry_run:
        yield Step("registry", "would", f"bring MLflow's tables from {found} to {expected}")
    else:
        copy = upgrade(registry.database)
        yield Step("registry", "done", f"brought MLflow's tables from {found} to {expected}; before it: {copy}")


def _features(workspace: Workspace, dry_run: bool) -> Iterator[Step]:
    """The Feast objects of each registered model; one that cannot be built ends no other's."""
    from hybrid.registry import Registry

    names = Registry(workspace).names()
    if not names:
        yield Step("features", "already", "no model is registered")
    for name in names:
        yield from _told(f"features of {name}", partial(_applied, workspace, name, dry_run))


def _applied(workspace: Workspace, name: str, dry_run: bool) -> Iterator[Step]:
    from feature_store.materialize import apply, not_applied
    from hybrid.registry import Registry

    model, what = Registry(workspace).load_model(name), f"features of {name}"
    missing = not_applied(model, workspace.feast)
    if not missing:
        yield Step(what, "already", "applied as declared")
    elif dry_run:
        yield Step(what, "would", f"apply {', '.join(missing)}")
    else:
        apply(model, workspace.feast)
        after = f"run `hybrid features materialize {name}` next"
        yield Step(what, "done", f"applied {', '.join(missing)}; {after}")


def _topics(broker: Broker | None, partitions: int | None, dry_run: bool) -> Iterator[Step]:
    if broker is None:
        yield Step("topics", "skipped", "--kafka says where they are to be made")
        return
    from serving.probing import topics
    from serving.topics import create_topics

    absent = [name for name, topic in topics(broker).items() if topic is None]
    if not absent:
        yield Step("topics", "already", f"all are in {broker.bootstrap}")
    elif dry_run:
        yield Step("topics", "would", f"create {', '.join(absent)} in {broker.bootstrap}")
    else:
        create_topics(broker, partitions)
        yield Step("topics", "done", f"created {', '.join(absent)} in {broker.bootstrap}")


def _print(steps: Sequence[Step]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "", "")
    table.columns[-1].overflow = "fold"
    for step in steps:
        table.add_row(step.what, step.outcome, escape(step.detail))
    Console(highlight=False).print(table)
