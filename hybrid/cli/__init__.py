"""The `hybrid` command. One module per command group; heavy libraries load only when a command runs."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated

import typer

from hybrid.cli import (
    analyze,
    audit,
    buffer,
    console,
    dead_letters,
    doctor,
    drift,
    evaluate,
    features,
    fleet,
    funnel,
    migrate,
    models,
    page,
    population,
    privacy,
    promote,
    report,
    rollout,
    skew,
    stack,
    sweep,
    train,
    watch,
)
from hybrid.errors import HybridError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does it already
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
GROUPS = (
    models,
    features,
    population,
    train,
    sweep,
    buffer,
    analyze,
    evaluate,
    privacy,
    audit,
    report,
    promote,
    rollout,
    watch,
    console,
    stack,
    page,
    fleet,
    dead_letters,
    skew,
    drift,
    funnel,
    doctor,
    migrate,
)


def _with_paragraphs(commands: typer.Typer) -> typer.Typer:
    """With each paragraph of their help in one line: Typer wraps it again, and would keep the source's breaks too."""
    for command in commands.registered_commands:
        paragraphs = inspect.cleandoc((command.callback and command.callback.__doc__) or "").split("\n\n")
        code = (any(line.startswith(" ") for line in paragraph.splitlines()) for paragraph in paragraphs)
        command.help = "\n\n".join(
            text if kept else text.replace("\n", " ") for text, kept in zip(paragraphs, code, strict=True)
        )
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            _with_paragraphs(group.typer_instance)
    return commands


for group in GROUPS:
    app.add_typer(_with_paragraphs(group.app))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"hybrid-towers {version('hybrid-towers')}")
        raise typer.Exit


@app.callback()
def hybrid(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declare, train and serve hybrid models."""


def main() -> None:
    """Runs the command line."""
    with command_line():
        app()


@contextmanager
def command_line() -> Iterator[None]:
    """What every command of ours does around its work.

    An error of ours is one sentence and exit status 1. Files are their owner's
    alone: people's rows, keys and logs. What libraries have to say about
    libraries that they use is not shown.
    """
    os.umask(0o077)
    shown = warnings.showwarning
    # Not a filter: some libraries replace the filters when they are imported.
    warnings.showwarning = lambda m, c, *rest: None if issubclass(c, DeprecationWarning) else shown(m, c, *rest)
    try:
        yield
    except HybridError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        warnings.showwarning = shown
