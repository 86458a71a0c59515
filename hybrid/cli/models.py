"""Commands about models: register, models, show."""

import typer

app = typer.Typer()
