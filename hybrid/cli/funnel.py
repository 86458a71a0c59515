"""`hybrid funnel`: where devices drop out, version by version, from noised counts, with a budget of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.asking import MECHANISM, ONE_ANSWER, ONE_TOKEN, ROUND_S, DevicesOf, RoundS, TokensOf, bar
from hybrid.cli.runs import PRODUCTION, check_plot, progress_bar
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.files import write_whole
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.analytics.estimates import Estimate
    from hybrid.analytics.funnel import Funnel, OfVersion
    from hybrid.privacy.ledger import Ledger
    from hybrid.spec import Funnel as Declared
    from hybrid.spec import HybridModel

app = typer.Typer()

KIND = "funnel"
PROTECTS = "what the device's journal says"
DECLARE = "add funnel=Funnel(epsilon=...) to it, from hybrid import Funnel: what a week of it may cost people"
TOP = 5  # reasons of a version that are printed
WIDE = 72  # columns of a terminal on which there is room for bars


@app.command()
def funnel(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    devices: DevicesOf = None,
    not_charging: Annotated[
        int, typer.Option("--not-charging", min=0, metavar="K", help="With --devices: so many of them never are.")
    ] = 0,
    round_s: RoundS = None,
    tokens: TokensOf = False,
    version: Annotated[str, typer.Option(help="With --devices: the promoted version that they have.")] = PRODUCTION,
    population: Annotated[
        str | None, typer.Option(help="With --devices: whose they are; by default the population of the model's name.")
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="To spend; by default, and at most, what the model declares for a week.")
    ] = None,
    week: Annotated[
        str | None, typer.Option(metavar="YEAR-WEEK", help="Of what is kept, e.g. 2026-W47; by default the last.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it, into an .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows how many devices came how far last week, by version, and why no further.

    Phases are: checked (it was offered the version), downloaded, eligible (it might
    take part, and asked), planned (it was given something to do), trained (or
    answered), uploaded. Each device keeps a journal of one line a version and week,
    and tells the line of its newest version, once, after the week is over. Only
    noised sums leave the aggregator; what fewer devices tell than the threshold is
    not shown.

    With --devices real devices take part on this machine, with clocks that are a
    week behind, and then tell. Without, what was told before is shown, which
    costs nothing. The model declares what a week may cost (`funnel`), and each week
    has a ledger of its own. docs/funnel.md says how a running fleet is asked.

    Example: hybrid funnel coupon --devices 60 --not-charging 25

    Example: hybrid funnel coupon
    """
    check_plot(plot)
    workspace = Workspace.current()
    if devices is None:
        _check_alone(not_charging=not_charging, round_s=round_s, tokens=tokens, epsilon=epsilon)
        shown = _kept(workspace.runs, model, week)
    else:
        if week is not None:
            raise ConfigError(f"--week must be left out with --devices: they tell of the last week, got {week}")
        if not_charging > devices:
            raise ConfigError(f"--not-charging must be at most the {devices} of --devices, got {not_charging}")
        order = _Order(workspace, version, population or model, devices, not_charging, round_s or ROUND_S, tokens)
        shown = _asked(order, model, epsilon)
    if plot is not None:
        _draw(plot, shown)
    if as_json:
        print(json.dumps(shown))
    else:
        _print(shown)


