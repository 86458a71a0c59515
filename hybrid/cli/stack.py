"""The local stack: up, status, down."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.local.supervisor import State

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print the state as JSON, for scripts.")]


@app.command()
def up(
    *,
    gateway_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 8080.")] = None,
    gateway_grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 8081.")] = None,
    kafka_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 19092.")] = None,
    kafka_controller_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 19093.")] = None,
    triton_http_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 18000.")] = None,
    triton_grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 18001.")] = None,
    triton_metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 18002.")] = None,
    gateway_metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 18003.")] = None,
    worker_metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default 18004.")] = None,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Any free port for those not given.")] = False,
    log_sample: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the rows whose server side is kept, for `hybrid skew`.")
    ] = 0.0,
    as_json: Json = False,
) -> None:
    """Start Kafka, Triton, merge worker and gateway on this machine, for what is promoted.

    They go on in the background until `hybrid down`, and stop together if one of them dies.
    Ctrl-C while they start stops them all. Kafka's topics begin empty at each start.

        hybrid up --gateway-port 9000

        hybrid up --free-ports --json
    """
    from hybrid.local import kafka, stack, triton
    from hybrid.local.process import default_cache

    ports = stack.Ports.choose(
        {
            "gateway": gateway_port,
            "gateway_grpc": gateway_grpc_port,
            "kafka": kafka_port,
            "kafka_controller": kafka_controller_port,
            "triton_http": triton_http_port,
            "triton_grpc": triton_grpc_port,
            "triton_metrics": triton_metrics_port,
            "gateway_metrics": gateway_metrics_port,
            "worker_metrics": worker_metrics_port,
        },
        free=free_ports,
    )
    workspace, cache = Workspace.current(), default_cache()
    stack.check_promoted(workspace)
    for server in (kafka, triton):
        server.install(cache, _say)
    settings = stack.Settings(root=workspace.root, cache=cache, ports=ports, log_sample=log_sample)
    before = stack.status(workspace)
    try:
        state = stack.up(settings, _Progress())
    except KeyboardInterrupt:
        _say("Interrupted. Nothing is left running.")
        raise typer.Exit(130) from None
    if before == state:
        _say("The local stack is up already and stays as it is; `hybrid down` first to change a setting.")
    _show(state, as_json=as_json)


@app.command()
def status(as_json: Json = False) -> None:
    """Show what the local stack is doing. Exit status 0 when it is ready, else 1.

    hybrid status --json
    """
    from hybrid.local import stack

    state = stack.status(Workspace.current())
    _show(state, as_json=as_json)
    raise typer.Exit(0 if state is not None and state.phase == "ready" else 1)


@app.command()
def down() -> None:
    """Stop the local stack and wait until all of it is gone. Its logs stay."""
    from hybrid.local import stack

    typer.echo("Stopped the local stack." if stack.down(Workspace.current()) else "The local stack is not up.")


class _Progress:
    """Says when a server begins to start and when it is ready."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._since = time.monotonic()

    def __call__(self, state: State) -> None:
        for server in state.servers:
            if server.phase != self._said.get(server.name, "waiting"):
                self._said[server.name] = server.phase
                _say(f"{time.monotonic() - self._since:5.1f} s  {server.name}: {server.phase}")


def _show(state: State | None, *, as_json: bool) -> None:
    """One row per server: its process, its ports, its log."""
    from rich.console import Console
    from rich.table import Table

    from hybrid.local.stack import NOTICE

    if as_json:
        typer.echo(state.model_dump_json(indent=2) if state else '{"phase": "down"}')
        return
    if state is None:
        typer.echo(f"The local stack of {Workspace.current().root} is down. Start it with `hybrid up`.")
        return
    table = Table("server", "state", "pid", "127.0.0.1:port", "log", title=f"local stack: {state.phase}")
    for server in state.servers:
        ports = "\n".join(f"{port} ({use})" for use, port in server.ports.items())
        table.add_row(server.name, server.phase, str(server.pid or ""), ports, server.log.name)
    Console().print(table)
    typer.echo(f"Logs: {os.path.relpath(state.servers[0].log.parent)}")
    typer.echo(state.message or NOTICE)


def _say(text: str) -> None:
    typer.echo(text, err=True)
