"""`hybrid console`: one page for the team."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.cli.watch import local_metrics
from hybrid.errors import ConfigError, HybridError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.console.health import Pulse
    from hybrid.console.pages import Model
    from hybrid.console.server import Place
    from hybrid.console.steps import Seen, Step
    from hybrid.console.work import Desk
    from hybrid.deployment import Window
    from hybrid.http import Certificate
    from hybrid.registry import Registry
    from hybrid.report.facts import Facts

PASSWORD = "HYBRID_CONSOLE_PASSWORD"  # noqa: S105  its name
PASSWORD_FILE = "console-password"  # noqa: S105  among the keys
CONNECTIONS = 64  # at once
PATIENCE_S = 3.0  # that a page waits for what takes longer only at first
app = typer.Typer()


@app.command()
def console(
    *,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 18010,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="What browsers call this machine; each of them. By default --host."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its chain (PEM); asked for where others reach it.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Of the certificate (PEM).")] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"What the team logs in with; else ${PASSWORD}, else one is made."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Of a gateway or worker; each of them. By default the local stack's."),
    ] = None,
) -> None:
    """Serves one page for the team: models and versions, rollouts with their buttons, quality, drift, privacy, health.

    It is a process of its own beside the control plane, since taking a version back
    needs the control plane's key: keep it off the internet. Whoever has the password
    may launch and take back; each button asks twice, and what is done is in the
    history (`hybrid history MODEL`). It shows what other commands found, and asks nobody.

    Where other machines reach it, it asks for a certificate. Ctrl-C ends it.

    Example: hybrid console --host 10.0.0.7 --name console.internal --certificate chain.pem --key key.pem
    """
    from hybrid.console.health import Pulse
    from hybrid.console.server import Console, application
    from hybrid.console.sessions import Sessions
    from hybrid.console.work import Desk
    from hybrid.http import TimedHttp, listening, told_to_end
    from hybrid.registry import Registry

    workspace = Workspace.current()
    chain = _certificate(host, certificate, key)
    password, where = _password(workspace, password_file)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("hybrid.console").setLevel(logging.INFO)
    place, called = _place(host, name or (), tls=chain is not None)
    ended = told_to_end()
    sessions, pulse = Sessions(password), Pulse(lambda: metrics or local_metrics(workspace))
    with pulse, _Reading(workspace) as reading, Desk(lambda step, seen: perform(workspace, step, seen)) as desk:
        shown = _Shown(workspace, pulse, desk, reading)
        served = application(Console(shown.models, shown.model, shown.seen, desk, sessions), place)
        options = {"http": TimedHttp, "lifespan": "off", "limit_concurrency": CONNECTIONS}
        with listening(served, host, port, name="console", certificate=chain, **options) as bound:
            typer.echo(f"The console: {place.scheme}://{called}:{bound}/   (Ctrl-C ends it)")
            typer.echo(f"Its password is {where}.")
            for model in Registry(workspace).names():
                reading.begin(model)  # so that who comes later need not wait
            ended.wait()
    typer.echo("The console is closed.")


def perform(workspace: Workspace, step: Step, seen: Seen) -> str:
    """Does to a rollout what the command of that name does, if it is as it was seen, and says what it did.

    Raises:
        HybridError: why it was not done.
    """
    from hybrid.cli.promote import export_to
    from hybrid.cli.rollout import promote_served, take_back, taken_back, tried_out, try_out
    from hybrid.cli.runs import PRODUCTION
    from hybrid.registry import Registry

    model, version = step.model, step.version
    if step.kind == "canary":
        return tried_out(try_out(workspace, model, version, step.share, seen.check))
    if step.kind == "halt":
        default = take_back(workspace, model, version, step.reason, seen.check)
        return taken_back(model, version, step.reason, default)
    if version in seen.served:
        promote_served(workspace, model, version, seen.check)
    else:
        export_to(workspace, Registry(workspace).load_model(model), version, PRODUCTION, seen.check)
    return f"{step.name} is the default: all devices fetch it"


class _Shown:
    """What the pages show, read anew each time."""

    def __init__(self, workspace: Workspace, pulse: Pulse, desk: Desk, reading: _Reading) -> None:
        self._workspace, self._pulse, self._desk, self._reading = workspace, pulse, desk, reading

    def models(self) -> list[Model]:
        """All that are registered, without facts."""
        return [self._model(name) for name in self._registry.names()]

    def model(self, name: str) -> Model:
        """One, with them. Raises: NotFound: none is registered under the name."""
        found = self._model(name)
        try:
            return replace(found, facts=self._reading.facts(name))
        except HybridError as error:
            return replace(found, why=str(error))

    def seen(self, name: str) -> Seen:
        """Its rollout. Raises: NotFound: none is registered under the name."""
        from hybrid.console.steps import Seen

        return Seen.of(self._window(name))

    @property
    def _registry(self) -> Registry:
        from hybrid.registry import Registry

        return Registry(self._workspace)

    def _model(self, name: str) -> Model:
        from hybrid.console.pages import Model
        from hybrid.deployment import history

        window, changes = self._window(name), history(self._workspace.deployments, name)
        return Model(name, window, changes, self._pulse.health(name), self._desk.latest(name))

    def _window(self, name: str) -> Window | None:
        from hybrid.deployment import Window

        self._registry.definition_hash(name)  # or NotFound, before the name becomes a path
        file = self._workspace.deployments / f"{name}.json"
        return Window.read(file) if file.exists() else None


class _Reading(AbstractContextManager["_Reading"]):
    """What a report says of each model: read in a thread of its own, and kept until a file of it changes.

    At first that takes seconds, for libraries and for ledgers that are composed; taking a version back waits for none.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self._alone = workspace, threading.Lock()
        self._thread = ThreadPoolExecutor(1, "console-reading")
        self._kept: dict[str, tuple[object, Future[Facts]]] = {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def facts(self, name: str) -> Facts | None:
        """Of a model; None: they are being read.

        Raises:
            HybridError: they cannot be.
        """
        try:
            return self.begin(name).result(PATIENCE_S)
        except TimeoutError:
            return None

    def begin(self, name: str) -> Future[Facts]:
        """Reads them, unless that was done since a file changed, or is being done."""
        from hybrid.cli.report import facts_of

        state = _state(self._workspace)
        with self._alone:
            kept = self._kept.get(name)
            if kept is None or (kept[0] != state and kept[1].done()):
                kept = state, self._thread.submit(facts_of, name, None, self._workspace, datetime.now(UTC))
                self._kept[name] = kept
        return kept[1]


def _state(workspace: Workspace) -> object:
    """Another one wherever a ledger, an answer, a version or an alias is."""
    from hybrid.analytics.results import FOLDER
    from hybrid.privacy.ledger import FILE

    runs = workspace.runs
    patterns = (f"*/{FILE}", f"*/*/{FILE}", "*/config.json", f"*/{FOLDER}/*.json")
    files = [file for pattern in patterns for file in runs.glob(pattern)]
    files += [*workspace.mlflow.glob("mlflow.db"), *workspace.definitions.glob("*/*.json")]
    return sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def _place(host: str, names: Sequence[str], *, tls: bool) -> tuple[Place, str]:
    """Where it is, and what it is called first.

    Raises:
        ConfigError: nobody says what it is called.
    """
    from hybrid.console.server import Place
    from hybrid.protocol import is_loopback

    if names:
        said = [name.lower() for name in names]
    elif is_loopback(host):
        said = [f"[{host}]" if ":" in host else host, "127.0.0.1", "localhost", "[::1]"]
    elif host in ("0.0.0.0", "::"):  # noqa: S104  is asked about, not bound
        raise ConfigError(f"--name must say what browsers call this machine where --host is {host}")
    else:
        said = [f"[{host}]" if ":" in host else host.lower()]
    return Place(frozenset(said), tls), said[0]


def _certificate(host: str, chain: Path | None, key: Path | None) -> Certificate | None:
    from hybrid.protocol import is_loopback

    if (chain is None) != (key is None):
        raise ConfigError("--certificate and --key go together: give both, or neither")
    if chain is not None and key is not None:
        return chain, key
    if not is_loopback(host):
        raise ConfigError(
            f"--certificate and --key must be given where others reach --host, got {host!r}: a password crosses the "
            "network; a loopback address, such as 127.0.0.1, needs none"
        )
    return None


def _password(workspace: Workspace, file: Path | None) -> tuple[str, str]:
    """What the team logs in with, and where it is, in words."""
    from hybrid.console.sessions import generated, password_in

    if file is not None:
        return password_in(file), f"in {file}"
    if PASSWORD in os.environ:
        return os.environ[PASSWORD], f"${PASSWORD}"
    made = workspace.keys / PASSWORD_FILE
    return generated(made), f"in {made}"
