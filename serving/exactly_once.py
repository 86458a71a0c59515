"""Exactly once: a worker's answers and the offsets of what it answered become visible together, or not at all.

Holds for what lies in Kafka, for readers that read what is committed only
(`--exactly-once` at the gateway too). One batch is one transaction: a few
milliseconds more for each.

Source:
    KIP-98 (transactions) and KIP-447 (one producer for a consumer group's member).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self

import kafka
from kafka.errors import KafkaError

from hybrid.errors import Unavailable
from serving.connection import Broker
from serving.kafka import GROUP, PRODUCER, SEND_TIMEOUT_MS, GroupInbox, Record, Upto

log = logging.getLogger(__name__)

RETRY_BACKOFF_MS = 10  # with kafka-python's default of 100 a commit takes as long
TRANSACTION_TIMEOUT_MS = 10_000
TIMEOUT_S = 2 * SEND_TIMEOUT_MS / 1000


class ExactlyOnce:
    """A worker's `Inbox` and `Outbox` in one, for one batch at a time.

    Whatever fails, the producer is replaced by one of the same name, which makes
    the broker abort what the old one had begun, and the inbox goes back to what
    is committed. kafka-python's own recovery is not relied upon: after an
    expired batch (3.0.12) it sends nothing ever again.

    Args:
        broker: where it is, and what is shown to it.
        topic: of the inbox.
        instance: name of this worker, no other's, and the same after a restart:
            then its successor ends at once what it left, else readers wait for
            the transaction's time limit, some 10 to 20 s.
    """

    def __init__(self, broker: Broker, topic: str, instance: str) -> None:
        self._broker, self._topic, self._name = broker, topic, f"{GROUP}-{instance}"
        self._inbox = GroupInbox(broker, topic, instance=instance)
        self._producer: Any = None
        self._sent: list[Any] = []
        self._open = self._failed = self._paused = False

    def __enter__(self) -> Self:
        self._renew()  # before anything is polled: ends what a killed predecessor had begun
        self._inbox.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._inbox.__exit__(*error)
        self._close()

    @property
    def assigned(self) -> bool:
        """Whether the group gave this worker a share."""
        return self._inbox.assigned

    @property
    def lag(self) -> int | None:
        """See `GroupInbox`."""
        return self._inbox.lag

    def poll(self, timeout_s: float, most: int) -> list[Record]:
        """See `Inbox`. None while it is paused, whatever the group gives it: a transaction is of one batch."""
        if self._paused:
            return []
        if self._failed:
            self._renew()
            self._inbox.rewind()
            self._failed = False
        return self._inbox.poll(timeout_s, most)

    def pause(self) -> None:
        """See `Inbox`."""
        self._paused = True

    def resume(self) -> None:
        """See `Inbox`."""
        self._paused = False

    def rewind(self) -> None:
        """See `Inbox`."""
        self._failed = True  # done by the next poll

    def send(self, topic: str, value: bytes, partition: int | None = None) -> None:
        """See `Outbox`."""
        try:
            if not self._open:
                self._producer.begin_transaction()
                self._open = True
            self._sent.append(self._producer.send(topic, value, partition=partition))
        except KafkaError as error:
            raise self._fail("Kafka takes no records", error) from None

    def flush(self) -> None:
        """See `Outbox`; what was sent is visible once `commit` returned."""
        sent, self._sent = self._sent, []
        try:
            for future in sent:
                future.get(timeout=TIMEOUT_S)
        except KafkaError as error:
            raise self._fail("Kafka did not take a record", error) from None

    def commit(self, upto: Upto) -> None:
        """Makes the answers and the offsets visible together.

        Raises:
            Unavailable: neither is visible, or Kafka did not say so; the next poll goes on from what is committed.
        """
        if self._failed:
            raise Unavailable("the transaction has failed")
        offsets = {
            kafka.TopicPartition(self._topic, partition): kafka.OffsetAndMetadata(offset, "", -1)
            for partition, offset in upto.items()
        }

        producer, began, member = self._producer, self._open, self._inbox.membership()

        def end() -> None:
            if not began:
                producer.begin_transaction()
            producer.send_offsets_to_transaction(offsets, member)
            producer.commit_transaction()

        try:
            within(TIMEOUT_S, end)
        except (KafkaError, TimeoutError) as error:
            raise self._fail("Kafka did not commit the answers", error) from None
        self._open = False

    def _fail(self, what: str, error: Exception) -> Unavailable:
        self._failed = True
        return Unavailable(f"{what}: {type(error).__name__}")

    def _renew(self) -> None:
        """A producer with nothing begun; the broker aborts what the last one of this name had begun.

        Raises:
            Unavailable: Kafka does not answer.
        """
        self._close()
        producer = kafka.KafkaProducer(
            **self._broker.settings(),
            transactional_id=self._name,
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            retry_backoff_ms=RETRY_BACKOFF_MS,
            **PRODUCER,
        )
        try:
            producer.init_transactions()
        except KafkaError as error:
            producer.close(timeout=0)
            raise Unavailable(f"Kafka begins no transactions: {type(error).__name__}") from None
        self._producer, self._sent, self._open = producer, [], False

    def _close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError):
                producer.close(timeout=0)


def within(timeout_s: float, call: Callable[[], None]) -> None:
    """Calls in a thread of its own, which is left behind if it takes longer: some of kafka-python waits for ever.

    Raises:
        TimeoutError: it takes longer.
        Exception: what the call raised.
    """
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="kafka-transaction", daemon=True).start()
    done.result(timeout_s)
