import asyncio
from dataclasses import dataclass, field

import pytest

from device_runtime.caller import Reply
from device_runtime.credentials import Credentials, NoToken
from device_runtime.tests.test_aggregator import Peer, answer
from hybrid.blind_rsa import blind_sign
from hybrid.errors import ConfigError
from hybrid.tokens import TokenRequest, Window, encode_key, new_key

NOW, END = 1_700_000_000_000, 1_700_000_600_000
# What is blinded for the smaller modulus can be signed under the larger one too.
SIGNER, OTHER = sorted((new_key(), new_key()), key=lambda key: key.public_key().public_numbers().n)
API_KEY = "hybrid_0011223344556677_secret"


def window(number=3, *, scope="spring", signer=SIGNER):
    key = encode_key(signer.public_key()).hex()
    return Window(issuer="issuer.example", scope=scope, number=number, key=key)


@dataclass
class Store:
    """What a device keeps of tokens, in memory: it outlives a process, as a file does."""

    rows: dict = field(default_factory=dict)
    written: int = 0

    def held(self, scope, *, device=0):
        return self.rows.get((scope, device))

    def hold(self, held, now_ms, *, device=0):
        self.written += 1
        self.rows[held.scope, device] = held


@dataclass
class Issuer:
    """Gives an account one token a window, and remembers what it was sent.

    Attributes:
        store: the device's; what it held when a request came is in `before`.
        replies: in place of its own, the first of them for the first request.
    """

    store: Store
    replies: list = field(default_factory=list)
    signer: object = SIGNER
    taken: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    before: list = field(default_factory=list)

    async def ask(self, method, path, content, headers, *, most):
        self.asked.append((method, path, content, dict(headers), most))
        self.before.append(dict(self.store.rows))
        if self.taken.setdefault(path, content) != content:
            return Reply(409)
        if self.replies:
            return self.replies.pop(0)
        return Reply(200, blind_sign(self.signer, TokenRequest.read(content).blinded))


def built(**fields):
    store = Store()
    credentials, issuer = Credentials("https://issuer.example", API_KEY), Issuer(store, **fields)
    credentials._caller = issuer
    return credentials, store, issuer


def token(credentials, store, of, **options):
    return asyncio.run(credentials.token(of, store, END, lambda: NOW, **options))


def test_a_token_is_asked_for_once_and_kept():
    """The request is in the store before it goes out; it says nothing of the device."""
    credentials, store, issuer = built()
    first = token(credentials, store, window())
    assert window().verify(first)
    assert token(credentials, store, window()) == first
    ((method, path, content, headers, most),) = issuer.asked
    assert (method, path, len(content), most) == ("POST", "/v1/tokens/spring/3", 259, 256)
    assert headers == {"Content-Type": "application/private-token-request", "Authorization": f"Bearer {API_KEY}"}
    assert bytes(issuer.before[0]["spring", 0].asked.request) == content
    assert (store.rows["spring", 0].token, store.rows["spring", 0].expires_ms) == (first, END)


@pytest.mark.parametrize("lost", [Reply(0, error="it broke"), Reply(503, retry_after_s=7.0)])
def test_a_device_that_lost_the_answer_asks_again_with_the_same_request(lost):
    """Another one would be refused: the account took its token."""
    credentials, store, issuer = built(replies=[lost])
    with pytest.raises(NoToken) as none:
        token(credentials, store, window())
    assert (none.value.taken, none.value.retry_after_s) == (False, lost.retry_after_s)
    assert window().verify(token(credentials, store, window()))
    assert issuer.asked[0] == issuer.asked[1]


def test_a_wiped_device_waits_and_so_does_another_of_the_account():
    """Its new request is not the one that was answered; the next window is open to it."""
    credentials, store, issuer = built()
    token(credentials, store, window())
    store.rows.clear()
    with pytest.raises(NoToken) as none:
        token(credentials, store, window())
    assert none.value.taken
    with pytest.raises(NoToken):
        token(credentials, store, window(), device=1)
    assert window(4).verify(token(credentials, store, window(4)))
    assert len(issuer.taken) == 2


