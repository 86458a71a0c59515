"""The `hybrid dead-letters` commands: keygen, list, replay."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrid.cli.connection import (
    Kafka,
    KafkaCa,
    KafkaCert,
    KafkaKey,
    KafkaPasswordFile,
    KafkaSasl,
    KafkaTls,
    KafkaUsername,
)
from hybrid.errors import ConfigError
from hybrid.workspace import Workspace

if TYPE_CHECKING:
    from serving.connection import Broker
    from serving.dead_letters import Filter, Found

app = typer.Typer()
group = typer.Typer(
    help="Records that serving could not read: why, and their bytes, to be sent again.\n\n"
    "Gateway and merge worker put such a record into <topic>.dead, with a reason code. Its bytes may hold an "
    "embedding, so they are kept only sealed to a public key that those processes are given "
    "(--dead-letter-key); the private key stays with whoever replays. Letters are kept for 7 days.",
    no_args_is_help=True,
)
app.add_typer(group, name="dead-letters")

PRIVATE, PUBLIC = "dead-letters.pem", "dead-letters.pub"

Topic = Annotated[str | None, typer.Option(help="Only records of this topic, such as hybrid.device-embeddings.v1.")]
Reason = Annotated[str | None, typer.Option(help="Only this reason code, such as unreadable.")]
Since = Annotated[datetime | None, typer.Option(help="Only letters written from this time on, UTC.")]
Until = Annotated[datetime | None, typer.Option(help="Only letters written before this time, UTC.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per letter and line.")]


@group.command()
def keygen(
    private: Annotated[Path | None, typer.Option(help=f"Default: keys/{PRIVATE} in the workspace.")] = None,
    public: Annotated[Path | None, typer.Option(help=f"Default: keys/{PUBLIC} in the workspace.")] = None,
) -> None:
    """Makes the pair of keys: the public one for gateway and worker, the private one for whoever replays.

    An existing file is never replaced: what was sealed to its key could not be read again.
    The local stack (`hybrid up`) uses the public key in the workspace by itself.

    Example: hybrid dead-letters keygen --private ~/replay.pem --public dead-letters.pub
    """
    from hybrid.sealing import generate

    keys = Workspace.current().keys
    private, public = private or keys / PRIVATE, public or keys / PUBLIC
    key_id = generate(private, public)
    print(f"key {key_id}")
    print(f"public   {public}   give it to serving: --dead-letter-key or $HYBRID_DEAD_LETTER_KEY")
    print(f"private  {private}   keep it where serving cannot read it")


@group.command(name="list")
def list_letters(
    *,
    kafka: Kafka = None,
    kafka_tls: KafkaTls = False,
    kafka_ca: KafkaCa = None,
    kafka_cert: KafkaCert = None,
    kafka_key: KafkaKey = None,
    kafka_sasl: KafkaSasl = None,
    kafka_username: KafkaUsername = None,
    kafka_password_file: KafkaPasswordFile = None,
    topic: Topic = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, oldest first.")] = 1000,
    as_json: Json = False,
) -> None:
    """Shows the letters: where each record lay, why it could not be read, and whether its bytes are there.

    Bytes are kept (sealed to the key shown), or not: no_key (serving was given none) or too_large.
    Without --kafka the local stack is asked.

    Example: hybrid dead-letters list --reason unreadable --since 2026-03-01
    """
    from serving.dead_letters import find
    from serving.topics import check_access

    shown = kafka_tls, kafka_ca, kafka_cert, kafka_key, kafka_sasl, kafka_username, kafka_password_file
    broker, wanted = _broker(kafka, *shown), _filter(topic, reason, since, until)
    check_access(broker)
    found = find(broker, wanted)
    letters = [_shown(each) for each in islice(found, limit)]
    _print(letters, as_json=as_json)


@group.command()
def replay(
    *,
    kafka: Kafka = None,
    kafka_tls: KafkaTls = False,
    kafka_ca: KafkaCa = None,
    kafka_cert: KafkaCert = None,
    kafka_key: KafkaKey = None,
    kafka_sasl: KafkaSasl = None,
    kafka_username: KafkaUsername = None,
    kafka_password_file: KafkaPasswordFile = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Private key. Default: $HYBRID_DEAD_LETTER_PRIVATE_KEY, or keys/{PRIVATE} in the workspace.",
        ),
    ] = None,
    topic: Topic = None,
    reason: Reason = None,
    since: Since = None,
    until: Until = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Open the letters and send nothing.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    as_json: Json = False,
) -> None:
    """Sends the original bytes to the topic and partition they came from, once what was wrong is mended.

    What was sent is noted in Kafka, so a second replay skips it and says
    already_replayed. Request ids are the original ones: whoever waits for an
    answer gets one, repeats are dropped, and rows whose callers gave up are
    answered with unavailable. A record that still cannot be read comes back as a
    new letter. Exit status 1 if a letter could not be opened. Without --kafka the
    local stack's.

    Example: hybrid dead-letters replay --reason unreadable --dry-run
    """
    from hybrid.sealing import OpeningKey
    from serving import dead_letters
    from serving.kafka import ProducerOutbox
    from serving.topics import create_topics

    default = os.environ.get("HYBRID_DEAD_LETTER_PRIVATE_KEY") or Workspace.current().keys / PRIVATE
    shown = kafka_tls, kafka_ca, kafka_cert, kafka_key, kafka_sasl, kafka_username, kafka_password_file
    broker, wanted = _broker(kafka, *shown), _filter(topic, reason, since, until)
    opening = OpeningKey.read(key or Path(default))
    done: list[dict[str, Any]] = []
    create_topics(broker)
    letters = dead_letters.find(broker, wanted)  # not those that a replay brings back
    with ProducerOutbox(broker) as outbox:
        for found, outcome in dead_letters.replay(letters, outbox, opening, _now_ms, dry_run=dry_run, again=again):
            done.append(_shown(found) | {"outcome": outcome})
    _print(done, as_json=as_json)
    if any(letter["outcome"] == "cannot_open" for letter in done):
        raise typer.Exit(1)


def _broker(given: str | None, *shown: Any) -> Broker:
    """Where it is, with what is shown to it: the rest of a `Broker`."""
    from hybrid.local import stack
    from serving.connection import Broker

    if bootstrap := given or os.environ.get("HYBRID_KAFKA"):
        return Broker(bootstrap, *shown)
    state = stack.status(Workspace.current())
    ports = {use: port for server in state.servers for use, port in server.ports.items()} if state else {}
    if "kafka" not in ports:
        raise ConfigError("--kafka must name the broker as HOST:PORT: the local stack is not up")
    return Broker(f"127.0.0.1:{ports['kafka']}", *shown)


def _filter(topic: str | None, reason: str | None, since: datetime | None, until: datetime | None) -> Filter:
    from serving.dead_letters import SOURCES, Filter

    if topic is not None and topic not in SOURCES:
        raise ConfigError(f"--topic must be one of {list(SOURCES)}, got {topic!r}")
    return Filter(topic, reason, _ms(since), _ms(until))


def _ms(at: datetime | None) -> int | None:
    return None if at is None else int(at.replace(tzinfo=UTC).timestamp() * 1000)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _time(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")


def _shown(found: Found) -> dict[str, Any]:
    letter = found.letter.model_dump(exclude={"sealed"})
    return {"at": _time(found.at_ms), **letter, "replayed_at": _time(found.replayed_ms)}


def _print(letters: list[dict[str, Any]], *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        for letter in letters:
            print(json.dumps(letter))
        return
    if not letters:
        print("No dead letters.")
        return
    table = Table("written", "topic", "partition:offset", "reason", "bytes", "kept", "replayed")
    for letter in letters:
        place = f"{letter['partition']}:{letter['offset']}"
        kept = letter["withheld"] or f"key {letter['key_id']}"
        row = letter["at"], letter["topic"], place, letter["code"], str(letter["length"]), kept
        table.add_row(*row, letter.get("outcome") or letter["replayed_at"] or "")
    Console(highlight=False).print(table)
    counts = Counter(letter.get("outcome") or letter["code"] for letter in letters)
    print(", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
