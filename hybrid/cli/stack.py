"""The local stack: up, status, down."""

import typer

app = typer.Typer()
