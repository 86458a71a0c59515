import json
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid.errors import PlanError
from hybrid.plan import (
    CONTEXT,
    MAX_BYTES,
    MAX_JSON,
    MAX_PARAMETERS,
    MAX_PAYLOAD,
    SIGNATURE,
    CheckIn,
    Halt,
    Local,
    Policy,
    QueryPlan,
    TrainPlan,
    Turn,
    open_signed,
    sign,
)
from hybrid.query import By, Categories, Histogram, Labels, Moments, Query, Scores
from hybrid.tokens import Window

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PLAN = TrainPlan(
    id="0f" * 16,
    model="coupon",
    version=3,
    definition_hash="ab" * 32,
    sampling=0.5,
    expires_ms=1_700_000_000_000,
    policy=Policy(battery=0.5, thermal="fair"),
    examples=(2, 64),
    local=Local(epochs=2, lr=0.5, batch=8, proximal=0.25, tower_dropout=0.1),
    clip=1.5,
    upload="int8",
    parameters=3,
)
WEIGHTS = np.array([1.5, -2.0, 1e-30], np.float32)
HALT = Halt(model="coupon", versions=(2, 3), reason="it predicts nonsense")
MESSAGE = sign(PLAN, KEY, WEIGHTS)
REFUSED = "not signed by the key this device trusts"


def signed(body: bytes, key: Ed25519PrivateKey = KEY) -> bytes:
    """What `sign` makes of a body that it would not have made."""
    return key.sign(CONTEXT + body) + body


