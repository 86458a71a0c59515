"""`hybrid drift`: whether features and scores have moved, from noised counts, with a budget of its own."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.runs import check_plot, version_of
from hybrid.errors import ConfigError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hybrid.analytics.asking import People
    from hybrid.analytics.drift import Column, Counted, Period, Question
    from hybrid.features import Transform
    from hybrid.federation.population import Population
    from hybrid.network import Network
    from hybrid.spec import Drift, HybridModel
    from hybrid.version import Version

app = typer.Typer()

OTHERWISE = "choose a version of this one, or none, to watch features alone"

FAILED = 3  # exit status of --fail; 1 is an error
DECLARE = "add drift=Drift(epsilon=...) to it, from hybrid import Drift: what a week of watching may cost people"
ASSUMPTION = "each person counts by one row in each period; who was asked is public, who had a row in it is not"


class Every(StrEnum):
    """Periods that follow each other."""

    DAY = "day"
    WEEK = "week"


@app.command()
def drift(
    selector: Annotated[
        str,
        typer.Argument(metavar="MODEL[@ALIAS|:VERSION]", help="A model; with a version, its scores are watched too."),
    ],
    *,
    population: Annotated[
        str | None, typer.Option(help="Whose rows; by default the population of the model's name.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="Rows from then on, e.g. 2026-11-23 (UTC).")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Rows before then.")] = None,
    period: Annotated[
        Every | None,
        typer.Option(help="In place of --since: the last whole one before --until, by default before now."),
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="With each row's time; by default the population's.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="POPULATION", help="To compare with; by default the same, before --since.")
    ] = None,
    reference_since: Annotated[str | None, typer.Option(metavar="TIME", help="Its rows from then on.")] = None,
    reference_until: Annotated[str | None, typer.Option(metavar="TIME", help="Its rows before then.")] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(help="Of each period that is counted now; by default the model's, at most its week's."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the noise, to repeat a run; by default the operating system's.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write metrics for Prometheus' textfile collector (.prom).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the indices, into an .svg or .png.")
    ] = None,
    fail: Annotated[bool, typer.Option("--fail", help=f"Exit status {FAILED} if something has drifted.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Says whether device features, and a version's scores, are distributed as they were.

    Each person's last row of a period is counted, for all columns at once; one
    noised release leaves the aggregator, and is kept: a reference that was
    counted once costs nothing again. Of each column the population stability
    index (PSI) is estimated, without what noise and chance add to it. Below 0.1
    it is stable, from 0.25 on it has drifted; where the lower end of its interval
    is above, it is said, so that noise alone alarms nobody.

    The model declares what an ISO week may cost (`drift`), and each week has a
    ledger of its own. What would pass it is refused before anybody is asked.

    Example: hybrid drift coupon@production --population november --reference october
    """
    check_plot(plot)
    from hybrid.analytics.drift import compare, watched
    from hybrid.analytics.results import keep as keep_result
    from hybrid.registry import Registry, parse_selector

    name, which = parse_selector(selector)
    workspace = Workspace.current()
    registry = Registry(workspace)
    model = registry.load_model(name)
    version = None if which is None else version_of(registry, name, which, otherwise=OTHERWISE)
    now = datetime.now(UTC)
    week = _Week(model, version, workspace, now, time, epsilon, seed)
    current = week.period(population or name, *_period(since, until, period, now))
    before = _reference(current, version, reference, reference_since, reference_until)
    query = watched(week.device, score=version is not None)
    counted = week.counted([week.period(*before), current], query)
    columns = compare(*counted)
    shown = week.shown(counted, columns)
    week.folder.mkdir(parents=True, exist_ok=True)
    keep_result(week.folder, "drift", shown, mark="noised", spend=week.spend(counted[1]), now=now)
    if metrics is not None:
        write_metrics(metrics, shown)
    if plot is not None:
        _draw(plot, shown)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(shown)
    if fail and shown["drifted"]:
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Week:
    """One model's drift in the week of now: what is kept, and who is asked.

    Attributes:
        model, version: whose features, and whose scores.
        now: when.
        time: the column with each row's time; None: the population's.
        epsilon: of each period that is asked now; None: the model's.
        seed: of the noise.

    Raises:
        ConfigError: the model does not declare what a week may cost.
    """

    model: HybridModel
    version: Version | None
    workspace: Workspace
    now: datetime
    time: str | None
    epsilon: float | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.model.drift is None:  # said first: no other option helps before it
            raise ConfigError(f"drift of {self.model.name!r} must be declared: {DECLARE}")

    @property
    def name(self) -> str:
        """The ISO week."""
        from hybrid.week import week_of

        return week_of(self.now)

    @property
    def folder(self) -> Path:
        """Of its ledger and counts."""
        from hybrid.analytics.drift import folder_of

        return folder_of(self.workspace.runs, self.model.name, self.name)

    @property
    def declared(self) -> Drift:
        """What the model declares."""
        assert self.model.drift is not None
        return self.model.drift

    @property
    def price(self) -> tuple[float, float]:
        """Of one period: an epsilon, and the share of it that is spent."""
        if self.epsilon is None:
            return self.declared.epsilon, 1 / self.declared.periods
        if not 0 < self.epsilon <= self.declared.epsilon:
            raise ConfigError(
                f"--epsilon must be in (0, {self.declared.epsilon:g}], the week's that {self.model.name} declares, "
                f"got {self.epsilon:g}"
            )
        return self.epsilon, 1.0

    def period(self, population: str, since: datetime | None, until: datetime | None) -> Period:
        """Of an imported population."""
        from hybrid.analytics.drift import Period

        file = self.workspace.populations / population / "population.json"
        if not file.is_file():
            raise NotFound(f"population {population!r} does not exist; `hybrid population import` makes one")
        imported = datetime.fromtimestamp(int(file.stat().st_mtime), UTC)
        return Period(population=population, imported=imported, since=since, until=until)

    def counted(self, periods: Sequence[Period], query: Any) -> list[Counted]:
        """The counts of each period: those that are kept, and the others asked."""
        from hybrid.analytics.drift import Question, kept

        if len(set(map(str, periods))) < len(periods):
            raise ConfigError(
                f"the reference must be another period or population than {periods[0]}: give --reference, or --since"
            )
        version = None if self.version is None else self.version.number
        asked = [Question(model=self.model.name, version=version, period=p, query=query) for p in periods]
        found = {question: self._best(question, kept(self.workspace.runs, self.model.name)) for question in asked}
        missing = [question for question, counted in found.items() if counted is None]
        found |= self._ask(missing)
        return [counted for question in asked if (counted := found[question]) is not None]

    @staticmethod
    def _best(question: Question, kept: Iterable[Counted]) -> Counted | None:
        """Those with the least noise."""
        return min((one for one in kept if one.question == question), key=lambda one: one.sd, default=None)

    def _ask(self, questions: Sequence[Question]) -> dict[Question, Counted]:
        from hybrid.analytics.asking import DRIFT, Simulated, phase
        from hybrid.analytics.drift import count, keep
        from hybrid.privacy.accountant import epsilon as accounted
        from hybrid.privacy.accountant import noise_multiplier_for
        from hybrid.privacy.ledger import Ledger

        whole, share = self.price
        if not questions:
            return {}
        delta = self.model.privacy.delta
        event = phase(noise_multiplier_for(whole, delta, 1.0, 1), share)
        alone = accounted([event], delta).epsilon
        self._begin()
        found = {}
        with Ledger.open(self.folder, budget_epsilon=self.declared.epsilon, delta=delta) as ledger:
            ledger.reserve([event] * len(questions))  # or refuses, before anybody's rows are read
            for question in questions:
                seed = None if self.seed is None else zlib.crc32(f"{self.seed}:{self.name}".encode())
                ask = Simulated(self._people(question), ledger, purpose=DRIFT, epsilon=whole, seed=seed)
                found[question] = count(ask, question, share=share, epsilon=alone, delta=delta, now=self.now)
                keep(found[question], self.folder, len(ledger.entries))
        return found

    def _begin(self) -> None:
        """Says whose the folder is, for `hybrid privacy`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"unit": self.model.privacy.unit, "protects": "device features", "assumption": ASSUMPTION}
        config = {"model": self.model.name, "kind": "drift", **about}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2))

    def _people(self, question: Question) -> People:
        """Their raw features, and scores where they are asked for, of rows in the period."""
        import numpy as np

        from hybrid.analytics.asking import People
        from hybrid.federation.noise import check_delta
        from hybrid.federation.population import Population
        from hybrid.query import SCORE

        population = Population.open(question.period.population, self.workspace)
        check_delta(self.model, population.users)
        rows = last_of_each(rows_in(population, question.period, self.time), population.offsets)  # no other counts
        columns = {name: population.column(name)[rows] for name in question.query.reads if name != SCORE}
        if self.version is not None:
            columns[SCORE] = self._scores(population, rows)
        return People(columns, np.searchsorted(rows, population.offsets))

    @property
    def device(self) -> Mapping[str, Transform]:
        """The device features, with the constants that the version learned, if there is one."""
        return self.model.device if self.version is None else self._network.model.device

    @cached_property
    def _network(self) -> Network:
        """The version's."""
        from hybrid.network import Network

        assert self.version is not None
        network = Network.of(self.model, self.version)
        network.check_registered(self.version.definition["network"])
        return network

    def _scores(self, population: Population, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """(k,) what the version predicts for some rows; none needs a label."""
        import numpy as np

        from feature_store.offline import join
        from hybrid.federation.engine import predict
        from hybrid.federation.population import ROWS_A_PART, Examples, encoded

        assert self.version is not None
        model, version = self._network.model, self.version
        times = None if population.time is None else population.column(population.time)[rows]
        entities = population.column(model.server.entity.join_key)[rows]
        slots = np.full((len(population), len(model.server.features)), np.nan, np.float32)
        slots[rows] = join(model, entities, times, self.workspace.feast)
        scores = [np.zeros(0, np.float32)]
        for begin in range(0, len(rows), ROWS_A_PART):
            server, device = encoded(model, population, slots, rows[begin : begin + ROWS_A_PART])
            part = Examples(server, device, np.zeros(len(server), np.float32), np.array([0, len(server)]))
            scores.append(predict(self._network, part, without=version.training.without))
        return np.concatenate(scores)

    def shown(self, counted: Sequence[Counted], columns: Sequence[Column]) -> dict[str, Any]:
        """What is printed and kept."""
        from hybrid.analytics.drift import unwatched
        from hybrid.analytics.psi import DRIFTED, MOVED

        reference, current = (self._counted_json(one) for one in counted)
        return {
            "model": self.model.name,
            "version": None if self.version is None else self.version.number,
            "time": self.now.isoformat(),
            "reference": reference,
            "current": current,
            "thresholds": {"moved": MOVED, "drifted": DRIFTED},
            "columns": [_column_json(column) for column in columns],
            "drifted": [column.name for column in columns if column.psi.verdict == "drifted"],
            "unwatched": list(unwatched(self.device)),
            "privacy": self._privacy(),
        }

    def _counted_json(self, counted: Counted) -> dict[str, Any]:
        rows = [cells.counts.sum() for cells in counted.columns.values()]
        period = counted.question.period
        return {
            "name": str(period),
            **period.model_dump(mode="json", exclude={"imported"}),
            "people": counted.people,
            "rows": max(0.0, float(sum(rows) / len(rows))),
            "counted": counted.time.isoformat(),
            "week": counted.week,
            "epsilon": counted.epsilon,
            "kept": counted.time != self.now,
        }

    def spend(self, counted: Counted) -> dict[str, Any]:
        """What a period cost in the week in which it was counted, for a report."""
        from hybrid.analytics.asking import DRIFT
        from hybrid.analytics.drift import folder_of

        paid = folder_of(self.workspace.runs, self.model.name, counted.week)
        about = {"epsilon": counted.epsilon, "delta": self.model.privacy.delta, "purpose": DRIFT, "releases": 1}
        return about | {"run": paid.name}

    def _privacy(self) -> dict[str, Any]:
        """Of the week's ledger."""
        from hybrid.privacy.ledger import FILE, Ledger

        paid = (self.folder / FILE).is_file()
        spent = Ledger.read(self.folder).spent() if paid else None
        return {
            "week": self.name,
            "run": self.folder.name,
            "budget_epsilon": self.declared.epsilon,
            "delta": self.model.privacy.delta,
            "epsilon": 0.0 if spent is None else spent.epsilon,
            "left": self.declared.epsilon if spent is None else max(0.0, self.declared.epsilon - spent.epsilon),
            "accountant": None if spent is None else spent.method,
            "unit": self.model.privacy.unit,
            "protects": "device features",
        }


def rows_in(population: Population, period: Period, time: str | None) -> NDArray[np.int64]:
    """(k,) the rows of a period, ascending.

    Raises:
        ConfigError: it has an end, and rows have no time.
    """
    import numpy as np

    if period.since is None and period.until is None:
        return np.arange(len(population))
    column = time or population.time
    if column is None:
        raise ConfigError(
            f"population {population.name!r} must have a time to be cut into periods: name its column by --time, "
            "or import each period as a population and give --reference"
        )
    times = population.column(column)
    if times.dtype.kind != "M":
        raise ConfigError(f"column {column!r} must hold a timestamp in every row, got {times.dtype}")
    inside = ~np.isnat(times)
    for end, keeps in ((period.since, np.greater_equal), (period.until, np.less)):
        if end is not None:
            inside &= keeps(times, np.datetime64(end.astimezone(UTC).replace(tzinfo=None)))
    return np.flatnonzero(inside)


def last_of_each(rows: NDArray[np.int64], offsets: NDArray[np.integer]) -> NDArray[np.int64]:
    """(k,) rows, ascending, of people whose rows begin at `offsets` -> the last one of each who has any."""
    import numpy as np

    ends = np.searchsorted(rows, offsets)
    return rows[ends[1:][np.diff(ends) > 0] - 1]


def _reference(
    current: Period, version: Version | None, named: str | None, since: str | None, until: str | None
) -> tuple[str, datetime | None, datetime | None]:
    """The population that is named, or the same one before, or what the version was trained on; and its ends."""
    first, end = _time("--reference-since", since), _time("--reference-until", until)
    if named is None and current.since is None and end is None and version is not None:
        return version.training.population, first, end
    if named is None and end is None:
        end = current.since
    return named or current.population, first, end


def _period(
    since: str | None, until: str | None, every: Every | None, now: datetime
) -> tuple[datetime | None, datetime | None]:
    """What the three options say.

    Raises:
        ConfigError: they contradict each other, or are no times.
    """
    first, end = _time("--since", since), _time("--until", until)
    if every is None:
        if first is not None and end is not None and first >= end:
            raise ConfigError(f"--since must be before --until, got {since} and {until}")
        return first, end
    if first is not None:
        raise ConfigError("--since must be left out with --period, which says how long before --until it begins")
    last = (end or now).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if every is Every.WEEK:
        last -= timedelta(days=last.weekday())
    return last - timedelta(days=7 if every is Every.WEEK else 1), last


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} must be a time such as 2026-11-23 or 2026-11-23T12:00, got {text!r}") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _column_json(column: Column) -> dict[str, Any]:
    return {
        "column": column.name,
        "psi": column.psi.value,
        "low": column.psi.low,
        "high": column.psi.high,
        "verdict": column.psi.verdict,
        "cells": list(column.cells),
        "reference": column.reference.tolist(),
        "current": column.current.tolist(),
    }


