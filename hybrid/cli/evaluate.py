"""`hybrid evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.asking import (
    FULL,
    NOISE,
    ROUND_S,
    DevicesOf,
    InProcess,
    OnDevices,
    PaidBy,
    RoundS,
    Seed,
    Spending,
    TokensOf,
    Whom,
    check_devices,
    check_epsilon,
    estimate_json,
    interval,
    paying,
    spend_lines,
)
from hybrid.cli.runs import PRODUCTION, check_plot, examples_of, preparing, version_of
from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.analytics.asking import Ask, People
    from hybrid.analytics.metrics import Curve, Evaluation
    from hybrid.features import Float32
    from hybrid.federation.population import Examples
    from hybrid.network import Network
    from hybrid.spec import HybridModel
    from hybrid.version import Version

app = typer.Typer()

OTHERWISE = "register the file it was trained from to evaluate it"

NAMES = {
    "auc": "AUC",
    "log_loss": "log-loss",
    "normalised_entropy": "normalised entropy",
    "calibration": "calibration",
    "mean_prediction": "mean prediction",
    "mean_label": "mean label",
    "precision": "precision",
    "recall": "recall",
}
FORM = "{:.4f}".format
UNKNOWN = "it is not known whether these people were in training: the run of {version} is not here"
TRAINED = "these people were in the training of {version}: on people that a model learned from, metrics flatter it"


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="NAME@ALIAS, NAME:VERSION, or NAME for its production version.")
    ],
    *,
    epsilon: Annotated[float, typer.Option(help="Privacy to spend.")],
    against: Annotated[
        str | None, typer.Option(metavar="ALIAS|VERSION", help="Another version of it, on the same people.")
    ] = None,
    population: Annotated[
        str | None, typer.Option(help="Whom to ask; by default the population of the model's name.")
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Ask the users of one fold of N only; by default the one training held out."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the population, in place of the label's own column.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Score from which precision and recall count a yes.")] = 0.5,
    rows: Annotated[int, typer.Option(min=1, help="Of a person, at most, the last: noise grows with it.")] = 8,
    full: Annotated[
        bool, typer.Option("--full/--no-full", help="Intervals for the population too, for 15 % of epsilon.")
    ] = True,
    run: PaidBy = None,
    seed: Seed = None,
    devices: DevicesOf = None,
    round_s: RoundS = None,
    tokens: TokensOf = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw ROC and calibration, into an .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measures a version on people's devices, and sees noised counts of scores by label: nobody's score.

    Each device predicts its latest labelled rows, --rows at most, and counts the
    scores near each of some 64 nodes, by label. AUC, log-loss, normalised entropy (below 1 is
    better than the mean label), calibration (mean prediction over mean label), precision and recall are computed
    from the noised sums. With --against both versions predict the same rows, and the differences, the first less the
    second, have intervals of their own.

    Every number has two intervals of 95 %: "noise" is for the exact value on the
    people asked, "full" for the population that they are a sample of.

    People that the version learned from flatter it: train with --fold, and they are left out here.

    With --devices nothing is simulated but the people: each has an encrypted store and
    the version's bundle, which predicts its rows, and answers an aggregator's signed plans.

    Example: hybrid evaluate coupon@canary --against production --epsilon 1

    Example: hybrid evaluate coupon --epsilon 4 --devices 200
    """
    check_plot(plot)
    check_devices(devices, seed, round_s, tokens)
    if devices is not None:
        _check_answerable(against, label)
    from hybrid.analytics.asking import EVALUATE
    from hybrid.network import Network
    from hybrid.registry import Registry, parse_selector

    name, selector = parse_selector(model)
    workspace = Workspace.current()
    registry = Registry(workspace)
    declared = registry.load_model(name)
    check_epsilon(declared, epsilon)
    _check_threshold(threshold)
    with preparing(f"evaluation of {name}"):
        versions = [version_of(registry, name, PRODUCTION if selector is None else selector, otherwise=OTHERWISE)]
        if against is not None:
            versions.append(version_of(registry, name, _other(name, against), otherwise=OTHERWISE))
        asked = _Asked.of(versions, population or name, fold, workspace)
        labelled = declared if label is None else _labelled(declared, label)
        Network.build(declared).check_registered(registry.definition(name)["network"])
        whom: Whom
        if devices is not None:
            whom = _devices(versions[0], asked, workspace, devices=devices, round_s=round_s or ROUND_S, tokens=tokens)
        else:
            whom = InProcess(asked.population, seed, _people(labelled, versions, asked, workspace))
    shown: dict[str, Any] = {
        "model": name,
        "versions": [{"version": one.number, "aliases": list(one.aliases)} for one in versions],
        "population": asked.population,
        "fold": asked.fold,
        "notes": list(asked.notes),
        "label": label or declared.label.column,
        "people": len(whom),
        "devices": devices is not None,
        "rows_a_person": rows,
        "threshold": threshold,
        "seed": whom.seed,
    }
    with paying(declared, workspace, whom, Spending(EVALUATE, epsilon, run)) as question:
        from hybrid.analytics.estimates import shares_of

        question.begin(shares_of(1.0, full=full))
        shown |= _measured(question.ask, compared=against is not None, rows=rows, threshold=threshold, full=full)
        shown |= {"spend": question.spend(), "people": question.ask.answered}
        question.keep(shown)
    if plot is not None:
        _draw(plot, shown)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(shown)


