import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import BadRequest, StaleFeatures
from hybrid.spec import Serving
from serving import oip
from serving.testing import deployment

SHOP = deployment()
TEXTS = struct.pack("<I", 6) + b"bakery" + struct.pack("<I", 0)  # "bakery", ""


def tensor(name, datatype, shape, data=None, size=None):
    content = {"data": data} if size is None else {"parameters": {"binary_data_size": size}}
    return {"name": name, "datatype": datatype, "shape": shape} | content


def inputs(**changes):
    """Two rows; `changes` replaces a tensor by name, or leaves it out where None."""
    tensors = {
        "entity": tensor("entity", "BYTES", [2], ["bakery", "kiosk"]),
        "hour": tensor("hour", "BYTES", [2], ["2PM", "9PM"]),
        "budget": tensor("budget", "FP32", [2], [0.5, 20]),
        "device_embedding": tensor("device_embedding", "FP32", [2, 2], [1, 2, 3, 4]),
    }
    return [t for t in (tensors | changes).values() if t is not None]


def decode(tensors, raw=b"", length=True, served=SHOP, **document):
    header = json.dumps({"inputs": tensors} | document).encode()
    return oip.decode(header + raw, str(len(header)) if raw and length else None, served)


def test_json_becomes_rows():
    """2PM is word 1, 9PM is unseen (2); Numeric() without constants clips at 10."""
    asked = decode(inputs(), id="q1")
    assert asked.id == "q1"
    assert asked.rows.entity.tolist() == ["bakery", "kiosk"]
    assert asked.rows.request.tolist() == [[1.0, 0.5], [2.0, 10.0]]
    assert asked.rows.embedding.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert asked.outputs == dict.fromkeys(
        ["prediction", "version", "feature_age_ms", "merged", "transport", "status", "fallback"], False
    )


def test_raw_tensors_lie_behind_the_json_in_the_order_of_the_inputs():
    """Budget as 2 floats, then the embedding as 4; entity and hour stay in the JSON."""
    binary = inputs(
        budget=tensor("budget", "FP32", [2], size=8),
        device_embedding=tensor("device_embedding", "FP32", [2, 2], size=16),
    )
    asked = decode(binary, struct.pack("<6f", 1, 2, 5, 6, 7, 8))
    assert asked.rows.request[:, 1].tolist() == [1.0, 2.0]
    assert asked.rows.embedding.tolist() == [[5.0, 6.0], [7.0, 8.0]]


def test_raw_text_lies_behind_its_lengths():
    """A missing hour cannot be told from an empty one in BYTES: both are unseen text, index 2."""
    asked = decode(inputs(hour=tensor("hour", "BYTES", [2], size=len(TEXTS))), TEXTS)
    assert asked.rows.request[:, 0].tolist() == [2.0, 2.0]


def test_nested_data_and_null_for_a_missing_request_feature_are_read():
    """The embedding row by row; null is missing: index 3 for text, NaN for a number."""
    asked = decode(
        inputs(
            hour=tensor("hour", "BYTES", [2], [None, "7AM"]),
            budget=tensor("budget", "FP32", [2], [None, 1]),
            device_embedding=tensor("device_embedding", "FP32", [2, 2], [[1, 2], [3, 4]]),
        )
    )
    np.testing.assert_array_equal(asked.rows.request, [[3.0, np.nan], [0.0, 1.0]])
    assert asked.rows.embedding.tolist() == [[1.0, 2.0], [3.0, 4.0]]


