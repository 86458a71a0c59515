"""`hybrid audit inversion`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.runs import PRODUCTION, check_plot, examples_of, preparing, progress_bar, version_of
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.privacy.inversion import Level, Recovered, Report
    from hybrid.registry import Registry
    from hybrid.spec import HybridModel
    from hybrid.version import Version

OTHERWISE = "choose a version of the registered one (--version), or register the file it was trained from"
ORACLE = "Oracle: recovery and AUC are measured on people's true features and labels, which only a simulation has."
ONE_RELEASE = (
    "Of one request. Noise of several requests from one person averages out: of m that hold the same features it hides "
    "as little as sigma / sqrt(m) does of one. What a request says beside the embedding is not looked at."
)


def inversion(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    version: Annotated[
        str | None, typer.Option(metavar="SELECTOR", help="Number or alias; by default production, else the latest.")
    ] = None,
    fold: Annotated[
        str, typer.Option(metavar="K/N", help="Who is attacked: as given to `hybrid train`, people it did not see.")
    ] = "1/5",
    population: Annotated[
        str | None, typer.Option(help="Who is attacked, and known; by default the population of the model's name.")
    ] = None,
    sigma: Annotated[
        list[float] | None,
        typer.Option(help="A noise level, over the clip; 0: clear. Repeat it for more. Default: 0, 0.03, 0.1, ... 10."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that are attacked, at most.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws: the same seed repeats an audit.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw AUC and what is recovered, into an .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Guesses each device feature from the embedding that a device releases, and says what noise against it costs.

    The attacker holds the device tower, as every device does, and knows the
    features of other people. It enumerates profiles, and searches around them,
    for those whose embedding fits best; and it trains a network that leads from
    embeddings back to features. Of these the best for each feature counts, at
    each noise level: how often it is right about people it does not know,
    against always guessing the commonest value. Beside it stands the AUC that
    is left at this level, so that `release` can be chosen with open eyes.

    A number is right within a tenth of its declared standard deviation.

    Example: hybrid audit inversion coupon --fold 1/5
    """
    check_plot(plot)
    from hybrid.analytics.results import keep
    from hybrid.network import Network
    from hybrid.privacy.inversion import SIGMAS
    from hybrid.privacy.inversion import inversion as attack
    from hybrid.registry import Registry

    workspace = Workspace.current()
    registry = Registry(workspace)
    with preparing(f"inversion of {model}"):
        declared, found = registry.load_model(model), _version(registry, model, version)
        network = Network.of(declared, found)
        network.check_registered(found.definition["network"])
        known, attacked = examples_of(network.model, population or model, fold, workspace)
    assert attacked is not None
    with progress_bar(f"inversion of {model}:{found.number}") as progress:
        report = attack(
            network, attacked, known, sigmas=SIGMAS if sigma is None else sigma, rows=rows, seed=seed, progress=progress
        )
    verdict = [*_verdict(declared, report), *_doubts(found, known.population, report), ONE_RELEASE, ORACLE]
    shown: dict[str, Any] = {"model": model, "version": found.number, "fold": fold, "seed": seed}
    shown |= report.figures() | {"verdict": verdict}
    keep(workspace.runs / found.training.run, "inversion", shown, mark="oracle")
    if plot is not None:
        _draw(plot, f"{model}:{found.number}", report)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(f"{model}:{found.number}", report)
        print("\n".join(verdict))


def _version(registry: Registry, model: str, selector: str | None) -> Version:
    """The chosen one, or what is served, or the latest; of what is registered now."""
    chosen: str | int
    if selector is not None:
        chosen = selector
    else:
        registered = registry.model(model)
        latest = registered.versions[-1] if registered.versions else 1  # the registry says that there is none
        chosen = PRODUCTION if PRODUCTION in registered.aliases else latest
    return version_of(registry, model, chosen, otherwise=OTHERWISE)


def _verdict(model: HybridModel, report: Report) -> Iterator[str]:
    """What the tables mean."""
    clear, hidden = report.clear, report.hidden_from
    if clear is not None:
        yield f"From a clear embedding {_recovered(clear)}."
    for level in report.levels:
        if level.declared and level.sigma:
            yield f"As declared, at {_named(level)}, {_recovered(level)}; that costs {_cost(level)}."
    if hidden is None:
        yield "At no level of the ladder are all features within 5 points of guessing: give it a larger --sigma."
    elif hidden.sigma:
        yield (
            f"From {_named(hidden)} on, none is recovered by more than 5 points over guessing; there noise costs "
            f"{_cost(hidden)}."
        )
    worse = next((level for level in report.levels if level.auc < report.auc_without), None)
    if worse is not None and model.merge == "server":
        yield (
            f"With nothing of the device AUC is {report.auc_without:.3f}: from {_named(worse)} on, sending the "
            "embedding is worse than sending none, as it is served. A server that drew what it is sent towards the "
            f"mean would have {worse.auc_shrunk:.3f} there. merge='device' sends none and keeps the clear AUC."
        )
    if model.merge == "device":
        yield "This model merges on the device and releases no embedding: all this is what it would give away."


