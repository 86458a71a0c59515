import asyncio
import functools
import threading
from types import SimpleNamespace

import kafka as kafka_python
import pytest
from kafka.errors import KafkaConnectionError, TopicAuthorizationFailedError

from hybrid.errors import Unavailable
from serving import kafka
from serving.connection import Broker
from serving.gateway import _watch
from serving.kafka import GroupInbox, ThreadedOutbox


@pytest.fixture
def outbox(monkeypatch):
    """With room for one record; its thread dies of an unforeseen error once `outbox.die` is set."""
    die = threading.Event()

    def producer(*_):
        die.wait(10)
        raise RuntimeError("secret")

    monkeypatch.setattr(kafka, "_producer", producer)
    outbox = ThreadedOutbox(Broker("127.0.0.1:1"), capacity=1)
    outbox.die = die
    return outbox


def test_what_waits_for_a_thread_that_dies_has_failed_and_the_next_is_refused(outbox, caplog):
    """Nobody waits for a deadline, nor for room in a queue that nobody empties; the log holds the error's class."""
    failed = threading.Event()
    with outbox:
        assert outbox.alive
        outbox.send("t", b"1", None, failed.set)
        with pytest.raises(Unavailable, match="too many records"):
            outbox.send("t", b"2", None, failed.set)
        outbox.die.set()
        assert failed.wait(10)
        outbox._thread.join(10)
        assert not outbox.alive
        assert not outbox.ready
        with pytest.raises(Unavailable, match="any more"):
            outbox.send("t", b"3", None, failed.set)
    assert "records are sent to Kafka no more: RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_a_gateway_is_told_that_a_thread_of_kafka_died(outbox):
    """Once, and not before."""
    lost = []

    async def scenario():
        watching = asyncio.create_task(_watch([outbox], lambda: lost.append(outbox.alive)))
        await asyncio.sleep(0)
        assert lost == []
        outbox.die.set()
        await asyncio.wait_for(watching, 10)

    with outbox:
        asyncio.run(scenario())
    assert lost == [False]


