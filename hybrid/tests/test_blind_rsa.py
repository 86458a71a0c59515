import json
from collections import Counter
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid import blind_rsa
from hybrid.blind_rsa import blind, blind_sign, encode, finalize, prepare, verify
from hybrid.errors import TokenError

VECTORS = json.loads((Path(__file__).parent / "vectors" / "rfc9474.json").read_text())
NAMES = [each["name"] for each in VECTORS["variants"]]


def number(text):
    return int(text, 16)


def rfc_key():
    p, q, d, n, e = (number(VECTORS["key"][name]) for name in "pqdne")
    public = rsa.RSAPublicNumbers(e, n)
    return rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key()


SIGNER = rfc_key()
KEY = SIGNER.public_key()
N = KEY.public_numbers().n
SMALL = rsa.generate_private_key(65537, 1024)


@pytest.mark.parametrize("vector", VECTORS["variants"], ids=NAMES)
def test_each_step_gives_the_bytes_of_the_rfc(vector):
    """All four variants of RFC 9474, appendix A: prepared, encoded, blinded, signed, and with the blinding off."""
    value = {name: bytes.fromhex(text) for name, text in vector.items() if isinstance(text, str) and name != "name"}
    salt_bytes, inverse = vector["salt_bytes"], number(vector["inv"])
    message = prepare(value["msg"], prefix=value["msg_prefix"]) if vector["randomized"] else value["msg"]
    assert message == value["input_msg"]
    if "encoded_msg" in value:
        assert encode(message, N.bit_length() - 1, value["salt"]) == value["encoded_msg"]
    blinded = blind(KEY, message, salt_bytes=salt_bytes, salt=value["salt"], r=pow(inverse, -1, N))
    assert (blinded.message, blinded.inverse) == (value["blinded_msg"], inverse)
    assert blind_sign(SIGNER, blinded.message) == value["blind_sig"]
    signature = finalize(KEY, message, value["blind_sig"], inverse, salt_bytes=salt_bytes)
    assert signature == value["sig"]
    assert verify(KEY, message, signature, salt_bytes=salt_bytes)
    assert not verify(KEY, message, signature, salt_bytes=48 - salt_bytes)


def test_a_prepared_message_begins_with_random_bytes():
    one, other = prepare(b"message"), prepare(b"message")
    assert len(one) == 32 + 7
    assert one != other
    assert one.endswith(b"message")


def test_each_request_for_one_message_is_another_and_each_signature_of_it_holds():
    requests = [blind(SMALL.public_key(), b"message") for _ in range(3)]
    assert len({request.message for request in requests}) == 3
    for request in requests:
        signature = finalize(SMALL.public_key(), b"message", blind_sign(SMALL, request.message), request.inverse)
        assert verify(SMALL.public_key(), b"message", signature)
        assert not verify(SMALL.public_key(), b"another", signature)


def test_blinding_factors_are_uniform_among_the_units():
    """Of 15 they are 1, 2, 4, 7, 8, 11, 13, 14: of 16,000 draws 2,000 each, within six deviations, 6 x 42."""
    drawn = Counter(blind_rsa._unit(15) for _ in range(16_000))
    assert sorted(drawn) == [1, 2, 4, 7, 8, 11, 13, 14]
    assert all(abs(count - 2000) < 252 for count in drawn.values())


@pytest.mark.parametrize(
    "blinded",
    [b"", b"\x01", bytes(256), bytes(513), N.to_bytes(512), (N + 1).to_bytes(512), b"\xff" * 512],
    ids=["empty", "short", "of a smaller key", "long", "the modulus", "above it", "largest"],
)
def test_a_message_out_of_range_is_not_signed(blinded):
    with pytest.raises(TokenError, match="must be a unit of the modulus in 512 bytes"):
        blind_sign(SIGNER, blinded)


