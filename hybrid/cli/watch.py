"""`hybrid watch`: a canary, or a shadow, beside the default, taken back where a gate fails."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

import typer

from hybrid.cli.rollout import promote_served, take_back, window_of
from hybrid.cli.runs import CANARY, SHADOW
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
    model: Annotated[str, typer.Argument(help="Whose canary; without one whose shadow.")],
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
    inversion: Annotated[
        float | None, typer.Option(help="By how much a device feature may be recovered over guessing; not asked.")
    ] = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="Ask too whether its training kept to its privacy budget.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Counts what becomes of the canary's requests beside the default's, and takes it back where a gate fails.

    It reads the metrics of gateways and workers, from now on: requests without an
    answer, rows that a fallback answered, seconds, and predictions. AUC is by the latest
    `hybrid evaluate MODEL@canary --against production`, and --inversion by the latest
    `hybrid audit inversion` of the version. A gate that waits has too little to say
    anything. Ends at once where it takes the canary back, with exit status 3; also where
    it could not read a process's metrics for --blind, since nobody watched it. Of a
    shadow, batches, seconds and predictions without a device are compared; of one that
    devices compute too, what they asked is judged as a canary's.

    Example: hybrid watch coupon --for 1h --promote
    """
    from hybrid.analytics.results import Kept
    from hybrid.gates import judge_auc, judge_inversion

    asked = {"least": least, "errors": errors, "fallbacks": fallbacks, "slower": slower, "drift": drift, "auc": auc}
    gates = _gates({name: value for name, value in (asked | {"inversion": inversion}).items() if value is not None})
    ends, pause, most_s = time.monotonic() + seconds_of(wait), seconds_of(every), seconds_of(blind)
    workspace = Workspace.current()
    tried = _tried(window_of(workspace, model), model)
    if promote and tried.what == SHADOW:
        raise ConfigError("--promote must be left out for a shadow: make it a canary first (`hybrid rollout --canary`)")
    kept = {kind: Kept(workspace.runs, model, kind) for kind in ("evaluate", "inversion")}
    spent = [_budget(workspace, model, tried.version)] if budget else []
    with _Processes(metrics or local_metrics(workspace), model) as processes:
        while True:
            counted = processes.look()
            verdicts = [*tried.judge(gates, counted), judge_auc(gates, _difference(kept["evaluate"], tried)), *spent]
            if gates.inversion is not None:
                verdicts.append(judge_inversion(gates.inversion, _audit(kept["inversion"], tried.version)))
            verdicts.append(processes.judge(most_s))
            failed = [one for one in verdicts if one.outcome == "fails"]
            if failed or time.monotonic() >= ends:
                break
            time.sleep(min(pause, max(0.0, ends - time.monotonic())))
            if _tried(window_of(workspace, model), model) != tried:
                raise ConfigError(
                    f"{model}:{tried.version} is no longer the {tried.what} beside {tried.default}: somebody changed "
                    "the rollout"
                )
    outcome = "went on"
    if failed:
        take_back(workspace, model, tried.version, f"gate {failed[0].gate}: {failed[0].said}")
        outcome = "taken back"
    elif promote and all(one.outcome == "passes" for one in verdicts):
        promote_served(workspace, model, tried.version)
        outcome = "promoted"
    shown = {"model": model, tried.what: tried.version, "default": tried.default, "outcome": outcome}
    if as_json:
        print(json.dumps(shown | {"gates": [asdict(one) for one in verdicts]}))
    else:
        _print(f"{model}:{tried.version}, the {tried.what} beside {tried.default}: {outcome}", verdicts)
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

        from hybrid.gates import fetched, read

        try:
            return read(fetched(self._client, url), self._model)
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


class _Tried(NamedTuple):
    """What is watched.

    Attributes:
        what: "canary" or "shadow".
        version: which.
        default: beside which.
        devices: of a shadow: whether devices ask it too, so that gateways and workers count what it serves.
    """

    what: str
    version: int
    default: int
    devices: bool = False

    def judge(self, gates: Gates, counted: Mapping[Sample, float]) -> list[Verdict]:
        """By what was counted of both."""
        from hybrid.gates import SERVED, SHADOWED, Counted, judge, judge_pair, judge_shadow

        served, shadowed = (
            [Counted.of(counted, version, metrics) for version in (self.version, self.default)]
            for metrics in (SERVED, SHADOWED)
        )
        if self.what != SHADOW:
            return judge(gates, *served)
        batches = judge_shadow(gates, *shadowed)
        return judge_pair(judge(gates, *served), batches) if self.devices else batches


def _tried(window: Window, model: str) -> _Tried:
    """The canary; without one the shadow."""
    default, canary, shadow = window.default.version, window.canary, window.shadow
    if canary is not None:
        return _Tried(CANARY, canary.version, default)
    if shadow is not None:
        return _Tried(SHADOW, shadow.version, default, shadow.devices)
    raise NotFound(
        f"{model} has no canary and no shadow: `hybrid rollout {model} VERSION --canary 5%`, or --shadow, starts one"
    )


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


def _difference(compared: Kept, tried: _Tried) -> dict[str, Any] | None:
    """Of AUC, as it was released last."""
    for shown in (result.shown for result in reversed(compared.all())):
        if [one["version"] for one in shown["versions"]] == [tried.version, tried.default] and shown["differences"]:
            auc: dict[str, Any] = shown["differences"]["auc"]
            return auc
    return None


def _audit(kept: Kept, version: int) -> dict[str, Any] | None:
    """The latest of the version."""
    return next((one.shown for one in reversed(kept.all()) if one.shown["version"] == version), None)


def _budget(workspace: Workspace, model: str, version: int) -> Verdict:
    """Composed once: a training is over, and what its run's ledger holds costs a second to add up."""
    from hybrid.gates import judge_budget
    from hybrid.privacy.ledger import Ledger
    from hybrid.registry import Registry

    record = Registry(workspace).version(model, version).training
    if record.epsilon is None:
        return judge_budget(None, None)
    try:
        account = Ledger.read(workspace.runs / record.run)
    except NotFound:
        return judge_budget(None, None)
    return judge_budget(max(account.spent().epsilon, record.epsilon), account.budget_epsilon)


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


def _print(said: str, verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("gate", "", "what was counted", box=None, pad_edge=False)
    for one in verdicts:
        table.add_row(one.gate, one.outcome, Text(one.said))
    Console(highlight=False).print(table)
    print(said)
