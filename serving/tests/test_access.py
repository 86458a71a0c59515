import asyncio
import base64
import hashlib
import hmac
import http.server
import json
import ssl
import threading
import time
from fractions import Fraction

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ConfigError, Forbidden, RateLimited, Unauthenticated, Unavailable
from hybrid.protocol import is_loopback
from serving.access import (
    AGAIN_S,
    FRESH_S,
    KEPT_S,
    MAX_TOKEN,
    Access,
    ApiKey,
    ApiKeys,
    Buckets,
    Jwt,
    KeySet,
    Tokens,
    error_headers,
    key_source,
)
from serving.testing import Certificate

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
CURVE = ec.generate_private_key(ec.SECP256R1())
NOW_S = 1_700_000_000


def jwk(key, kid, **changes):
    kind = jwt.algorithms.RSAAlgorithm if hasattr(key.public_key(), "encrypt") else jwt.algorithms.ECAlgorithm
    return kind.to_jwk(key.public_key(), as_dict=True) | {"kid": kid} | changes


def jwks(*keys):
    return json.dumps({"keys": keys}).encode()


def claims(**changes):
    """A token's good claims; `changes` replaces one, or leaves it out where None."""
    # PyJWT reads the clock by itself, so the test's times are far off on either side.
    good = {"iss": "https://issuer", "aud": "hybrid", "sub": "shop-app", "exp": 2**33, "nbf": 1}
    return {name: value for name, value in (good | changes).items() if value is not None}


def token(key=RSA, algorithm="RS256", kid="a", **changes):
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": kid} if kid else {})


