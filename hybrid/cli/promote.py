"""`hybrid promote`: exports a version and points an alias at it."""

import typer

app = typer.Typer()