class Consumer:
    """What `GroupInbox` uses of kafka-python's consumer: a share of partitions, and commits as they are sent."""

    def __init__(self, *partitions):
        self.share = {kafka_python.TopicPartition("t", partition) for partition in partitions}
        self.sent, self.calls, self.polled, self.ends, self.positions = [], [], {}, {}, {}

    def assignment(self):
        return self.share

    def poll(self, **_):
        self.calls.append("poll")
        polled, self.polled = self.polled, {}
        return polled

    def highwater(self, partition):
        return self.ends.get(partition.partition)

    def position(self, partition, timeout_ms):
        return self.positions[partition.partition]

    def commit_async(self, offsets, callback):
        self.noted = functools.partial(callback, offsets) if callback else None
        self.sent.append({place.partition: each.offset for place, each in offsets.items()})

    def commit(self, offsets, timeout_ms):
        self.commit_async(offsets, None)

    def committed(self, partition, timeout_ms):
        self.calls.append("committed")
        return 7

    def seek(self, partition, offset):
        self.calls.append(("seek", partition.partition, offset))

    def close(self, autocommit):
        assert not autocommit
        self.calls.append("close")

    def subscribe(self, topics):
        self.calls.append("subscribe")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    seconds = [1000.0]
    monkeypatch.setattr(kafka.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def inbox(monkeypatch, clock):
    """With partitions 0 and 1."""
    consumer = Consumer(0, 1)
    monkeypatch.setattr(kafka.kafka, "KafkaConsumer", lambda **_: consumer)
    inbox = GroupInbox(Broker("127.0.0.1:1"), "t")
    inbox.consumer = consumer
    return inbox


def test_offsets_of_a_tenth_of_a_second_are_committed_together(inbox, clock):
    """The first at once; the next three, the last of each partition, with the poll a tenth of a second later."""
    inbox.commit({0: 1})
    for upto in ({0: 2}, {1: 5}, {0: 3}):
        inbox.commit(upto)
    inbox.poll(0, 1)
    assert inbox.consumer.sent == [{0: 1}]
    clock[0] += kafka.COMMIT_S
    inbox.poll(0, 1)
    inbox.poll(0, 1)
    assert inbox.consumer.sent == [{0: 1}, {0: 3, 1: 5}]


def test_a_commit_that_failed_is_sent_again_unless_a_later_one_covers_it(inbox, clock, caplog):
    """No record may follow for long: without this, all that was answered is answered again after the next rebalance."""
    inbox.commit({0: 1, 1: 5})
    first = inbox.consumer.noted
    clock[0] += kafka.COMMIT_S
    inbox.commit({0: 2})
    inbox.consumer.noted(None)
    first(KafkaConnectionError())
    inbox.poll(0, 1)
    assert inbox.consumer.sent == [{0: 1, 1: 5}, {0: 2}]
    clock[0] += 1 + kafka.COMMIT_S
    inbox.poll(0, 1)
    inbox.poll(0, 1)
    assert inbox.consumer.sent == [{0: 1, 1: 5}, {0: 2}, {1: 5}]
    assert "were not committed, and will be: KafkaConnectionError" in caplog.text


def test_the_lag_is_what_the_share_holds_and_was_not_polled(inbox):
    """Unknown; partition 0 waits at its end, 7; then 1 holds 5 to 9, of which 5 is polled; then 1 goes away."""
    consumer, lags = inbox.consumer, [inbox.lag]

    def poll():
        inbox.poll(0, 1)
        lags.append(inbox.lag)

    poll()
    consumer.ends, consumer.positions = {0: 7}, {0: 7}
    poll()
    consumer.ends = {0: 7, 1: 10}
    place = kafka_python.TopicPartition("t", 1)
    consumer.polled = {place: [SimpleNamespace(topic="t", partition=1, offset=5, value=b"x", headers=[])]}
    poll()
    consumer.share = {kafka_python.TopicPartition("t", 0)}
    poll()
    assert lags == [None, None, 0, 4, 0]


def test_offsets_of_partitions_that_went_to_another_worker_are_not_committed(inbox):
    """Partition 2 is another's by now."""
    inbox.commit({0: 1, 2: 9})
    assert inbox.consumer.sent == [{0: 1}]


def test_what_waits_is_committed_at_the_end_and_before_going_back(inbox):
    """Neither leaving nor a rewind forgets what has arrived."""
    with inbox:
        inbox.commit({0: 1})
        inbox.commit({0: 2})
        inbox.rewind()
        assert inbox.consumer.sent == [{0: 1}, {0: 2}]
        assert ("seek", 0, 7) in inbox.consumer.calls
        inbox.commit({1: 4})
    assert inbox.consumer.sent[-1] == {1: 4}
    assert inbox.consumer.calls[-1] == "close"


def test_checksums_are_computed_in_c():
    """kafka-python's own, in Python, takes 19 ms for a record of 50 kB, and says nothing."""
    from kafka.record import util

    assert util.crc32c_c is not None


def test_of_a_records_headers_the_first_trace_contexts_are_taken():
    """Whoever may write to the topic may write any header: others, empty ones and all past the 64th are left."""
    headers = [("other", b"x"), ("traceparent", None), *(("traceparent", b"\xff%d" % n) for n in range(100))]
    found = kafka._traces(headers)
    assert len(found) == 64
    assert found[:2] == ("", "\ufffd0")


def test_a_poll_that_fails_while_the_broker_is_away_gives_nothing_and_the_process_goes_on(caplog):
    """kafka-python's consumer group raised ECONNREFUSED from a poll, which ended the worker."""

    class Away:
        def poll(self, timeout_ms, max_records):
            raise KafkaConnectionError("111 ECONNREFUSED")

    assert kafka._records(Away(), 0.0, 1) == []
    assert "nothing can be polled: KafkaConnectionError" in caplog.text


def test_a_poll_that_will_fail_for_ever_ends_the_process():
    """A topic that may not be read is no outage to be waited for."""

    class Forbidden:
        def poll(self, timeout_ms, max_records):
            raise TopicAuthorizationFailedError

    with pytest.raises(TopicAuthorizationFailedError):
        kafka._records(Forbidden(), 0.0, 1)
