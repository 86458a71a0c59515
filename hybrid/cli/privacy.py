"""`hybrid privacy`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.runs import check_plot
from hybrid.errors import ConfigError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.privacy.accountant import Spent
    from hybrid.privacy.ledger import Account, AnyEntry
    from hybrid.version import TrainingRecord

app = typer.Typer()

SCOPE = "per run; repeats and tuning not composed"
ABOUT = ("unit", "protects", "assumption")  # of a run: its versions say it, or its config.json where it has none
POINTS = 48  # of all lines of a plot: composing takes up to a second each
TOLERANCE = 0.02  # an accountant that got tighter is no damage


@app.command()
def privacy(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="Only this folder under runs/.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw epsilon against releases, into an .svg or .png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows what a model's trainings spent of their privacy budgets, on what, and what is left.

    Each run has one ledger and one budget, which every training given that run
    shares: a guarantee is per run, and does not cover repeating or tuning it.
    What it would be for a person who was in all of the model's runs is said too.
    Only ledgers are read, and nothing is written: a training may be going on.

    Example: hybrid privacy coupon --plot privacy.svg
    """
    check_plot(plot)
    from hybrid.registry import Registry

    workspace = Workspace.current()
    trainings = Registry(workspace).trainings(model)
    every = _runs(workspace.runs, model, trainings)
    if not every and not trainings:
        raise ConfigError(f"{model} has no trained version; run `hybrid train {model}` first")
    runs = every if run is None else [found for found in every if found.name == run]
    if run is not None and not runs:
        names = ", ".join(found.name for found in every) or "none"
        raise NotFound(f"{model} has no run {run!r} that spent privacy; it has: {names}")
    shown = {
        "model": model,
        "versions": len(trainings),
        "runs": [_run_json(found) for found in runs],
        "references": [
            {"version": number, "kind": record.kind} for number, record in trainings.items() if record.epsilon is None
        ],
        "scope": SCOPE,
        "composed": _composed(every),
    }
    if plot is not None:
        _draw(plot, model, runs)
    print(json.dumps(shown) if as_json else "\n".join(_lines(shown, of=len(every))))


@dataclass(frozen=True)
class _Run:
    """One run of the model that spent privacy, or should have.

    Attributes:
        name: of its folder.
        trained: version -> record, of the versions that it made under a mechanism.
        account: of its ledger; None where that is missing.
        spent: what it comes to; None likewise.
        config: what its config.json says; empty where there is none.
    """

    name: str
    trained: Mapping[int, TrainingRecord]
    account: Account | None
    spent: Spent | None
    config: Mapping[str, Any]

    @property
    def doubt(self) -> str | None:
        """Why the ledger cannot be the whole account."""
        claimed = max((record.epsilon or 0.0 for record in self.trained.values()), default=0.0)
        if self.spent is None:
            return f"its ledger is missing; its versions spent epsilon {claimed:.3f} at least"
        if self.spent.epsilon < (1 - TOLERANCE) * claimed:
            return f"its ledger shows less than its versions, which spent epsilon {claimed:.3f} at least"
        return None