def unsigned(header, payload, signature=b""):
    parts = (json.dumps(header).encode(), json.dumps(payload).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def tokens(document=None, scope=None, algorithms=("RS256", "ES256")):
    document = jwks(jwk(RSA, "a"), jwk(CURVE, "c")) if document is None else document
    settings = Jwt("https://issuer", "hybrid", algorithms, scope)
    return Tokens(settings, KeySet(lambda: document, algorithms))


def client(credentials, text):
    return asyncio.run(credentials.client(text))


@pytest.mark.parametrize(
    "good",
    [token(), token(CURVE, "ES256", "c"), token(aud=["others", "hybrid"])],
    ids=["RSA", "curve", "two audiences"],
)
def test_a_token_that_holds_names_its_client(good):
    """The client is the subject."""
    assert client(tokens(), good) == "shop-app"


PUBLIC_PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def confused():
    """Signed with HMAC under the public key, which everyone has."""
    header, payload, _ = unsigned({"alg": "HS256", "kid": "a"}, claims()).split(".")
    signature = hmac.digest(PUBLIC_PEM, f"{header}.{payload}".encode(), hashlib.sha256)
    return f"{header}.{payload}." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


def with_header(changes):
    return jwt.encode(claims(), RSA, "RS256", headers={"kid": "a"} | changes)


BAD = {
    "no signature at all": unsigned({"alg": "none", "kid": "a"}, claims()),
    "None": unsigned({"alg": "None", "kid": "a"}, claims()),
    "no algorithm": unsigned({"kid": "a"}, claims()),
    "a signature of nothing": unsigned({"alg": "RS256", "kid": "a"}, claims()),
    "the public key as a shared secret": confused(),
    "another's key": token(OTHER),
    "a key of the set, but another one": token(CURVE, "ES256", "a"),
    "an algorithm that is not allowed": token(algorithm="RS512"),
    "an unknown key id": token(kid="b"),
    "no key id": token(kid=None),
    "its own key in its header": with_header({"jwk": jwk(OTHER, "a"), "kid": "b"}),
    "an unknown critical header": with_header({"crit": ["x"], "x": 1}),
    "expired": token(exp=NOW_S),
    "never expires": token(exp=None),
    "expires at infinity": token(exp=1e400),
    "not yet valid": token(nbf=2**33),
    "another audience": token(aud="others"),
    "no audience": token(aud=None),
    "another issuer": token(iss="https://issuer.example"),
    "no issuer": token(iss=None),
    "no subject": token(sub=None),
    "empty": "",
    "no token": "a.b.c",
    "not base64": "ÿÿÿÿ",
    "a deeply nested header": base64.urlsafe_b64encode(b"[" * 5_000).decode() + ".e30.e30",
    "a header that is a list": base64.urlsafe_b64encode(b"[]").decode() + ".e30.e30",
    "a key id that is a list": unsigned({"alg": "RS256", "kid": ["a"]}, claims()),
    "huge": token(more="x" * MAX_TOKEN),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_token_that_does_not_hold_is_refused(bad):
    """401, and the message holds nothing of the token."""
    with pytest.raises(Unauthenticated) as refused:
        client(tokens(), bad)
    assert len(bad) < 8 or bad[:8] not in str(refused.value)
    assert error_headers(refused.value)["WWW-Authenticate"] == 'Bearer realm="hybrid", error="invalid_token"'


def test_a_clock_may_differ_by_half_a_minute():
    """A token that expired 20 s ago holds, one that expired 40 s ago does not."""
    assert client(tokens(), token(exp=int(time.time()) - 20)) == "shop-app"
    with pytest.raises(Unauthenticated, match="expired"):
        client(tokens(), token(exp=int(time.time()) - 40))


def test_a_scope_that_is_asked_for_must_be_granted():
    """403 without it; `scope` is text, `scp` a list."""
    assert client(tokens(scope="infer"), token(scope="read infer")) == "shop-app"
    assert client(tokens(scope="infer"), token(scp=["infer"])) == "shop-app"
    for lacking in (token(), token(scope="inference"), token(scope=7), token(scope={"infer": 1})):
        with pytest.raises(Forbidden) as refused:
            client(tokens(scope="infer"), lacking)
        assert "insufficient_scope" in error_headers(refused.value)["WWW-Authenticate"]


def test_keys_that_are_not_public_signing_keys_are_left_out():
    """A shared secret, a private key, one to encrypt with, one of another kind: none verifies a token."""
    secret = {"kty": "oct", "k": base64.urlsafe_b64encode(b"s" * 32).decode(), "kid": "s", "alg": "RS256"}
    private = jwt.algorithms.RSAAlgorithm.to_jwk(RSA, as_dict=True) | {"kid": "p"}
    document = jwks(secret, private, jwk(RSA, "e", use="enc"), {"kty": "new", "kid": "n"}, {"kid": "x"}, 7, None)
    for kid in "spenx":
        with pytest.raises(Unauthenticated):
            client(tokens(document), token(kid=kid))
    with pytest.raises(Unauthenticated):
        client(tokens(document), jwt.encode(claims(), b"s" * 32, "HS256", headers={"kid": "s"}))


def test_a_short_key_verifies_nothing():
    """RSA below 2,048 bits can be broken."""
    short = rsa.generate_private_key(65537, 1024)
    with pytest.raises(Unauthenticated), pytest.warns(match="below the minimum"):
        client(tokens(jwks(jwk(short, "a"))), token(short))


@pytest.mark.parametrize("algorithms", [("HS256",), ("none",), ("RS256", "HS512"), ("",), ()])
def test_only_asymmetric_algorithms_can_be_allowed(algorithms):
    """With a shared secret, or none, whoever checks tokens could make them."""
    with pytest.raises(ConfigError, match="algorithms must"):
        Jwt("https://issuer", "hybrid", algorithms)


@pytest.mark.parametrize("place", ["http://issuer/keys", "file:///keys", "ftp://issuer/keys", "/nowhere/keys.json"])
def test_keys_come_from_a_file_or_over_https(place):
    """Whoever can change them on the way can be anyone."""
    with pytest.raises(ConfigError, match="JWK set"):
        key_source(place)


class Issuer:
    """A key set that changes, and can be gone; counts how often it is read."""

    def __init__(self, document):
        self.document, self.reads, self.now_s = document, 0, 0.0
        self.keys = KeySet(self.fetch, ("RS256",), lambda: self.now_s)

    def fetch(self):
        self.reads += 1
        if self.document is None:
            raise OSError
        return self.document

    async def has(self, kid):
        found = await self.keys.find(kid) is not None
        if self.keys._reading:  # one that nobody waits for
            await self.keys._reading
        return found


def test_a_new_key_is_taken_up_at_once_and_an_old_one_ends_within_five_minutes():
    """Rotation: "b" is asked for before the next reading is due; "a" goes when that is."""

    async def scenario():
        issuer = Issuer(jwks(jwk(RSA, "a")))
        assert await issuer.has("a")
        issuer.document = jwks(jwk(OTHER, "b"))
        issuer.now_s = AGAIN_S
        assert await issuer.has("b")
        assert not await issuer.has("a")
        issuer.document = jwks(jwk(RSA, "a"))
        issuer.now_s += FRESH_S
        assert await issuer.has("b")  # answered from memory while it reads
        assert not await issuer.has("b")

    asyncio.run(scenario())


def test_tokens_with_made_up_key_ids_do_not_flood_the_issuer():
    """A thousand unknown ids within ten seconds: one reading more than the first."""

    async def scenario():
        issuer = Issuer(jwks(jwk(RSA, "a")))
        await issuer.has("a")
        issuer.now_s = AGAIN_S
        assert not any(await asyncio.gather(*(issuer.has(f"x{n}") for n in range(1_000))))
        assert issuer.reads == 2

    asyncio.run(scenario())


def test_the_last_keys_hold_for_an_hour_without_the_issuer():
    """After that nobody can be known: 503, not 401. Garbage is as good as nothing."""

    async def scenario():
        issuer = Issuer(jwks(jwk(RSA, "a")))
        await issuer.has("a")
        for document in (None, b"garbage", b"[]", b'{"keys": 7}'):
            issuer.document, issuer.now_s = document, issuer.now_s + FRESH_S
            assert await issuer.has("a")
        issuer.now_s = KEPT_S
        with pytest.raises(Unavailable, match="keys of the tokens' issuer"):
            await issuer.has("a")

    asyncio.run(scenario())


def test_those_who_ask_while_keys_are_read_wait_for_the_same_reading():
    """Two callers, one fetch."""

    async def scenario():
        go, reads = threading.Event(), []

        def fetch():
            reads.append(go.wait(10))
            return jwks(jwk(RSA, "a"))

        keys = KeySet(fetch, ("RS256",))
        asked = [asyncio.create_task(keys.find("a")) for _ in range(2)]
        await asyncio.sleep(0)
        asked[0].cancel()  # a caller that goes away takes nothing from the other
        go.set()
        assert await asked[1] is not None
        assert reads == [True]

    asyncio.run(scenario())


def test_an_api_key_names_its_client(tmp_path):
    """Each of two keys of one client, and another's."""
    issued = [ApiKey.issue(name) for name in ("shop-app", "shop-app", "coupon-app")]
    file = tmp_path / "keys"
    file.write_text("# of the gateway\n\n" + "".join(f"{key}\n" for key, _ in issued))
    keys = ApiKeys(file)
    assert [client(keys, text) for _, text in issued] == ["shop-app", "shop-app", "coupon-app"]
    assert not any(text.split("_", 2)[2] in file.read_text() for _, text in issued)


def test_what_is_no_key_is_refused(tmp_path):
    """A changed secret, another key's id, a piece, the line of the file itself."""
    (one, text), (two, _) = ApiKey.issue("a"), ApiKey.issue("b")
    file = tmp_path / "keys"
    file.write_text(f"{one}\n{two}\n")
    secret = text.split("_", 2)[2]
    bad = [text + "x", text[:-1], f"hybrid_{two.id}_{secret}", f"hybrid_{'0' * 16}_{secret}",
           f"other_{one.id}_{secret}", secret, "", "_", "__", str(one), f"hybrid_{one.id}_"]  # fmt: skip
    for wrong in bad:
        with pytest.raises(Unauthenticated):
            client(ApiKeys(file), wrong)


def test_a_changed_file_of_keys_holds_at_once_and_a_broken_one_changes_nothing(tmp_path, caplog):
    """A line taken out is a key revoked. The log names neither the client nor the line."""
    (one, text), (two, later) = ApiKey.issue("shop-app"), ApiKey.issue("b")
    file = tmp_path / "keys"
    file.write_text(f"{one}\n")
    keys = ApiKeys(file)
    file.write_text(f"{two}\nshop-app:broken\n")
    assert client(keys, text) == "shop-app"
    file.write_text(f"{two}\n")
    assert client(keys, later) == "b"
    with pytest.raises(Unauthenticated):
        client(keys, text)
    file.unlink()
    assert client(keys, later) == "b"
    assert "stay as they were" in caplog.text
    assert "shop-app" not in caplog.text


@pytest.mark.parametrize(
    "line", ["a", "a:b:c:d", f"a:{'0' * 16}:{'0' * 32}:{'0' * 62}", f"a b:{'0' * 16}:{'0' * 32}:{'0' * 64}"]
)
def test_a_file_that_is_none_of_keys_is_refused_by_its_line(tmp_path, line):
    """At the start, where someone can mend it."""
    file = tmp_path / "keys"
    file.write_text(f"# keys\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 of the file of API keys"):
        ApiKeys(file)
    with pytest.raises(ConfigError, match="client must be"):
        ApiKey.issue("a:b")


@given(
    rate=st.integers(1, 50),
    burst=st.integers(1, 50),
    asked=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 50)), max_size=40),
)
def test_a_bucket_gives_what_it_has_and_says_when_it_has_more(rate, burst, asked):
    """Against exact arithmetic: level = min(burst, level + rate * passed); taken only where that is enough.

    Times are in sixteenths of a second, which floats hold exactly.
    """
    buckets, level, now = Buckets(rate, burst), Fraction(burst), Fraction(0)
    for passed, wanted in asked:
        tokens = min(wanted, burst)
        now += Fraction(passed, 16)
        level = min(Fraction(burst), level + rate * Fraction(passed, 16))
        wait_s = buckets.take("a", tokens, float(now))
        assert (wait_s == 0) == (tokens <= level)
        if wait_s:
            assert wait_s == pytest.approx(float((tokens - level) / rate))
        else:
            level -= tokens


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 8)), max_size=60))
def test_no_window_gives_more_than_a_burst_and_the_rate(asked):
    """At 3 a second and 8 at once: in any time t at most 8 + 3 t, whatever is asked when."""
    buckets, now_s, taken = Buckets(3, 8), 0.0, []
    for passed_s, tokens in asked:
        now_s += passed_s
        if not buckets.take("a", tokens, now_s):
            taken.append((now_s, tokens))
    for i, (start, _) in enumerate(taken):
        for j in range(i, len(taken)):
            given = sum(tokens for _, tokens in taken[i : j + 1])
            assert given <= 8 + 3 * (taken[j][0] - start) + 1e-6


