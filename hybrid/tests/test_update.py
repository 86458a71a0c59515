import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hybrid.errors import UpdateError
from hybrid.privacy.mechanisms import clip_rows
from hybrid.update import BLOCK, decode, dequantise, encode, length, quantise

FINITE = st.floats(-100, 100, width=32)
UPDATES = st.integers(1, 700).flatmap(lambda size: arrays(np.float32, size, elements=FINITE))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_float32_travels_as_it_is():
    """8 bytes of header, then 4 a weight; read again, every bit is the same, whatever the weight."""
    update = np.array([0.0, -0.0, 1e-45, -3.4e38, 0.1], np.float32)
    data = encode(update, "float32", rng())
    assert data[:8] == b"f32 \x05\x00\x00\x00"
    assert decode(data, 5).tobytes() == update.tobytes()


def test_int8_is_a_scale_a_block_and_a_byte_a_weight():
    """Of a block whose largest is 127 the scale is 1, so whole numbers travel exactly; the next block has its own."""
    update = np.r_[np.arange(-127, 129) % 128, [0.0, -254.0, 2.0]].astype(np.float32)
    data = encode(update, "int8", rng())
    assert data[:8] == b"i8  " + struct.pack("<I", 259)
    assert struct.unpack("<2f", data[8:16]) == (1.0, 2.0)
    np.testing.assert_array_equal(np.frombuffer(data[-3:], np.int8), [0, -127, 1])
    np.testing.assert_array_equal(decode(data, 259), update)


@pytest.mark.parametrize(("upload", "most"), [("float32", 4.4), ("int8", 1.2)])
@pytest.mark.parametrize("parameters", [1000, 6257, 1_000_000])
def test_an_update_is_as_short_as_it_says(upload, most, parameters):
    """Header included: at most 4.4 bytes a weight, and 1.2 in 8 bits."""
    data = encode(rng(1).normal(size=parameters).astype(np.float32), upload, rng())
    assert len(data) == length(parameters, upload) <= most * parameters


def test_rounding_is_right_on_average():
    """Over 4,000 roundings the mean of each weight is within five standard errors of it: its error has one of at most
    half a scale, 1/127 here."""
    update = np.concatenate([rng(3).uniform(-1, 1, 99), [1.0]]).astype(np.float32)
    mean = dequantise(*quantise(np.repeat(update[None], 4000, axis=0), rng(4))).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(mean, update, atol=5 * 0.5 / 127 / np.sqrt(4000))


def test_rounding_is_drawn_from_the_generator_alone():
    """The same seed gives the same bytes, another other ones."""
    update = rng(1).normal(size=600).astype(np.float32)
    assert encode(update, "int8", rng(1)) == encode(update, "int8", rng(1)) != encode(update, "int8", rng(2))


@settings(max_examples=200, deadline=None)
@given(UPDATES, st.integers(0, 2**32 - 1))
def test_each_weight_arrives_within_a_scale_of_itself(update, seed):
    """A block's scale is a 127th of its largest weight; a block of zeros stays zeros."""
    arrived = decode(encode(update, "int8", rng(seed)), len(update))
    for begin in range(0, len(update), BLOCK):
        block = update[begin : begin + BLOCK].astype(np.float64)
        scale = np.abs(block).max() / 127
        assert np.abs(arrived[begin : begin + BLOCK] - block).max() <= scale * (1 + 1e-5) + 2e-45


@settings(max_examples=200, deadline=None)
@given(UPDATES, st.sampled_from(["float32", "int8"]), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_clipped_again_it_is_within_the_clip_and_near_what_was_sent(update, upload, clip, seed):
    """However it travelled: one person moves the sum by at most the clip, and by what it meant to but for rounding."""
    sent = clip_rows(update[None], clip)[0].astype(np.float32)
    arrived = clip_rows(decode(encode(sent, upload, rng(seed)), len(sent))[None], clip)[0]
    assert np.linalg.norm(arrived) <= clip * (1 + 1e-12)
    # Each weight is off by a scale at most; clipping moves it towards a ball in which what was sent lies (to 1e-6).
    assert np.linalg.norm(arrived - sent) <= np.sqrt(len(sent)) * np.abs(sent).max() / 127 * (1 + 1e-5) + 1e-6 * clip


@pytest.mark.parametrize("value", [3e38, 1e-45, -1e-38, 127.00001, 1.0])
def test_a_block_of_one_weight_arrives_as_that_weight(value):
    """The largest weight of a block is 127 scales, to float32's precision, however small or large."""
    update = np.array([value], np.float32)
    np.testing.assert_allclose(decode(encode(update, "int8", rng()), 1), update, rtol=2e-7, atol=2e-43)


GOOD = {upload: encode(np.linspace(-1, 1, 300, dtype=np.float32), upload, rng()) for upload in ("float32", "int8")}


@pytest.mark.parametrize("upload", GOOD)
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:8]])
def test_an_update_of_another_length_is_refused(upload, change):
    """A byte less or more, or a header alone: nothing of it is read, and no weight is in the message."""
    with pytest.raises(UpdateError, match=f"an update of 300 weights as {upload} must have"):
        decode(change(GOOD[upload]), 300)


@pytest.mark.parametrize("upload", GOOD)
def test_an_update_for_another_plan_is_refused(upload):
    """It is whole in itself, but for 300 weights in place of 299; or says another number than it has."""
    with pytest.raises(UpdateError, match="for 300 weights"):
        decode(GOOD[upload], 299)
    with pytest.raises(UpdateError, match="for 299 weights"):
        decode(GOOD[upload][:4] + struct.pack("<I", 299) + GOOD[upload][8:], 300)


@pytest.mark.parametrize("data", [b"", b"f32", b"\0" * 7])
def test_an_update_without_a_header_is_refused(data):
    """Fewer than 8 bytes say nothing."""
    with pytest.raises(UpdateError, match="at least 8 bytes"):
        decode(data, 300)


@pytest.mark.parametrize("name", [b"f64 ", b"\0\0\0\0", b"F32 ", b"i8\0\0"])
def test_an_unknown_encoding_is_refused(name):
    """Only the two names, to the byte; what was sent instead is not repeated."""
    with pytest.raises(UpdateError, match="must be encoded as float32 or int8, got another"):
        decode(name + GOOD["float32"][4:], 300)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    """As a weight or as a scale."""
    bad = struct.pack("<f", value)
    with pytest.raises(UpdateError, match="finite"):
        decode(GOOD["float32"][:-4] + bad, 300)
    with pytest.raises(UpdateError, match="finite"):
        decode(GOOD["int8"][:12] + bad + GOOD["int8"][16:], 300)


def test_a_scale_that_is_negative_or_overflows_is_refused():
    """Neither is one that a device writes: 1e38 x 127 is no float32."""
    for scale in (-1.0, 1e38):
        with pytest.raises(UpdateError, match="finite"):
            decode(GOOD["int8"][:12] + struct.pack("<f", scale) + GOOD["int8"][16:], 300)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(1, 40))
def test_any_bytes_are_an_update_or_refused(data, parameters):
    """Whatever comes: finite weights of the right number, or an UpdateError, and nothing else."""
    for name in (b"", b"f32 " + struct.pack("<I", parameters), b"i8  " + struct.pack("<I", parameters)):
        try:
            update = decode((name + data)[: length(parameters, "float32")], parameters)
        except UpdateError:
            continue
        assert update.shape == (parameters,)
        assert np.isfinite(update).all()