def _check_alone(**given: Any) -> None:
    """Raises: ConfigError: an option is given that asks, and nobody to ask."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name.replace('_', '-')} must be left out without --devices, got {value}")


def _kept(runs: Path, model: str, week: str | None) -> dict[str, Any]:
    """What was told before.

    Raises:
        NotFound: nothing of that week, or of any.
    """
    from hybrid.analytics.results import read

    found = [result.shown for _, result in read(runs, model) if result.kind == KIND]
    found = [shown for shown in found if week in (None, shown["week"])]
    if not found:
        raise NotFound(
            f"no funnel of {model!r} is kept{'' if week is None else f' of {week}'}: `hybrid funnel {model} --devices "
            "N` asks devices of this machine, docs/funnel.md says how a fleet is asked"
        )
    return max(reversed(found), key=lambda shown: shown["week"])


@dataclass(frozen=True)
class _Order:
    """Devices of this machine that are asked: see `hybrid.local.fleet.reporting`."""

    workspace: Workspace
    version: str
    population: str
    devices: int
    not_charging: int
    round_s: float
    tokens: bool


def _asked(order: _Order, name: str, epsilon: float | None) -> dict[str, Any]:
    """What they tell of last week, kept and paid for."""
    from hybrid.analytics.asking import FUNNEL
    from hybrid.analytics.fleet import FleetAsk
    from hybrid.analytics.funnel import folder_of, latest, query_of
    from hybrid.analytics.funnel import funnel as told
    from hybrid.analytics.results import keep
    from hybrid.federation.noise import check_delta
    from hybrid.local.fleet import Promoted, reporting
    from hybrid.privacy.ledger import Ledger
    from hybrid.registry import Registry
    from hybrid.week import last_week

    registry, now = Registry(order.workspace), datetime.now(UTC)
    model = registry.load_model(name)
    declared, delta = _declared(model), model.privacy.delta
    spent = declared.epsilon if epsilon is None else epsilon
    if not 0 < spent <= declared.epsilon:
        raise ConfigError(
            f"--epsilon must be in (0, {declared.epsilon:g}], the week's that {name} declares, got {spent:g}"
        )
    check_delta(model, order.devices)
    promoted = Promoted.open(name, order.version, order.workspace)
    people = promoted.people(order.population, order.devices, order.workspace)
    week = last_week(now)
    folder = folder_of(order.workspace.runs, name, week)
    options: dict[str, Any] = {"round_s": order.round_s, "tokens": order.tokens, "not_charging": order.not_charging}
    with Ledger.open(folder, budget_epsilon=declared.epsilon, delta=delta) as ledger:
        about = {
            "unit": "user" if order.tokens else "device",
            "protects": PROTECTS,
            "assumption": ONE_TOKEN if order.tokens else ONE_ANSWER,
        }
        write_whole(folder / "config.json", json.dumps({"model": name, "kind": KIND, **about}, indent=2).encode())
        with (
            progress_bar(f"{order.devices} devices take part, and tell, {order.round_s:g} s each"),
            reporting(promoted, people, ledger, order.workspace.keys, **options) as (aggregator, take_part),
        ):
            ask = FleetAsk(aggregator, purpose=FUNNEL, epsilon=spent)
            try:
                ask.begin((1.0,))  # in the week's budget, or nobody is asked
            except BudgetExceeded as error:
                kept = f"`hybrid funnel {name} --week {week}` shows what was told"
                raise BudgetExceeded(f"{error}; devices tell of {week} once: {kept}") from None
            take_part()
            answer = ask(query_of(week, latest(registry.model(name).versions)))
        privacy = _privacy(ledger, folder.name, week) | about
    shown = shown_of(name, week, told(answer, declared.least)) | {"privacy": privacy}
    spend = {"epsilon": spent, "delta": delta, "purpose": FUNNEL, "releases": 1, "run": folder.name}
    keep(folder, KIND, shown, mark="noised", spend=spend, now=now)
    return shown


def _declared(model: HybridModel) -> Declared:
    """Raises: ConfigError: the model does not declare what a week may cost."""
    if model.funnel is None:
        raise ConfigError(f"funnel of {model.name!r} must be declared: {DECLARE}")
    return model.funnel


def _privacy(ledger: Ledger, run: str, week: str) -> dict[str, Any]:
    """Of the week's ledger."""
    spent = ledger.spent()
    return {
        "week": week,
        "run": run,
        "budget_epsilon": ledger.budget_epsilon,
        "delta": ledger.delta,
        "epsilon": spent.epsilon,
        "left": max(0.0, ledger.budget_epsilon - spent.epsilon),
        "mechanism": MECHANISM,
        "accountant": spent.method,
    }


def shown_of(model: str, week: str, told: Funnel) -> dict[str, Any]:
    """As JSON values; what is below the threshold is null, or not there."""
    return {
        "model": model,
        "week": week,
        "people": told.people,
        "threshold": told.threshold,
        "versions": [_version_json(each) for each in told.versions],
    }


def _version_json(told: OfVersion) -> dict[str, Any]:
    phases = [{"name": str(phase), **_number(devices)} for phase, devices in told.phases.items()]
    stops = [{"phase": str(each.phase), "reason": each.reason, **_number(each.devices)} for each in told.stops]
    return {"version": told.version, "devices": _number(told.devices), "phases": phases, "stopped": stops}