def test_a_message_that_shares_a_factor_with_the_modulus_is_not_signed():
    """0, and a multiple of p, which only who has factored the modulus can send."""
    for value in (0, 2 * number(VECTORS["key"]["p"])):
        with pytest.raises(TokenError, match="must be a unit of the modulus"):
            blind_sign(SIGNER, value.to_bytes(512))


def test_a_blinding_factor_that_is_no_unit_is_refused():
    with pytest.raises(TokenError, match="must be a unit"):
        blind(KEY, b"message", r=number(VECTORS["key"]["q"]))


def test_a_message_that_shares_a_factor_with_the_modulus_is_not_blinded(monkeypatch):
    monkeypatch.setattr(blind_rsa, "encode", lambda *_: bytes.fromhex(VECTORS["key"]["p"]))
    with pytest.raises(TokenError, match="shares a factor"):
        blind(KEY, b"message")


def test_a_key_that_is_too_short_for_hash_and_salt_is_refused():
    """SHA-384 and its salt need 48 + 48 + 2 = 98 bytes."""
    assert len(encode(b"message", 8 * 98, bytes(48))) == 98
    with pytest.raises(TokenError, match="needs 98 bytes when encoded, the key has 97"):
        encode(b"message", 8 * 97, bytes(48))


@pytest.mark.parametrize("half", [0, 1])
def test_a_fault_in_one_half_of_signing_lets_nothing_out(monkeypatch, half):
    """Boneh, DeMillo and Lipton: a signature that is right modulo one prime alone would give the key away."""
    request, calls = blind(SMALL.public_key(), b"message"), []
    primes = SMALL.private_numbers().p, SMALL.private_numbers().q

    def faulty(base, exponent, modulus):
        calls.append(modulus)
        return (pow(base, exponent, modulus) + (modulus == primes[half])) % modulus

    monkeypatch.setattr(blind_rsa, "pow", faulty, raising=False)
    with pytest.raises(TokenError, match="computed wrongly"):
        blind_sign(SMALL, request.message)
    assert primes[half] in calls


def test_signing_raises_neither_the_message_nor_by_the_exponent_itself(monkeypatch):
    """What is raised to secret powers is another number each time, and so is the power."""
    request, seen = blind(SMALL.public_key(), b"message"), []
    private = SMALL.private_numbers()

    def watched(base, exponent, modulus):
        if modulus in (private.p, private.q):
            seen.append((base, exponent))
        return pow(base, exponent, modulus)

    monkeypatch.setattr(blind_rsa, "pow", watched, raising=False)
    assert blind_sign(SMALL, request.message) == blind_sign(SMALL, request.message)
    assert len({base for base, _ in seen}) == len({exponent for _, exponent in seen}) == 4
    assert private.dmp1 not in {exponent for _, exponent in seen}


def test_an_answer_of_another_length_or_of_another_key_is_refused():
    request = blind(SMALL.public_key(), b"message")
    with pytest.raises(TokenError, match="must have 128 bytes, got 127"):
        finalize(SMALL.public_key(), b"message", bytes(127), request.inverse)
    with pytest.raises(TokenError, match="no signature of the message under its key"):
        finalize(SMALL.public_key(), b"message", bytes(127) + b"\x01", request.inverse)


@settings(max_examples=60, deadline=None)
@given(flip=st.integers(0, 8 * 128 - 1), which=st.sampled_from(["answer", "signature"]))
def test_one_bit_that_is_changed_makes_an_answer_or_a_signature_worthless(flip, which):
    def changed(data):
        return (int.from_bytes(data) ^ 1 << flip).to_bytes(128)

    request = blind(SMALL.public_key(), b"message")
    answer = blind_sign(SMALL, request.message)
    if which == "answer":
        with pytest.raises(TokenError):
            finalize(SMALL.public_key(), b"message", changed(answer), request.inverse)
    else:
        signature = finalize(SMALL.public_key(), b"message", answer, request.inverse)
        assert not verify(SMALL.public_key(), b"message", changed(signature))