def test_an_answer_that_the_plans_key_did_not_sign_makes_no_token():
    """An issuer with a key for each device would be found out so; nothing is kept of its answer."""
    for signer in (OTHER, None):
        credentials, store, _ = built(signer=signer or SIGNER, replies=[] if signer else [Reply(200, bytes(255))])
        with pytest.raises(NoToken, match="makes no token"):
            token(credentials, store, window())
        assert store.rows["spring", 0].token is None


def test_another_key_for_a_window_is_another_request():
    """The account's one request went out; of a second one the issuer decides, and no token is mixed up."""
    credentials, store, issuer = built()
    token(credentials, store, window())
    with pytest.raises(NoToken):
        token(credentials, store, window(signer=OTHER))
    assert issuer.asked[0][2] != issuer.asked[1][2]


def test_tokens_of_several_scopes_and_devices_stay_apart():
    credentials, store, issuer = built()
    found = [token(credentials, store, window(scope=scope)) for scope in ("spring", "summer")]
    assert len(set(found)) == 2
    assert token(credentials, store, window()) == found[0]
    issuer.taken.clear()  # another account's
    assert token(credentials, store, window(), device=1) not in found
    assert len(store.rows) == 3


def test_what_is_kept_lasts_as_long_as_the_last_plan_of_its_window():
    """A step that a crash left open has another plan, which ends later; the request is the same."""
    credentials, store, issuer = built(replies=[Reply(503)])
    with pytest.raises(NoToken):
        token(credentials, store, window())
    later = asyncio.run(credentials.token(window(), store, END + 5, lambda: NOW))
    assert window().verify(later)
    assert issuer.before[1]["spring", 0].expires_ms == store.rows["spring", 0].expires_ms == END + 5
    assert issuer.asked[0] == issuer.asked[1]
    asyncio.run(credentials.token(window(), store, END + 9, lambda: NOW))
    assert (store.rows["spring", 0].token, store.rows["spring", 0].expires_ms) == (later, END + 9)


def test_a_window_without_a_key_is_refused_before_anybody_is_asked():
    credentials, store, issuer = built()
    with pytest.raises(NoToken, match="the plan's window is none"):
        token(credentials, store, window().model_copy(update={"key": "00"}))
    assert (issuer.asked, store.rows) == ([], {})


@pytest.mark.parametrize(
    ("url", "key", "match"),
    [
        ("http://issuer.example", API_KEY, "https"),
        ("https://u:p@issuer.example", API_KEY, "without user name"),
        ("https://issuer.example", "a key with spaces", "API key must be one line"),
    ],
)
def test_an_account_is_shown_to_no_issuer_that_others_could_read(url, key, match):
    with pytest.raises(ConfigError, match=match):
        Credentials(url, key)


def test_the_issuer_has_a_name():
    """That of its host, as plans say it, unless the app gives one."""
    assert Credentials("https://Issuer.Example/", API_KEY).issuer == "issuer.example"
    assert Credentials("http://127.0.0.1:8092", API_KEY).issuer == "127.0.0.1:8092"
    assert Credentials("https://10.0.0.1", API_KEY, issuer="issuer.example").issuer == "issuer.example"


def test_a_request_is_these_bytes_and_no_others():
    """The account's key is the one thing in it that is one account's."""
    with Peer([answer(bytes(256))]) as peer:
        store, host = Store(), peer.url.removeprefix("http://")
        with pytest.raises(NoToken):
            token(Credentials(peer.url, API_KEY), store, window())
    lines = ["POST /v1/tokens/spring/3 HTTP/1.1", f"Host: {host}", "User-Agent: hybrid-device"]
    lines += ["Accept: application/octet-stream", "Accept-Encoding: identity", "Connection: close"]
    lines += ["Content-Type: application/private-token-request", f"Authorization: Bearer {API_KEY}"]
    head = "\r\n".join([*lines, "Content-Length: 259", "", ""]).encode()
    assert peer.requests == [head + bytes(store.rows["spring", 0].asked.request)]
