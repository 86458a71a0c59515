import threading
from types import SimpleNamespace

import kafka
import pytest
from kafka.errors import KafkaTimeoutError, ProducerFencedError

from hybrid.errors import Unavailable
from serving import connection, exactly_once
from serving.exactly_once import ExactlyOnce, within
from serving.kafka import Record

TOPIC = "hybrid.device-embeddings.v1"


class Broker:
    """What producers of one name do to Kafka, as kafka-python shows it to us; `error` is raised by `failing`."""

    def __init__(self):
        self.committed, self.offsets, self.producers = [], {}, []
        self.failing, self.error, self.rewound = None, KafkaTimeoutError("secret"), 0
        self.position = {1: 5}

    def producer(self, **settings):
        assert settings["transactional_id"] == "hybrid-merge-worker-w1"
        assert 5 <= settings["retry_backoff_ms"] <= 20
        self.producers.append(Producer(self))
        return self.producers[-1]

    def inbox(self, *_, instance):
        assert instance == "w1"
        return SimpleNamespace(
            __enter__=lambda: None,
            poll=lambda timeout_s, most: [Record(TOPIC, 1, self.position[1], b"")],
            rewind=self.rewind,
            membership=lambda: "member",
        )

    def rewind(self):
        self.rewound += 1

    def may_fail(self, call):
        if call == self.failing:
            raise self.error


class Producer:
    def __init__(self, broker):
        self._broker, self._values, self._offsets, self.begun, self.closed = broker, [], {}, False, False

    def init_transactions(self):
        self._broker.may_fail("init")

    def begin_transaction(self):
        assert not self.begun
        self.begun = True

    def send(self, topic, value, partition):
        self._broker.may_fail("send")
        self._values.append(value)
        return SimpleNamespace(get=lambda timeout: self._broker.may_fail("flush"))

    def send_offsets_to_transaction(self, offsets, member):
        assert member == "member"
        self._offsets = {place.partition: offset.offset for place, offset in offsets.items()}

    def commit_transaction(self):
        self._broker.may_fail("commit")
        assert self.begun
        self._broker.committed += self._values
        self._broker.offsets |= self._offsets
        self._values, self.begun = [], False

    def close(self, timeout):
        self.closed = True


@pytest.fixture
def broker(monkeypatch):
    broker = Broker()
    monkeypatch.setattr(kafka, "KafkaProducer", broker.producer)
    monkeypatch.setattr(exactly_once, "GroupInbox", broker.inbox)
    return broker


@pytest.fixture
def ends(broker):
    ends = ExactlyOnce(connection.Broker("127.0.0.1:1"), TOPIC, "w1")
    ends._renew()
    return ends


def batch(ends, value):
    ends.poll(0.1, 1)
    ends.send("t", value, 2)
    ends.flush()
    ends.commit({1: 6})


def test_answers_and_offsets_become_visible_together(ends, broker):
    """Not at the flush but at the commit; the second batch is a transaction of its own."""
    ends.poll(0.1, 1)
    ends.send("t", b"a", 2)
    ends.send("t", b"b", 2)
    ends.flush()
    assert (broker.committed, broker.offsets) == ([], {})
    ends.commit({1: 6, 3: 9})
    assert (broker.committed, broker.offsets) == ([b"a", b"b"], {1: 6, 3: 9})
    batch(ends, b"c")
    assert (broker.committed, broker.offsets) == ([b"a", b"b", b"c"], {1: 6, 3: 9})
    assert len(broker.producers) == 1


@pytest.mark.parametrize("error", [KafkaTimeoutError("secret"), ProducerFencedError("secret")])
@pytest.mark.parametrize("failing", ["send", "flush", "commit"])
def test_whatever_fails_nothing_is_visible_and_the_next_poll_begins_anew(ends, broker, failing, error):
    """A new producer, the inbox back at what is committed; the batch is answered once."""
    broker.failing, broker.error = failing, error
    with pytest.raises(Unavailable) as refused:
        batch(ends, b"a")
    assert "secret" not in str(refused.value)
    assert (broker.committed, broker.rewound) == ([], 0)
    with pytest.raises(Unavailable, match="has failed"):
        ends.commit({1: 9})  # of another batch of the same transaction
    broker.failing = None
    batch(ends, b"a")
    assert (broker.committed, broker.rewound) == ([b"a"], 1)
    assert [producer.closed for producer in broker.producers] == [True, False]


def test_while_kafka_begins_no_transactions_nothing_is_polled(ends, broker):
    """The poll says so, and the one after it tries again."""
    broker.failing = "commit"
    with pytest.raises(Unavailable):
        batch(ends, b"a")
    broker.failing = "init"
    for _ in range(2):
        with pytest.raises(Unavailable, match="begins no transactions: KafkaTimeoutError"):
            ends.poll(0.1, 1)
    broker.failing = None
    batch(ends, b"a")
    assert (broker.committed, broker.rewound) == ([b"a"], 1)


def test_a_call_that_never_ends_is_left_behind():
    """kafka-python waits for a commit without a limit."""
    release = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.01, release.wait)
    release.set()
    with pytest.raises(ZeroDivisionError):
        within(1, lambda: 1 / 0)
    assert within(1, lambda: None) is None
