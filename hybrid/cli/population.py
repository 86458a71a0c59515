"""The `hybrid population` commands: import, list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hybrid.workspace import Workspace

app = typer.Typer()
group = typer.Typer(help="The people a model learns from: a team's own tables, imported.", no_args_is_help=True)
app.add_typer(group, name="population")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@group.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A table: .csv, .csv.gz or .parquet.")],
    *,
    user: Annotated[str, typer.Option(help="Column that says whose row it is: the unit that privacy protects.")],
    name: Annotated[str, typer.Option(help="Name of the population; by default `hybrid train` takes its model's.")],
    time: Annotated[
        str | None,
        typer.Option(help="Column with each row's time: the server's features are joined as they were then."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of one of the same name.")] = False,
    as_json: Json = False,
) -> None:
    """Brings a table into a population, in the order of users; the user column itself is not kept.

    The table needs the model's join key, request and device features and label as columns.

    Example: hybrid population import visits.csv.gz --user account --time seen_at --name visits
    """
    from hybrid.federation.population import import_table

    made = import_table(file, user=user, name=name, workspace=Workspace.current(), time=time, replace=replace)
    if as_json:
        print(json.dumps({"name": made.name, "users": made.users, "rows": len(made), "time": made.time}))
    else:
        print(f"population {made.name}: {made.users} users, {len(made)} rows")


@group.command("list")
def list_all(as_json: Json = False) -> None:
    """Lists imported populations.

    Example: hybrid population list
    """
    from hybrid.federation.population import Population, names

    workspace = Workspace.current()
    found = [Population.open(name, workspace) for name in names(workspace)]
    if as_json:
        print(json.dumps([{"name": p.name, "users": p.users, "rows": len(p), "time": p.time} for p in found]))
        return
    if not found:
        print("No population is imported: see `hybrid population import --help`.")
    for population in found:
        print(f"{population.name}: {population.users} users, {len(population)} rows")