def body_of(document: object, raw: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<I", len(text)) + text + raw


def changed(**fields: object) -> dict[str, object]:
    return json.loads(PLAN.model_dump_json()) | fields


def test_a_plan_comes_back_with_its_weights():
    """Every field, and every bit of the weights, which nobody can change by accident."""
    message, weights = open_signed(MESSAGE, PUBLIC)
    assert message == PLAN
    np.testing.assert_array_equal(weights, WEIGHTS)
    assert not weights.flags.writeable
    assert weights.flags.aligned


def test_a_turn_comes_back_and_is_absent_where_there_is_none():
    """A device of before there were turns reads a plan by coins, and refuses one that asks it to keep a separation."""
    turn = Turn(training="5" * 32, first_step=3, last_step=13, separation=8)
    plan = PLAN.model_copy(update={"turn": turn})
    assert open_signed(sign(plan, KEY, WEIGHTS), PUBLIC)[0] == plan
    assert b'"turn"' not in MESSAGE
    with pytest.raises(ValidationError, match="at most last_step"):
        Turn(training="5" * 32, first_step=3, last_step=2, separation=8)


def test_what_is_kept_by_label_comes_back_and_is_absent_where_all_is():
    """A device that knows no `keep` reads plans without it, and refuses one with it."""
    plan = PLAN.model_copy(update={"local": PLAN.local.model_copy(update={"keep": (0.05, 1.0)})})
    assert open_signed(sign(plan, KEY, WEIGHTS), PUBLIC)[0] == plan
    assert b'"keep"' not in MESSAGE


def test_a_halt_comes_back():
    """It has no weights."""
    message, weights = open_signed(sign(HALT, KEY), PUBLIC)
    assert (message, weights.shape) == (HALT, (0,))


def test_a_message_is_laid_out_as_the_module_says():
    """Signature, length, JSON, weights: by the document alone, as another language would read it."""
    signature, body = MESSAGE[:64], MESSAGE[64:]
    PUBLIC.verify(signature, b"hybrid plan 1\0" + body)
    length = int.from_bytes(body[:4], "little")
    assert json.loads(body[4 : 4 + length])["id"] == "0f" * 16
    assert struct.unpack("<3f", body[4 + length :]) == tuple(WEIGHTS.tolist())


QUERY = Query(
    parts=(
        Moments(column="age", low=0, high=120, scale="log1p"),
        Histogram(column="age", edges=(18.0, 65.0), cumulative=True),
        Categories(column="town", values=("Köln", "Ulm")),
        Labels(),
        Scores(nodes=tuple(np.sin(np.linspace(0, np.pi / 2, 64)) ** 2), cumulative=True),
    ),
    rows=8,
    by=By(column="hour", values=("7AM", "2PM")),
    clip=3.0,
)
ASKED = QueryPlan(
    id="1f" * 16, model="coupon", version=3, definition_hash="ab" * 32, expires_ms=1_700_000_000_000, query=QUERY
)


def test_a_query_s_plan_comes_back():
    """Every part of it, with 64 nodes in less than a tenth of what a plan's JSON may have; it brings nothing along."""
    signed_plan = sign(ASKED, KEY)
    message, payload = open_signed(signed_plan, PUBLIC)
    assert (message, payload.shape) == (ASKED, (0,))
    assert len(signed_plan) < MAX_JSON / 10
    assert (message.parameters, message.clip, message.upload, message.sampling) == (QUERY.size, 3.0, "float32", 1.0)
    assert QUERY.size == 2 * (3 + 4 + 4 + 2 + 128)


def test_squares_are_asked_with_their_payload():
    """Two statistics of two counts: gradients and centres, six numbers, and no other count of them."""
    spread = Query(parts=(Labels(),), spread=(1.0, 2.0))
    plan, payload = ASKED.model_copy(update={"query": spread}), np.arange(6, dtype=np.float32)
    message, found = open_signed(sign(plan, KEY, payload), PUBLIC)
    assert (message, found.tolist(), message.parameters) == (plan, payload.tolist(), 2)
    assert message.clip == pytest.approx(2**0.5)
    for wrong in (None, payload[:5], np.full(6, np.nan, np.float32)):
        with pytest.raises(PlanError, match="6 finite numbers of payload"):
            sign(plan, KEY, wrong)
    document = json.loads(plan.model_dump_json(exclude_none=True))
    with pytest.raises(PlanError, match="6 finite numbers of payload"):
        open_signed(signed(body_of(document, payload[:5].tobytes())), PUBLIC)


def test_a_payload_is_bounded():
    """513 statistics of 512 counts are 513 x 513 numbers, more than 2^18."""
    query = {"parts": [{"kind": "histogram", "column": "age", "edges": list(range(510))}], "spread": [1.0] * 513}
    with pytest.raises(ValidationError, match=f"at most {MAX_PAYLOAD}"):
        QueryPlan(**ASKED.model_dump(exclude={"query"}), query=query)


@pytest.mark.parametrize(
    "query",
    [
        {"parts": []},
        {"parts": [{"kind": "shell", "column": "age"}]},
        {"parts": [{"kind": "labels", "more": 1}]},
        {"parts": [{"kind": "moments", "column": "age", "low": 2, "high": 1}]},
        {"parts": [{"kind": "histogram", "column": "age", "edges": [1, 1]}]},
        {"parts": [{"kind": "categories", "column": "town", "values": ["a", "a"]}]},
        {"parts": [{"kind": "scores", "nodes": [0.5, 2]}]},
        {"parts": [{"kind": "histogram", "column": "age", "edges": list(range(4096))}] * 256},
        {"parts": [{"kind": "labels"}], "clip": 0},
        {"parts": [{"kind": "labels"}], "spread": [-1]},
        {"parts": [{"kind": "labels"}], "by": {"column": "hour", "values": []}},
        "labels",
        None,
    ],
    ids=str,
)
def test_a_malformed_query_is_a_malformed_plan(query):
    """Also where the right key signed it."""
    document = json.loads(ASKED.model_dump_json(exclude_none=True)) | {"query": query}
    with pytest.raises(PlanError):
        open_signed(signed(body_of(document)), PUBLIC)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_any_number_of_weights_comes_back_bit_by_bit(parameters: int, seed: int):
    """Whatever length the JSON has before them."""
    weights = np.random.default_rng(seed).normal(size=parameters).astype(np.float32)
    plan = PLAN.model_copy(update={"parameters": parameters})
    _, found = open_signed(sign(plan, KEY, weights), PUBLIC)
    assert found.tobytes() == weights.tobytes()


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_changed_message_is_refused_and_nothing_else_happens(data: st.DataObject):
    """Bytes changed, cut, inserted or appended anywhere: PlanError, every time."""
    raw = bytearray(MESSAGE)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "append", "swap"]))
    place = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del raw[place:]
    elif kind == "swap":
        raw = raw[place:] + raw[:place]
    else:
        raw[(place if kind == "insert" else len(raw)) : place if kind == "insert" else len(raw)] = data.draw(
            st.binary(min_size=1, max_size=80)
        )
    if bytes(raw) == MESSAGE:
        return
    with pytest.raises(PlanError):
        open_signed(bytes(raw), PUBLIC)


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_whatever_the_key_signed_is_a_message_or_refused(body: bytes):
    """Signed by the right key, and still nonsense: PlanError, never another error."""
    with pytest.raises(PlanError):
        open_signed(signed(body), PUBLIC)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_signed_body_that_was_damaged_before_is_refused_or_still_a_message(data: st.DataObject):
    """As a faulty signer would send it: what is opened has as many finite weights as it says."""
    raw = bytearray(MESSAGE[SIGNATURE:])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message, weights = open_signed(signed(bytes(raw)), PUBLIC)
    except PlanError:
        return
    assert isinstance(message, TrainPlan)
    assert weights.shape == (message.parameters,)
    assert np.isfinite(weights).all()


