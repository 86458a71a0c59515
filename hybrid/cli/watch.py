"""`hybrid watch`: a canary beside the default, taken back where a gate fails."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from hybrid.cli.rollout import promote_served, take_back, window_of
from hybrid.errors import ConfigError, NotFound, StackError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.analytics.results import Kept
    from hybrid.deployment import Window
    from hybrid.gates import Gates, Sample, Verdict

app = typer.Typer()
HALTED = 3  # exit status
METRICS_S = 5.0  # for one process's metrics


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
    blind: Annotated[
        str, typer.Option(metavar="TIME", help="For how long a process's metrics may be unreadable.")
    ] = "60s",
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
    say anything. Ends at once where it takes the canary back, with exit status 3; also
    where it could not read a process's metrics for --blind, since nobody watched it.

    Example: hybrid watch coupon --for 1h --promote
    """
    from hybrid.analytics.results import Kept
    from hybrid.gates import Counted, judge, judge_auc

    asked = {"least": least, "errors": errors, "fallbacks": fallbacks, "slower": slower, "drift": drift, "auc": auc}
    gates = _gates({name: value for name, value in asked.items() if value is not None})
    ends, pause, most_s = time.monotonic() + seconds_of(wait), seconds_of(every), seconds_of(blind)
    workspace = Workspace.current()
    canary, default = _both(window_of(workspace, model), model)
    compared = Kept(workspace.runs, model, "evaluate")
    with _Processes(metrics or _local(workspace), model) as processes:
        while True:
            counted = processes.look()
            verdicts = judge(gates, Counted.of(counted, canary), Counted.of(counted, default))
            verdicts += [judge_auc(gates, _difference(compared, canary, default)), processes.judge(most_s)]
            failed = [one for one in verdicts if one.outcome == "fails"]
            if failed or time.monotonic() >= ends:
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


class _Processes:
    """What gateways and workers counted since the first look; one that cannot be read stands as it was last read.

    Args:
        urls: of the metrics of each.
        model: whose.

    Raises:
        StackError: one cannot be read, so that its requests would not be judged.
    """

    def __init__(self, urls: Sequence[str], model: str) -> None:
        import httpx

        self._model, self._client = model, httpx.Client(timeout=METRICS_S, trust_env=False)
        self._counted: Counter[Sample] = Counter()
        self._blind_since: dict[str, float] = {}
        self._latest = {url: self._read(url) for url in urls}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def look(self) -> Counter[Sample]:
        """The sum over all of them."""
        from hybrid.gates import grown

        for url, before in self._latest.items():
            try:
                now = self._read(url)
            except StackError:
                self._blind_since.setdefault(url, time.monotonic())
            else:
                self._counted.update(grown([before], [now]))
                self._latest[url] = now
                self._blind_since.pop(url, None)
        return self._counted

    def judge(self, most_s: float) -> Verdict:
        """Whether all are seen: a canary that nobody watches must not go on.

        What it says is told to devices, as the reason of a halt: it names no process.
        """
        from hybrid.gates import Verdict

        if not self._blind_since:
            return Verdict("metrics", "passes", "all processes are read")
        over = time.monotonic() - min(self._blind_since.values()) > most_s
        said = f"metrics of {len(self._blind_since)} of {len(self._latest)} processes could not be read"
        if over:
            return Verdict("metrics", "fails", f"{said} for {most_s:g} s")
        return Verdict("metrics", "waits", f"{said} now; {most_s:g} s are allowed")

    def _read(self, url: str) -> dict[Sample, float]:
        import httpx

        from hybrid.gates import read

        try:
            answer = self._client.get(url)
            answer.raise_for_status()
            return read(answer.text, self._model)
        except (httpx.HTTPError, httpx.InvalidURL, ConfigError) as error:
            raise StackError(f"metrics {url!r} cannot be read: {type(error).__name__}; the canary goes on") from None


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


def _local(workspace: Workspace) -> list[str]:
    """Of the local stack's gateway and worker."""
    from hybrid.local import stack

    state = stack.status(workspace)
    if state is None or state.phase != "ready":
        raise StackError("the local stack is not up: `hybrid up`, or give --metrics of each gateway and worker")
    named = [server.ports["metrics"] for server in state.servers if server.name in ("gateway", "worker")]
    return [f"http://127.0.0.1:{port}/metrics" for port in named]


def _difference(compared: Kept, canary: int, default: int) -> dict[str, Any] | None:
    """Of AUC, as it was released last."""
    for shown in (result.shown for result in reversed(compared.all())):
        if [one["version"] for one in shown["versions"]] == [canary, default] and shown["differences"]:
            auc: dict[str, Any] = shown["differences"]["auc"]
            return auc
    return None


def seconds_of(text: str) -> float:
    """A time as people write it.

    Raises:
        ConfigError: it is none.

    >>> [seconds_of(text) for text in ("90", "30s", "10m", "1.5h")]
    [90.0, 30.0, 600.0, 5400.0]
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise ConfigError(f"a time must be a number above 0 with s, m or h, such as 10m, got {text!r}")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _print(shown: Mapping[str, Any], verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("gate", "", "what was counted", box=None, pad_edge=False)
    for one in verdicts:
        table.add_row(one.gate, one.outcome, Text(one.said))
    Console(highlight=False).print(table)
    print(f"{shown['model']}:{shown['canary']}, the canary beside {shown['default']}: {shown['outcome']}")
