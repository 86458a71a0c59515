"""Dead letters, read back and replayed: the original bytes go to the topic and partition they came from.

A replay is told by the SHA-256 of its bytes, so a record that comes back as a
new letter, because it still cannot be read, is known to have been replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import kafka
from kafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict

from hybrid.errors import Unavailable
from hybrid.messages import DeadLetter, DeviceEmbeddings, Predictions
from hybrid.sealing import CannotOpen, OpeningKey
from serving.connection import Broker
from serving.kafka import Outbox, lying_in
from serving.topics import REPLAYS

log = logging.getLogger(__name__)

SOURCES = (DeviceEmbeddings.TOPIC, Predictions.TOPIC)
Outcome = Literal["replayed", "would_replay", "already_replayed", "not_kept", "cannot_open"]


class Replay(BaseModel):
    """A record of `REPLAYS`: original bytes that were sent again.

    Attributes:
        topic, partition: where to.
        sha256: of the bytes.
        replayed_ms: when, Unix time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    topic: str
    partition: int
    sha256: str
    replayed_ms: int


@dataclass(frozen=True)
class Filter:
    """Which letters are meant; None means any.

    Attributes:
        topic: the record's.
        code: why it could not be processed.
        since_ms, until_ms: when the letter was written, Unix time; from, and before.
    """

    topic: str | None = None
    code: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None

    def takes(self, letter: DeadLetter, at_ms: int) -> bool:
        """Whether a letter written at `at_ms` is meant."""
        return (
            self.topic in (None, letter.topic)
            and self.code in (None, letter.code)
            and (self.since_ms is None or at_ms >= self.since_ms)
            and (self.until_ms is None or at_ms < self.until_ms)
        )


@dataclass(frozen=True)
class Found:
    """A letter, when it was written, and when its bytes were last replayed; None if never."""

    letter: DeadLetter
    at_ms: int
    replayed_ms: int | None


def find(broker: Broker, wanted: Filter) -> Iterator[Found]:
    """The letters that lie in Kafka when their topic is begun, oldest first within a topic; later ones are left out.

    What is in a dead topic and is no letter is passed over with a warning: anybody who may write there can put it.

    Raises:
        Unavailable: Kafka does not answer.
    """
    replays = _replays(broker)
    for topic in SOURCES:
        if wanted.topic not in (None, topic):
            continue
        dead, partitions = DeadLetter.topic_for(topic), _partitions(broker, topic)
        for record in lying_in(broker, dead):
            letter, at_ms = _letter(record.value or b""), record.timestamp
            # One that names another place was not written by us, and must not choose where bytes go.
            if letter is None or letter.topic != topic or letter.partition not in partitions:
                log.warning("a record of %s is not a dead letter", dead)
            elif wanted.takes(letter, at_ms):
                yield Found(letter, at_ms, replays.get((topic, letter.sha256)))


def replay(
    letters: Iterable[Found],
    outbox: Outbox,
    key: OpeningKey,
    now_ms: Callable[[], int],
    *,
    dry_run: bool = False,
    again: bool = False,
) -> Iterator[tuple[Found, Outcome]]:
    """Sends the bytes of letters again, each to its own topic and partition, and says of each what became of it.

    The bytes are safe in Kafka before they are noted as replayed: one who is
    stopped in between sends them twice, and their request ids, which are the
    same, make that harmless.

    Args:
        letters: oldest first.
        outbox: where to.
        key: opens them.
        now_ms: Unix time.
        dry_run: opens them, and sends nothing.
        again: also those that were replayed before.

    Raises:
        Unavailable: Kafka did not take something; what was yielded before is done.
    """
    sent: set[tuple[str, str]] = set()
    for found in letters:
        letter = found.letter
        identity = letter.topic, letter.sha256
        if letter.sealed is None:
            yield found, "not_kept"
        elif identity in sent or (found.replayed_ms is not None and not again):
            yield found, "already_replayed"
        else:
            try:
                data = letter.open(key)
            except CannotOpen as error:
                log.warning("%s partition %d offset %d: %s", letter.topic, letter.partition, letter.offset, error)
                yield found, "cannot_open"
                continue
            sent.add(identity)
            if dry_run:
                yield found, "would_replay"
                continue
            outbox.send(letter.topic, data, letter.partition)
            outbox.flush()
            note = Replay(topic=letter.topic, partition=letter.partition, sha256=letter.sha256, replayed_ms=now_ms())
            outbox.send(REPLAYS, note.model_dump_json().encode())
            outbox.flush()
            yield found, "replayed"


def _replays(broker: Broker) -> dict[tuple[str, str], int]:
    """(topic, sha256) -> when it was last replayed."""
    found = {}
    for record in lying_in(broker, REPLAYS):
        try:
            note = Replay.model_validate_json(record.value or b"")
        except ValueError:
            log.warning("a record of %s is not a replay", REPLAYS)
            continue
        found[note.topic, note.sha256] = note.replayed_ms
    return found


def _letter(value: bytes) -> DeadLetter | None:
    try:
        return DeadLetter.model_validate_json(value)
    except ValueError:
        return None


def _partitions(broker: Broker, topic: str) -> set[int]:
    try:
        with closing(kafka.KafkaConsumer(enable_auto_commit=False, **broker.settings())) as consumer:
            return set(consumer.partitions_for_topic(topic) or ())
    except KafkaError as error:
        raise Unavailable(f"Kafka does not answer: {type(error).__name__}") from None
