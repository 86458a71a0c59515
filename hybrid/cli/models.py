"""Commands about models: register, models, show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from rich.table import Table

    from hybrid.registry import Registered
    from hybrid.spec import HybridModel
    from hybrid.version import TrainingRecord, Version

app = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def register(
    file: Annotated[Path, typer.Argument(help="Python file that builds one HybridModel.")],
    as_json: Json = False,
) -> None:
    """Checks a model's declaration, its towers and its feature sources, and stores it.

    Nothing is trained or served. The hash that it prints covers everything that
    was declared, and the network with its operations: training binds versions to it.

    Example: hybrid register examples/coupon/model.py
    """
    from feature_store.definitions import check_sources
    from hybrid.network import Network
    from hybrid.registry import Registry
    from hybrid.spec import load_model

    model = load_model(file)
    network = Network.build(model).description()
    check_sources(model)
    digest = Registry(Workspace.current()).register(model, network, file)
    if as_json:
        print(json.dumps({"name": model.name, "definition_hash": digest, "network": network}))
    else:
        _print_registered(model, digest, network)


@app.command()
def models(as_json: Json = False) -> None:
    """Lists registered models, their trained versions and aliases.

    Example: hybrid models
    """
    from hybrid.registry import Registry

    registered = Registry(Workspace.current()).models()
    if as_json:
        print(json.dumps([_registered_json(model) for model in registered]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "definition", "versions", "aliases")
    for model in registered:
        aliases = ", ".join(f"{alias} -> {number}" for alias, number in sorted(model.aliases.items()))
        versions = ", ".join(map(str, model.versions)) or "not trained"
        table.add_row(model.name, model.definition_hash[:12], versions, aliases)
    if not registered:
        typer.echo(f"No model is registered in {Workspace.current().root}; `hybrid register FILE` registers one.")
        return
    Console().print(table, highlight=False)


@app.command()
def show(
    selector: Annotated[str, typer.Argument(metavar="NAME[@ALIAS|:VERSION]", help="A model, or a version of it.")],
    as_json: Json = False,
) -> None:
    """Shows a registered model, or one trained version and what it cost in privacy.

    Example: hybrid show coupon@production
    """
    from hybrid.registry import Registry, parse_selector

    name, which = parse_selector(selector)
    registry = Registry(Workspace.current())
    if which is None:
        model = registry.model(name)
        shown = _registered_json(model) | {"definition": registry.definition(name)}
    else:
        shown = _version_json(registry.version(name, which))
    if as_json:
        print(json.dumps(shown))
    else:
        _print_shown(shown)


def _print_registered(model: HybridModel, digest: str, network: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    table = _table(f"{model.name}, definition {digest[:12]}")
    _add_declaration(table, model.definition())
    _add_network(table, network)
    console.print(table)
    if model.label.visible_to == "device" and model.training.server_tower == "central":
        console.print(
            "Only devices see the label: train with --server-tower federated or frozen, or declare it in `training`."
        )
    console.print(
        f"Registered. Next: `hybrid features apply {model.name}`, `hybrid features materialize {model.name}`, "
        f"then `hybrid train {model.name}`."
    )


def _add_declaration(table: Table, declaration: Mapping[str, Any]) -> None:
    """What was declared: features by side, who learns the label, the budget, and what a release discloses."""
    from hybrid.spec import Label, Privacy

    served = {name: kind for view in declaration["server"]["views"] for name, kind in view["features"].items()}
    sides = {"server": served, "request": declaration["request"], "device": declaration["device"]}
    for side, transforms in sides.items():
        features = ", ".join(f"{name} ({_kind(transform)})" for name, transform in transforms.items())
        table.add_row(f"{side} features", features or "none")
    label, privacy = Label(**declaration["label"]), Privacy(**declaration["privacy"])
    table.add_row("label", f"{label.column}, visible to the {label.visible_to}")
    budget = f"epsilon <= {privacy.epsilon:g} at delta {privacy.delta:g} per {privacy.unit}"
    table.add_row("privacy", f"{budget}; protects {label.protects}")
    table.add_row("release", _released(declaration["release"], privacy.delta))


def _kind(transform: Mapping[str, Any]) -> str:
    learned = "normalise" in transform or "discover" in transform
    return f"{transform['kind']}, learned" if learned else str(transform["kind"])


def _released(release: Mapping[str, Any] | None, delta: float) -> str:
    """How the device embedding leaves the device, and what that discloses."""
    from hybrid.privacy.mechanisms import local_epsilon

    if release is None:
        return "none: the device merges, and is sent the server's embedding of the entity that it names"
    if release["kind"] == "noised":
        epsilon = local_epsilon(release["sigma"], delta)
        return f"noised: each request has a local epsilon of {epsilon:.3g} at delta {delta:g}, and requests add up"
    return f"clear: whoever holds the tower can try inputs until one gives the embedding. Reason: {release['reason']}"


def _add_network(table: Table, network: Mapping[str, Any]) -> None:
    table.add_row("embeddings", f"server {network['server_embedding']}, device {network['device_embedding']}")
    table.add_row("parameters", ", ".join(f"{part} {count}" for part, count in network["parameters"].items()))


def _registered_json(model: Registered) -> dict[str, Any]:
    return asdict(model) | {"file": str(model.file), "versions": list(model.versions)}


def _version_json(version: Version) -> dict[str, Any]:
    return {
        "name": version.model,
        "version": version.number,
        "aliases": list(version.aliases),
        "definition_hash": version.definition_hash,
        "training": version.training.model_dump(mode="json"),
        "definition": version.definition,
    }


def _print_shown(shown: Mapping[str, Any]) -> None:
    from rich.console import Console

    from hybrid.version import TrainingRecord

    number = f":{shown['version']}" if "version" in shown else ""
    table = _table(f"{shown['name']}{number}")
    table.add_row("definition", shown["definition_hash"])
    if "version" in shown:
        table.add_row("aliases", ", ".join(shown["aliases"]) or "none")
        _add_training(table, TrainingRecord(**shown["training"]))
    else:
        table.add_row("file", shown["file"])
        table.add_row("versions", ", ".join(map(str, shown["versions"])) or "not trained")
        table.add_row("aliases", ", ".join(f"{a} -> {n}" for a, n in sorted(shown["aliases"].items())) or "none")
    _add_declaration(table, shown["definition"]["declaration"])
    _add_network(table, shown["definition"]["network"])
    Console(highlight=False).print(table)


def _add_training(table: Table, record: TrainingRecord) -> None:
    rows = "examples that only devices count" if record.examples is None else f"{record.examples} examples (oracle)"
    learned = f"{record.kind}, from {record.users} users and {rows} of {record.population}"
    table.add_row("training", learned)
    table.add_row("run", record.run)
    table.add_row("privacy spent", "\n".join(record.privacy_lines()))
    if record.balance is not None:
        table.add_row("label balance", record.balance.line())
    if record.noise_multiplier is not None:
        table.add_row("noise", f"{record.noise_multiplier:.4g} x clip {record.clip}")
    if record.learned is not None:
        from rich.markup import escape

        from hybrid.version import constants_of

        constants = (f"{name}: {constants_of(each)}" for name, each in record.learned.transforms.items())
        table.add_row("learned constants", escape("\n".join(constants)))
    for metric, value in record.oracle.items():
        table.add_row(f"{metric} (oracle: pooled data, simulation only)", f"{value:.4g}")


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table