def _other(name: str, against: str) -> str | int:
    """The selector of --against, which may name the model too.

    Raises:
        ConfigError: it names another model.
    """
    from hybrid.registry import parse_selector

    if not {":", "@"} & set(against):
        return against
    other, selector = parse_selector(against)
    if other != name or selector is None:
        raise ConfigError(f"--against must be an alias or a version of {name}, got {against!r}")
    return selector


@dataclass(frozen=True)
class _Asked:
    """Who is asked, and what is to be said about it.

    Attributes:
        population: its name.
        fold: K/N; None: everybody.
        notes: sentences.
    """

    population: str
    fold: str | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, versions: list[Version], population: str, fold: str | None, workspace: Workspace) -> _Asked:
        """The fold that the versions held out, where they learned from this population.

        Raises:
            ConfigError: they held out different folds, or another than `fold`.
        """
        notes: list[str] = []
        held_out: set[str | None] = set()
        for version in versions:
            name = f"{version.model}:{version.number}"
            if version.training.population != population:
                continue
            config = _config(workspace, version)
            if config is None:
                notes.append(UNKNOWN.format(version=name))
                continue
            kept = config.get("fold")
            if fold is not None and kept != fold:
                said = "held out nobody" if kept is None else f"held out fold {kept}"
                raise ConfigError(f"--fold must be people that {name} did not learn from: it {said}, got {fold}")
            held_out.add(kept)
        folds = {kept for kept in held_out if kept is not None}
        if len(folds) > 1:
            raise ConfigError(
                f"the versions must have held out the same people, got folds {' and '.join(sorted(folds))}: "
                "train one of them again"
            )
        found = next(iter(folds), fold)
        for version in versions:
            config = _config(workspace, version)
            if version.training.population == population and config is not None and config.get("fold") is None:
                notes.append(TRAINED.format(version=f"{version.model}:{version.number}"))
        return cls(population, found, tuple(notes))


def _config(workspace: Workspace, version: Version) -> dict[str, Any] | None:
    """How the version's training was started; None where that is not known."""
    try:
        config: dict[str, Any] = json.loads((workspace.runs / version.training.run / "config.json").read_text())
    except (OSError, ValueError):
        return None
    trained = version.training  # another training may have been given the same run since
    same = (config.get("kind"), config.get("users"), config.get("examples"))
    return config if same == (trained.kind, trained.users, trained.examples) else None


def _people(model: HybridModel, versions: list[Version], asked: _Asked, workspace: Workspace) -> People:
    """Labels and scores of the rows of those who are asked; without a label a row is none.

    Args:
        model: with the label that is taken.
        versions: one or two, of it.
        asked: who.
        workspace: with the population and the feature store.
    """
    from hybrid.analytics.asking import People
    from hybrid.network import Network
    from hybrid.query import AGAINST, LABEL, SCORE

    columns: dict[str, Any] = {}
    rows: Examples | None = None
    of: HybridModel | None = None
    for version, column in zip(versions, (SCORE, AGAINST), strict=False):
        built = Network.of(model, version)
        if rows is None or built.model != of:
            everybody, held_out = examples_of(built.model, asked.population, asked.fold, workspace)
            rows, of = everybody if held_out is None else held_out, built.model
        columns |= {LABEL: rows.labels, column: _scores(built, version, rows)}
    assert rows is not None
    return People(columns, rows.offsets)


def _check_answerable(against: str | None, label: str | None) -> None:
    """Raises: ConfigError: devices cannot answer it."""
    if against is not None:
        raise ConfigError(f"--against must be left out with --devices: a device has one version, got {against!r}")
    if label is not None:
        raise ConfigError(f"--label must be left out with --devices, which have the declared one, got {label!r}")


def _devices(version: Version, asked: _Asked, workspace: Workspace, **how: Any) -> OnDevices:
    """Those who are asked, with the version's bundle; `how` is as in `OnDevices.of`."""
    from hybrid.federation.population import Population, parse_fold

    population = Population.open(asked.population, workspace)
    among = None if asked.fold is None else population.fold(*parse_fold(asked.fold))
    found = OnDevices.of((version.model, version.number), population, workspace, among=among, **how)
    if found.promoted.settings.server_tower == "federated":
        raise ConfigError(
            f"--devices must be left out for {version.model}:{version.number}, whose server tower devices train: they "
            "predict no row that was not served to them"
        )
    return found