def test_clients_do_not_share_a_bucket_and_many_of_them_do_not_fill_the_memory():
    """A hundred thousand clients leave the ten that asked last; an idle clock that goes back gives nothing."""
    buckets = Buckets(1, 1, clients=10)
    assert buckets.take("a", 1, 0) == 0
    assert buckets.take("b", 1, 0) == 0
    assert buckets.take("a", 1, 0) == 1
    assert buckets.take("a", 1, -50) == 1
    for number in range(100_000):
        buckets.take(str(number), 1, 0)
    assert len(buckets) == 10


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0.5)])
def test_a_rate_that_lets_nothing_or_everything_through_is_refused(rate, burst):
    """Nothing could ever be asked, or nothing would be limited."""
    with pytest.raises(ConfigError, match="rate must be"):
        Buckets(rate, burst)


def test_requests_and_rows_are_limited_each(tmp_path):
    """2 requests at once and 1 each 4 s: the third waits 4 s. 10 rows at once: after 8 of them 3 wait 1/5 s, so 1 s."""
    access = Access(requests=Buckets(0.25, 2), rows=Buckets(5, 10), now_s=lambda: 0.0)
    for _ in range(2):
        asyncio.run(access.admit([]))
    with pytest.raises(RateLimited) as refused:
        asyncio.run(access.admit([]))
    assert error_headers(refused.value) == {"Retry-After": "4"}
    access.take_rows("", 8)
    with pytest.raises(RateLimited, match="too many rows; try again in 1 s"):
        access.take_rows("", 3)
    access.take_rows("", 2)


