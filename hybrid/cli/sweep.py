"""`hybrid sweep`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.runs import check_drawing, exactly, examples_of, progress_bar, run_folder
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.federation.grid import Grid
    from hybrid.federation.sweep import Result, Swept

app = typer.Typer()

LINES = 6  # of a plot that can be told apart; of more, the rest is grey
PANELS = {"auc": "AUC", "log_loss": "log-loss"}
REFERENCES = {"server-only": ":", "central": "-."}


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    grid: Annotated[Path, typer.Option(metavar="FILE", help=r"TOML: a table \[grid] of lists, and a table \[fixed].")],
    population: Annotated[
        str | None, typer.Option(help="What to learn from; by default the population of the model's name.")
    ] = None,
    fold: Annotated[str, typer.Option(metavar="K/N", help="Hold out the users of one fold of N.")] = "1/5",
    central: Annotated[
        bool, typer.Option("--central", help="Also train on pooled data, without privacy: the reference.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    r"""Trains a model under every combination of a grid, and compares them on held-out users.

    The grid's fields are those of the model's `training`, and `epsilon`, `clip`
    and `seed`; epsilon = inf trains without noise and without privacy, to see
    what privacy costs. Configurations that see the same people are trained as
    one batch. No version is registered: train the one you choose. The folder
    under `runs/` has results.json, plot.svg and a ledger for each configuration.
    Tuning is not in any epsilon: what all of them cost together is printed.

    A file like this trains 2 x 3 x 3 = 18 times:

        \[grid]
        server_lr = [0.003, 0.01]
        epsilon = [1, 2, 8]
        seed = [0, 1, 2]

    Example: hybrid sweep coupon --grid examples/coupon/grid.toml
    """
    from hybrid.federation.grid import Grid
    from hybrid.federation.population import parse_fold

    wanted = Grid.load(grid)
    parse_fold(fold)
    check_drawing("a sweep's plot")
    from hybrid.network import Network
    from hybrid.registry import Registry

    workspace = Workspace.current()
    registry = Registry(workspace)
    declared = registry.load_model(model)
    configurations = wanted.configurations(declared)
    Network.build(declared).check_registered(registry.definition(model)["network"])
    from hybrid.federation.sweep import sweep as sweep_model

    pending = declared.device_features.pending
    declared = exactly(declared, population or model, fold, workspace)
    train_on, held_out = examples_of(declared, population or model, fold, workspace)
    assert held_out is not None
    folder = run_folder(workspace.runs, None, f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{model}-sweep")
    with folder as run_dir, progress_bar(f"sweep of {model}") as progress:
        swept = sweep_model(
            declared, configurations, train_on, held_out, run_dir=run_dir, central=central, progress=progress
        )
        swept = replace(swept, exact=pending)
        shown = {"model": model, "population": train_on.population, "fold": fold, "run": str(run_dir)}
        shown |= _results(swept)
        _write(run_dir, wanted, shown)
        _draw(run_dir / "plot.svg", f"{model}: held-out users (oracle)", _rows(swept), swept.references)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(model, swept, run_dir)


def _write(run_dir: Path, grid: Grid, shown: Mapping[str, Any]) -> None:
    from hybrid.federation.sweep import finite

    lists = {
        name: [finite(value) if isinstance(value, float) else value for value in values]
        for name, values in grid.lists.items()
    }
    config = {"model": shown["model"], "kind": "sweep", "fold": shown["fold"], "grid": lists, "fixed": grid.fixed}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))
    (run_dir / "results.json").write_text(json.dumps(shown, indent=2))


def _results(swept: Swept) -> dict[str, Any]:
    """As JSON; whatever is measured on held-out users is under "oracle"."""
    from hybrid.federation.sweep import described, finite

    return {
        "configurations": [
            {
                "name": result.name,
                **described(result.configuration),
                "epsilon_spent": finite(result.epsilon),
                "noise_multiplier": result.noise_multiplier,
                "seconds": result.seconds,
                "oracle": {name: finite(value) for name, value in result.oracle.items()},
            }
            for result in swept.results
        ],
        "references": {
            kind: [{"oracle": {name: finite(value) for name, value in metrics.items()}} for metrics in of_seeds]
            for kind, of_seeds in swept.references.items()
        },
        "composed": {
            "epsilon": finite(swept.composed.epsilon),
            "delta": swept.delta,
            "accountant": swept.composed.method,
        },
        "statement": list(_statement(swept)),
    }


def _statement(swept: Swept) -> Iterator[str]:
    """What the epsilons do not say."""
    oracles = sum(result.configuration.is_oracle for result in swept.results)
    private = len(swept.results) - oracles
    yield (
        f"Tuning is not in the epsilon: {len(swept.results)} configurations looked at the same {swept.users} people, "
        "and each epsilon is of one of them alone."
    )
    if private:
        yield (
            f"Together the {private} with noise spent epsilon {swept.composed.epsilon:.3f} at delta {swept.delta:g} "
            f"({swept.composed.method}), each with noise of its own; in this seeded simulation those of one seed "
            "draw the same."
        )
    if swept.exact:
        names = ", ".join(swept.exact)
        yield f"Constants of {names} are exact, from pooled rows (oracle): their cost is in no epsilon."
    if oracles:
        yield f"{oracles} had no noise and no privacy at all (epsilon inf), and so has nobody who looks at the whole."
    yield (
        "Accuracy is measured on held-out users, pooled (oracle): only a simulation can see it, and what looks best "
        "on them will do a little worse on others."
    )


@dataclass(frozen=True)
class _Row:
    """The configurations that differ in their seed alone.

    Attributes:
        swept: what else the grid says of them.
        epsilon: to spend at most.
        results: one a seed.
    """

    swept: Mapping[str, Any]
    epsilon: float
    results: Sequence[Result]

    @property
    def label(self) -> str:
        """Of everything but epsilon."""
        others = [f"{name} {_short(value)}" for name, value in self.swept.items() if name != "epsilon"]
        return ", ".join(others) or "as declared"

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return fmean(result.oracle[metric] for result in self.results)

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds; None of one alone."""
        values = [result.oracle[metric] for result in self.results]
        return stdev(values) if len(values) > 1 else None

    def cell(self, metric: str) -> str:
        """For the table."""
        spread = self.spread(metric)
        return f"{self.mean(metric):.4f}" + ("" if spread is None else f" ± {spread:.4f}")


