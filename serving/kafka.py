"""Kafka, as serving uses it: topics, a consumer group's inbox, an outbox, one partition read from its end.

Timestamps are the producer's (CreateTime). Everything here blocks: the gateway
calls it from threads of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import kafka
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import AuthorizationError, KafkaError

from hybrid.errors import ConfigError, Unavailable
from hybrid.messages import BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.tracing import MAX_TRACES, TRACEPARENT
from serving.connection import Broker

if TYPE_CHECKING:
    from hybrid.sealing import SealingKey

log = logging.getLogger(__name__)

GROUP = "hybrid-merge-worker"
SEND_TIMEOUT_MS = 5_000
LISTING_POLL_MS = 500
COMMIT_S = 0.1  # between two commits; a killed worker's rows of that time are answered twice
RECONNECT_MS = 1_000  # the longest pause between two tries; with the default, 30 s, an outage lasts as much longer
PRODUCER: dict[str, Any] = {  # settings of every producer: what was sent is in Kafka, or is known not to be, in time
    "acks": "all",
    "metrics_enabled": False,  # `serving.telemetry` has ours; kafka-python's cost a twentieth of its time
    "reconnect_backoff_max_ms": RECONNECT_MS,
    "max_block_ms": SEND_TIMEOUT_MS,
    "request_timeout_ms": SEND_TIMEOUT_MS - 1_000,
    "delivery_timeout_ms": SEND_TIMEOUT_MS,
}


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

    def dead_letter(self, error: BadMessage, key: SealingKey | None) -> DeadLetter:
        """What is kept of a record that cannot be read; its bytes where there is a key to seal them with."""
        place: dict[str, Any] = {"topic": self.topic, "partition": self.partition, "offset": self.offset}
        return DeadLetter.of(self.value, **place, error=error, key=key)


Upto = Mapping[int, int]  # partition -> offset of the first record that is not done with


class Inbox(Protocol):
    """Where the worker takes records from."""

    def poll(self, timeout_s: float, most: int) -> list[Record]:
        """Records since the last poll, at most so many, none if `timeout_s` passes first."""

    def commit(self, upto: Upto) -> None:
        """Says that all records before those offsets are done with; need not wait until Kafka has noted it."""

    def pause(self) -> None:
        """Takes no more records of its present share until `resume`; polls go on, to stay in the group."""

    def resume(self) -> None:
        """Takes records again."""

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
        """Waits until everything that this thread sent lies in its topic.

        Raises:
            Unavailable: something does not.
        """


def lying_in(broker: Broker, topic: str) -> Iterator[Any]:
    """kafka-python's records that lie in a topic now, without those of transactions that are not committed.

    Yields nothing where there is no such topic.

    Raises:
        Unavailable: Kafka does not answer.
    """
    try:
        with closing(
            kafka.KafkaConsumer(enable_auto_commit=False, isolation_level="read_committed", **broker.settings())
        ) as consumer:
            partitions = [kafka.TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
            consumer.assign(partitions)
            ends = consumer.end_offsets(partitions) if partitions else {}
            consumer.seek_to_beginning(*partitions)
            while any(consumer.position(partition) < end for partition, end in ends.items()):
                for records in consumer.poll(timeout_ms=LISTING_POLL_MS).values():
                    yield from records
    except KafkaError as error:
        raise Unavailable(f"Kafka does not answer: {type(error).__name__}") from None


class GroupInbox:
    """The worker's share of a topic, by consumer group; at least once, as offsets are committed by hand.

    One thread uses it; kafka-python fetches ahead and keeps up the membership in another.

    Args:
        broker: where it is, and what is shown to it.
        topic: what to read.
        instance: names this worker and no other: one that restarts within 6 s under its name keeps its share.
    """

    def __init__(self, broker: Broker, topic: str, instance: str | None = None) -> None:
        self._topic = topic
        self._lag: int | None = None
        self._assigned = False
        self._next: dict[Any, int] = {}  # offset that the next poll may bring, of each partition
        self._done: dict[Any, Any] = {}  # not committed yet
        self._sent: dict[Any, Any] = {}  # the last commit of each partition, on its way or noted
        self._committed_s = 0.0
        self._consumer = kafka.KafkaConsumer(
            **broker.settings(),
            group_id=GROUP,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # A killed worker's partitions wait this long for the next one: the shortest a broker takes by default.
            session_timeout_ms=6_000,
            heartbeat_interval_ms=1_500,
            group_instance_id=instance,
            metrics_enabled=False,
            # A worker that joins or leaves takes no partition from those whose share stays as it was (KIP-429).
            partition_assignment_strategy=[CooperativeStickyAssignor],
            reconnect_backoff_max_ms=RECONNECT_MS,
        )

    def __enter__(self) -> Self:
        self._consumer.subscribe([self._topic])
        return self

    def __exit__(self, *_: object) -> None:
        self._commit_all()
        self._consumer.close(autocommit=False)

    @property
    def assigned(self) -> bool:
        """Whether the group had given this consumer a share when it polled last; threads may ask."""
        return self._assigned

    def membership(self) -> Any:
        """What a transaction needs to know of this member of the group."""
        return self._consumer.group_metadata()

    @property
    def lag(self) -> int | None:
        """Records in its share that were not polled yet; None before Kafka said how many there are."""
        return self._lag

    def poll(self, timeout_s: float, most: int) -> list[Record]:
        """See `Inbox`.

        Raises:
            ConfigError: the group or the topic may not be read.
        """
        self._commit_some()
        try:
            found = _records(self._consumer, timeout_s, most)
        except AuthorizationError as error:
            raise ConfigError(
                f"Kafka's user must have the rights of a worker ({type(error).__name__}): read {self._topic} and the "
                f"group {GROUP}"
            ) from None
        self._lag = self._behind(found)
        return found

    def _behind(self, found: Sequence[Record]) -> int | None:
        """By what was polled; where nothing was, by the consumer's position, which it may have to ask for."""
        known = self._next | {kafka.TopicPartition(self._topic, r.partition): r.offset + 1 for r in found}
        share = self._consumer.assignment()
        self._assigned = bool(share)
        for place in share - known.keys():
            with suppress(KafkaError):
                if self._consumer.highwater(place) is not None:  # something was fetched, so there is a position
                    known[place] = self._consumer.position(place, timeout_ms=0)
        self._next = {place: known[place] for place in share if known.get(place) is not None}
        ends = {place: self._consumer.highwater(place) or 0 for place in self._next}
        return sum(max(ends[place] - offset, 0) for place, offset in self._next.items()) if ends else None

    def commit(self, upto: Upto) -> None:
        """See `Inbox`. After a rebalance the records are another worker's: answered twice, which is allowed."""
        for partition, offset in upto.items():
            self._done[kafka.TopicPartition(self._topic, partition)] = kafka.OffsetAndMetadata(offset, "", -1)
        self._commit_some()

    def _commit_some(self) -> None:
        """A commit costs the broker as much as a record; those of a short time go together."""
        if self._done and time.monotonic() - self._committed_s >= COMMIT_S:
            self._committed_s = time.monotonic()
            if ours := self._take_done():
                self._sent |= ours
                self._consumer.commit_async(ours, callback=self._noted)

    def _noted(self, offsets: Mapping[Any, Any], answer: object) -> None:
        """A commit that failed is tried again, which kafka-python does not: no later record may follow to cover it."""
        if isinstance(answer, Exception):
            log.warning("offsets were not committed, and will be: %s", type(answer).__name__)
            last = {place: offset for place, offset in offsets.items() if self._sent[place] is offset}
            self._done = last | self._done
            self._committed_s = time.monotonic() + RECONNECT_MS / 1000

    def _take_done(self) -> dict[Any, Any]:
        """What was not committed yet, of partitions that the group did not give to another."""
        done, self._done = self._done, {}
        share = self._consumer.assignment()
        return {place: offset for place, offset in done.items() if place in share}

    def _commit_all(self) -> None:
        try:
            if ours := self._take_done():
                self._consumer.commit(ours, timeout_ms=SEND_TIMEOUT_MS)
        except KafkaError as error:
            log.warning("offsets were not committed: %s", type(error).__name__)

    def pause(self) -> None:
        """See `Inbox`."""
        self._consumer.pause(*self._consumer.assignment())

    def resume(self) -> None:
        """See `Inbox`."""
        self._consumer.resume(*self._consumer.paused())

    def rewind(self) -> None:
        """See `Inbox`."""
        self._commit_all()
        self._next.clear()
        try:
            for partition in self._consumer.assignment():
                committed = self._consumer.committed(partition, timeout_ms=SEND_TIMEOUT_MS)
                if committed is None:
                    self._consumer.seek_to_beginning(partition)
                else:
                    self._consumer.seek(partition, committed)
        except KafkaError as error:
            raise Unavailable(f"Kafka does not say where to go on: {type(error).__name__}") from None


