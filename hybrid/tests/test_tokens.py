import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid.blind_rsa import blind, blind_sign, check_blinded, finalize
from hybrid.errors import TokenError
from hybrid.tokens import (
    Pending,
    Token,
    TokenChallenge,
    TokenRequest,
    Window,
    decode_key,
    encode_key,
    new_key,
    token_key_id,
    window_context,
)

RFC = json.loads((Path(__file__).parent / "vectors" / "rfc9578.json").read_text())
VALUE = {name: bytes.fromhex(text) for name, text in RFC.items() if name != "source"}
SIGNER, OTHER = new_key(), new_key()
WINDOW = Window(issuer="issuer.example", scope="spring", number=3, key=encode_key(SIGNER.public_key()).hex())


def issued(window=WINDOW, signer=SIGNER):
    asked = window.ask()
    return asked, window.finish(asked, blind_sign(signer, asked.blinded))


def test_request_and_token_are_those_of_the_rfc():
    """RFC 9578, appendix A, issuance protocol 2: challenge, key id, request and token byte for byte.

    Its answer is the one signature of its request, since raising to the public exponent maps one to one.
    """
    key, challenge = decode_key(VALUE["pkS"]), TokenChallenge.read(VALUE["token_challenge"])
    assert (challenge.issuer, challenge.origin, len(challenge.context)) == ("issuer.example", "origin.example", 32)
    assert bytes(challenge) == VALUE["token_challenge"]
    assert encode_key(key) == VALUE["pkS"]
    expected = Token.read(VALUE["token"])
    assert (expected.nonce, expected.challenge) == (VALUE["nonce"], challenge.digest)
    assert expected.key_id == token_key_id(VALUE["pkS"])
    assert bytes(expected) == VALUE["token"]
    blinded = blind(key, expected.signed, salt=VALUE["salt"], r=int.from_bytes(VALUE["blind"]))
    request = TokenRequest(expected.key_id[-1], blinded.message)
    assert bytes(request) == VALUE["token_request"]
    assert TokenRequest.read(VALUE["token_request"]) == request
    request.check(key, expected.key_id)
    signed = int.from_bytes(VALUE["token_response"])
    assert pow(signed, 65537, key.public_numbers().n) == check_blinded(key, request.blinded)
    assert finalize(key, expected.signed, VALUE["token_response"], blinded.inverse) == expected.authenticator


def test_a_window_makes_the_same_of_them():
    """Its own challenge has the window in place of the RFC's random context, and no origin."""
    window = Window(issuer="issuer.example", scope="spring", number=3, key=VALUE["pkS"].hex())
    # type, length of the issuer's name, name, length of the context, context, length of the origin
    context = hashlib.sha256(b"hybrid token window 1\0" + b"\x06spring" + b"\0\0\0\x03").digest()
    assert bytes(window.challenge) == b"\0\x02" + b"\0\x0eissuer.example" + b"\x20" + context + b"\0\0"
    asked = window.ask(nonce=VALUE["nonce"], salt=VALUE["salt"], r=int.from_bytes(VALUE["blind"]))
    assert asked.signed == b"\0\x02" + VALUE["nonce"] + window.challenge.digest + token_key_id(VALUE["pkS"])
    assert Pending.read(bytes(asked)) == asked
    assert bytes(asked.request)[:3] == VALUE["token_request"][:3]


def test_a_token_is_what_its_window_says_and_no_other_takes_it():
    asked, token = issued()
    assert WINDOW.verify(token) == asked.signed[2:34]
    others = {"number": 4, "scope": "summer", "issuer": "else.example", "key": encode_key(OTHER.public_key()).hex()}
    for field, value in others.items():
        assert WINDOW.model_copy(update={field: value}).verify(token) is None, field


def test_an_answer_of_another_key_than_the_plans_makes_no_token():
    """An issuer that gave each device a key of its own, to tell it by, would only be refused."""
    modulus = OTHER.public_key().public_numbers().n  # which may be the smaller one, and then not all can be asked of it
    asked = next(asked for asked in iter(WINDOW.ask, None) if int.from_bytes(asked.blinded) < modulus)
    with pytest.raises(TokenError, match="no signature of the message under its key"):
        WINDOW.finish(asked, blind_sign(OTHER, asked.blinded))