WRONG = {
    "wrong datatype": (inputs(budget=tensor("budget", "FP64", [2], [1, 2])), "'budget' must have datatype FP32"),
    "wrong shape": (inputs(budget=tensor("budget", "FP32", [1], [1])), r"'budget' must have shape \[2\], got \[1\]"),
    "a width that is not the model's": (
        inputs(device_embedding=tensor("device_embedding", "FP32", [2, 3], [1] * 6)),
        r"must have shape \[2, 2\], got \[2, 3\]",
    ),
    "too few values": (inputs(budget=tensor("budget", "FP32", [2], [1])), "must have 2 values, got 1"),
    "text for numbers": (inputs(budget=tensor("budget", "FP32", [2], [1, "x"])), "must hold numbers, got str"),
    "a boolean for a number": (inputs(budget=tensor("budget", "FP32", [2], [1, True])), "must hold numbers, got bool"),
    "null in the embedding": (
        inputs(device_embedding=tensor("device_embedding", "FP32", [2, 2], [1, 2, 3, None])),
        "must hold numbers, got NoneType",
    ),
    "past float32 in the embedding": (
        inputs(device_embedding=tensor("device_embedding", "FP32", [2, 2], [1, 2, 3, 1e39])),
        "'device_embedding' must be finite",
    ),
    "no rows": (inputs(entity=tensor("entity", "BYTES", [0], [])), "1 <= n <= 1024"),
    "too many rows": (inputs(entity=tensor("entity", "BYTES", [1025], ["a"] * 1025)), "1 <= n <= 1024"),
    "an empty entity": (inputs(entity=tensor("entity", "BYTES", [2], ["a", ""])), "1 to 256 bytes"),
    "a long entity": (inputs(entity=tensor("entity", "BYTES", [2], ["a", "é" * 129])), "1 to 256 bytes"),
    "a missing input": (inputs(hour=None), r"\['hour'\] are missing"),
    "a device feature": (inputs(mood=tensor("mood", "FP32", [2], [0.7, 0.9])), "unknown input 'mood'; shop takes"),
    "an input twice": (inputs(more=tensor("entity", "BYTES", [2], ["a", "b"])), "distinct names"),
    "deeply nested data": (inputs(budget=tensor("budget", "FP32", [2], [[[1]], 2])), "no deeper"),
    "data that is no list": (inputs(budget=tensor("budget", "FP32", [2], 7)), "data as a list"),
    "inputs that are no list": ({"entity": 1}, "inputs must be a list"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_as_the_metadata_says_is_a_bad_request(tensors, message):
    """The message names the input, what it must be and what it got."""
    with pytest.raises(BadRequest, match=message):
        decode(tensors)


def test_long_text_is_refused_before_anyone_looks_at_it():
    """140,000 combining marks take minutes to bring into Unicode's normal form; here they take a length."""
    marks = "\u0301" * 70_000 + "\u0316" * 70_000
    for name in ("entity", "hour"):
        with pytest.raises(BadRequest, match=f"input '{name}' must have at most 1024 characters in each row"):
            decode(inputs(**{name: tensor(name, "BYTES", [2], ["bakery", marks])}))


def test_a_deeply_nested_shape_is_a_bad_request():
    """Python's own limit on nesting is no error of the server's."""
    shape = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(BadRequest, match="must have shape"):
        decode(inputs(entity=tensor("entity", "BYTES", shape, ["bakery", "kiosk"])))


def test_no_message_repeats_a_value():
    """A device feature sent by mistake, text for a number, an entity too long: none of the values come back."""
    for tensors in (
        inputs(mood=tensor("mood", "BYTES", [2], ["secret", "secret"])),
        inputs(budget=tensor("budget", "FP32", [2], ["secret", 1])),
        inputs(entity=tensor("entity", "BYTES", [2], ["secret" * 100, "a"])),
    ):
        with pytest.raises(BadRequest) as raised:
            decode(tensors)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("raw", "size", "message"),
    [
        (TEXTS[:-1], 13, "ends before"),
        (TEXTS + b"x", 15, "1 bytes follow"),
        (b"\xff\xff\xff\xffab", 6, "ends before"),
        (TEXTS, 13, "14 bytes follow the JSON"),
        (TEXTS.replace(b"bakery", b"\xff\xfe\xfd\xfc\xfb\xfa"), 14, "UTF-8"),
        (TEXTS, -1, "whole number"),
        (TEXTS, "14", "1 to 256 bytes"),  # a size as text is read; then the second entity is empty
    ],
)
def test_raw_text_that_does_not_add_up_is_refused(raw, size, message):
    """Lengths that end early, late or beyond the body; bytes that are not UTF-8."""
    tensors = inputs(entity=tensor("entity", "BYTES", [2], size=size))
    with pytest.raises(BadRequest, match=message):
        decode(tensors, raw)


@pytest.mark.parametrize(
    ("body", "length"),
    [(b"{", None), (b"[1]", None), (b"\xff{}", None), (b'{"inputs": NaN}', None), (b"{}", "7"), (b"{}", "-1")],
)
def test_a_body_that_is_no_json_object_is_refused(body, length):
    """Cut, of another type, not UTF-8, with NaN, or shorter than its header says."""
    with pytest.raises(BadRequest):
        oip.decode(body, length, SHOP)


@pytest.mark.parametrize("key", ["9223372036854775808", "1.0", "٣", "-", "9" * 200])
def test_integer_join_keys_are_whole_numbers_of_64_bits(key):
    """From -2^63 to 2^63 - 1, in ASCII digits; nothing else."""
    least = str(-(2**63))
    good = inputs(entity=tensor("entity", "BYTES", [2], ["12", least]))
    assert decode(good, served=deployment(join_key_type="integer")).rows.entity.tolist() == ["12", least]
    with pytest.raises(BadRequest, match="whole numbers of 64 bits"):
        decode(inputs(entity=tensor("entity", "BYTES", [2], ["1", key])), served=deployment(join_key_type="integer"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 400), st.binary(max_size=30), st.integers(0, 500))
def test_a_damaged_request_is_read_or_refused_but_never_anything_else(patch, place, tail, length):
    """Bytes overwritten anywhere, raw bytes appended, any header length: rows or BadRequest."""
    body = bytearray(json.dumps({"inputs": inputs()}).encode())
    body[place : place + len(patch)] = patch
    with contextlib.suppress(BadRequest):
        oip.decode(bytes(body) + tail, str(length), SHOP)


def answer(outputs):
    asked = oip.Infer("q1", decode(inputs()).rows, outputs)
    return oip.encode(
        asked, oip.Answers(np.array([0.25, 0.5], np.float32), np.array([7, 8]), ["ok"] * 2, ["none"] * 2), SHOP
    )


def test_an_answer_in_json():
    """Model, version, id and each output with its data; 0.25 and 0.5 are exact."""
    body, length = answer({"prediction": False, "version": False, "merged": False})
    assert length is None
    assert json.loads(body) == {
        "model_name": "shop",
        "model_version": "1",
        "id": "q1",
        "outputs": [
            {"name": "prediction", "datatype": "FP32", "shape": [2], "data": [0.25, 0.5]},
            {"name": "version", "datatype": "INT64", "shape": [2], "data": [1, 1]},
            {"name": "merged", "datatype": "BYTES", "shape": [2], "data": ["server", "server"]},
        ],
    }


def test_an_answer_names_what_answered_and_why():
    """Row 2 is predicted without the server's side, since the store has no row for it; the model goes over Kafka."""
    asked = oip.Infer(None, decode(inputs()).rows, {"transport": False, "status": False, "fallback": False})
    answers = oip.Answers(
        np.array([0.25, 0.5], np.float32), np.array([7, -1]), ["ok", "unknown_entity"], ["none", "device-only"]
    )
    outputs = {o["name"]: o["data"] for o in json.loads(oip.encode(asked, answers, SHOP)[0])["outputs"]}
    assert outputs == {
        "transport": ["kafka", "kafka"],
        "status": ["ok", "unknown_entity"],
        "fallback": ["none", "device-only"],
    }


def test_the_device_embedding_may_be_left_out_where_the_model_answers_without():
    """Then its rows are NaN; where the model declares no answer without one, the input is missing."""
    declared = SHOP.model_copy(update={"serving": Serving(missing_device="constant", constant=0.1)})
    assert np.isnan(decode(inputs(device_embedding=None), served=declared).rows.embedding).all()
    with pytest.raises(BadRequest, match=r"inputs \['device_embedding'\] are missing"):
        decode(inputs(device_embedding=None))


def test_an_answer_with_raw_tensors():
    """Two floats, two 64-bit ages and two texts behind their lengths, in that order behind the JSON."""
    body, length = answer({"prediction": True, "feature_age_ms": True, "merged": True})
    sizes = [output["parameters"]["binary_data_size"] for output in json.loads(body[:length])["outputs"]]
    assert sizes == [8, 16, 20]
    assert body[length:] == struct.pack("<2f2q", 0.25, 0.5, 7, 8) + 2 * (struct.pack("<I", 6) + b"server")


def test_outputs_are_chosen_by_name_and_form():
    """One output as JSON though binary is the default; an unknown one is refused."""
    wanted = [{"name": "prediction"}, {"name": "version", "parameters": {"binary_data": False}}]
    asked = decode(inputs(), outputs=wanted, parameters={"binary_data_output": True})
    assert asked.outputs == {"prediction": True, "version": False}
    with pytest.raises(BadRequest, match="unknown output 'mood'"):
        decode(inputs(), outputs=[{"name": "mood"}])


def test_an_error_says_why_in_one_word():
    """The protocol's error object, and the code."""
    assert json.loads(oip.encode_error(StaleFeatures("too old"))) == {"error": "too old", "code": "stale_features"}


ON_DEVICE = SHOP.model_copy(update={"merge": "device"})
GIVING = SHOP.model_copy(update={"serving": Serving(contribution=True)})


def test_a_device_that_merges_sends_nothing_of_itself_and_is_answered_the_servers_embedding():
    """No embedding goes in; the server's, its age, its version and its end come out, and no prediction."""
    asked = decode(inputs(device_embedding=None), served=ON_DEVICE)
    assert (asked.rows.embedding.shape, asked.rows.contribution) == ((2, 0), 2)
    assert list(asked.outputs) == [
        "server_embedding",
        "version",
        "feature_age_ms",
        "expires_ms",
        "merged",
        "transport",
        "status",
        "fallback",
    ]
    with pytest.raises(BadRequest, match="'device_embedding' must not be sent: shop merges on the device") as refused:
        decode(inputs(), served=ON_DEVICE)
    assert "4" not in str(refused.value)
    with pytest.raises(BadRequest, match=r"the device predicts \(merge='device'\), so there is no output 'prediction'"):
        decode(inputs(device_embedding=None), served=ON_DEVICE, outputs=[{"name": "prediction"}])


def test_the_contribution_is_given_by_name_and_only_where_it_is_declared():
    """Without a name it is not among the outputs; where nobody is given it, asking is an error that says so."""
    assert decode(inputs(), served=GIVING).rows.contribution == 0
    named = {"outputs": [{"name": "server_embedding"}, {"name": "prediction"}]}
    asked = decode(inputs(), served=GIVING, **named)
    assert (asked.rows.contribution, list(asked.outputs)) == (2, ["server_embedding", "prediction"])
    with pytest.raises(BadRequest, match=r"serving\.contribution is not declared, so nobody is given output"):
        decode(inputs(), **named)


def slots_of_shop(**changes):
    return SHOP.model_copy(update={"serving": Serving(contribution=True), "contributes": "slots", **changes})


def test_slots_are_given_by_name_where_devices_train_the_server_tower():
    """One server slot and two of the request; no merge gives them unasked, and where there are none, it says so."""
    for merge in ("server", "device"):
        served = slots_of_shop(merge=merge)
        asking = {"device_embedding": None} if merge == "device" else {}
        unasked = decode(inputs(**asking), served=served)
        assert (unasked.rows.slots, "server_slots" in unasked.outputs) == (0, False)
        asked = decode(inputs(**asking), served=served, outputs=[{"name": "server_slots"}])
        assert (asked.rows.slots, asked.rows.contribution) == (3, 2 if merge == "device" else 0)
        assert asked.rows.nbytes == unasked.rows.nbytes + 4 * 2 * 3
        named = [tensor["name"] for tensor in oip.model_metadata(served, [1])["outputs"]]
        assert sorted(set(named)) == sorted(named)
        assert {"server_embedding", "server_slots"} <= set(named)
    assert oip.shape("server_slots", 2, served) == [2, 3]
    named = {"outputs": [{"name": "server_slots"}]}
    with pytest.raises(
        BadRequest, match="devices do not train the server tower of this version, so there is no output"
    ):
        decode(inputs(), served=GIVING, **named)
    with pytest.raises(BadRequest, match=r"serving\.contribution is not declared, so nobody is given output"):
        decode(inputs(), served=slots_of_shop(serving=Serving()), **named)


def test_slots_are_answered_row_by_row():
    """Two rows of three in JSON, null where a value is missing; in binary 24 bytes."""
    asked = oip.Infer(None, decode(inputs()).rows, {"server_slots": False})
    slots = np.array([[1, 0, np.nan], [2, 1, -0.5]], np.float32)
    none = np.empty((2, 0), np.float32)
    answers = oip.Answers(np.full(2, 0.5), np.array([7, 7]), ["ok"] * 2, ["none"] * 2, None, none, slots)
    assert json.loads(oip.encode(asked, answers, slots_of_shop())[0])["outputs"] == [
        {"name": "server_slots", "datatype": "FP32", "shape": [2, 3], "data": [1, 0, None, 2, 1, -0.5]}
    ]
    body, length = oip.encode(oip.Infer(None, asked.rows, {"server_slots": True}), answers, slots_of_shop())
    assert body[length:] == slots.tobytes()


def test_metadata_has_the_shapes_of_each_merge():
    """Without the device's embedding going in where the device merges; the contribution where it is declared."""
    shapes = {
        served.merge + str(served.serving.contribution): (
            [t["name"] for t in oip.model_metadata(served, [1])["inputs"]],
            {t["name"]: t["shape"] for t in oip.model_metadata(served, [1])["outputs"]}.get("server_embedding"),
        )
        for served in (SHOP, GIVING, ON_DEVICE)
    }
    assert shapes == {
        "serverFalse": (["entity", "hour", "budget", "device_embedding"], None),
        "serverTrue": (["entity", "hour", "budget", "device_embedding"], [-1, 2]),
        "deviceFalse": (["entity", "hour", "budget"], [-1, 2]),
    }


def test_a_server_embedding_is_answered_row_by_row():
    """(2, 2) numbers in JSON, null where a constant answered; in binary 16 bytes."""
    asked = oip.Infer(None, decode(inputs()).rows, {"server_embedding": False, "expires_ms": False})
    server = np.array([[1.5, -2.0], [np.nan, np.nan]], np.float32)
    answers = oip.Answers(
        np.full(2, np.nan), np.array([7, -1]), ["ok", "unavailable"], ["none", "constant"], np.array([99, -1]), server
    )
    assert json.loads(oip.encode(asked, answers, ON_DEVICE)[0])["outputs"] == [
        {"name": "server_embedding", "datatype": "FP32", "shape": [2, 2], "data": [1.5, -2.0, None, None]},
        {"name": "expires_ms", "datatype": "INT64", "shape": [2], "data": [99, -1]},
    ]
    body, length = oip.encode(oip.Infer(None, asked.rows, {"server_embedding": True}), answers, ON_DEVICE)
    assert body[length:] == server.tobytes()
