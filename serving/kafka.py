"""Kafka, as serving uses it: topics, a consumer group's inbox, an outbox, one partition read from its end.

Timestamps are the producer's (CreateTime). Everything here blocks: the gateway
calls it from threads of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

import kafka
from kafka.errors import KafkaError, TopicAlreadyExistsError

from hybrid.errors import Unavailable
from hybrid.messages import DeadLetter, DeviceEmbeddings, Predictions
from hybrid.tracing import MAX_TRACES, TRACEPARENT

log = logging.getLogger(__name__)

GROUP = "hybrid-merge-worker"
PARTITIONS = {
    DeviceEmbeddings.TOPIC: 4,
    Predictions.TOPIC: 8,
    DeadLetter.topic_for(DeviceEmbeddings.TOPIC): 1,
    DeadLetter.topic_for(Predictions.TOPIC): 1,
}
# A topic is deleted by whole segments, so hourly retention needs segments shorter than an hour.
TOPIC_CONFIG = {"retention.ms": "3600000", "segment.ms": "600000", "message.timestamp.type": "CreateTime"}
SEND_TIMEOUT_MS = 5_000


@dataclass(frozen=True)
class Record:
    """One record as it lies in a topic; `value` is empty where Kafka holds none.

    `traces` are its `traceparent` headers, one for each traced request that shares it.
    """

    topic: str
    partition: int
    offset: int
    value: bytes
    traces: tuple[str, ...] = ()

    def dead_letter(self, reason: str) -> DeadLetter:
        """What is kept of a record that cannot be read."""
        place = {"partition": self.partition, "offset": self.offset}
        return DeadLetter.of(self.value, topic=self.topic, reason=reason, **place)


class Inbox(Protocol):
    """Where the worker takes records from."""

    def poll(self, timeout_s: float) -> list[Record]:
        """Records since the last poll, none if `timeout_s` passes first."""

    def commit(self) -> None:
        """Says that all polled records are done with."""

    def rewind(self) -> None:
        """Goes back to the last commit: the records since then come again.

        Raises:
            Unavailable: the last commit cannot be asked for; nothing moved for good.
        """


class Outbox(Protocol):
    """Where the worker puts records."""

    def send(self, topic: str, value: bytes, partition: int | None = None) -> None:
        """Takes a record; it is safe only once `flush` returned."""

    def flush(self) -> None:
        """Waits until everything sent lies in its topic.

        Raises:
            Unavailable: something does not.
        """


def create_topics(bootstrap: str) -> None:
    """Creates the topics of serving that are absent."""
    admin = kafka.KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        for topic in sorted(set(PARTITIONS) - set(admin.list_topics())):
            try:
                settings = {"num_partitions": PARTITIONS[topic], "configs": TOPIC_CONFIG}
                admin.create_topics({topic: settings}, wait_for_metadata=True)
            except TopicAlreadyExistsError:
                log.info("topic %s was created meanwhile", topic)
    finally:
        admin.close()


class GroupInbox:
    """The worker's share of a topic, by consumer group; at least once, as offsets are committed by hand."""

    def __init__(self, bootstrap: str, topic: str, max_records: int = 64) -> None:
        self._topic, self._lag = topic, None
        self._consumer = kafka.KafkaConsumer(
            bootstrap_servers=bootstrap,
            group_id=GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=max_records,
            # A killed worker's partitions wait this long for the next one: the shortest a broker takes by default.
            session_timeout_ms=6_000,
            heartbeat_interval_ms=1_500,
        )

    def __enter__(self) -> Self:
        self._consumer.subscribe([self._topic])
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close(autocommit=False)

    @property
    def assigned(self) -> bool:
        """Whether the group gave this consumer a share."""
        return bool(self._consumer.assignment())

    @property
    def lag(self) -> int | None:
        """Records in its share that were not polled yet; None before anything was."""
        return self._lag

    def poll(self, timeout_s: float) -> list[Record]:
        """See `Inbox`."""
        found = _records(self._consumer, timeout_s)
        # Where nothing was fetched yet there is no high water, and asking for the position would wait for it.
        ends = {p: end for p in self._consumer.assignment() if (end := self._consumer.highwater(p)) is not None}
        self._lag = sum(max(end - self._consumer.position(p), 0) for p, end in ends.items()) if ends else None
        return found

    def commit(self) -> None:
        """See `Inbox`. After a rebalance the records are another worker's: answered twice, which is allowed."""
        try:
            self._consumer.commit()
        except KafkaError as error:
            log.warning("offsets were not committed: %s", type(error).__name__)

    def rewind(self) -> None:
        """See `Inbox`."""
        try:
            for partition in self._consumer.assignment():
                committed = self._consumer.committed(partition)
                if committed is None:
                    self._consumer.seek_to_beginning(partition)
                else:
                    self._consumer.seek(partition, committed)
        except KafkaError as error:
            raise Unavailable(f"Kafka does not say where to go on: {type(error).__name__}") from None


class ProducerOutbox:
    """A producer that knows whether everything sent has arrived."""

    def __init__(self, bootstrap: str) -> None:
        self._producer = _producer(bootstrap, Predictions.TOPIC)
        self._sent: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.close(timeout=SEND_TIMEOUT_MS / 1000)

    def send(self, topic: str, value: bytes, partition: int | None = None) -> None:
        """See `Outbox`."""
        try:
            self._sent.append(self._producer.send(topic, value, partition=partition))
        except KafkaError as error:
            raise Unavailable(f"Kafka takes no records: {type(error).__name__}") from None

    def flush(self) -> None:
        """See `Outbox`."""
        sent, self._sent = self._sent, []
        try:
            for future in sent:
                future.get(timeout=2 * SEND_TIMEOUT_MS / 1000)
        except KafkaError as error:
            raise Unavailable(f"Kafka did not take a record: {type(error).__name__}") from None


