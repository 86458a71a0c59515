import asyncio
import threading

import pytest

from hybrid.errors import Unavailable
from serving import kafka
from serving.gateway import _watch
from serving.kafka import ThreadedOutbox


@pytest.fixture
def outbox(monkeypatch):
    """With room for one record; its thread dies of an unforeseen error once `outbox.die` is set."""
    die = threading.Event()

    def producer(*_):
        die.wait(10)
        raise RuntimeError("secret")

    monkeypatch.setattr(kafka, "_producer", producer)
    outbox = ThreadedOutbox("127.0.0.1:1", capacity=1)
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


def test_of_a_records_headers_the_first_trace_contexts_are_taken():
    """Whoever may write to the topic may write any header: others, empty ones and all past the 64th are left."""
    headers = [("other", b"x"), ("traceparent", None), *(("traceparent", b"\xff%d" % n) for n in range(100))]
    found = kafka._traces(headers)
    assert len(found) == 64
    assert found[:2] == ("", "\ufffd0")
