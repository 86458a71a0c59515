"""The `hybrid features` commands: apply, materialize, read."""

import typer

app = typer.Typer()
