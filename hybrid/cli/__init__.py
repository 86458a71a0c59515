"""The `hybrid` command. One module per command group; heavy libraries load only when a command runs."""

from __future__ import annotations

import os
import sys

import typer

from hybrid.cli import features, models, population, promote, stack, train
from hybrid.errors import HybridError

app = typer.Typer(
    help="Declare, train, serve and watch hybrid models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (models, features, population, train, promote, stack):
    app.add_typer(group.app)


def main() -> None:
    """Runs the command line; an error of ours is one sentence and exit status 1."""
    os.umask(0o077)  # people's rows, keys and logs are their owner's, in every process that starts from here
    try:
        app()
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