@dataclass(frozen=True)
class _Sending:
    """One record on its way out of the gateway."""

    topic: str
    value: bytes
    key: bytes | None
    on_failure: Callable[[], None]
    traces: Sequence[str]


class ThreadedOutbox:
    """Sends from a thread of its own, so that a slow broker never holds up the event loop.

    Args:
        bootstrap: the broker, HOST:PORT.
        capacity: records that may wait; more are refused.
    """

    def __init__(self, bootstrap: str, capacity: int = 10_000) -> None:
        self._bootstrap = bootstrap
        self._waiting: queue.Queue[_Sending | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name="kafka-outbox", daemon=True)
        self._connected = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.alive:
            with suppress(queue.Full):  # so many records wait that the broker takes none
                self._waiting.put(None, timeout=SEND_TIMEOUT_MS / 1000)
        self._thread.join(timeout=2 * SEND_TIMEOUT_MS / 1000)

    @property
    def alive(self) -> bool:
        """Whether its thread is; an error that nobody foresaw ends it."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether the producer is there and its thread lives."""
        return self._connected.is_set() and self.alive

    @property
    def waiting(self) -> int:
        """Records that wait to be sent."""
        return self._waiting.qsize()

    def send(
        self,
        topic: str,
        value: bytes,
        key: bytes | None,
        on_failure: Callable[[], None],
        traces: Sequence[str] = (),
    ) -> None:
        """Takes a record and returns at once; `on_failure` is called, in some thread, if it was not delivered.

        Raises:
            Unavailable: too many records wait already, or the thread ended.
        """
        if not self.alive:
            raise Unavailable("nothing is sent to Kafka any more")
        try:
            self._waiting.put_nowait(_Sending(topic, value, key, on_failure, traces))
        except queue.Full:
            raise Unavailable("too many records wait for Kafka") from None

    def _run(self) -> None:
        try:
            self._send_all()
        except Exception as error:
            log.critical("records are sent to Kafka no more: %s", type(error).__name__)
        while not self._waiting.empty():
            if item := self._waiting.get():
                item.on_failure()

    def _send_all(self) -> None:
        producer = _producer(self._bootstrap, DeviceEmbeddings.TOPIC)
        self._connected.set()
        while (item := self._waiting.get()) is not None:
            headers = [(TRACEPARENT, trace.encode()) for trace in item.traces]
            try:
                sent = producer.send(item.topic, item.value, key=item.key, headers=headers)
                sent.add_errback(lambda _, fail=item.on_failure: fail())
            except KafkaError as error:
                log.warning("a record for %s was not sent: %s", item.topic, type(error).__name__)
                item.on_failure()
        producer.close(timeout=SEND_TIMEOUT_MS / 1000)


class Tail:
    """One partition read from its end on, in a thread of its own.

    Args:
        bootstrap: the broker, HOST:PORT.
        topic, partition: what to read.
        on_record: called in that thread for each record.
    """

    def __init__(self, bootstrap: str, topic: str, partition: int, on_record: Callable[[Record], None]) -> None:
        self._bootstrap = bootstrap
        self._partition = kafka.TopicPartition(topic, partition)
        self._on_record = on_record
        self._assigned, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="kafka-tail", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=SEND_TIMEOUT_MS / 1000)

    @property
    def alive(self) -> bool:
        """Whether its thread is; an error that nobody foresaw ends it."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether every record written from now on will be read."""
        return self._assigned.is_set() and self.alive

    def _run(self) -> None:
        try:
            self._read_all()
        except Exception as error:
            # The class alone: a record's bytes can stand in the text.
            log.critical("partition %s is read no more: %s", self._partition, type(error).__name__)

    def _read_all(self) -> None:
        consumer = kafka.KafkaConsumer(bootstrap_servers=self._bootstrap, enable_auto_commit=False)
        try:
            consumer.assign([self._partition])
            consumer.seek_to_end(self._partition)
            consumer.position(self._partition)  # resolves the end now, not at the first poll
            self._assigned.set()
            while not self._stopping.is_set():
                for record in _records(consumer, timeout_s=0.2):
                    self._on_record(record)
        finally:
            consumer.close()


def _producer(bootstrap: str, topic: str) -> Any:
    """A producer that knows where `topic` lies, so that its first record does not wait for that."""
    producer = kafka.KafkaProducer(
        bootstrap_servers=bootstrap,
        acks="all",
        retry_backoff_ms=20,
        max_block_ms=SEND_TIMEOUT_MS,
        request_timeout_ms=SEND_TIMEOUT_MS - 1_000,
        delivery_timeout_ms=SEND_TIMEOUT_MS,
    )
    producer.partitions_for(topic)
    return producer


def _records(consumer: Any, timeout_s: float) -> list[Record]:
    polled = consumer.poll(timeout_ms=int(1000 * timeout_s))
    return [
        Record(r.topic, r.partition, r.offset, r.value or b"", _traces(r.headers)) for rs in polled.values() for r in rs
    ]


def _traces(headers: Sequence[tuple[str, bytes | None]]) -> tuple[str, ...]:
    """The first of the record's trace contexts: whoever may write to a topic may write any number of anything."""
    found = [(value or b"").decode("ascii", "replace") for key, value in headers if key == TRACEPARENT]
    return tuple(found[:MAX_TRACES])