class ProducerOutbox:
    """A producer that knows whether everything sent has arrived. Threads may share it."""

    def __init__(self, broker: Broker) -> None:
        self._producer = _producer(broker, Predictions.TOPIC)
        self._sent: dict[int, list[Any]] = defaultdict(list)  # by thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._producer.close(timeout=SEND_TIMEOUT_MS / 1000)

    def send(self, topic: str, value: bytes, partition: int | None = None) -> None:
        """See `Outbox`."""
        try:
            self._sent[threading.get_ident()].append(self._producer.send(topic, value, partition=partition))
        except KafkaError as error:
            raise Unavailable(f"Kafka takes no records: {type(error).__name__}") from None

    def flush(self) -> None:
        """See `Outbox`."""
        try:
            for future in self._sent.pop(threading.get_ident(), []):
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
        broker: where it is, and what is shown to it.
        capacity: records that may wait; more are refused.
    """

    def __init__(self, broker: Broker, capacity: int = 10_000) -> None:
        self._broker = broker
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
        producer = _producer(self._broker, DeviceEmbeddings.TOPIC)
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
        broker: where it is, and what is shown to it.
        topic, partition: what to read.
        on_record: called in that thread for each record.
        committed: leaves out what belongs to transactions that are not, or not yet, committed.
    """

    def __init__(
        self,
        broker: Broker,
        topic: str,
        partition: int,
        on_record: Callable[[Record], None],
        *,
        committed: bool = False,
    ) -> None:
        self._broker = broker
        self._isolation = "read_committed" if committed else "read_uncommitted"
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
        consumer = kafka.KafkaConsumer(
            **self._broker.settings(),
            enable_auto_commit=False,
            isolation_level=self._isolation,
            metrics_enabled=False,
            reconnect_backoff_max_ms=RECONNECT_MS,
        )
        try:
            consumer.assign([self._partition])
            consumer.seek_to_end(self._partition)
            consumer.position(self._partition)  # resolves the end now, not at the first poll
            self._assigned.set()
            while not self._stopping.is_set():
                for record in _records(consumer, 0.2):
                    self._on_record(record)
        finally:
            consumer.close()


