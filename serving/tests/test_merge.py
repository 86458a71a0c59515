import math
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hybrid.messages import DeviceEmbeddings
from hybrid.spec import Serving
from serving.kafka import Record
from serving.merge import Merged, decode, encode, features, forward, merge, within_limit
from serving.testing import MemoryReader, MemoryRows, SumModels, deployment

KNOWN = {"bakery": (1.0, "ok"), "kiosk": (2.0, "ok"), "ruin": (3.0, "stale_features"), "mall": (4.0, "schema_drift")}


def message(entities=("bakery",), first_id=1, reply_partition=0, embedding=None, **changes):
    n = len(entities)
    columns = {
        "model": "shop",
        "version": 1,
        "request_id": np.frombuffer(b"".join((first_id + i).to_bytes(16, "big") for i in range(n)), dtype="V16"),
        "entity": np.array(entities, dtype=object),
        "request": np.array([[1.0, 10.0]] * n, np.float32),
        "embedding": np.ones((n, 2), np.float32) if embedding is None else np.array(embedding, np.float32),
        "event_ms": np.zeros(n, np.int64),
    }
    return DeviceEmbeddings(reply_partition=reply_partition, **(columns | changes))


def records(*messages):
    return [Record("t", 0, i, m if isinstance(m, bytes) else m.to_bytes()) for i, m in enumerate(messages)]


def find(model, version):
    return deployment() if (model, version) == ("shop", 1) else None


def only_batch(*messages):
    return decode(records(*messages), find).batches[0]


def test_rows_of_several_records_are_merged_into_one_batch():
    """Two records of one version, of gateways 0 and 3, are three rows that go through together."""
    batch = only_batch(message(["bakery", "kiosk"]), message(["ruin"], first_id=3, reply_partition=3))
    assert batch.entity.tolist() == ["bakery", "kiosk", "ruin"]
    assert batch.reply_partition.tolist() == [0, 0, 3]


def test_a_record_that_cannot_be_read_is_a_value_beside_the_others():
    """Garbage at offset 1 becomes a dead letter that says so; the rows around it are decoded."""
    decoded = decode(records(message(), b"garbage", message(first_id=2)), find)
    assert [len(batch) for batch in decoded.batches] == [2]
    assert [(letter.offset, letter.length) for letter in decoded.dead] == [(1, 7)]


def test_a_reply_partition_that_does_not_exist_is_a_dead_letter():
    """Partitions are 0 to 7: nobody could read the answer."""
    decoded = decode(records(message(reply_partition=8), message(reply_partition=-1)), find)
    assert (decoded.batches, decoded.refused, len(decoded.dead)) == ([], [], 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 9}, "unknown_model"),
        ({"model": "other"}, "unknown_model"),
        ({"embedding": [[1.0, 2.0, 3.0]]}, "bad_request"),
        ({"request": np.zeros((1, 0), np.float32)}, "bad_request"),
    ],
)
def test_a_record_of_another_model_or_width_is_refused_row_by_row(changes, reason):
    """It can be read, so its gateway is told why."""
    refused = decode(records(message(**changes)), find).refused
    assert [r.status.tolist() for r in refused] == [[reason]]
    assert np.isnan(refused[0].prediction).all()


def test_features_puts_request_slots_after_the_servers():
    """bakery's slot is 1; hour and budget came as 1 and 10."""
    joined = features(only_batch(message()), MemoryReader(KNOWN), now_ms=0)
    assert joined.slots.tolist() == [[1.0, 1.0, 10.0]]
    assert (joined.age_ms.tolist(), joined.status.tolist()) == ([5], ["ok"])


def test_forward_runs_only_rows_that_can_be_predicted():
    """bakery: slots 1 + 1 + 10 = 12, tower (12, 12), head 24 + device 2 = 26; the unknown row costs nothing."""
    batch, models = only_batch(message(["nowhere", "bakery"])), SumModels()
    merged = forward(batch, features(batch, MemoryReader(KNOWN), now_ms=0), models)
    np.testing.assert_array_equal(merged.prediction, [np.nan, 26.0])
    assert models.calls == [("shop_server_tower", 1, 1), ("shop_head", 1, 1)]