def _rows(swept: Swept) -> list[_Row]:
    """The best first, by the mean AUC of its seeds."""
    found: dict[str, _Row] = {}
    for result in swept.results:
        others = {name: value for name, value in result.configuration.swept.items() if name != "seed"}
        row = found.setdefault(repr(others), _Row(others, result.configuration.epsilon, []))
        assert isinstance(row.results, list)
        row.results.append(result)
    return sorted(
        found.values(), key=lambda row: -math.inf if math.isnan(row.mean("auc")) else row.mean("auc"), reverse=True
    )


def _print(model: str, swept: Swept, run_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = _rows(swept)
    seeds = len({result.configuration.seed for result in swept.results})
    table = Table(title=f"{model}: held-out users (oracle), mean ± standard deviation of {seeds} seeds, best first")
    fields = [name for name in rows[0].swept if name != "epsilon"]
    for name in [*fields, "AUC", "log-loss", "calibration", "epsilon spent", "seconds"]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [_short(row.swept[name]) for name in fields]
        cells += [row.cell(metric) for metric in ("auc", "log_loss", "calibration_ratio")]
        spent = max(result.epsilon for result in row.results)
        cells += ["inf (oracle)" if math.isinf(spent) else f"{spent:.3f}", _seconds(row)]
        table.add_row(*cells)
    for kind, of_seeds in swept.references.items():
        metrics = [f"{fmean(one[name] for one in of_seeds):.4f}" for name in ("auc", "log_loss", "calibration_ratio")]
        table.add_row(*[""] * len(fields), *metrics, kind, "")
    Console(width=None if sys.stdout.isatty() else 200).print(table, highlight=False)  # a file has room for a row
    print("\n".join(_statement(swept)))
    print(f"run: {run_dir} (results.json, plot.svg, a ledger for each configuration)")


def _seconds(row: _Row) -> str:
    return f"{sum(result.seconds for result in row.results):.2f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _draw(
    file: Path, title: str, rows: Sequence[_Row], references: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Accuracy against epsilon: a line for each combination of the other fields, the best of them in colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    places = _places(sorted({row.epsilon for row in rows}))
    lines: dict[str, list[_Row]] = {}
    for row in rows:  # the best first, so that a line's place is that of its best point
        lines.setdefault(row.label, []).append(row)
    if len(lines) > LINES:
        title += f"; best {LINES} of {len(lines)} combinations in colour"
    for axes, (metric, name) in zip(panels, PANELS.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        for number, (label, line) in enumerate(lines.items()):
            points = sorted(line, key=lambda row: row.epsilon)
            style = {"label": label, "zorder": 3} if number < LINES else {"color": "0.8", "label": f"_{label}"}
            axes.errorbar(
                [places[row.epsilon] for row in points],
                [row.mean(metric) for row in points],
                yerr=[row.spread(metric) or 0.0 for row in points],
                marker="o",
                markersize=4,
                capsize=3,
                **style,
            )
        for kind, of_seeds in references.items():
            level = fmean(one[metric] for one in of_seeds)
            axes.axhline(level, color="0.4", linewidth=1, linestyle=REFERENCES[kind], label=kind)
        axes.set_xticks(list(places.values()), ["no noise" if math.isinf(e) else f"{e:g}" for e in places])
        axes.set(xlabel="epsilon of one configuration (tuning not counted)", ylabel=name)
    figure.suptitle(title, fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", fontsize="small", ncols=3)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _places(epsilons: Sequence[float]) -> dict[float, float]:
    """Where each epsilon stands: by its logarithm; no noise, one step behind the last."""
    finite = [value for value in epsilons if math.isfinite(value)]
    places = {value: math.log2(value) for value in finite}
    if len(finite) < len(epsilons):
        places[math.inf] = max(places.values(), default=0.0) + 1.0
    return places
