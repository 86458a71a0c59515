"""What the commands share: the rows, a version, the folder of a run, a bar, where a plot goes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hybrid.errors import ConfigError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from hybrid.analytics.asking import People
    from hybrid.features import Float32, Transform
    from hybrid.federation.population import Examples, Population
    from hybrid.registry import Registry
    from hybrid.spec import HybridModel
    from hybrid.version import Version


class Where(StrEnum):
    """Where federated rounds run, if not in this process."""

    LOCAL = "local"


PRODUCTION: Final = "production"  # the alias of what is served
CANARY: Final = "canary"  # of what some devices fetch in its place
SHADOW: Final = "shadow"  # of what runs beside it
PLOTS = (".svg", ".png")
IN_MEMORY = 1 << 30  # bytes of encoded examples; more are mapped from the disk


def examples_of(
    model: HybridModel, name: str, fold: str | None, workspace: Workspace
) -> tuple[Examples, Examples | None]:
    """The rows to learn from, with the server's features as they were, and those of held-out users."""
    from hybrid.federation.population import Population, examples, parse_fold

    population = Population.open(name, workspace)
    held_out = None if fold is None else population.fold(*parse_fold(fold))
    slots = server_slots(model, population, workspace)
    large = 4 * len(population) * (model.server_features.width + model.device_features.width) > IN_MEMORY
    rows = examples(model, population, slots, folder=workspace.examples / name if large else None)
    return (rows, None) if held_out is None else (rows.of(~held_out), rows.of(held_out))


def server_slots(model: HybridModel, population: Population, workspace: Workspace) -> Float32:
    """(n, s) what the server knew of each row's entity at its time, as slots.

    Raises:
        ConfigError: the population lacks a column, or the model was not applied to the feature store.
        NotFound: some rows have no server features at their time.
    """
    from feature_store.offline import join

    times = None if population.time is None else population.column(population.time)
    return join(model, population.column(model.server.entity.join_key), times, workspace.feast)


def check_types(transform: Transform, column: ArrayLike) -> None:
    """Of raw values, also where the transform's constants are not learned yet.

    Raises:
        BadRequest: they are texts in place of numbers, or the other way round.
    """
    from hybrid.features import Numeric, as_text

    (as_text if transform.text else Numeric().inputs)(column)


def version_of(registry: Registry, name: str, selector: str | int, *, otherwise: str) -> Version:
    """A version of what is registered now.

    Args:
        registry: of the workspace.
        name: of the model.
        selector: a number, also as text, or an alias.
        otherwise: what to do where it is of another definition, for the message.

    Raises:
        NotFound: there is none.
        ConfigError: it was trained from another definition.
    """
    found = registry.version(name, selector)
    if found.definition_hash != registry.definition_hash(name):
        raise ConfigError(
            f"{name}:{found.number} was trained from another definition than is registered now: {otherwise}"
        )
    return found


def people_of(model: HybridModel, name: str, fold: str | None, workspace: Workspace) -> People:
    """Those to learn from, and of them the device features whose constants are learned, in rows that have a label.

    Raises:
        ConfigError: the population lacks a column, or holds values of another type in it.
    """
    import numpy as np

    from hybrid.analytics.asking import People
    from hybrid.errors import BadRequest
    from hybrid.federation.population import Population, labels_of, parse_fold

    population = Population.open(name, workspace)
    _, known = labels_of(model.label, population)
    columns = {feature: population.column(feature)[known] for feature in model.device_features.pending}
    for feature, column in columns.items():
        try:
            check_types(model.device[feature], column)
        except BadRequest as error:
            raise ConfigError(f"population {name!r}: feature {feature!r}: {error}") from None
    people = People(columns, np.concatenate([[0], np.cumsum(known)])[population.offsets])
    return people if fold is None else people.of(~population.fold(*parse_fold(fold)))


def exactly(model: HybridModel, name: str, fold: str | None, workspace: Workspace) -> HybridModel:
    """The model with constants from pooled rows, for what is an oracle anyway; itself where it declares them all."""
    from hybrid.analytics.normalisation import exact

    pending = {feature: model.device[feature] for feature in model.device_features.pending}
    return model.with_learned(exact(pending, people_of(model, name, fold, workspace)) if pending else {})


@contextmanager
def run_folder(runs: Path, name: str | None, new: str) -> Iterator[Path]:
    """The folder of a run, and with it a ledger; none is left of a training that was refused at once."""
    folder = _new_run(runs, new) if name is None else run_of(runs, name)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def run_of(runs: Path, name: str) -> Path:
    """The folder of that name, which may not be there.

    Raises:
        ConfigError: no run can have that name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", name):
        raise ConfigError(f"--run must be letters, digits, _, . and -, and start with a letter or digit, got {name!r}")
    return runs / name


def interrupted(runs: Path, model: str, name: str | None, registry: Registry) -> Path:
    """The folder of a training of `model` that began and gave no version.

    Args:
        runs: folder of all runs.
        model: of the training.
        name: of the run; None: the one that there is.
        registry: knows which trainings gave one.

    Raises:
        NotFound: there is none, or none in the run of that name.
        ConfigError: it is finished, or of another model; or there are several, and no name chooses.
    """
    from hybrid.federation.resume import BY_ROUNDS, rounds_done, started

    trainings = registry.trainings(model).items()
    versions: dict[tuple[str, Any], int] = {(record.run, record.kind): number for number, record in trainings}
    if name is not None:
        folder = run_of(runs, name)
        config = started(folder)
        if config.get("model") != model:
            raise ConfigError(f"run {name!r} is of model {config.get('model')!r}, not of {model!r}")
        version = versions.get((name, config.get("kind")))
        if version is not None:
            raise ConfigError(f"run {name!r} is finished: it is {model}:{version}")
        return folder
    every = {file.parent: json.loads(file.read_text()) for file in sorted(runs.glob("*/config.json"))}
    found = {
        folder: config
        for folder, config in every.items()
        if config.get("model") == model
        and config.get("kind") in BY_ROUNDS
        and (folder.name, config["kind"]) not in versions
    }
    if not found:
        raise NotFound(f"{runs.name}/ has no interrupted training of {model}: `hybrid train {model}` starts one")
    if len(found) > 1:
        said = [f"{f.name} ({rounds_done(f, c)} of {c['training']['rounds']} rounds)" for f, c in found.items()]
        raise ConfigError(f"several trainings of {model} were interrupted; choose by --run: {', '.join(said)}")
    return next(iter(found))


def _new_run(runs: Path, stem: str) -> Path:
    """An empty folder of its own."""
    for attempt in range(1, 1000):
        folder = runs / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{runs.name} has too many runs named {stem}")


@contextmanager
def preparing(what: str) -> Iterator[None]:
    """Says on a terminal what goes on before there is a bar: libraries load for seconds. Nothing of it stays."""
    from rich.console import Console

    with Console(stderr=True).status(f"{what}: reading"):
        yield


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, so that what a script reads stays clean."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def check_plot(file: Path | None) -> None:
    """Before anything is computed.

    Raises:
        ConfigError: a plot is wanted, and cannot be drawn into that file, or at all.
    """
    if file is None:
        return
    if file.suffix not in PLOTS:
        raise ConfigError(f"--plot must end with {' or '.join(PLOTS)}, got {file.name!r}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot must be in a folder that exists, got {str(file)!r}")
    check_drawing("--plot")


def check_drawing(what: str) -> None:
    """Raises: ConfigError: `what` cannot be drawn here."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs matplotlib: install hybrid-towers[report]")