def test_each_gateway_is_answered_in_a_message_of_its_own():
    """Rows 1 and 3 go to partition 0, row 2 to partition 5, each with its id."""
    batch = only_batch(message(), message(["kiosk"], first_id=2, reply_partition=5), message(first_id=3))
    merged = Merged(np.array([0.1, 0.2, 0.3], np.float32), np.zeros((3, 2), np.float32))
    answers = encode(batch, features(batch, MemoryReader(KNOWN), now_ms=0), merged)
    found = {m.reply_partition: [int.from_bytes(i.tobytes(), "big") for i in m.request_id] for m in answers}
    assert found == {0: [1, 3], 5: [2]}


def test_every_row_has_its_own_reason():
    """One batch holds a prediction, an unknown, a stale and a drifted entity, and NaN in an embedding."""
    embedding = [[1, 1], [1, 1], [1, 1], [1, 1], [1, np.nan]]
    batch = only_batch(message(["bakery", "nowhere", "ruin", "mall", "kiosk"], embedding=embedding))
    (answer,) = merge(batch, lambda _: MemoryReader(KNOWN), SumModels(), now_ms=0)
    assert answer.status.tolist() == ["ok", "unknown_entity", "stale_features", "schema_drift", "bad_request"]
    np.testing.assert_array_equal(np.isnan(answer.prediction), [False, True, True, True, True])


def no_store(_):
    raise OSError("the key 'bakery' cannot be read")


@pytest.mark.parametrize(
    ("reader_of", "models"),
    [(no_store, SumModels()), (lambda _: MemoryReader(KNOWN), SumModels(broken=True))],
    ids=["feature store", "Triton"],
)
def test_where_a_server_fails_every_row_says_unavailable(reader_of, models, caplog):
    """Nothing is lost, and the log does not repeat what the store said."""
    (answer,) = merge(only_batch(message(["bakery", "kiosk"])), reader_of, models, now_ms=0)
    assert answer.status.tolist() == ["unavailable", "unavailable"]
    assert "bakery" not in caplog.text


def test_a_prediction_that_is_not_finite_is_no_prediction():
    """An infinite embedding sum is answered with "unavailable", and only that row: no caller can fail another's."""
    huge = message(["bakery"], embedding=np.full((1, 2), 3e38, np.float32))
    with np.errstate(over="ignore"):
        batch = only_batch(huge, message(["bakery"], first_id=2))
        (answer,) = merge(batch, lambda _: MemoryReader(KNOWN), SumModels(), now_ms=0)
    assert answer.status.tolist() == ["unavailable", "ok"]
    assert np.isfinite(answer.prediction).tolist() == [False, True]


LEARNED = {"missing_server": (10.0, 10.0), "missing_device": (5.0, 5.0)}


def answered(entities, serving=None, embedding=None, models=None, reader=None, learned=LEARNED):
    """Status, fallback and prediction of each row."""
    served = deployment().model_copy(update={"serving": Serving(**(serving or {})), **learned})
    batch = decode(records(message(entities, embedding=embedding)), lambda *_: served).batches[0]
    (found,) = merge(batch, lambda _: reader or MemoryReader(KNOWN), models or SumModels(), now_ms=0)
    return list(zip(found.status, found.fallback, found.prediction.tolist(), strict=True))


class NoStore:
    def read(self, entities, now_ms):
        raise OSError("database is locked")


def test_without_a_declared_fallback_a_missing_side_is_an_error():
    """Each reason is told, and nothing is predicted in silence."""
    rows = answered(["nowhere", "ruin", "mall"])
    assert [(status, fallback) for status, fallback, _ in rows] == [
        ("unknown_entity", "none"),
        ("stale_features", "none"),
        ("schema_drift", "none"),
    ]
    assert np.isnan([prediction for *_, prediction in rows]).all()


def test_device_only_is_predicted_with_the_embedding_learned_for_a_missing_server_side():
    """The head sums (10, 10) and the device's (1, 1): 22; the bakery beside it 2 x 12 + 2 = 26."""
    serving = {"missing_entity": "device-only", "stale_features": "device-only"}
    assert answered(["nowhere", "bakery", "ruin", "mall"], serving) == [
        ("unknown_entity", "device-only", 22.0),
        ("ok", "none", 26.0),
        ("stale_features", "device-only", 22.0),
        ("schema_drift", "device-only", 22.0),
    ]


