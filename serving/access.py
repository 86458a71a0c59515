"""Who may ask at the gateway, and how much: API keys or JWT as bearer, rates per client; the same over HTTP and gRPC.

No log line above DEBUG names a client, a key or a token.

Sources: RFC 6750 (bearer tokens), RFC 7519 (JWT), RFC 7517 (JWK sets), RFC 8725 (what to refuse of a JWT).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import URLError

import jwt
import orjson

from hybrid.errors import ConfigError, Forbidden, RateLimited, ServingError, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "ES256", "EdDSA")
ASYMMETRIC = frozenset({*ALGORITHMS, "RS384", "RS512", "PS256", "PS384", "PS512", "ES384", "ES512"})
LEEWAY_S = 30.0  # that two clocks may differ
MAX_TOKEN = 8 << 10  # characters
MAX_KEYS_BYTES = 1 << 20  # of a JWK set
FETCH_S = 5.0
FRESH_S, KEPT_S, AGAIN_S = 300.0, 3_600.0, 10.0  # of a JWK set: read again after, not used after, tried again after
MAX_CLIENTS = 10_000  # whose rates are kept; the one longest away is forgotten first
KEY_PREFIX = "hybrid"
_CLIENT = re.compile(r"[A-Za-z0-9._@-]{1,64}")


class Credentials(Protocol):
    """Knows clients by what they show."""

    async def client(self, token: str) -> str:
        """The client that shows `token`.

        Raises:
            Unauthenticated: the token does not hold.
            Forbidden: it does, and does not allow to ask here.
            Unavailable: that cannot be told now.
        """


@dataclass(frozen=True)
class ApiKey:
    """One line of the file of API keys: `client:id:salt:hash`.

    The secret has 256 random bits, so one round of SHA-256 is as hard to turn back as many.

    Attributes:
        client: whose it is; a client may have several, so that one can follow another.
        id: its public part, 16 hexadecimal digits.
        salt, hash: hexadecimal; HMAC-SHA-256 of the secret under the salt.
    """

    client: str
    id: str
    salt: str
    hash: str

    @classmethod
    def issue(cls, client: str) -> tuple[ApiKey, str]:
        """A new key, and its text, which is nowhere else.

        Raises:
            ConfigError: `client` is no name.
        """
        if not _CLIENT.fullmatch(client):
            raise ConfigError(f"client must be 1 to 64 letters, digits and any of . _ @ -, got {client!r}")
        identity, salt, secret = secrets.token_hex(8), secrets.token_hex(16), secrets.token_urlsafe(32)
        return cls(client, identity, salt, _digest(salt, secret)), f"{KEY_PREFIX}_{identity}_{secret}"

    @classmethod
    def parse(cls, line: str) -> ApiKey:
        """Raises ValueError where the line is not a key's."""
        client, identity, salt, digest = line.split(":")
        if not _CLIENT.fullmatch(client) or not re.fullmatch(r"[0-9a-f]{16}", identity):
            raise ValueError("not a client and an id")
        if len(bytes.fromhex(salt)) < 16 or len(bytes.fromhex(digest)) != 32:
            raise ValueError("not a salt and a hash")
        return cls(client, identity, salt, digest)

    def __str__(self) -> str:
        return f"{self.client}:{self.id}:{self.salt}:{self.hash}"


