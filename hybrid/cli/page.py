"""`hybrid page`: a person's device in a browser, beside the local stack."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.errors import ConfigError, HybridError, NotFound
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from types import FrameType

    from hybrid.deployment import Deployment
    from hybrid.local.supervisor import State
    from hybrid.spec import HybridModel

ENTITIES = 500  # that the page offers; any other can be typed
RELEASES = 200  # whose total the page can tell
app = typer.Typer()


@app.command()
def page(
    model: Annotated[str, typer.Argument(help="Name of a promoted model.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page, on this machine; 0: any free one.")] = 8090,
    no_open: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
) -> None:
    """Open a page that is a person's device: set private features, see the prediction, and every byte that left.

    Starts the local stack where it is not up, and then stops it in the end; Ctrl-C ends the page.
    The first time, the browser device is built: npm packages are downloaded into the cache.

        hybrid page coupon

        hybrid page coupon --port 0 --no-open
    """
    from hybrid.deployment import Window
    from hybrid.local import stack, web
    from hybrid.local.page import PageServer
    from hybrid.local.process import default_cache

    workspace = Workspace.current()
    stack.check_promoted(workspace)
    windows = Window.read_all(workspace.deployments)
    if model not in windows:
        raise NotFound(f"model {model!r} is not promoted; promoted are {sorted(windows)}")
    dist = web.install(default_cache(), _say) / "dist"
    config = settings(workspace, windows[model].default)
    with _until_told(), PageServer(port, dist, config, lambda: _gateway(stack.status(workspace))) as server:
        with _stack(workspace):
            typer.echo(f"The page: {server.url}   (Ctrl-C ends it)")
            if not no_open:
                import webbrowser

                webbrowser.open(server.url)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        typer.echo("The page is closed.")


def settings(workspace: Workspace, served: Deployment) -> dict[str, Any]:
    """What the page is told beside the bundle: the host app's trust, what may be chosen, what a release discloses.

    Raises:
        ConfigError: the workspace's public key is gone.
    """
    try:
        trust = (workspace.keys / "bundle-signing.pub").read_text()
    except OSError as error:
        raise ConfigError(f"the key that devices trust cannot be read: {type(error).__name__}") from None
    declared = _declared(workspace, served.model)
    choices = {name: getattr(transform, "vocabulary", ()) for name, transform in served.request.transforms.items()}
    return {
        "model": served.model,
        "trust": trust,
        "entity": served.join_key,
        "entities": _entities(declared) if declared else [],
        "choices": {name: list(words) for name, words in choices.items() if words},
        "disclosure": _disclosure(declared) if declared else None,
    }


def _declared(workspace: Workspace, model: str) -> HybridModel | None:
    """The declaration, where its file is still there: the page does without what only that knows."""
    from hybrid.registry import Registry

    with suppress(HybridError):
        return Registry(workspace).load_model(model)
    return None


def _entities(model: HybridModel) -> list[dict[str, str]]:
    """Join keys of the first view's source, with what the server knows of each, as one line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    view, key = model.server.views[0], model.server.entity.join_key
    try:
        rows = pq.read_table(view.source, columns=[key, *view.features]).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    known = {str(row[key]): ", ".join(f"{name} {_short(row[name])}" for name in view.features) for row in rows}
    return [{"key": each, "about": about} for each, about in sorted(known.items())[:ENTITIES]]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _disclosure(model: HybridModel) -> dict[str, Any] | None:
    """The local epsilon of one release by noise, and of 2 to `RELEASES` together; None where nothing is noised."""
    from hybrid.privacy.mechanisms import local_epsilon
    from hybrid.spec import Noised

    if not isinstance(model.release, Noised):
        return None
    delta, sigma = model.privacy.delta, model.release.sigma
    totals = [local_epsilon(sigma / math.sqrt(count), delta) for count in range(1, RELEASES + 1)]
    return {"delta": delta, "epsilons": [total if math.isfinite(total) else None for total in totals]}


def _gateway(state: State | None) -> int | None:
    """Port of the gateway of a stack that is ready."""
    if state is None or state.phase != "ready":
        return None
    ports = {use: port for server in state.servers for use, port in server.ports.items()}
    return ports.get("gateway")


@contextmanager
def _stack(workspace: Workspace) -> Iterator[None]:
    """The local stack: as it is where it is up, else started, and stopped in the end."""
    from hybrid.cli.stack import _Progress
    from hybrid.local import kafka, stack, triton
    from hybrid.local.process import default_cache

    if _gateway(stack.status(workspace)) is not None:
        yield
        return
    for server in (kafka, triton):
        server.install(default_cache(), _say)
    _say("The local stack is not up: starting it, until the page ends.")
    ports = stack.Ports.choose({}, free=True)
    stack.up(stack.Settings(root=workspace.root, cache=default_cache(), ports=ports), _Progress())
    try:
        yield
    finally:
        stack.down(workspace)
        _say("Stopped the local stack.")


@contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM ends the page as Ctrl-C does, also where a shell had it ignored: nothing that it started is left."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        _say("Interrupted. Nothing is left running.")
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    typer.echo(text, err=True)