def test_server_only_is_predicted_with_the_embedding_learned_for_a_missing_device_side():
    """The bakery's tower gives (12, 12), the missing device (5, 5): 34; a row of its own embedding 26."""
    rows = answered(["bakery", "bakery"], {"missing_device": "server-only"}, [[np.nan, np.nan], [1, 1]])
    assert rows == [("missing_device", "server-only", 34.0), ("ok", "none", 26.0)]


def test_an_embedding_that_is_half_a_number_is_refused():
    """Only a whole row of NaN says that there is none."""
    assert answered(["bakery"], {"missing_device": "server-only"}, [[np.nan, 1]])[0][:2] == ("bad_request", "none")


@pytest.mark.parametrize(("constant", "expected"), [(0.25, ("unknown_entity", "constant", 0.25)), (None, None)])
def test_with_both_sides_missing_only_a_constant_is_left(constant, expected):
    """Each side alone would be predicted without the other; without both there is nothing to predict from."""
    serving = {"missing_entity": "device-only", "missing_device": "server-only", "constant": constant}
    (row,) = answered(["nowhere"], serving, [[np.nan, np.nan]])
    assert row == expected if expected else row[:2] == ("unknown_entity", "none")


def test_a_constant_is_what_was_declared():
    """No network is asked."""
    models = SumModels()
    assert answered(["nowhere"], {"missing_entity": "constant", "constant": 0.125}, models=models) == [
        ("unknown_entity", "constant", 0.125)
    ]
    assert not models.calls


def test_a_store_that_fails_is_the_declared_fallback_of_unavailable():
    """Feast is down and Triton is not: the device's side is predicted alone, or an error where none is declared."""
    assert answered(["bakery"], {"unavailable": "device-only"}, reader=NoStore()) == [
        ("unavailable", "device-only", 22.0)
    ]
    assert answered(["bakery"], reader=NoStore())[0][:2] == ("unavailable", "none")


class LastRead:
    """A store that does not answer, and what was last read of it: the bakery's slot 1, 700 ms ago."""

    def read(self, entities, now_ms):
        known = np.array([entity == "bakery" for entity in entities])
        status = np.full(len(entities), "unavailable", dtype=object)
        return SimpleNamespace(
            slots=np.where(known, 1, np.nan).astype(np.float32)[:, None],
            age_ms=np.where(known, 700, -1),
            status=status,
        )


@pytest.mark.parametrize(
    ("serving", "expected"),
    [
        ({"unavailable": "cached"}, [("cached", 26.0, 700), ("none", None, -1)]),
        ({"unavailable": "cached", "constant": 0.25}, [("cached", 26.0, 700), ("constant", 0.25, -1)]),
        ({"unavailable": "device-only"}, [("device-only", 22.0, -1)] * 2),
        ({"unavailable": "constant", "constant": 0.25}, [("constant", 0.25, -1)] * 2),
        ({}, [("none", None, -1)] * 2),
    ],
)
def test_what_was_last_read_answers_only_where_it_is_declared_and_known(serving, expected):
    """bakery: 1 + 1 + 10 = 12, tower (12, 12), head 24 + 2 = 26, with its true age; of nowhere nothing is known."""
    served = deployment().model_copy(update={"serving": Serving(**serving), **LEARNED})
    batch = decode(records(message(["bakery", "nowhere"])), lambda *_: served).batches[0]
    (found,) = merge(batch, lambda _: LastRead(), SumModels(), now_ms=0)
    assert found.status.tolist() == ["unavailable"] * 2
    said = zip(found.fallback, found.prediction.tolist(), found.feature_age_ms.tolist(), strict=True)
    assert [(word, None if np.isnan(value) else value, age) for word, value, age in said] == expected