BROKEN = {
    "nothing": b"",
    "no length": b"\x01\x02",
    "a length of gigabytes": b"\xff\xff\xff\xff{}",
    "no JSON": body_of(b"\x00\xff"),
    "a deep nesting": body_of(b"[" * 60_000),
    "another format": body_of(changed(format=2), WEIGHTS.tobytes()),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_nothing_is_read_before_the_signature(body: bytes):
    """Another's key: the sentence is the signature's, whatever is wrong behind it."""
    with pytest.raises(PlanError, match=REFUSED):
        open_signed(signed(body, OTHER), PUBLIC)
    with pytest.raises(PlanError) as refused:
        open_signed(signed(body), PUBLIC)
    assert REFUSED not in str(refused.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 63, b"\0" * 64, b"\0" * 1000, MESSAGE[SIGNATURE:]])
def test_what_has_no_signature_is_refused(data: bytes):
    """Shorter than one, or zeros in its place."""
    with pytest.raises(PlanError, match=REFUSED):
        open_signed(data, PUBLIC)


def test_a_bundles_signature_does_not_pass_for_a_plans():
    """The same key signs both; what it signed without the context of plans is not one of them."""
    body = MESSAGE[SIGNATURE:]
    with pytest.raises(PlanError, match=REFUSED):
        open_signed(KEY.sign(body) + body, PUBLIC)


@pytest.mark.parametrize(
    "fields",
    [
        {"surprise": 1},
        {"kind": "evaluate"},
        {"format": 2},
        {"id": "0F" * 16},
        {"id": "0f" * 16 + "\n"},
        {"id": "../" * 10 + "ab"},
        {"model": "Coupon"},
        {"model": "a/b"},
        {"version": 0},
        {"version": 1 << 31},
        {"definition_hash": "ab"},
        {"sampling": 0.0},
        {"sampling": 1.01},
        {"expires_ms": -1},
        {"expires_ms": 1 << 53},
        {"examples": [3, 2]},
        {"examples": [0, 2]},
        {"seconds": 0},
        {"memory_mb": 0},
        {"clip": 0},
        {"upload": "int4"},
        {"parameters": 0},
        {"parameters": MAX_PARAMETERS + 1},
        {"local": {"lr": 1.0}},
        {"local": {"lr": 1.0, "steps": 1, "epochs": 1}},
        {"local": {"lr": 3.0, "steps": 1, "proximal": 0.5}},
        {"local": {"lr": 1.0, "steps": 1001}},
        {"local": {"lr": 1.0, "steps": 1, "tower_dropout": 0.5}},
        {"local": {"lr": 1.0, "steps": 1, "keep": [0, 1]}},
        {"local": {"lr": 1.0, "steps": 1, "keep": [0.5, 1.5]}},
        {"local": {"lr": 1.0, "steps": 1, "keep": [0.5]}},
        {"policy": {"battery": 1.5}},
        {"policy": {"thermal": "critical"}},
        {"policy": {"participations": 0}},
        {"policy": {"period_s": 0}},
        {"policy": {"consent": False}},
    ],
    ids=str,
)
def test_a_plan_outside_its_ranges_is_of_another_format(fields: dict[str, object]):
    """However well it is signed; the sentence holds none of its values."""
    with pytest.raises(PlanError, match=r"^the plan is of another format: \d+ fields differ$"):
        open_signed(signed(body_of(changed(**fields), WEIGHTS.tobytes())), PUBLIC)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str):
    """As JSON of other languages may hold them."""
    text = PLAN.model_dump_json().replace('"clip":1.5', f'"clip":{number}').encode()
    assert number.encode() in text
    with pytest.raises(PlanError):
        open_signed(signed(body_of(text, WEIGHTS.tobytes())), PUBLIC)