def _digest(salt: str, secret: str) -> str:
    return hmac.digest(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hex()


_NOBODY = ApiKey("", "0" * 16, "00" * 16, "00" * 32)


class ApiKeys:
    """The keys of a file, read again when it changes; a change that cannot be read leaves all as it was.

    Args:
        file: one `ApiKey` a line; empty lines and those that begin with # are not read.

    Raises:
        ConfigError: the file is not there, or not of that form.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._keys, self._stamp = self._read()

    async def client(self, token: str) -> str:
        """See `Credentials`."""
        self._refresh()
        prefix, _, rest = token.partition("_")
        identity, _, secret = rest.partition("_")
        key = self._keys.get(identity, _NOBODY)  # an unknown id takes as long as a wrong secret
        if not hmac.compare_digest(_digest(key.salt, secret), key.hash) or prefix != KEY_PREFIX:
            raise _invalid("the API key is not known")
        return key.client

    def _refresh(self) -> None:
        try:
            if self._now() != self._stamp:
                self._keys, self._stamp = self._read()
                log.info("%d API keys", len(self._keys))
        except (ConfigError, OSError) as error:
            log.error("API keys stay as they were: %s", type(error).__name__)

    def _now(self) -> tuple[int, int, int]:
        stat = self._file.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size

    def _read(self) -> tuple[dict[str, ApiKey], tuple[int, int, int]]:
        try:
            stamp, lines = self._now(), self._file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the file of API keys cannot be read: {type(error).__name__}") from None
        keys = {}
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                try:
                    key = ApiKey.parse(line.strip())
                except ValueError:
                    raise ConfigError(f"line {number} of the file of API keys must be client:id:salt:hash") from None
                keys[key.id] = key
        return keys, stamp


class KeySet:
    """An issuer's public keys by their id, as one event loop uses them.

    Read when first asked, every five minutes from then on, and when a token
    names a key that is not there (a new one, perhaps), but never more than
    once in ten seconds, whatever tokens name. If it cannot be read the last
    one holds for an hour.

    Args:
        fetch: gives the JWK set's JSON; blocks, so it runs in a thread. May raise OSError.
        algorithms: that its keys may be of; other keys are left out, symmetric ones always.
        now_s: a clock that never goes back.
    """

    def __init__(
        self, fetch: Callable[[], bytes], algorithms: Sequence[str], now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._fetch, self._algorithms, self._now_s = fetch, frozenset(algorithms) & ASYMMETRIC, now_s
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_s = self._tried_s = -math.inf
        self._reading: asyncio.Task[None] | None = None

    async def find(self, key_id: str) -> jwt.PyJWK | None:
        """The key of that id; None where the issuer has none.

        Raises:
            Unavailable: the set was not read for an hour, and cannot be.
        """
        age_s, key = self._now_s() - self._read_s, self._keys.get(key_id)
        reading = self._again() if key is None or age_s >= FRESH_S else None
        if reading is not None and (key is None or age_s >= KEPT_S):
            await asyncio.shield(reading)
        if self._now_s() - self._read_s >= KEPT_S:
            raise Unavailable("the keys of the tokens' issuer cannot be read")
        return self._keys.get(key_id)

    def _again(self) -> asyncio.Task[None] | None:
        """The reading under way, or a new one unless the last is too short ago."""
        if self._reading is None and self._now_s() - self._tried_s >= AGAIN_S:
            self._tried_s = self._now_s()
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        try:
            found = keys_of(await asyncio.to_thread(self._fetch), self._algorithms)
            self._keys, self._read_s = found, self._now_s()
        except (OSError, HTTPException, ValueError) as error:
            log.warning("the keys of the tokens' issuer were not read: %s", type(error).__name__)
        finally:
            self._reading = None


def keys_of(document: bytes, algorithms: frozenset[str]) -> dict[str, jwt.PyJWK]:
    """The keys of a JWK set that may verify a token of one of `algorithms`.

    Raises:
        ValueError: it is no JWK set.
    """
    parsed = orjson.loads(document)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("keys"), list):
        raise ValueError("not a JWK set")
    found = {}
    for each in parsed["keys"]:
        # A symmetric or a private key is no public one, however it came there.
        if not isinstance(each, dict) or each.get("kty") == "oct" or "d" in each or each.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(each)
        except (jwt.PyJWTError, TypeError, ValueError):
            continue  # of a kind that only others know
        if isinstance(key.key_id, str) and key.algorithm_name in algorithms:
            found[key.key_id] = key
    return found


def key_source(place: str) -> Callable[[], bytes]:
    """What reads a JWK set from a file, or from an https URL.

    Raises:
        ConfigError: it is a URL of another kind, or no file.
    """
    if "://" not in place:
        file = Path(place)
        if not file.is_file():
            raise ConfigError(f"the JWK set must be a file or an https URL, got {place!r}")
        return file.read_bytes
    if not place.startswith("https://"):
        raise ConfigError(f"the JWK set's URL must begin with https://, got {place!r}")
    opener = urllib.request.build_opener(_NoRedirect)

    def fetch() -> bytes:
        with opener.open(place, timeout=FETCH_S) as answer:
            document: bytes = answer.read(MAX_KEYS_BYTES + 1)
        if len(document) > MAX_KEYS_BYTES:
            raise URLError("the JWK set is too large")
        return document

    return fetch


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could lead to http, or to a host that nobody named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """No request follows."""


@dataclass(frozen=True)
class Jwt:
    """What a token must say.

    Attributes:
        issuer, audience: that it must name; the audience may be one of several there.
        algorithms: that it may be signed with; asymmetric ones only.
        scope: that must be among those granted (claim `scope`, or `scp`); None where none is asked for.

    Raises:
        ConfigError: one is empty, or an algorithm is symmetric or unknown.
    """

    issuer: str
    audience: str
    algorithms: tuple[str, ...] = ALGORITHMS
    scope: str | None = None

    def __post_init__(self) -> None:
        if not (self.issuer and self.audience and self.algorithms):
            raise ConfigError("a JWT's issuer, audience and algorithms must all be given")
        if unfit := [name for name in self.algorithms if name not in ASYMMETRIC]:
            raise ConfigError(f"a JWT's algorithms must be among {sorted(ASYMMETRIC)}, got {unfit}")


@dataclass(frozen=True)
class Tokens:
    """Clients by signed tokens: the client is the token's subject.

    A token must name its key (`kid`), and say `exp`, `iss`, `aud` and `sub`. It
    is verified with the algorithm of the key, not with the one that it names.
    """

    settings: Jwt
    keys: KeySet

    async def client(self, token: str) -> str:
        """See `Credentials`."""
        if len(token) > MAX_TOKEN:
            raise _invalid(f"the token must have at most {MAX_TOKEN} characters")
        try:
            named = jwt.get_unverified_header(token).get("kid")
            key = await self.keys.find(named) if isinstance(named, str) else None
            if key is None:
                raise _invalid("the token must name a key (kid) of its issuer")
            claims = jwt.decode(
                token,
                key,
                algorithms=list(self.settings.algorithms),
                issuer=self.settings.issuer,
                audience=self.settings.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True},
            )
        except jwt.ExpiredSignatureError:
            raise _invalid("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise _invalid("the token is not valid yet") from None
        # Beside its own errors PyJWT lets through what JSON and conversions raise, as for an `exp` of infinity.
        except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError):
            raise _invalid("the token does not hold") from None
        self._check_scope(claims)
        return str(claims["sub"])

    def _check_scope(self, claims: dict[str, Any]) -> None:
        wanted, granted = self.settings.scope, claims.get("scope", claims.get("scp"))
        granted = granted.split() if isinstance(granted, str) else granted
        if wanted is not None and (not isinstance(granted, list) or wanted not in granted):
            raise Forbidden(f"the token must grant the scope {wanted!r}")


class Buckets:
    """One token bucket per client: `rate` a second on the average, `burst` at once.

    Memory is bounded: past `clients` the one that asked longest ago is forgotten, and begins anew with a full bucket.

    Args:
        rate: tokens a second; finite, > 0.
        burst: tokens of a full bucket; >= 1.
        clients: whose buckets are kept.

    Raises:
        ConfigError: a setting is outside its range.
    """

    def __init__(self, rate: float, burst: float, clients: int = MAX_CLIENTS) -> None:
        if not 0 < rate < math.inf or not 1 <= burst < math.inf:
            raise ConfigError(f"a rate must be finite and > 0, its burst finite and >= 1, got {rate!r} and {burst!r}")
        self._rate, self._burst, self._clients = rate, burst, clients
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> tokens, at

    def __len__(self) -> int:
        return len(self._levels)

    def take(self, client: str, tokens: int, now_s: float) -> float:
        """Takes tokens, all or none; no more than a full bucket holds.

        Returns:
            0 where they were taken, else the seconds until they could be.
        """
        assert tokens <= self._burst
        level, at = self._levels.pop(client, (self._burst, now_s))
        level = min(self._burst, level + self._rate * max(0.0, now_s - at))
        taken = tokens <= level
        self._levels[client] = (level - tokens if taken else level, max(now_s, at))
        if len(self._levels) > self._clients:
            self._levels.popitem(last=False)
        return 0.0 if taken else (tokens - level) / self._rate


@dataclass(frozen=True)
class Access:
    """What both fronts ask before they answer; as it is by default, everyone may ask as much as they like.

    Attributes:
        credentials: how clients are known; None: nobody is asked, all are one client.
        requests, rows: what a client may ask for; None: as much as it likes.
        now_s: a clock that never goes back.
    """

    credentials: Credentials | None = None
    requests: Buckets | None = None
    rows: Buckets | None = None
    now_s: Callable[[], float] = field(default=time.monotonic)

    async def admit(self, authorization: Sequence[str]) -> str:
        """Lets one request in.

        Args:
            authorization: every value of the request's Authorization header, or metadata.

        Returns:
            Its client.

        Raises:
            Unauthenticated, Forbidden, Unavailable: see `Credentials`.
            RateLimited: the client asks too often.
        """
        client = "" if self.credentials is None else await self.credentials.client(_bearer(authorization))
        _take(self.requests, client, 1, "requests", self.now_s())
        return client

    def take_rows(self, client: str, rows: int) -> None:
        """Counts the rows of an admitted request; raises RateLimited where they are too many."""
        _take(self.rows, client, rows, "rows", self.now_s())


def error_headers(error: ServingError) -> dict[str, str]:
    """What an error says beside its text, in HTTP's headers or gRPC's trailing metadata."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="hybrid"' + (', error="invalid_token"' if error.shown else "")
    if isinstance(error, Forbidden):
        headers["WWW-Authenticate"] = 'Bearer realm="hybrid", error="insufficient_scope"'
    return headers


def _bearer(authorization: Sequence[str]) -> str:
    """The one bearer token of a request."""
    if not authorization:
        raise Unauthenticated("the request must have an Authorization header: Bearer, and an API key or a token")
    scheme, _, token = authorization[0].partition(" ")
    # Of two, another part on the way may have checked the other one.
    if len(authorization) != 1 or scheme.lower() != "bearer" or not token or not token.isascii() or " " in token:
        raise _invalid("the Authorization header must be there once: Bearer, a space, and an API key or a token")
    return token


def _invalid(message: str) -> Unauthenticated:
    return Unauthenticated(message, shown=True)


def _take(buckets: Buckets | None, client: str, tokens: int, what: str, now_s: float) -> None:
    wait_s = 0.0 if buckets is None else buckets.take(client, tokens, now_s)
    if wait_s:
        raise RateLimited(f"too many {what}; try again in {math.ceil(wait_s)} s", math.ceil(wait_s))