def _producer(broker: Broker, topic: str) -> Any:
    """A producer that knows where `topic` lies, so that its first record does not wait for that."""
    producer = kafka.KafkaProducer(
        **broker.settings(),
        # Repeats are told by their request ids. kafka-python's own idempotence (3.0.12) sends nothing ever again
        # once a batch that was tried has expired, as it does in any outage longer than the time limit below.
        enable_idempotence=False,
        retry_backoff_ms=20,
        **PRODUCER,
    )
    producer.partitions_for(topic)
    return producer


def _records(consumer: Any, timeout_s: float, most: int | None = None) -> list[Record]:
    try:
        polled = consumer.poll(timeout_ms=int(1000 * timeout_s), max_records=most)
    except KafkaError as error:  # as a rule polls give nothing while the broker is away; a group's may raise
        if not error.retriable:  # such as a topic that may not be read: it would be so for ever
            raise
        log.warning("nothing can be polled: %s", type(error).__name__)
        time.sleep(timeout_s)
        return []
    return [
        Record(r.topic, r.partition, r.offset, r.value or b"", _traces(r.headers)) for rs in polled.values() for r in rs
    ]


def _traces(headers: Sequence[tuple[str, bytes | None]]) -> tuple[str, ...]:
    """The first of the record's trace contexts: whoever may write to a topic may write any number of anything."""
    found = [(value or b"").decode("ascii", "replace") for key, value in headers if key == TRACEPARENT]
    return tuple(found[:MAX_TRACES])
