"""`hybrid watch`: a canary beside the default, taken back where a gate fails."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.rollout import promote_served, take_back, window_of
from hybrid.errors import ConfigError, NotFound, StackError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.deployment import Window
    from hybrid.gates import Gates, Sample, Verdict

app = typer.Typer()
HALTED = 3  # exit status


@app.command()
def watch(
    model: Annotated[str, typer.Argument(help="Whose canary.")],
    *,
    wait: Annotated[str, typer.Option("--for", metavar="TIME", help="How long: 90s, 10m, 2h.")] = "10m",
    every: Annotated[str, typer.Option(metavar="TIME", help="How often.")] = "2s",
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Of a gateway or worker; each of them. By default the local stack's."),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Make it the default at the end, if every gate passes.")
    ] = False,
    least: Annotated[int | None, typer.Option(min=1, help="Requests of either before a gate passes; 500.")] = None,
    errors: Annotated[
        float | None, typer.Option(help="More requests without an answer that are allowed; 0.01.")
    ] = None,
    fallbacks: Annotated[float | None, typer.Option(help="More rows that a fallback answers, likewise; 0.02.")] = None,
    slower: Annotated[float | None, typer.Option(help="Times the default's 95th percentile of seconds; 2.")] = None,
    drift: Annotated[float | None, typer.Option(help="Index of its predictions against the default's; 0.25.")] = None,
    auc: Annotated[float | None, typer.Option(help="By how much its AUC may be lower; 0.01.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Counts what becomes of the canary's requests beside the default's, and takes it back where a gate fails.

    It reads the metrics of gateways and workers, from now on: requests without an
    answer, rows that a fallback answered, seconds, and predictions. AUC is by the latest
    `hybrid evaluate MODEL@canary --against production`. A gate that waits has too little to
    say anything. Ends at once where it takes the canary back, with exit status 3.

    Example: hybrid watch coupon --for 1h --promote
    """
    from hybrid.gates import Counted, grown, judge, judge_auc, seconds_of

    asked = {"least": least, "errors": errors, "fallbacks": fallbacks, "slower": slower, "drift": drift, "auc": auc}
    gates = _gates({name: value for name, value in asked.items() if value is not None})
    ends, pause = time.monotonic() + seconds_of(wait), seconds_of(every)
    workspace = Workspace.current()
    canary, default = _both(window_of(workspace, model), model)
    urls = metrics or local_metrics(workspace)
    before = _scraped(urls, model)
    while True:
        now = grown(before, _scraped(urls, model))
        verdicts = judge(gates, Counted.of(now, canary), Counted.of(now, default))
        verdicts.append(judge_auc(gates, _compared(workspace, model, canary, default)))
        failed = [one for one in verdicts if one.outcome == "fails"]
        over = time.monotonic() >= ends
        if failed or over:
            break
        time.sleep(min(pause, max(0.0, ends - time.monotonic())))
        if _both(window_of(workspace, model), model) != (canary, default):
            raise ConfigError(
                f"{model}:{canary} is no longer the canary beside {default}: somebody changed the rollout"
            )
    outcome = "went on"
    if failed:
        take_back(workspace, model, canary, f"gate {failed[0].gate}: {failed[0].said}")
        outcome = "taken back"
    elif promote and all(one.outcome == "passes" for one in verdicts):
        promote_served(workspace, model, canary)
        outcome = "promoted"
    shown = {"model": model, "canary": canary, "default": default, "outcome": outcome}
    if as_json:
        print(json.dumps(shown | {"gates": [asdict(one) for one in verdicts]}))
    else:
        _print(shown, verdicts)
    if failed:
        raise typer.Exit(HALTED)


def _gates(asked: Mapping[str, float]) -> Gates:
    from pydantic import ValidationError

    from hybrid.gates import Gates

    try:
        return Gates.model_validate(asked)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ConfigError(f"--{fault['loc'][0]}: {fault['msg'].lower()}, got {fault['input']}") from None


def _both(window: Window, model: str) -> tuple[int, int]:
    if window.canary is None:
        raise NotFound(f"{model} has no canary: `hybrid rollout {model} VERSION --canary 5%` starts one")
    return window.canary.version, window.default.version


def local_metrics(workspace: Workspace) -> list[str]:
    """Addresses of the metrics of the local stack's gateway and worker.

    Raises:
        StackError: it is not up.
    """
    from hybrid.local import stack

    state = stack.status(workspace)
    if state is None or state.phase != "ready":
        raise StackError("the local stack is not up: `hybrid up`, or give --metrics of each gateway and worker")
    named = [server.ports["metrics"] for server in state.servers if server.name in ("gateway", "worker")]
    return [f"http://127.0.0.1:{port}/metrics" for port in named]


def _scraped(urls: Sequence[str], model: str) -> list[dict[Sample, float]]:
    """Of each process; one that cannot be reached is an error, since its requests would not be judged."""
    import httpx

    from hybrid.gates import read

    found = []
    for url in urls:
        try:
            answer = httpx.get(url, timeout=10)
            answer.raise_for_status()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise StackError(f"metrics {url!r} cannot be read: {type(error).__name__}; the canary goes on") from None
        found.append(read(answer.text, model))
    return found


def _compared(workspace: Workspace, model: str, canary: int, default: int) -> dict[str, Any] | None:
    """The difference of AUC that was released last."""
    from hybrid.analytics.results import read

    found = [result.shown for _, result in read(workspace.runs, model) if result.kind == "evaluate"]
    for shown in reversed(found):
        if [one["version"] for one in shown["versions"]] == [canary, default] and shown["differences"]:
            auc: dict[str, Any] = shown["differences"]["auc"]
            return auc
    return None


def _print(shown: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("gate", "", "what was counted", box=None, pad_edge=False)
    for one in verdicts:
        table.add_row(one.gate, one.outcome, Text(one.said))
    Console(highlight=False).print(table)
    print(f"{shown['model']}:{shown['canary']}, the canary beside {shown['default']}: {shown['outcome']}")