@pytest.mark.parametrize(
    "weights", [WEIGHTS[:2], np.append(WEIGHTS, WEIGHTS), WEIGHTS[:0], WEIGHTS * np.float32(np.inf), WEIGHTS[None]]
)
def test_weights_are_as_many_as_the_plan_says_and_finite(weights: np.ndarray):
    """The signer refuses to sign others, and the device to take them."""
    with pytest.raises(PlanError, match="must have 3 finite weights"):
        sign(PLAN, KEY, weights)
    if weights.ndim == 1:
        with pytest.raises(PlanError, match="must have 3 finite weights"):
            open_signed(signed(body_of(changed(), weights.tobytes())), PUBLIC)


def test_half_a_weight_is_refused():
    """A number of bytes that is no number of weights."""
    with pytest.raises(PlanError, match="damaged"):
        open_signed(signed(MESSAGE[SIGNATURE:] + b"\0"), PUBLIC)


def test_a_halt_has_no_weights():
    """Neither may be signed, nor taken."""
    with pytest.raises(PlanError, match="must have 0 finite weights"):
        sign(HALT, KEY, WEIGHTS)
    with pytest.raises(PlanError, match="must have 0 finite weights"):
        open_signed(signed(body_of(json.loads(HALT.model_dump_json()), WEIGHTS.tobytes())), PUBLIC)


@pytest.mark.parametrize("fields", [{"versions": []}, {"versions": [0]}, {"reason": ""}, {"reason": "x" * 501}])
def test_a_halt_says_which_versions_and_why(fields: dict[str, object]):
    """At least one, and a sentence that a person can read."""
    with pytest.raises(PlanError, match="another format"):
        open_signed(signed(body_of(json.loads(HALT.model_dump_json()) | fields)), PUBLIC)


def test_no_message_is_larger_than_its_limits():
    """One byte more than a device looks at is refused before its signature is; so is JSON of more than its share."""
    with pytest.raises(PlanError, match=f"at most {MAX_BYTES} bytes, got {MAX_BYTES + 1}"):
        open_signed(bytes(MAX_BYTES + 1), PUBLIC)
    with pytest.raises(PlanError, match=f"at most {len(MESSAGE) - 1} bytes"):
        open_signed(MESSAGE, PUBLIC, most=len(MESSAGE) - 1)
    assert open_signed(MESSAGE, PUBLIC, most=len(MESSAGE))
    padded = PLAN.model_dump_json().encode() + b" " * MAX_JSON
    with pytest.raises(PlanError, match="damaged"):
        open_signed(signed(body_of(padded, WEIGHTS.tobytes())), PUBLIC)


def test_the_largest_plan_fits_a_message():
    """Its weights, its JSON, its length and its signature are together no more than a message may have."""
    assert 4 * MAX_PARAMETERS + MAX_JSON + 4 + SIGNATURE <= MAX_BYTES


def test_a_check_in_names_its_version_and_nothing_else():
    """The fields of a check-in are these: what another device with that version says too."""
    assert set(CheckIn.model_fields) == {"model", "version", "runtime"}
    with pytest.raises(ValidationError):
        CheckIn.model_validate({"model": "coupon", "version": 1, "runtime": 1, "device": 7})


WINDOW = Window(issuer="issuer.example:8092", scope="ab" * 16, number=7, key="30" * 342)


def test_a_plan_may_ask_for_a_token():
    """For a training and for a query. Without one its bytes do not name it: older devices read them."""
    with_token = PLAN.model_copy(update={"token": WINDOW})
    assert open_signed(sign(with_token, KEY, WEIGHTS), PUBLIC)[0] == with_token
    query = ASKED.model_copy(update={"token": WINDOW})
    assert open_signed(sign(query, KEY), PUBLIC)[0] == query
    assert b"token" not in MESSAGE


def test_a_query_may_be_about_a_week_s_journals():
    """Without a week its bytes do not name one: older devices read them; and who comes to report names no version."""
    query = Query(parts=(Histogram(column="left", edges=(0.5,)),), week="2026-W47")
    asked = ASKED.model_copy(update={"query": query})
    assert open_signed(sign(asked, KEY), PUBLIC)[0] == asked
    assert b"week" not in sign(ASKED.model_copy(update={"query": Query(parts=query.parts)}), KEY)
    assert CheckIn(model="coupon", runtime=4).model_dump_json(exclude_none=True) == '{"model":"coupon","runtime":4}'