@pytest.mark.parametrize(
    "shown",
    [["Bearer"], ["Bearer "], ["Basic YTpi"], ["KEY"], ["Bearer KEY", "Bearer KEY"], ["Bearer KEY", "Bearer x"],
     ["Bearer KEY x"], ["Bearer  KEY"], ["Bearer KEYé"]],
)  # fmt: skip
def test_the_header_is_there_once_and_holds_one_bearer(tmp_path, shown):
    """Of two, a proxy may have checked the other one."""
    key, text = ApiKey.issue("a")
    (tmp_path / "keys").write_text(f"{key}\n")
    access = Access(ApiKeys(tmp_path / "keys"))
    assert asyncio.run(access.admit([f"bearer {text}"])) == "a"
    with pytest.raises(Unauthenticated):
        asyncio.run(access.admit([each.replace("KEY", text) for each in shown]))


def test_without_a_header_the_challenge_names_no_error(tmp_path):
    """RFC 6750, section 3.1: a client that showed nothing is told only how to."""
    (tmp_path / "keys").write_text("")
    with pytest.raises(Unauthenticated) as refused:
        asyncio.run(Access(ApiKeys(tmp_path / "keys")).admit([]))
    assert error_headers(refused.value) == {"WWW-Authenticate": 'Bearer realm="hybrid"'}


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("gateway.example", False), ("", False)],
)  # fmt: skip
def test_loopback_is_known(host, here):
    """A name could be anywhere tomorrow."""
    assert is_loopback(host) == here