def write_metrics(file: Path, shown: Mapping[str, Any]) -> None:
    """Prometheus' text, which any may read: node_exporter seldom runs as who wrote it.

    Raises:
        ConfigError: the file is not one that the textfile collector would read, or cannot be written.
    """
    from prometheus_client import CollectorRegistry, generate_latest

    if file.suffix != ".prom":
        raise ConfigError(f"--metrics must end with .prom, which is what the collector reads, got {file.name!r}")
    registry = CollectorRegistry()
    _fill(registry, shown)
    draft = file.with_suffix(".prom.new")  # the collector must not read half of it
    try:
        draft.write_bytes(generate_latest(registry))
        os.chmod(draft, 0o644)
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"--metrics {str(file)!r} cannot be written: {error.strerror}") from None


def _fill(registry: Any, shown: Mapping[str, Any]) -> None:
    from prometheus_client import Gauge

    pair = {"model": shown["model"], "version": "" if shown["version"] is None else str(shown["version"])}

    def gauge(name: str, text: str, *labels: str) -> Any:
        return Gauge(name, text, (*pair, *labels), registry=registry)

    psi = gauge("hybrid_drift_psi", "Population stability index of a column, against its reference.", "column")
    low = gauge("hybrid_drift_psi_low", "Lower end of its 95 % interval.", "column")
    high = gauge("hybrid_drift_psi_high", "Upper end of its 95 % interval.", "column")
    alert = gauge("hybrid_drift_alert", "1 where a column has drifted, by the lower end.", "column")
    for column in shown["columns"]:
        labels = {**pair, "column": column["column"]}
        for family, key in ((psi, "psi"), (low, "low"), (high, "high")):
            family.labels(**labels).set("nan" if column[key] is None else column[key])
        alert.labels(**labels).set(column["verdict"] == "drifted")
    privacy = shown["privacy"]
    texts = {"epsilon": ("spent", "Spent on drift this ISO week."), "left": ("left", "Left for drift this ISO week.")}
    for key, (name, text) in texts.items():
        gauge(f"hybrid_drift_epsilon_{name}", text).labels(**pair).set(privacy[key])
    stamp = datetime.fromisoformat(shown["time"]).timestamp()
    gauge("hybrid_drift_time_seconds", "When it was compared, Unix time.").labels(**pair).set(stamp)