@pytest.mark.parametrize(
    ("constant", "missing_device", "expected"),
    [(0.25, "server-only", "constant"), (0.25, "error", "none"), (None, "server-only", "none")],
)
def test_without_a_device_side_what_was_last_read_does_not_answer(constant, missing_device, expected):
    """Neither side is there as it should be: only a constant is left, where both are declared."""
    serving = {"unavailable": "cached", "missing_device": missing_device, "constant": constant}
    assert answered(["bakery"], serving, [[np.nan, np.nan]], reader=LastRead())[0][:2] == ("unavailable", expected)


@pytest.mark.parametrize("reader", [LastRead(), MemoryReader(KNOWN)])
@pytest.mark.parametrize(("constant", "expected"), [(None, "none"), (0.25, "constant")])
def test_without_triton_what_was_last_read_is_of_no_use(reader, constant, expected):
    """Whether the store answers or not: the head runs on Triton too."""
    served = deployment().model_copy(update={"serving": Serving(unavailable="cached", constant=constant)})
    batch = decode(records(message(["bakery"])), lambda *_: served).batches[0]
    (found,) = merge(batch, lambda _: reader, SumModels(broken=True), now_ms=0)
    assert (found.status.tolist(), found.fallback.tolist()) == (["unavailable"], [expected])


@pytest.mark.parametrize(
    ("serving", "expected"),
    [
        ({}, [("unavailable", "none"), ("unknown_entity", "none")]),
        ({"unavailable": "device-only"}, [("unavailable", "none"), ("unknown_entity", "none")]),
        (
            {"unavailable": "device-only", "missing_entity": "device-only", "constant": 0.5},
            [("unavailable", "constant"), ("unknown_entity", "constant")],
        ),
    ],
)
def test_without_triton_only_a_constant_is_left(serving, expected):
    """And each row keeps the reason of its own."""
    rows = answered(["bakery", "nowhere"], serving, models=SumModels(broken=True))
    assert [row[:2] for row in rows] == expected
    assert all(row[2] == 0.5 for row in rows if row[1] == "constant")


def test_a_row_asked_too_long_ago_is_not_predicted_by_a_fallback():
    """Nobody waits for it."""
    served = deployment().model_copy(update={"serving": Serving(unavailable="constant", constant=0.5)})
    batch = decode(records(message()), lambda *_: served).batches[0]
    joined = features(batch, MemoryReader(KNOWN), now_ms=5_001)
    assert (joined.status.tolist(), joined.fallback.tolist()) == (["unavailable"], ["none"])


LEAST, MOST = -(1 << 63), (1 << 63) - 1


@pytest.mark.parametrize(
    ("asked_ms", "deadline_ms", "waits"),
    [
        (8_000, MOST, True),  # of the release before: 5 s after it was asked, which is 13,000
        (8_000, 10_000, True),
        (8_000, 9_999, False),  # sooner than ours
        (4_999, 11_000, False),  # ours, 9,999, is sooner
        (4_999, MOST, False),
        (8_000, LEAST, False),
        (LEAST, MOST, False),
    ],
)
def test_a_row_is_late_by_its_callers_deadline_or_by_the_workers_own(asked_ms, deadline_ms, waits):
    """At 10,000 ms with 5 s: the sooner one counts, whatever number stands in the record; no network is asked."""
    models = SumModels()
    batch = only_batch(message(event_ms=np.array([asked_ms]), deadline_ms=np.array([deadline_ms])))
    (answer,) = merge(batch, lambda _: MemoryReader(KNOWN), models, now_ms=10_000, deadline_s=5)
    assert answer.status.tolist() == ["ok" if waits else "unavailable"]
    assert answer.fallback.tolist() == ["none"]
    assert len(models.calls) == (2 if waits else 0)


def test_only_the_rows_that_are_still_waited_for_go_through():
    """Of three rows of one record, the second's caller gave up a millisecond ago."""
    models = SumModels()
    batch = only_batch(message(["bakery"] * 3, deadline_ms=np.array([1_000, 999, MOST])))
    (answer,) = merge(batch, lambda _: MemoryReader(KNOWN), models, now_ms=1_000)
    assert answer.status.tolist() == ["ok", "unavailable", "ok"]
    assert models.calls == [("shop_server_tower", 1, 2), ("shop_head", 1, 2)]


