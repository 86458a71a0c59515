"""The `hybrid population` commands: import, list."""

import typer

app = typer.Typer()