def _number(devices: Estimate | None) -> dict[str, float | None]:
    """With the 95 % interval of the mechanism's noise."""
    if devices is None:
        return {"value": None, "low": None, "high": None}
    return {"value": devices.value, "low": devices.noise.low, "high": devices.noise.high}


def _print(shown: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    print(f"{shown['model']}, week {shown['week']}: {shown['people']:,} devices told how far they came")
    for version in shown["versions"]:
        table = Table(
            "phase",
            Column("devices", justify="right", no_wrap=True),
            Column("of before", justify="right"),
            *([""] if console.width >= WIDE else []),
            title=f"version {version['version']}",
            title_justify="left",
        )
        for row in _rows(version, shown["threshold"]):
            table.add_row(*row[: len(table.columns)])
        console.print(table)
        for place in version["stopped"][:TOP]:
            print(f"  stopped at {place['phase']}, {place['reason']}: {_give_or_take(place)}")
    print("\n".join(_lines(shown)))


def _rows(version: Mapping[str, Any], threshold: float) -> Iterator[tuple[str, str, str, str]]:
    """Of a version's table: phase, devices, their share of the phase before, and a bar."""
    before, most = None, version["devices"]["high"]
    for phase in version["phases"]:
        value = phase["value"]
        share = "" if value is None or before is None else f"{min(value / before, 1.0):.0%}"
        ends = {"value": value, "noise": [phase["low"], phase["high"]]}
        said = f"fewer than {threshold:.0f}" if value is None else _give_or_take(phase)
        yield phase["name"], said, share, bar(ends, most)
        before = value


def _give_or_take(number: Mapping[str, float]) -> str:
    """A count, and half of its interval where the range of such a number does not cut it.

    >>> _give_or_take({"value": 812.4, "low": 780.0, "high": 844.8})
    '812 ± 32'
    """
    value = number["value"]
    return f"{value:,.0f} ± {max(value - number['low'], number['high'] - value):,.0f}"


def _lines(shown: Mapping[str, Any]) -> Iterator[str]:
    threshold, people, privacy = shown["threshold"], shown["people"], shown["privacy"]
    if not shown["versions"]:
        yield f"Nothing is shown: no version has {threshold:.0f} devices or more, as far as the noise lets it be seen."
    if threshold > people:
        yield (
            f"The noise is as large as this fleet: with {people} devices and epsilon {privacy['epsilon']:.3g} nothing "
            "can be told; ask more devices, or declare a larger epsilon."
        )
    yield f"± is 95 % of the noise; numbers below {threshold:.0f} are not shown, reasons with fewer devices neither."
    yield (
        f"privacy, week {privacy['week']}: epsilon {privacy['epsilon']:.3f} of {privacy['budget_epsilon']:g} at delta "
        f"{privacy['delta']:g} per {privacy['unit']}, {privacy['left']:.3f} left; protects {privacy['protects']}"
    )
    yield f"  {privacy['mechanism']}; assumes: {privacy['assumption']}"


def _draw(file: Path, shown: Mapping[str, Any]) -> None:
    """Devices by phase with their intervals, a colour for each version."""
    from matplotlib.figure import Figure

    versions = shown["versions"]
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    width = 0.8 / max(1, len(versions))
    for place, version in enumerate(versions):
        there = [(at, phase) for at, phase in enumerate(version["phases"]) if phase["value"] is not None]
        values = [phase["value"] for _, phase in there]
        ends = [[phase["value"] - phase["low"] for _, phase in there], [p["high"] - p["value"] for _, p in there]]
        at = [x + (place - (len(versions) - 1) / 2) * width for x, _ in there]
        axes.bar(at, values, width, yerr=ends, capsize=3, label=f"version {version['version']}")
    names = [phase["name"] for phase in versions[0]["phases"]] if versions else []
    axes.set_xticks(range(len(names)), names)
    axes.axhline(shown["threshold"], color="C7", linestyle=":", label=f"not shown below {shown['threshold']:.0f}")
    axes.set(ylabel="devices, 95 % intervals", title=f"{shown['model']}: week {shown['week']}")
    figure.legend(frameon=False, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