def _print(shown: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column as Heading
    from rich.table import Table

    table = Table(Heading("column", overflow="fold"), "PSI", "95 % interval", "verdict")
    for column in sorted(shown["columns"], key=lambda column: (-column["low"], -(column["psi"] or 0.0))):
        if column["psi"] is None:
            table.add_row(column["column"], "?", "drowned by noise", column["verdict"])
        else:
            interval = f"{column['low']:.3f} to {column['high']:.3f}"
            table.add_row(column["column"], f"{column['psi']:.3f}", interval, column["verdict"])
    Console(highlight=False).print(table)
    print("\n".join(_lines(shown)))


def _lines(shown: Mapping[str, Any]) -> Iterator[str]:
    version = "" if shown["version"] is None else f":{shown['version']}"
    for role in ("current", "reference"):
        side = shown[role]
        paid = f"epsilon {side['epsilon']:.3f}" + (f" in {side['week']}, nothing now" if side["kept"] else "")
        yield f"{role + ':':10} {side['name']}: about {side['rows']:.0f} of {side['people']} people had rows; {paid}"
    drifted = ", ".join(shown["drifted"]) or "nothing"
    yield f"{shown['model']}{version}: drifted: {drifted}"
    if any(column["verdict"] == "unclear" for column in shown["columns"]):
        yield "Unclear: with so few people, noise and chance leave room for none and for much; ask more, or for longer."
    for name in shown["unwatched"]:
        yield f"not watched: {name}, whose hash has no cells that could be counted"
    privacy = shown["privacy"]
    yield (
        f"privacy, week {privacy['week']}: epsilon {privacy['epsilon']:.3f} of {privacy['budget_epsilon']:g} at delta "
        f"{privacy['delta']:g} per {privacy['unit']}, {privacy['left']:.3f} left; protects the {privacy['protects']}; "
        "beside what training spends"
    )


def _draw(file: Path, shown: Mapping[str, Any]) -> None:
    """A dot and its interval for each column, with both thresholds."""
    from matplotlib.figure import Figure

    columns = [column for column in shown["columns"] if column["psi"] is not None]
    columns.sort(key=lambda column: (column["low"], column["psi"]))
    figure = Figure(figsize=(7.0, 1.4 + 0.28 * len(columns)), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    names, values = [column["column"] for column in columns], [column["psi"] for column in columns]
    ends = [
        [column["psi"] - column["low"] for column in columns],
        [column["high"] - column["psi"] for column in columns],
    ]
    axes.errorbar(values, names, xerr=ends, fmt="o", capsize=3, markersize=4)
    for name, colour in (("moved", "C1"), ("drifted", "C3")):
        at = shown["thresholds"][name]
        axes.axvline(at, color=colour, linestyle=":", label=f"{name}: {at:g}")
    right = max([2 * shown["thresholds"]["drifted"], *(1.2 * value for value in values)])
    axes.set(xlim=(0, right), xlabel="population stability index, 95 % intervals")
    axes.set(title=f"{shown['model']}: {shown['current']['name']} against {shown['reference']['name']}")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
