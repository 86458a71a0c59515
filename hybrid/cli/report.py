"""`hybrid report`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.errors import ConfigError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.analytics.results import Result
    from hybrid.cli.privacy import _Run
    from hybrid.privacy.ledger import Account
    from hybrid.registry import Registry
    from hybrid.report.facts import Facts
    from hybrid.report.spending import Spending
    from hybrid.version import TrainingRecord

app = typer.Typer()

ABOUT = ("unit", "protects", "assumption")  # of a run
DRAWN_VERSIONS = 4  # whose curves are drawn
DRAWN_RUNS = 6  # whose spending is drawn each by itself


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="An .html; by default MODEL.html here.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only answers and spending of this folder under runs/.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Writes one page about a model: features, label, versions, how good they are, what leaks, what was spent.

    It shows what other commands found, so it costs no privacy: numbers that were
    noised and paid for, public ones, and those that only a simulation can know,
    each marked as what it is. Where nothing was asked yet, it says which command
    does. The page is one file that fetches nothing, and reads on a phone.

    Example: hybrid report coupon --output coupon.html
    """
    file = Path(f"{model}.html") if output is None else output
    if file.suffix != ".html":
        raise ConfigError(f"--output must end with .html, got {file.name!r}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output must be in a folder that exists, got {str(file)!r}")
    from hybrid.report.page import page

    content = page(facts_of(model, run, Workspace.current(), datetime.now(UTC))).encode("utf-8", "replace")
    with NamedTemporaryFile(dir=file.absolute().parent, prefix=".report-", delete=False) as draft:
        draft.write(content)
    os.replace(draft.name, file)
    print(f"{file}: {len(content) / 1000:.0f} kB; open it in a browser. Nothing was spent.")
    if open_it:
        import webbrowser

        webbrowser.open(file.absolute().as_uri())


def facts_of(model: str, run: str | None, workspace: Workspace, now: datetime) -> Facts:
    """What there is about a model.

    Raises:
        NotFound: no such model, or it has no such run.
        ConfigError: a kept answer or a ledger cannot be read.
    """
    from hybrid.analytics.results import read
    from hybrid.cli.models import _released
    from hybrid.cli.privacy import SCOPE, _composed, _run_json, _runs
    from hybrid.registry import Registry
    from hybrid.report.facts import Facts

    registry = Registry(workspace)
    declaration = registry.definition(model)["declaration"]
    trainings = registry.trainings(model)
    every = _runs(workspace.runs, model, trainings)
    kept = read(workspace.runs, model)
    if run is not None:
        known = {found.name for found in every} | {name for name, _ in kept} | {r.run for r in trainings.values()}
        if run not in known:
            raise NotFound(f"{model} has no run {run!r}; it has: {', '.join(sorted(known)) or 'none'}")
    runs = [found for found in every if run in (None, found.name)]
    accounts = {found.name: found.account for found in every}
    results, unpaid = _paid_for([one for one in kept if run in (None, one[0])], accounts, workspace.runs)
    privacy = declaration["privacy"]
    return Facts(
        model=model,
        written=now,
        only=run,
        device=list(declaration["device"]),
        request=list(declaration["request"]),
        label=declaration["label"]["column"],
        label_visible_to=declaration["label"]["visible_to"],
        release=_released(declaration["release"], privacy["delta"]),
        budget=(privacy["epsilon"], privacy["delta"], privacy["unit"]),
        aliases=registry.model(model).aliases,
        trainings=trainings,
        created=registry.created(model),
        curves=_curves(registry, model, trainings),
        results=results,
        unpaid=unpaid,
        runs=[_described(_run_json(found), results) for found in runs],
        scope=SCOPE,
        composed=_composed(every),
        spending=list(_spending(runs)),
    )


def _described(run: dict[str, Any], results: Sequence[tuple[str, Result]]) -> dict[str, Any]:
    """A run with what its answers say of it, where no version of it does."""
    said = next((result.spend for name, result in results if name == run["run"] and result.spend), {})
    return run | {about: run[about] or said.get(about) for about in ABOUT}


def _paid_for(
    kept: Sequence[tuple[str, Result]], accounts: Mapping[str, Account | None], runs: Path
) -> tuple[list[tuple[str, Result]], list[str]]:
    """Answers that may be shown; and, of noised ones whose ledger does not hold what they cost, why not."""
    shown, unpaid = [], []
    for run, result in kept:
        spend = result.spend
        if spend is None or _releases(spend, accounts, runs) >= spend["releases"]:
            shown.append((run, result))
        else:
            said = f"an answer of hybrid {result.kind} in run {run}"
            unpaid.append(f"{said}: the ledger of {spend['run']} has no such spend")
    return shown, unpaid


def _releases(spend: Mapping[str, Any], accounts: Mapping[str, Account | None], runs: Path) -> int:
    """How many its ledger holds that are for its purpose; a run of another model may have paid."""
    from hybrid.cli.privacy import _read

    account = accounts.get(spend["run"]) or _read(runs / spend["run"])
    return 0 if account is None else sum(entry.purpose == spend["purpose"] for entry in account.entries)


def _curves(registry: Registry, model: str, trainings: dict[int, TrainingRecord]) -> dict[int, Any]:
    """Of the latest versions that have any."""
    found: dict[int, Any] = {}
    for number in reversed(trainings):
        if len(found) < DRAWN_VERSIONS and (curves := registry.curves(model, number)):
            found[number] = curves
    return found


def _spending(runs: Sequence[_Run]) -> Iterator[Spending]:
    """Of all runs together, then of those that released more than once."""
    from hybrid.report.spending import over_time

    accounts = {run.name: run.account for run in runs if run.account is not None}
    several = {name: account for name, account in accounts.items() if len(account.entries) > 1}
    if len(accounts) > 1:
        delta = min(account.delta for account in accounts.values())
        drawn = over_time("all runs, for a person who was in each", list(accounts.values()), delta=delta, budget=None)
        if drawn is not None:
            yield drawn
    for name, account in list(reversed(several.items()))[:DRAWN_RUNS]:
        drawn = over_time(f"run {name}", [account], delta=account.delta, budget=account.budget_epsilon)
        if drawn is not None:
            yield drawn