def _labelled(model: HybridModel, column: str) -> HybridModel:
    return model.model_copy(update={"label": model.label.model_copy(update={"column": column})})


def _scores(network: Network, version: Version, rows: Examples) -> Float32:
    """(n,) probabilities that the version gives to rows."""
    from hybrid.federation.engine import predict

    return predict(network, rows, without=version.training.without)


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold < 1:
        raise ConfigError(f"--threshold must be in (0, 1), got {threshold:g}")


def _measured(ask: Ask, *, compared: bool, **how: Any) -> dict[str, Any]:
    """The answer as JSON values."""
    from hybrid.analytics.metrics import compare
    from hybrid.analytics.metrics import evaluate as measure

    if not compared:
        return {"evaluations": [_evaluation_json(measure(ask, **how))], "differences": None}
    found = compare(ask, **how)
    differences = {name: estimate_json(value) for name, value in found.differences.items()}
    return {
        "evaluations": [_evaluation_json(one) for one in (found.first, found.second)],
        "differences": differences,
    }


def _evaluation_json(found: Evaluation) -> dict[str, Any]:
    return {
        "rows": estimate_json(found.rows),
        "metrics": {name: estimate_json(value) for name, value in found.metrics.items()},
        "roc": _curve_json(found.roc),
        "deciles": _curve_json(found.deciles),
    }


def _curve_json(curve: Curve) -> dict[str, Any]:
    return {name: [round(float(value), 6) for value in getattr(curve, name)] for name in ("x", "y", "low", "high")}


def _title(shown: Mapping[str, Any], place: int) -> str:
    version = shown["versions"][place]
    aliases = f" ({', '.join(version['aliases'])})" if version["aliases"] else ""
    return f"{shown['model']}:{version['version']}{aliases}"


def _print(shown: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    for line in _head(shown):
        print(line)
    for place, found in enumerate(shown["evaluations"]):
        table = Table(escape(_title(shown, place)), "value", "noise", "full", box=None, pad_edge=False)
        _fill(table, found["metrics"])
        console.print(table)
    if shown["differences"] is not None:
        table = Table("difference", "value", "noise", "full", box=None, pad_edge=False)
        _fill(table, shown["differences"])
        console.print(table)
    print(NOISE.format(people=shown["people"]))
    print(FULL if shown["evaluations"][0]["rows"]["full"] else "full: not asked for")
    for line in spend_lines(shown["spend"], ""):
        print(line)


def _head(shown: Mapping[str, Any]) -> Iterator[str]:
    names = " against ".join(_title(shown, place) for place in range(len(shown["versions"])))
    fold = f" of fold {shown['fold']}" if shown["fold"] else ""
    fold += ", with real devices" if shown["devices"] else ""
    rows = shown["evaluations"][0]["rows"]["value"]
    yield (
        f"{names}, on {shown['people']:,} people of {shown['population']}{fold}, their last "
        f"{shown['rows_a_person']} rows at most: {rows:,.0f} rows (noised)"
    )
    yield from shown["notes"]


def _fill(table: Any, found: Mapping[str, Any]) -> None:
    for name, one in found.items():
        value = "-" if one["value"] is None else FORM(one["value"])
        table.add_row(NAMES[name], value, interval(one["noise"], FORM), interval(one["full"], FORM))


def _draw(file: Path, shown: Mapping[str, Any]) -> None:
    """ROC and calibration of each version, with the noise's bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    roc, deciles = figure.subplots(1, 2)
    for panel in (roc, deciles):
        panel.spines[["top", "right"]].set_visible(False)
        panel.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for place, found in enumerate(shown["evaluations"]):
        area = found["metrics"]["auc"]["value"]
        name = f"{_title(shown, place)}, AUC {'-' if area is None else format(area, '.3f')}"
        for panel, key, marker in ((roc, "roc", ""), (deciles, "deciles", ".")):
            curve = found[key]
            (line,) = panel.plot(curve["x"], curve["y"], marker=marker, linewidth=1.4, label=name)
            panel.fill_between(curve["x"], curve["low"], curve["high"], color=line.get_color(), alpha=0.2, linewidth=0)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    deciles.set(xlabel="mean prediction", ylabel="mean label", title="calibration, ten parts of equally many rows")
    roc.legend(frameon=False, loc="lower right", fontsize="small")
    spend = shown["spend"]
    figure.suptitle(
        f"{shown['people']:,} people, epsilon {spend['epsilon']:.3g}; bands: 95 % at each place, noise only",
        fontsize="medium",
    )
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