@pytest.mark.parametrize(
    ("asked_ms", "deadline_ms", "left_s"),
    [([1_000, 1_000], [1_300, 1_700], 0.7), ([1_000, 400], [1_300, MOST], 4.4), ([MOST, MOST], [MOST, 1_100], 5)],
)
def test_triton_has_as_long_as_the_most_patient_caller_waits(asked_ms, deadline_ms, left_s):
    """At 1,000 ms: until 1,700; until 5 s after 400; and never longer than 5 s, though all is said to be later."""
    models = SumModels()
    batch = only_batch(message(["bakery"] * 2, event_ms=np.array(asked_ms), deadline_ms=np.array(deadline_ms)))
    before_s = time.monotonic()
    merge(batch, lambda _: MemoryReader(KNOWN), models, now_ms=1_000, deadline_s=5)
    tower, head = models.until_s
    assert tower == head
    assert before_s + left_s <= tower <= time.monotonic() + left_s


def test_an_overflow_is_no_answer_of_a_fallback_either():
    """The head gives infinity for an extreme embedding: unavailable, as without a fallback."""
    with np.errstate(over="ignore"):
        (row,) = answered(["nowhere"], {"missing_entity": "device-only"}, [[3e38, 3e38]])
    assert row[:2] == ("unavailable", "none")


def test_a_batch_names_the_traces_of_the_records_with_rows_in_it():
    """Records of 2,047, 2 and 1 rows: the first batch of 2,048 ends within the second record, which is in both."""
    sizes = {"a": 2_047, "b": 2, "c": 1}
    traced = [
        replace(record, traces=(name,))
        for name, record in zip(sizes, records(*(message(["x"] * n) for n in sizes.values())), strict=True)
    ]
    batches = decode(traced, find).batches
    assert [(len(batch), batch.traces) for batch in batches] == [(2_048, ("a", "b")), (2, ("b", "c"))]


def test_the_last_three_stages_are_timed_in_order():
    """One each."""
    seen = []

    @contextmanager
    def stage(name):
        seen.append(name)
        yield

    merge(only_batch(message()), lambda _: MemoryReader(KNOWN), SumModels(), 0, stage=stage)
    assert seen == ["features", "forward", "encode"]


def server_side(
    entities,
    serving=None,
    wants=None,
    embedding=None,
    models=None,
    merge_on="device",
    contributes="embedding",
    reader=None,
    **how,
):
    """The answer of a model that merges on the device, or of one that gives its contribution; asked at 1,000 ms."""
    what = {"merge": merge_on, "serving": Serving(**(serving or {})), "contributes": contributes, **LEARNED}
    served = deployment().model_copy(update=what)
    size = 0 if merge_on == "device" else 2
    given = np.ones((len(entities), size)) if embedding is None else embedding
    asked = message(entities, embedding=given, wants_server=wants, **how)
    (batch,) = decode(records(asked), lambda *_: served).batches
    (found,) = merge(batch, lambda _: reader or MemoryReader(KNOWN), models or SumModels(), now_ms=1_000)
    return found


def test_a_device_that_merges_is_given_the_servers_embedding_and_when_it_expires():
    """bakery: tower (12, 12), features of 5 ms ago that may be 60 s old: 1,000 - 5 + 60,000. The head is not asked."""
    models = SumModels()
    found = server_side(["bakery"], models=models)
    assert found.server_embedding.tolist() == [[12.0, 12.0]]
    assert (found.expires_ms.tolist(), found.feature_age_ms.tolist()) == ([60_995], [5])
    assert (found.status.tolist(), found.fallback.tolist()) == (["ok"], ["none"])
    assert np.isnan(found.prediction).all()
    assert models.calls == [("shop_server_tower", 1, 1)]


def test_a_device_that_merges_is_given_the_embedding_learned_for_a_missing_server_side_or_told_constant():
    """(10, 10) of no features, so it never expires; a constant has no embedding; an error has none either."""
    declared = {"missing_entity": "device-only", "stale_features": "constant", "constant": 0.5}
    found = server_side(["nowhere", "ruin", "bakery"], declared)
    np.testing.assert_array_equal(found.server_embedding, [[10, 10], [np.nan] * 2, [12, 12]])
    assert found.fallback.tolist() == ["device-only", "constant", "none"]
    assert found.expires_ms.tolist() == [-1, -1, 60_995]
    refused = server_side(["nowhere"])
    assert (refused.status.tolist(), refused.fallback.tolist()) == (["unknown_entity"], ["none"])
    assert np.isnan(refused.server_embedding).all()


