"""The `hybrid features` commands: apply, materialize, read."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
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
