"""`hybrid doctor`: all that a deployment needs, looked at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid.cli import connection as c
from hybrid.cli.checks import NAMES, Servers, checks, stack_state, with_stack
from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from hybrid.doctor.findings import Finding

app = typer.Typer()


@app.command()
def doctor(
    *,
    kafka: c.Kafka = None,
    kafka_tls: c.KafkaTls = False,
    kafka_ca: c.KafkaCa = None,
    kafka_cert: c.KafkaCert = None,
    kafka_key: c.KafkaKey = None,
    kafka_sasl: c.KafkaSasl = None,
    kafka_username: c.KafkaUsername = None,
    kafka_password_file: c.KafkaPasswordFile = None,
    triton: c.Triton = None,
    triton_tls: c.TritonTls = False,
    triton_ca: c.TritonCa = None,
    triton_cert: c.TritonCert = None,
    triton_key: c.TritonKey = None,
    triton_token_file: c.TritonTokenFile = None,
    gateway: Annotated[str | None, typer.Option(metavar="URL", help="Such as https://gateway:8080.")] = None,
    superlink: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Flower's, any of its ports.")] = None,
    aggregator: Annotated[list[str] | None, typer.Option(metavar="URL", help="Each of them.")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="Of the issuer of tokens.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="Of the certificates of gateway, SuperLink, aggregators and issuer, PEM.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="CHECK", help=f"One of {', '.join(NAMES)}; again.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For each check.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Looks at all that a deployment needs, and says for each thing what it found and what to do about it.

    The registry is where MLFLOW_TRACKING_URI says, features are where the workspace says; the local stack is asked
    if it is up, and what runs elsewhere where an option says. What nobody says is skipped. Nothing is changed, but
    for a record in the topic hybrid.doctor.v1. Exit status 1 where something failed, else 0.

        hybrid doctor

        hybrid doctor --kafka kafka:9092 --triton triton:8001 --gateway http://gateway:8080 --json
    """
    from hybrid.doctor.findings import examine

    if unknown := sorted(set(only or ()) - {*NAMES}):
        raise ConfigError(f"--only must be one of {', '.join(NAMES)}, got {', '.join(unknown)}")
    broker = c.broker_of(
        kafka,
        tls=kafka_tls,
        ca=kafka_ca,
        certificate=kafka_cert,
        key=kafka_key,
        sasl=kafka_sasl,
        username=kafka_username,
        password_file=kafka_password_file,
    )
    asked = c.triton_address_of(
        triton, tls=triton_tls, ca=triton_ca, certificate=triton_cert, key=triton_key, token_file=triton_token_file
    )
    given = Servers(broker, asked, gateway, superlink, tuple(aggregator or ()), issuer, ca)
    for library in ("kafka", "feast"):  # what they say of a failure, a finding says
        logging.getLogger(library).setLevel(logging.CRITICAL)
    workspace = Workspace.current()
    state = stack_state(workspace)
    wanted = [each for each in checks(workspace, with_stack(given, state), state) if each.name in (only or NAMES)]
    found = list(examine(wanted, timeout_s))
    failed = any(finding.status == "fail" for finding in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}))
    else:
        _print(found)
    raise typer.Exit(1 if failed else 0)


def _print(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "warn": "yellow", "fail": "red", "skipped": "dim"}
    table = Table("check", "", "found", "what to do")
    for column in table.columns[2:]:
        column.overflow = "fold"
    for finding in found:
        colour = colours[finding.status]
        table.add_row(finding.check, f"[{colour}]{finding.status}[/]", escape(finding.found), escape(finding.fix))
    Console(highlight=False).print(table)
    count = {status: sum(finding.status == status for finding in found) for status in colours}
    typer.echo(f"{count['ok']} ok, {count['warn']} to watch, {count['fail']} failed, {count['skipped']} skipped")