def _runs(folder: Path, model: str, trainings: Mapping[int, TrainingRecord]) -> list[_Run]:
    """Of its versions, of answers about it, and with a ledger alone: those go on, or failed, or are a sweep's."""
    from hybrid.analytics.results import read
    from hybrid.privacy.ledger import FILE

    trained: dict[str, dict[int, TrainingRecord]] = {}
    for number, record in trainings.items():
        if record.epsilon is not None:
            trained.setdefault(record.run, {})[number] = record
    for _, result in read(folder, model):
        if result.spend is not None:  # another model's run may have paid
            trained.setdefault(result.spend["run"], {})
    for ledger in sorted([*folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}")]):  # a sweep has one a configuration
        name = ledger.parent.relative_to(folder).as_posix()
        if name not in trained and _config(ledger.parent).get("model") == model:
            trained[name] = {}
    runs = []
    for name, versions in trained.items():
        account = _read(folder / name)
        runs.append(_Run(name, versions, account, account.spent() if account else None, _config(folder / name)))
    return runs


def _read(run: Path) -> Account | None:
    from hybrid.privacy.ledger import Ledger

    try:
        return Ledger.read(run)
    except NotFound:
        return None


def _config(run: Path) -> dict[str, Any]:
    """What the run's config.json says, e.g. whose it is; empty where nobody wrote one yet."""
    try:
        config = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _run_json(run: _Run) -> dict[str, Any]:
    record = next(iter(run.trained.values()), None)
    shown = {
        "run": run.name,
        "versions": list(run.trained),
        "kind": run.config.get("kind"),
        **{about: getattr(record, about) if record else run.config.get(about) for about in ABOUT},
        "doubt": run.doubt,
    }
    account, spent = run.account, run.spent
    if account is None or spent is None:
        return shown
    return shown | {
        "budget_epsilon": account.budget_epsilon,
        "delta": account.delta,
        "epsilon": spent.epsilon,
        "accountant": spent.method,
        "left": max(0.0, account.budget_epsilon - spent.epsilon),
        "releases": len(account.entries),
        "lost": len(account.lost),
        "spent_on": _spent_on(account),
    }


def _spent_on(account: Account) -> list[dict[str, Any]]:
    """The releases by what they have in common, each kind with what it would cost alone."""
    from hybrid.privacy.accountant import epsilon
    from hybrid.privacy.ledger import costs

    def kind(entry: AnyEntry) -> tuple[str, ...]:
        return entry.purpose, entry.mechanism, *(f"{value!r}" for value in _kind(entry).values())

    shown = []
    for (purpose, mechanism, *_), entries in groupby(sorted(account.entries, key=kind), kind):
        same = list(entries)
        clips = [entry.clip for entry in same]
        shown.append(
            {
                "purpose": purpose,
                "mechanism": mechanism,
                **_kind(same[0]),
                "releases": len(same),
                "clip": [min(clips), max(clips)],
                "epsilon_alone": epsilon(costs(same), account.delta).epsilon,
            }
        )
    return shown


def _kind(entry: AnyEntry) -> dict[str, float]:
    """What releases of one kind have in common: what their event says, but for how many they are."""
    return {name: value for name, value in asdict(entry.event).items() if name != "count"}


def _composed(runs: Sequence[_Run]) -> dict[str, Any] | None:
    """What a person who was in every run could lose; None where a ledger does not tell, or there is none."""
    from hybrid.privacy.accountant import epsilon

    accounts = [run.account for run in runs if run.account is not None and run.doubt is None]
    if not accounts or len(accounts) < len(runs):
        return None
    delta = min(account.delta for account in accounts)
    events = [event for account in accounts for event in account.events()]
    spent = epsilon(events, delta) if len(runs) > 1 else runs[0].spent
    assert spent is not None
    return {"epsilon": spent.epsilon, "delta": delta, "accountant": spent.method, "runs": len(accounts)}


def _lines(shown: Mapping[str, Any], of: int) -> Iterator[str]:
    """What is printed for people; `of` is how many runs the model has."""
    yield f"{shown['model']}: {_many(shown['versions'], 'version')}, {_many(of, 'run')} under differential privacy"
    for run in shown["runs"]:
        yield from ("", *_run_lines(run))
    yield ""
    for reference in shown["references"]:
        yield (
            f"version {reference['version']} ({reference['kind']}) is a reference: "
            "trained without a mechanism, and nothing here protects those people from it"
        )
    yield f"{SCOPE}."
    composed = shown["composed"]
    if composed:
        yield (
            f"For people who were in all of the model's runs ({composed['runs']}): together epsilon "
            f"{composed['epsilon']:.3f} at delta {composed['delta']:g} ({composed['accountant']})."
        )
    elif of:
        yield "For people who were in all of the model's runs: not known, since a ledger is not whole."


def _run_lines(run: Mapping[str, Any]) -> Iterator[str]:
    versions = ", ".join(map(str, run["versions"])) or _no_versions(run)
    yield f"run {run['run']} (versions: {versions})"
    if "epsilon" in run:
        unit = f" per {run['unit']}" if run["unit"] else ""
        yield (
            f"  spent     epsilon {run['epsilon']:.3f} at delta {run['delta']:g}{unit}, of {run['budget_epsilon']:g}: "
            f"{run['left']:.3f} left; accountant: {run['accountant']}"
        )
        for spend in run["spent_on"]:
            yield f"  on        {_spend_line(spend)}"
    if run.get("lost"):
        yield f"  lost      {_many(run['lost'], 'release')} at most that cannot be read, counted as the costliest"
    if run["doubt"]:
        yield f"  doubt     {run['doubt']}"
    yield f"  protects  {run['protects'] or 'said by the version, once there is one'}"
    yield f"  assumes   {run['assumption'] or 'said by the version, once there is one'}"


def _no_versions(run: Mapping[str, Any]) -> str:
    """Why a run has none."""
    if "/" in run["run"]:
        return "none: a sweep's configuration"
    if run["kind"] == "drift":
        return "none: a week of watching for drift"
    if run["kind"] == "funnel":
        return "none: a week of what devices tell of themselves"
    trained = any(spend["purpose"] == "train" for spend in run.get("spent_on", ()))
    return "none: it goes on, or it failed" if trained or not run.get("spent_on") else "none: questions"


def _spend_line(spend: Mapping[str, Any]) -> str:
    low, high = spend["clip"]
    clip = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return (
        f"{spend['purpose']}: {_many(spend['releases'], 'release')}, {spend['mechanism']} noise "
        f"{spend['noise_multiplier']:.4g} x clip {clip}, {_who(spend)}; alone epsilon {spend['epsilon_alone']:.3f}"
    )


def _who(spend: Mapping[str, Any]) -> str:
    """Who takes part in the releases of a kind."""
    if spend["mechanism"] == "matrix":
        return (
            f"charged for all {spend['rounds']} rounds of its horizon, each person at most once in any "
            f"{spend['separation']} of them"
        )
    sampling = spend["sampling"]
    return "everybody in each" if sampling == 1 else f"each person in each with probability {sampling:g}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _draw(file: Path, model: str, runs: Sequence[_Run]) -> None:
    """A line a run: epsilon after each release, and its budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    accounts = [(run.name, run.account) for run in runs if run.account is not None]
    for name, account in accounts:
        releases, spent = zip(*_curve(account, max(3, POINTS // len(accounts))), strict=True)
        (line,) = axes.plot(releases, spent, marker=".", label=f"{name}, at delta {account.delta:g}")
        axes.axhline(account.budget_epsilon, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="releases", ylabel="epsilon spent (dotted: budget)", title=f"{model}: {SCOPE}")
    axes.set(xlim=(0, None), ylim=(0, None))
    if accounts:
        figure.legend(frameon=False, loc="outside lower center", fontsize="small")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _curve(account: Account, points: int) -> Iterator[tuple[int, float]]:
    """(releases, epsilon of the first so many); lost ones come first, since nobody knows when they were made."""
    from hybrid.privacy.accountant import epsilon
    from hybrid.privacy.ledger import costs

    lost, releases = len(account.lost), len(account.lost) + len(account.entries)
    stops = sorted({round(place * releases / points) for place in range(points + 1)} | {0, releases})
    for stop in stops:
        events = [*account.lost[:stop], *costs(account.entries[: max(0, stop - lost)])]
        yield stop, epsilon(events, account.delta).epsilon
