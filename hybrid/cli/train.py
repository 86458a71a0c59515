"""`hybrid train`."""

import typer

app = typer.Typer()