@settings(max_examples=150, deadline=None)
@given(flip=st.integers(0, 8 * 354 - 1))
def test_no_token_holds_with_one_bit_changed(flip):
    token = issued()[1]
    assert WINDOW.verify((int.from_bytes(token) ^ 1 << flip).to_bytes(354)) is None


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=400))
def test_what_is_no_token_is_none(data):
    assert WINDOW.verify(data) is None


def test_any_token_may_have_come_of_any_request():
    """What issuer and aggregator hold together: every pair of a request and a token is explained by one blinding.

    The factors are drawn uniformly, so with all logs and the private key all pairings are as likely.
    """
    key, n = SIGNER.public_key(), SIGNER.public_key().public_numbers().n
    d = SIGNER.private_numbers().d
    pairs = [issued() for _ in range(5)]
    for (asked, _), (other, token) in product(pairs, pairs):
        seen, answered = int.from_bytes(asked.blinded), blind_sign(SIGNER, asked.blinded)
        authenticator = int.from_bytes(Token.read(token).authenticator)
        encoded = pow(authenticator, 65537, n)  # what was signed, salt and all
        r = pow(seen * pow(encoded, -1, n), d, n)
        assert 0 < r < n
        assert encoded * pow(r, 65537, n) % n == seen
        assert finalize(key, other.signed, answered, pow(r, -1, n)) == token[98:]


def test_requests_say_nothing_of_their_window_but_its_key():
    """Two requests of one window differ in the blinded message alone."""
    one, two = (bytes(WINDOW.ask().request) for _ in range(2))
    assert one[:3] == two[:3] == b"\0\x02" + WINDOW.key_id[-1:]
    assert one[3:] != two[3:]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "must be SubjectPublicKeyInfo"),
        (b"\x30\x03abc", "must be SubjectPublicKeyInfo"),
        (encode_key(rsa.generate_private_key(65537, 1024).public_key()), "2048 bits and exponent 65537"),
        (encode_key(rsa.generate_private_key(3, 2048).public_key()), "2048 bits and exponent 65537"),
        (
            ec.generate_private_key(ec.SECP256R1())
            .public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "must be of RSA",
        ),
        (
            SIGNER.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            "must name RSASSA-PSS",
        ),
    ],
    ids=["empty", "no key", "short", "exponent 3", "elliptic", "plain RSA"],
)
def test_a_key_of_another_kind_or_form_is_refused(data, match):
    with pytest.raises(TokenError, match=match):
        decode_key(data)
    window = WINDOW.model_copy(update={"key": data.hex()})
    with pytest.raises(TokenError, match=match):
        window.ask()


@pytest.mark.parametrize(
    "fields",
    [
        *({"scope": ""}, {"scope": "a/b"}, {"scope": "A"}, {"number": 0}, {"number": 1 << 31}),
        *({"issuer": ""}, {"issuer": "a b"}, {"key": "abc"}, {"key": "xy"}, {"key": ""}, {"key": "00" * 513}),
        {"more": 1},
    ],
)
def test_a_window_of_another_form_is_refused(fields):
    with pytest.raises(ValidationError):
        Window(**WINDOW.model_dump() | fields)


@settings(max_examples=100, deadline=None)
@given(
    a=st.tuples(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,10}\Z"), st.integers(1, 99)),
    b=st.tuples(st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,10}\Z"), st.integers(1, 99)),
)
def test_two_windows_have_one_context_only_if_they_are_one(a, b):
    assert (window_context(*a) == window_context(*b)) == (a == b)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(VALUE["token_challenge"]) - 1))
def test_a_challenge_that_is_cut_short_or_goes_on_is_refused(cut):
    for data in (VALUE["token_challenge"][:cut], VALUE["token_challenge"] + b"\0"):
        with pytest.raises(TokenError):
            TokenChallenge.read(data)


@pytest.mark.parametrize("data", [b"", bytes(259), VALUE["token_request"][:-1], VALUE["token_request"] + b"\0"])
def test_a_request_of_another_form_is_refused(data):
    with pytest.raises(TokenError, match="must have 259 bytes and be of type 2"):
        TokenRequest.read(data)


def test_a_request_for_another_key_or_with_no_unit_is_refused_before_anything_is_signed():
    key, request = SIGNER.public_key(), WINDOW.ask().request
    with pytest.raises(TokenError, match="must name the window's key"):
        TokenRequest(request.key ^ 1, request.blinded).check(key, WINDOW.key_id)
    with pytest.raises(TokenError, match="must be a unit"):
        TokenRequest(request.key, bytes(256)).check(key, WINDOW.key_id)
