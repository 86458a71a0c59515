import base64
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hybrid.messages import MAX_KEPT_BYTES, NO_DEADLINE, BadMessage, DeadLetter, DeviceEmbeddings, Predictions
from hybrid.sealing import CannotOpen, OpeningKey, SealingKey, generate

FINITE = st.floats(width=32, allow_nan=False)


def embeddings(rows=2, size=4):
    return DeviceEmbeddings(
        model="coupon",
        version=3,
        reply_partition=0,
        request_id=np.frombuffer(bytes(range(16)) * rows, dtype="V16"),
        entity=np.array(["Bar|2h"] * rows, dtype=object),
        request=np.zeros((rows, 1), np.float32),
        embedding=np.zeros((rows, size), np.float32),
        event_ms=np.full(rows, 1_700_000_000_000),
    )


def assert_same(left, right):
    assert (left.model, left.version, left.reply_partition) == (right.model, right.version, right.reply_partition)
    for name in left.COLUMNS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@settings(deadline=None)
@given(st.data(), st.integers(1, 20), st.integers(0, 3), st.integers(1, 16))
def test_embeddings_come_back_as_they_went(data, rows, request, size):
    """to_bytes then from_bytes is the identity, also without request features and with text of any script."""
    sent = replace(
        embeddings(rows),
        request_id=np.frombuffer(data.draw(st.binary(min_size=16 * rows, max_size=16 * rows)), dtype="V16"),
        entity=np.array(data.draw(st.lists(st.text(), min_size=rows, max_size=rows)), dtype=object),
        request=data.draw(arrays.arrays(np.float32, (rows, request))),
        embedding=data.draw(arrays.arrays(np.float32, (rows, size), elements=FINITE)),
        event_ms=data.draw(arrays.arrays(np.int64, rows)),
        deadline_ms=data.draw(arrays.arrays(np.int64, rows)),
    )
    assert_same(DeviceEmbeddings.from_bytes(sent.to_bytes()), sent)


def test_predictions_come_back_as_they_went():
    """A row that failed keeps its status, a NaN prediction and age -1."""
    sent = Predictions(
        model="coupon",
        version=3,
        reply_partition=7,
        request_id=np.frombuffer(bytes(32), dtype="V16"),
        status=np.array(["ok", "unknown_entity"], dtype=object),
        fallback=np.array(["none", "none"], dtype=object),
        prediction=np.array([0.25, np.nan], np.float32),
        feature_age_ms=np.array([1500, -1]),
    )
    assert_same(Predictions.from_bytes(sent.to_bytes()), sent)


@pytest.mark.parametrize("width", [0, 3])
def test_what_the_server_contributed_comes_back_in_any_width(width):
    """Width 0, where no row asked for it, survives; so do NaN slots, embeddings of a device that merges, and wishes."""
    sent = Predictions(
        "coupon",
        3,
        7,
        request_id=np.frombuffer(bytes(32), dtype="V16"),
        status=np.array(["ok", "ok"], dtype=object),
        fallback=np.array(["none", "none"], dtype=object),
        prediction=np.array([np.nan, np.nan], np.float32),
        feature_age_ms=np.array([1500, -1]),
        expires_ms=np.array([1_700_000_000_000, -1]),
        server_embedding=np.arange(2 * width, dtype=np.float32).reshape(2, width),
        server_slots=np.full((2, 2 * width), np.nan, np.float32),
    )
    assert_same(Predictions.from_bytes(sent.to_bytes()), sent)
    wishes = {"wants_server": np.array([True, False]), "wants_slots": np.array([False, True])}
    asked = replace(embeddings(size=width), **wishes)
    read = DeviceEmbeddings.from_bytes(asked.to_bytes())
    assert_same(read, asked)
    assert read.embedding.shape == (2, width)


def test_a_record_of_the_release_before_is_still_read():
    """Its later columns were not there: nobody wants what the server knows, no deadline is known, nothing expires.

    Those that say no more than that are not written now either.
    """
    asked = batch_of(embeddings()).drop_columns(["deadline_ms"])
    assert not {"wants_server", "wants_slots"} & set(asked.schema.names)
    old = DeviceEmbeddings.from_bytes(stream(asked))
    assert (old.wants_server.tolist(), old.deadline_ms.tolist()) == ([False, False], [NO_DEADLINE, NO_DEADLINE])
    assert old.wants_slots.tolist() == [False, False]
    said = Predictions(
        "coupon",
        3,
        7,
        request_id=np.frombuffer(bytes(16), dtype="V16"),
        status=np.array(["ok"], dtype=object),
        fallback=np.array(["none"], dtype=object),
        prediction=np.array([0.5], np.float32),
        feature_age_ms=np.array([5]),
    )
    told = batch_of(said).drop_columns(["expires_ms"])
    assert not {"server_embedding", "server_slots"} & set(told.schema.names)
    read = Predictions.from_bytes(stream(told))
    assert (read.expires_ms.tolist(), read.server_embedding.shape, read.server_slots.shape) == ([-1], (1, 0), (1, 0))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_record_is_refused_or_read_but_never_anything_else(data):
    """Bytes changed, lengths made huge, the end cut: a message or BadMessage; no crash, no other error."""
    damaged = bytearray(embeddings().to_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, len(damaged) - 4)) // 4 * 4
        word = data.draw(st.sampled_from([0x7FFFFFFF, 0xFFFFFFFF, 0x40000000, 0, 1]) | st.integers(0, 2**32 - 1))
        damaged[place : place + 4] = word.to_bytes(4, "little")
    kept = data.draw(st.sampled_from([len(damaged), len(damaged) - 8]) | st.integers(0, len(damaged)))
    before = pa.total_allocated_bytes()
    try:
        DeviceEmbeddings.from_bytes(bytes(damaged[:kept]))
    except BadMessage:
        assert pa.total_allocated_bytes() - before < 1 << 20


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_bad_message(garbage):
    """Arbitrary bytes raise BadMessage."""
    with pytest.raises(BadMessage):
        DeviceEmbeddings.from_bytes(garbage)