@pytest.fixture
def https(tmp_path, monkeypatch):
    """An issuer over https: its answers by path, and its address. Its certificate is trusted."""
    certificate = Certificate.write(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.chain))
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.chain, certificate.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield answers, f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_keys_are_read_over_https(https):
    """From an issuer whose certificate holds; a redirect, an error and more than a megabyte are no keys."""
    answers, url = https
    answers["/keys"] = (200, {}, jwks(jwk(RSA, "a")))
    answers["/moved"] = (302, {"Location": f"{url}/keys"}, b"")
    answers["/error"] = (500, {}, b"")
    answers["/large"] = (200, {}, b" " * (1 << 20) + jwks(jwk(RSA, "a")))
    settings = Jwt("https://issuer", "hybrid")
    good = Tokens(settings, KeySet(key_source(f"{url}/keys"), settings.algorithms))
    assert client(good, token()) == "shop-app"
    for path in ("/moved", "/error", "/large"):
        with pytest.raises(Unavailable):
            client(Tokens(settings, KeySet(key_source(url + path), settings.algorithms)), token())


def test_an_issuer_with_a_certificate_that_nobody_signed_is_not_believed(https, monkeypatch, tmp_path):
    """Its keys could be anyone's."""
    (tmp_path / "none.crt").write_bytes(Certificate.write(tmp_path, "other").chain.read_bytes())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.crt"))
    answers, url = https
    answers["/keys"] = (200, {}, jwks(jwk(RSA, "a")))
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        key_source(f"{url}/keys")()