def _recovered(level: Level) -> str:
    """Of how many features, the most, and whole profiles."""
    better = [found for found in level.recovered if found.gain.low > 0]
    if not better:
        return "no feature is recovered better than by guessing"
    most = max(better, key=lambda found: found.gain.mean)
    said = f"{len(better)} of {len(level.recovered)} features are recovered better than by guessing, most of all "
    said += f"{most.feature}: {most.recovery:.0%} against {most.prior:.0%}"
    return f"{said}; the whole profile in {level.whole:.0%} of requests" if level.whole >= 0.005 else said


def _named(level: Level) -> str:
    return f"sigma {level.sigma:g} (a local epsilon of {level.epsilon:.3g} a request)" if level.sigma else "no noise"


def _cost(level: Level) -> str:
    cost = level.auc_cost
    return f"{cost.mean:.3f} AUC ({cost.low:.3f} to {cost.high:.3f}), of which {level.auc:.3f} is left"


def _doubts(version: Version, population: str, report: Report) -> Iterator[str]:
    """Where the attacked may be people whom the version learned from."""
    training = version.training
    if training.population == population and training.users != report.known:
        yield (
            f"Version {version.number} learned from {training.users} people, but {report.known} are not attacked: "
            "AUC is too good if it learned from attacked people. Give the --fold that it was trained with."
        )


def _print(name: str, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    levels = Table(title=f"{name}: what noise on the embedding costs, and hides (oracle)")
    for column in ("sigma", "local epsilon", "AUC", "AUC lost (95 %)", "AUC, shrunk", "largest gain", "whole profiles"):
        levels.add_column(column, justify="right")
    for level in report.levels:
        cost, most = level.auc_cost, level.most
        levels.add_row(
            _column(level),
            f"{level.epsilon:.3g}" if level.sigma else "none",
            f"{level.auc:.3f}",
            f"{cost.mean:.3f} ({cost.low:.3f}, {cost.high:.3f})" if level.sigma else "0",
            f"{level.auc_shrunk:.3f}",
            f"{most.feature} {_points(most)}",
            f"{level.whole:.1%}",
        )
    levels.add_row("nothing sent", "0", f"{report.auc_without:.3f}", "", "", "", "")
    features = Table(
        title=f"recovered: share of {report.rows} requests of {report.attacked} people, and points over guessing; "
        f"attackers know {report.known} others; clip {report.clip:.3g}"
    )
    features.add_column("feature")
    for column in ("guessing", *map(_column, report.levels)):
        features.add_column(column, justify="right")
    for every in zip(*(level.recovered for level in report.levels), strict=True):
        cells = (f"{found.recovery:.0%} {_points(found)}" for found in every)
        features.add_row(every[0].feature, f"{every[0].prior:.0%}", *cells)
    console = Console(width=None if sys.stdout.isatty() else 200)  # a file has room for a row
    console.print(levels, features, highlight=False)


def _column(level: Level) -> str:
    name = f"{level.sigma:g}" if level.sigma else "clear"
    return f"{name} (declared)" if level.declared else name


def _points(found: Recovered) -> str:
    return f"{round(100 * found.gain.mean):+d}"


def _draw(file: Path, name: str, report: Report) -> None:
    """AUC by noise level, and under it the points over guessing of each feature."""
    import numpy as np
    from matplotlib.figure import Figure

    order = np.argsort([-found.gain.mean for found in report.levels[0].recovered], kind="stable")
    gains = 100 * np.array([[level.recovered[f].gain.mean for level in report.levels] for f in order])
    figure = Figure(figsize=(2.6 + 0.75 * len(report.levels), 2.8 + 0.3 * len(order)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.3 * len(order)))
    places = np.arange(len(report.levels))
    above.plot(places, [level.auc for level in report.levels], marker="o", color="C0", label="AUC")
    shrunk = [level.auc_shrunk for level in report.levels]
    above.plot(places, shrunk, marker=".", linestyle="--", color="C0", label="did the server shrink it")
    above.axhline(report.auc_without, color="0.5", linestyle=":", label="with nothing of the device")
    above.spines[["top", "right"]].set_visible(False)
    above.set(ylabel="AUC", title=f"{name}: inversion audit (oracle)")
    above.legend(frameon=False, fontsize="small")
    below.imshow(gains, aspect="auto", cmap="Reds", vmin=0, vmax=100)
    for row, column in np.ndindex(*gains.shape):
        shown = gains[row, column]
        below.text(
            column,
            row,
            f"{round(float(shown))}",
            ha="center",
            va="center",
            color="w" if shown > 55 else "k",
            fontsize=8,
        )
    below.set_xticks(places, [_column(level).replace(" ", "\n") for level in report.levels])
    below.set_yticks(range(len(order)), [report.levels[0].recovered[f].feature for f in order])
    below.set(xlabel="sigma: noise over clip", ylabel="points over guessing")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