def stream(*batches, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def batch_of(message):
    return pa.ipc.open_stream(message.to_bytes()).read_next_batch()


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_record_is_refused_before_it_is_unpacked(codec):
    """64 MiB of zeros fit in a few kilobytes; reading them allocates less than a megabyte."""
    bomb = batch_of(embeddings(rows=1, size=1 << 24))
    data = stream(bomb, compression=codec)
    del bomb
    before = pa.total_allocated_bytes()
    with pytest.raises(BadMessage):
        DeviceEmbeddings.from_bytes(data)
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_the_other_topic_two_batches_no_rows_and_nulls_are_refused():
    """A record of another schema, with two batches, none, or a null is not read in part."""
    batch = batch_of(embeddings())
    nulls = batch.set_column(1, pa.field("entity", pa.string()), pa.array(["a", None]))
    for data in [stream(batch, batch), stream(batch.slice(0, 0)), stream(nulls)]:
        with pytest.raises(BadMessage):
            DeviceEmbeddings.from_bytes(data)
    with pytest.raises(BadMessage):
        Predictions.from_bytes(embeddings().to_bytes())


def test_the_reason_holds_no_bytes_of_the_record():
    """What Arrow says about text it cannot read is not repeated."""
    with pytest.raises(BadMessage, match=r"^not a hybrid\.device-embeddings\.v1 record: \w+$"):
        DeviceEmbeddings.from_bytes(embeddings().to_bytes().replace(b"Bar|2h", b"Bar|\xff\xff"))


def letter_of(data, key=None):
    return DeadLetter.of(data, topic="t", partition=1, offset=5, error=BadMessage("not a record"), key=key)


@pytest.fixture
def keys(tmp_path):
    """(sealing, opening) key."""
    generate(tmp_path / "a.pem", tmp_path / "a.pub")
    return SealingKey.read(tmp_path / "a.pub"), OpeningKey.read(tmp_path / "a.pem")


def test_a_dead_letter_without_a_key_says_where_and_why_and_that_it_keeps_no_bytes():
    """SHA-256 of "abc" is FIPS 180-2's example; the record itself is not there."""
    letter = letter_of(b"abc")
    assert letter.model_dump() == {
        "topic": "t",
        "partition": 1,
        "offset": 5,
        "code": "unreadable",
        "reason": "not a record",
        "length": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "sealed": None,
        "key_id": None,
        "withheld": "no_key",
    }
    assert DeadLetter.topic_for("t") == "t.dead"


def test_a_dead_letter_keeps_the_bytes_for_the_private_key_alone(keys):
    """Through JSON and back, the other half opens them; neither the text nor its base64 stands in the letter."""
    sealing, opening = keys
    letter = letter_of(b"secret garbage", sealing)
    assert (letter.key_id, letter.withheld) == (opening.key_id, None)
    text = letter.model_dump_json()
    assert b"secret garbage" not in base64.b64decode(letter.sealed)
    assert DeadLetter.model_validate_json(text).open(opening) == b"secret garbage"


def test_the_bytes_of_a_letter_do_not_open_in_another_place(keys):
    """Whoever may write letters cannot make bytes of one record pass for another's, nor change its hash."""
    letter = letter_of(b"x", keys[0])
    for change in ({"topic": "u"}, {"partition": 2}, {"offset": 6}, {"sha256": "0" * 64}, {"key_id": "0" * 16}):
        with pytest.raises(CannotOpen):
            letter.model_copy(update=change).open(keys[1])
    for sealed in ("", "AAAA", "é", None):
        with pytest.raises(CannotOpen):
            letter.model_copy(update={"sealed": sealed}).open(keys[1])


@pytest.mark.parametrize("length", [0, MAX_KEPT_BYTES, MAX_KEPT_BYTES + 1, 1 << 20, 8 << 20])
def test_a_record_of_any_size_makes_a_letter_that_kafka_takes(keys, length):
    """Below 1 MiB with room for the framing; a record larger than 704 KiB leaves its length and hash only."""
    letter = letter_of(b"\xff" * length, keys[0])
    assert len(letter.model_dump_json()) < (1 << 20) - (1 << 10)
    assert letter.length == length
    assert letter.withheld == ("too_large" if length > MAX_KEPT_BYTES else None)
    assert (letter.sealed is None) == (length > MAX_KEPT_BYTES)


def test_a_letter_of_the_release_before_is_still_read():
    """It had neither code nor bytes."""
    old = '{"topic": "t", "partition": 0, "offset": 1, "reason": "r", "length": 3, "sha256": "00"}'
    letter = DeadLetter.model_validate_json(old)
    assert (letter.code, letter.sealed) == ("unreadable", None)