def test_without_triton_a_device_that_merges_still_predicts_alone():
    """What was learned is in the deployment: only the tower's own rows fall back."""
    declared = {"unavailable": "device-only", "missing_entity": "device-only", "constant": 0.5}
    found = server_side(["bakery", "nowhere"], declared, models=SumModels(broken=True))
    assert list(zip(found.status, found.fallback, strict=True)) == [
        ("unavailable", "device-only"),
        ("unknown_entity", "device-only"),
    ]
    assert found.server_embedding.tolist() == [[10.0, 10.0]] * 2
    assert found.expires_ms.tolist() == [-1, -1]


def test_a_server_embedding_that_is_not_finite_is_no_answer():
    """Request slots of 3e38 twice overflow the tower: that row alone is unavailable."""
    with np.errstate(over="ignore"):
        found = server_side(["bakery", "bakery"], request=np.array([[3e38, 3e38], [1, 10]], np.float32))
    assert found.status.tolist() == ["unavailable", "ok"]
    np.testing.assert_array_equal(found.server_embedding, [[np.nan] * 2, [12, 12]])
    assert found.expires_ms.tolist() == [-1, 60_995]


def test_an_embedding_of_a_device_that_merges_itself_is_refused():
    """Who sends one does not know what was declared; it is not looked at."""
    served = deployment().model_copy(update={"merge": "device"})
    (refused,) = decode(records(message()), lambda *_: served).refused
    assert refused.status.tolist() == ["bad_request"]


def test_the_contribution_is_given_to_the_rows_that_want_it_alone():
    """Beside its prediction, 26, row 2 has the tower's (12, 12); row 3 the learned (10, 10) that its fallback used.

    No row is given it where it is not declared, whatever the record says.
    """
    declared = {"missing_entity": "device-only", "stale_features": "constant", "constant": 0.5, "contribution": True}
    wants = np.array([False, True, True, True])
    found = server_side(["bakery", "bakery", "nowhere", "ruin"], declared, wants, merge_on="server")
    np.testing.assert_array_equal(found.server_embedding, [[np.nan] * 2, [12, 12], [10, 10], [np.nan] * 2])
    assert found.prediction.tolist() == [26.0, 26.0, 22.0, 0.5]
    assert found.status.tolist() == ["ok", "ok", "unknown_entity", "stale_features"]
    for serving, wants in ((declared, None), (declared | {"contribution": False}, np.array([True]))):
        nobody = server_side(["bakery"], serving, wants, merge_on="server")
        assert (nobody.server_embedding.shape, nobody.prediction.tolist()) == ((1, 0), [26.0])


SLOTS = {"contribution": True, "missing_entity": "device-only", "stale_features": "constant", "constant": 0.5}
NO_SLOTS = [np.nan] * 3


@pytest.mark.parametrize("merge_on", ["server", "device"])
def test_slots_are_given_to_the_rows_that_want_them_as_they_went_into_the_tower(merge_on):
    """The bakery's 1, the hour's place 1 and the budget, 10 or missing; NaN where no tower was asked, or nobody wants.

    A row that no fallback answers has none either. The server's embedding comes or not as it does without.
    """
    request = np.array([[1, 10], [1, np.nan], [1, 10], [1, 10], [1, 10]], np.float32)
    wants = np.array([True, True, False, True, True])
    entities = ["bakery", "bakery", "bakery", "nowhere", "ruin"]
    found = server_side(entities, SLOTS, merge_on=merge_on, contributes="slots", request=request, wants_slots=wants)
    expected = [[1, 1, 10], NO_SLOTS, NO_SLOTS, NO_SLOTS, NO_SLOTS]  # of a missing budget the sum is no number
    np.testing.assert_array_equal(found.server_slots, expected)
    assert found.status.tolist()[:2] == ["ok", "unavailable"]
    assert found.server_embedding.shape == (5, 2 if merge_on == "device" else 0)


