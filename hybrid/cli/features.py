"""The `hybrid features` commands: apply, materialize, read, store."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.workspace import Workspace

app = typer.Typer()
group = typer.Typer(help="Server features: Feast definitions, materialisation and reads.", no_args_is_help=True)
app.add_typer(group, name="features")

Model = Annotated[str, typer.Argument(help="Name of a registered model.")]


@group.command()
def apply(model: Model) -> None:
    """Generates a model's Feast entity, views and service, and the packed view that serving reads.

    Example: hybrid features apply coupon
    """
    from feature_store.materialize import apply as apply_model
    from hybrid.registry import Registry

    workspace = Workspace.current()
    for name in apply_model(Registry(workspace).load_model(model), workspace.feast):
        print(f"applied {name}")


@group.command()
def materialize(model: Model) -> None:
    """Loads each entity's newest row into the online store, raw and packed, and checks that they agree.

    Example: hybrid features materialize coupon
    """
    from feature_store.materialize import materialize as materialize_model
    from hybrid.registry import Registry

    workspace = Workspace.current()
    done = materialize_model(Registry(workspace).load_model(model), workspace.feast, datetime.now(UTC))
    for view, entities in done.views.items():
        print(f"{view}: {entities} entities")
    print(f"packed: {done.packed} entities; of {done.checked}, packed = unpacked = offline")


@group.command()
def read(
    model: Model,
    entities: Annotated[list[str], typer.Argument(metavar="ENTITY...", help="Join keys.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a list with one object per entity.")] = False,
) -> None:
    """Reads entities as serving does: slots by feature, age, and whether they may be used.

    A slot is a feature after its transform: a number normalised, text as its
    place in the vocabulary. Status is ok, unknown_entity, stale_features or
    schema_drift.

    Example: hybrid features read coupon OFFER_ID
    """
    from feature_store.materialize import reader
    from hybrid.registry import Registry

    workspace = Workspace.current()
    declared = Registry(workspace).load_model(model)
    found = reader(declared, workspace.feast).read(entities, int(datetime.now(UTC).timestamp() * 1000))
    names = declared.server.features.names
    rows: list[dict[str, Any]] = [
        {
            "entity": entity,
            "status": status,
            "age_s": age_ms / 1000 if age_ms >= 0 else None,
            "slots": {n: None if math.isnan(slot) else slot for n, slot in zip(names, slots.tolist(), strict=True)},
        }
        for entity, status, age_ms, slots in zip(
            entities, found.status, found.age_ms.tolist(), found.slots, strict=True
        )
    ]
    if as_json:
        print(json.dumps(rows))
    else:
        _print_rows(rows, names)


@group.command()
def store(
    kind: Annotated[str | None, typer.Argument(help="sqlite or redis; without it what is set is shown.")] = None,
    *,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of Redis.")] = "127.0.0.1:6379",
    database: Annotated[int, typer.Option(help="Of Redis; deployments on one server need different ones.")] = 0,
    tls: Annotated[bool, typer.Option("--tls", help="Speak to Redis over TLS.")] = False,
    username: Annotated[str | None, typer.Option(help="Of Redis, if it has users.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="File that holds Redis's password.")] = None,
) -> None:
    """Chooses where the features that serving reads lie; written to online.json in the feature store's folder.

    SQLite is a file, for one machine; Redis a server, for workers on many. After a change apply and
    materialize each model again, and restart the merge workers: nothing is copied from one to the other.

    Example: hybrid features store redis --address redis.internal:6379 --tls --password-file /run/secrets/redis
    """
    from feature_store.definitions import OnlineStore

    folder = Workspace.current().feast
    if kind is None:
        online = OnlineStore.read(folder)
        print(online.model_dump_json(indent=2, include=None if online.kind == "redis" else {"kind"}))
        return
    redis = {
        "address": address,
        "database": database,
        "tls": tls,
        "username": username,
        "password_file": password_file and password_file.resolve(),
    }
    online = OnlineStore.of({"kind": kind} | (redis if kind == "redis" else {}))
    online.for_feast(folder)  # is the password's file there?
    print(f"wrote {online.write(folder)}")


def _print_rows(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("entity")
    for row in rows:
        table.add_column(row["entity"], overflow="fold")
    table.add_row("status", *(row["status"] for row in rows))
    table.add_row("age (s)", *("" if row["age_s"] is None else f"{row['age_s']:.0f}" for row in rows))
    for name in names:
        slots = [row["slots"][name] for row in rows]
        table.add_row(name, *("" if slot is None else f"{slot:.6g}" for slot in slots))
    Console(highlight=False).print(table)
