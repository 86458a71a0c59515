"""`hybrid buffer`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.federation.noise import BufferSize

app = typer.Typer()

TARGETS = (8.0, 4.0, 2.0, 1.0)


@app.command()
def buffer(
    model: Annotated[str, typer.Argument(help="Name of a registered model.")],
    *,
    updates: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="That serves at the epsilon the model declares; by default its buffer, else a 50th of the people.",
        ),
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(help="A target; may be given several times. By default 8, 4, 2 and 1.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="independent, banded or blt; by default as the model declares.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Flushes; by default the rounds that it declares.")] = None,
    max_staleness: Annotated[
        int | None, typer.Option(min=0, help="Flushes that an update may be late; by default as the model declares.")
    ] = None,
    people: Annotated[
        int | None, typer.Option(min=1, help="How many; by default those of the population of the model's name.")
    ] = None,
    coming: Annotated[
        float,
        typer.Option(help="Share of the people who come in the time between two participations of one, in (0, 1]."),
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows how many updates a flush of an asynchronous training needs at a target epsilon.

    A smaller epsilon needs more noise; a larger buffer has more updates to carry it.
    Shown is, for each target, the K whose steps are as quiet as those with
    --updates at the epsilon that the model declares. Noise of a step: the standard
    deviation in each weight of the mean update, in clips; correlated noise counts as
    independent noise that would take the weights as far. Nothing is trained or spent.

    Example: hybrid buffer coupon --updates 20 --epsilon 2
    """
    if not 0 < coming <= 1:
        raise ConfigError(f"--coming must be in (0, 1], got {coming:g}")
    from hybrid.federation.noise import BufferSize, buffer_for, most_updates
    from hybrid.federation.population import Population
    from hybrid.registry import Registry
    from hybrid.spec import Training

    workspace = Workspace.current()
    declared = Registry(workspace).load_model(model)
    users = people or Population.open(model, workspace).users
    changed = {"buffer": None, "separation": declared.training.separation or 1, "noise": noise, "rounds": rounds}
    changed |= {"max_staleness": max_staleness}
    kept = declared.training.model_dump() | {name: value for name, value in changed.items() if value is not None}
    settings = Training(**kept)
    chosen, most = updates or declared.training.buffer or max(1, users // 50), declared.privacy.epsilon
    largest = most_updates(settings, users, coming)
    if largest < 1:
        raise ConfigError(
            f"{users} people are too few for updates up to {settings.max_staleness} flushes late: --people x --coming "
            f"must be at least {settings.max_staleness + 1}, got {coming * users:g}; or lower --max-staleness"
        )
    if chosen > largest:
        raise ConfigError(
            f"--updates must be at most {largest}, with {users} people and updates up to {settings.max_staleness} "
            f"flushes late, got {chosen}"
        )
    for target in epsilon or ():
        if not 0 < target <= most:
            raise ConfigError(f"--epsilon must be > 0 and at most the {most:g} that {model!r} declares, got {target:g}")
    delta = declared.privacy.delta
    now = BufferSize.of(settings, chosen, users, coming=coming, epsilon=most, delta=delta)
    targets = epsilon or [target for target in TARGETS if target < most]
    needed: dict[float, BufferSize | None] = {
        target: buffer_for(settings, users, most_noise=now.step_noise, coming=coming, epsilon=target, delta=delta)
        for target in targets
        if target != most  # what serves there is given
    }
    if as_json:
        found = [{"epsilon": target, "buffer": size and asdict(size)} for target, size in needed.items()]
        print(json.dumps({"people": users, "flushes": settings.rounds, "declared": asdict(now), "needed": found}))
    else:
        _print(users, settings.rounds, {most: now, **needed})


def _print(users: int, flushes: int, sizes: dict[float, BufferSize | None]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("epsilon", "K", "separation", "participations", "multiplier", "noise of a step")
    for target, size in sizes.items():
        row = (
            ["none"]
            if size is None
            else [
                f"{size.updates:,}",
                str(size.separation),
                str(size.participations),
                f"{size.noise_multiplier:.3g}",
                f"{size.step_noise:.3g}",
            ]
        )
        table.add_row(f"{target:g}", *row)
    print(f"{users:,} people, {flushes} flushes: the K that an epsilon needs for as little noise in a step")
    Console(highlight=False).print(table)
    if None in sizes.values():
        print("none: too few people come for it")