def test_a_missing_value_is_a_slot_as_any_other():
    """Of a tower that copes with it: NaN in the budget's place, and an answer."""

    class Coping(SumModels):
        def infer(self, model, version, inputs, output, until_s=math.inf):
            whole = {name: np.nan_to_num(values) for name, values in inputs.items()}
            return super().infer(model, version, whole, output, until_s)

    request, wants = np.array([[1, np.nan]], np.float32), np.array([True])
    how = {"contributes": "slots", "request": request, "wants_slots": wants, "models": Coping()}
    found = server_side(["bakery"], SLOTS, **how)
    assert found.status.tolist() == ["ok"]
    np.testing.assert_array_equal(found.server_slots, [[1, 1, np.nan]])


def test_slots_that_are_infinite_are_no_answer():
    """Whoever writes to the topic may write anything: that row alone is unavailable, and told none."""

    class Squashing(SumModels):
        def infer(self, model, version, inputs, output, until_s=math.inf):
            return np.tanh(super().infer(model, version, inputs, output, until_s))

    request, wants = np.array([[1, np.inf], [1, 10]], np.float32), np.ones(2, bool)
    how = {"contributes": "slots", "request": request, "wants_slots": wants, "models": Squashing()}
    found = server_side(["bakery", "bakery"], {"contribution": True}, **how)
    assert found.status.tolist() == ["unavailable", "ok"]
    np.testing.assert_array_equal(found.server_slots, [NO_SLOTS, [1, 1, 10]])


def test_features_last_read_are_slots_and_a_missing_device_takes_none_away():
    """Both "cached" and "server-only" ask the tower, so both have what went into it."""

    class LastRead:
        def read(self, entities, now_ms):
            return MemoryRows(np.array([[7.0]], np.float32), np.array([9]), np.array(["unavailable"], dtype=object))

    how = {"merge_on": "server", "contributes": "slots", "wants_slots": np.array([True])}
    cached = server_side(["bakery"], SLOTS | {"unavailable": "cached"}, reader=LastRead(), **how)
    assert (cached.fallback.tolist(), cached.server_slots.tolist()) == (["cached"], [[7, 1, 10]])
    absent = np.full((1, 2), np.nan)
    alone = server_side(["bakery"], SLOTS | {"missing_device": "server-only"}, embedding=absent, **how)
    assert (alone.fallback.tolist(), alone.server_slots.tolist()) == (["server-only"], [[1, 1, 10]])


def test_no_slots_are_given_where_none_are_declared_contributed_or_wanted():
    """Whatever the record says; without Triton, the column is there for those who asked, and says nothing."""
    wants = np.array([True])
    for serving, contributes, wish in (
        (SLOTS | {"contribution": False}, "slots", wants),
        (SLOTS, "embedding", wants),
        (SLOTS, "slots", None),
        (SLOTS, "slots", ~wants),
    ):
        found = server_side(["bakery"], serving, contributes=contributes, wants_slots=wish)
        assert (found.status.tolist(), found.server_slots.shape) == (["ok"], (1, 0))
    down = server_side(["bakery"], SLOTS, contributes="slots", wants_slots=wants, models=SumModels(broken=True))
    np.testing.assert_array_equal(down.server_slots, [NO_SLOTS])


def test_answers_with_wide_embeddings_leave_in_several_messages():
    """Embeddings of 4 kB: 1,000 rows are 4 MB, 186 fit into 768 KiB with 128 bytes beside each; none is lost."""
    found = server_side(["bakery"])
    many = found[np.zeros(1_000, int)]
    wide = replace(many, server_embedding=np.zeros((1_000, 1_024), np.float32))
    parts = list(within_limit(wide))
    assert [len(part) for part in parts] == [186] * 5 + [70]
    assert max(len(part.to_bytes()) for part in parts) < 1 << 20
    assert [len(part) for part in within_limit(many)] == [1_000]
    both = replace(wide, server_slots=np.zeros((1_000, 1_024), np.float32))
    assert {len(part) for part in within_limit(both)} == {94, 60}  # 8,320 bytes a row
