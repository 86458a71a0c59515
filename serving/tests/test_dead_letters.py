import json
from types import SimpleNamespace

import pytest

from hybrid.errors import Unavailable
from hybrid.messages import BadMessage, DeadLetter
from hybrid.sealing import OpeningKey, SealingKey, generate
from serving import dead_letters
from serving.connection import Broker
from serving.dead_letters import Filter, Found, Replay, find, replay
from serving.testing import MemoryTopic
from serving.topics import REPLAYS

TOPIC = "hybrid.device-embeddings.v1"


@pytest.fixture
def keys(tmp_path):
    """(sealing, opening) key."""
    generate(tmp_path / "a.pem", tmp_path / "a.pub")
    return SealingKey.read(tmp_path / "a.pub"), OpeningKey.read(tmp_path / "a.pem")


def found(data, key, offset=5, replayed_ms=None):
    letter = DeadLetter.of(data, topic=TOPIC, partition=3, offset=offset, error=BadMessage("why"), key=key)
    return Found(letter, 1000, replayed_ms)


def outcomes(letters, outbox, key, **options):
    return [outcome for _, outcome in replay(letters, outbox, key, lambda: 77, **options)]


def test_the_original_bytes_go_where_they_came_from_and_that_is_noted(keys):
    """To the same topic and partition, byte for byte; then a note that holds their hash and not them."""
    outbox = MemoryTopic()
    assert outcomes([found(b"abc", keys[0])], outbox, keys[1]) == ["replayed"]
    sent, note = outbox.records
    assert (sent.topic, sent.partition, sent.value) == (TOPIC, 3, b"abc")
    assert note.topic == REPLAYS
    assert json.loads(note.value) == {
        "topic": TOPIC,
        "partition": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "replayed_ms": 77,
    }


def test_what_was_replayed_is_not_replayed_again_unless_asked(keys):
    """Neither in a second replay, nor twice in one where the record came back as a second letter."""
    outbox = MemoryTopic()
    letters = [found(b"a", keys[0], replayed_ms=5), found(b"b", keys[0], 6), found(b"b", keys[0], 7)]
    assert outcomes(letters, outbox, keys[1]) == ["already_replayed", "replayed", "already_replayed"]
    assert [r.value for r in outbox.records if r.topic == TOPIC] == [b"b"]
    assert outcomes(letters, outbox, keys[1], again=True) == ["replayed", "replayed", "already_replayed"]


def test_a_dry_run_opens_the_letters_and_sends_nothing(keys, tmp_path):
    """A letter of another key is told before anything is sent."""
    generate(tmp_path / "b.pem", tmp_path / "b.pub")
    letters = [found(b"a", keys[0]), found(b"b", SealingKey.read(tmp_path / "b.pub")), found(b"c", None)]
    outbox = MemoryTopic()
    assert outcomes(letters, outbox, keys[1], dry_run=True) == ["would_replay", "cannot_open", "not_kept"]
    assert outbox.records == []


def test_a_letter_that_does_not_open_does_not_hold_up_the_others(keys, caplog):
    """One was changed: it is said and logged without values; the next is sent."""
    bad = found(b"a", keys[0])
    letter = bad.letter.model_copy(update={"offset": 99})
    outbox = MemoryTopic()
    assert outcomes([Found(letter, 0, None), found(b"b", keys[0], 6)], outbox, keys[1]) == ["cannot_open", "replayed"]
    assert "offset 99" in caplog.text


def test_bytes_that_kafka_did_not_take_are_not_noted_as_replayed(keys):
    """The flush fails: Unavailable, and no note, so the next replay sends them."""
    outbox = MemoryTopic(failures=1)
    with pytest.raises(Unavailable):
        outcomes([found(b"a", keys[0])], outbox, keys[1])
    assert outbox.records == []
    assert outcomes([found(b"a", keys[0])], outbox, keys[1]) == ["replayed"]


@pytest.mark.parametrize(
    ("wanted", "takes"),
    [
        (Filter(), True),
        (Filter(topic=TOPIC, code="unreadable", since_ms=1000, until_ms=1001), True),
        (Filter(topic="hybrid.predictions.v1"), False),
        (Filter(code="name_too_long"), False),
        (Filter(since_ms=1001), False),
        (Filter(until_ms=1000), False),
    ],
)
def test_a_filter_takes_what_has_all_that_it_names(wanted, takes):
    """The letter is of 1000 ms: from `since` on, and before `until`."""
    assert wanted.takes(found(b"a", None).letter, 1000) is takes


def test_what_anybody_put_among_the_letters_is_passed_over(monkeypatch, caplog):
    """No JSON, nothing, another topic's letter, one of no partition: they choose no place to send bytes to."""
    good = found(b"a", None).letter
    other = good.model_copy(update={"topic": "hybrid.predictions.v1"})
    beyond = good.model_copy(update={"partition": 99})
    note = Replay(topic=TOPIC, partition=3, sha256=good.sha256, replayed_ms=9).model_dump_json().encode()
    topics = {
        f"{TOPIC}.dead": [*(letter.model_dump_json().encode() for letter in (other, beyond, good)), b"{", None],
        REPLAYS: [b"junk", note],
    }
    lying = {topic: [SimpleNamespace(value=v, timestamp=5) for v in values] for topic, values in topics.items()}
    monkeypatch.setattr(dead_letters, "lying_in", lambda _, topic: lying.get(topic, []))
    monkeypatch.setattr(dead_letters, "_partitions", lambda *_: {0, 1, 2, 3})
    assert list(find(Broker("127.0.0.1:1"), Filter())) == [Found(good, 5, 9)]
    assert caplog.text.count("is not a dead letter") == 4
    assert caplog.text.count("is not a replay") == 1
