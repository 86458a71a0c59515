"""The issuer of tokens: it knows accounts, gives each one token a window, and never sees what a token is used for.

Its two sides listen on two ports; `hybrid.tokens` has the bytes. To devices:

| request | answer |
|---|---|
| `POST TOKENS`, an account's key as bearer, a `TokenRequest` | 200, a blind signature; again for the same request |
| `GET TOKENS` | 200, the window's public key |
| `GET /health` | 200 |

and, for who signs plans, with the control side's token as bearer:

| `POST WINDOWS`, an `Opening` | 200, an `Opened`: the window, and its public key |
| `DELETE WINDOWS` | 204: nothing of this scope is issued any more, and what accounts took of it is forgotten |

An error is JSON with `error`, a stable word, and `message`; 409 `token_taken` says from which number on the account may
have one. That an account took a token is on the disk before the signature leaves: whatever ends the process, it never
gives a second one, and the same request is answered again. What is kept of a request is a digest, so that it can be
told from another one. Nothing here is logged of accounts or requests.

`python -m serving.issuer` is its process, until SIGTERM. It should run where the aggregator does not, by others.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from hybrid import http
from hybrid.bearer import check_token, read_token, shown
from hybrid.blind_rsa import blind_sign
from hybrid.errors import ConfigError, HybridError, ServingError, TokenError, Unauthenticated
from hybrid.files import take_from_group
from hybrid.http import Certificate, TimedHttp, read_body
from hybrid.protocol import is_loopback
from hybrid.tokens import (
    REQUEST_BYTES,
    RESPONSE_TYPE,
    TOKENS,
    WINDOWS,
    Number,
    Opened,
    Opening,
    ScopeName,
    TokenRequest,
    encode_key,
    new_key,
    token_key_id,
)
from serving.access import Access, ApiKeys, Buckets, error_headers

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger("serving.issuer")

KEPT_WINDOWS = 8  # of a scope whose tokens are given; older private keys are deleted
KEPT_S = 30 * 86_400.0  # after which a window's private key is deleted at the latest
MAX_SCOPES = 1000  # that are open
MAX_OPENING = 1024  # bytes of its body
CONNECTIONS = 512  # at once
FILE = "issuer.db"
_TABLES = """
CREATE TABLE IF NOT EXISTS scopes (
    name TEXT PRIMARY KEY, separation INTEGER NOT NULL, last INTEGER NOT NULL, closed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS windows (
    scope TEXT NOT NULL, number INTEGER NOT NULL, key BLOB NOT NULL, opened_ms INTEGER NOT NULL,
    PRIMARY KEY (scope, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken (
    scope TEXT NOT NULL, account TEXT NOT NULL, number INTEGER NOT NULL, request BLOB NOT NULL,
    PRIMARY KEY (scope, account)
) STRICT, WITHOUT ROWID
"""  # of an account its last window in each scope, and a digest of its request
_SCOPE: TypeAdapter[str] = TypeAdapter(ScopeName)
_NUMBER: TypeAdapter[int] = TypeAdapter(Number)


class UnknownWindow(ServingError):
    """No such window is open: it never was, or it is over."""

    status = 404
    code = "unknown_window"


class BadTokenRequest(ServingError):
    """It is no token request for the window's key. Nothing was taken."""

    status = 422
    code = "bad_token_request"


class TokenTaken(ServingError):
    """The account took its token already, of this window or of one nearer than the separation."""

    status = 409
    code = "token_taken"

    def __init__(self, earliest: int) -> None:
        super().__init__(f"the account may have its next token of window {earliest}")
        self.earliest = earliest


class OtherWindow(ServingError):
    """The window cannot be opened as it is asked for."""

    status = 409
    code = "other_window"


class TooManyScopes(ServingError):
    """Scopes that are over must be closed first."""

    status = 503
    code = "too_many_scopes"


@dataclass(frozen=True)
class _Key:
    """A window's, of which the private half is used here alone."""

    private: RSAPrivateKey
    public: bytes

    @property
    def key_id(self) -> bytes:
        return token_key_id(self.public)


class Issuer(AbstractContextManager["Issuer"]):
    """Windows, their keys, and who took a token: in one file, for its owner alone. Several threads may use it.

    An account may have a token of a window if the last that it took of the scope is at least a separation before it.

    Args:
        folder: its own; made where it is not there.
        now_ms: Unix time.

    Raises:
        ConfigError: others can read the file, or it is none of an issuer.
    """

    def __init__(self, folder: Path, *, now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file, self._now_ms, self._alone = folder / FILE, now_ms, threading.Lock()
        try:
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
            take_from_group(self._file)
            if self._file.stat().st_mode & 0o077:
                raise ConfigError(f"{self._file.name} must be readable by its owner only (chmod 600)")
            self._db = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
            # EXTRA: a transaction is on the disk when it is over, also where its journal's name is deleted.
            for statement in ("PRAGMA synchronous = EXTRA", "PRAGMA secure_delete = ON", *_TABLES.split(";\n")):
                self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"the issuer's file {str(self._file)!r} cannot be used: {type(error).__name__}") from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()

    def open(self, scope: str, opening: Opening) -> Opened:
        """Opens a window, with a new key; the oldest that are beyond `KEPT_WINDOWS` lose theirs.

        Args:
            scope: begun with the first window.
            opening: which.

        Raises:
            OtherWindow: the scope was closed, or has another separation, or the window was before and is over.
            TooManyScopes: the scope would be one too many.
        """
        fresh = _private_bytes(new_key())
        with self._transaction():
            last = self._last(scope, opening.separation)
            number = last + 1 if opening.number is None else opening.number
            found = self._key(scope, number)
            if found is None:
                if number <= last:
                    raise OtherWindow(f"a new window must be after the last, {last}, got {number}")
                now_ms = self._now_ms()
                self._db.execute("INSERT INTO windows VALUES (?, ?, ?, ?)", (scope, number, fresh, now_ms))
                self._db.execute("UPDATE scopes SET last = ? WHERE name = ?", (number, scope))
                self._delete_old(scope, now_ms)
                found = _loaded(fresh)
        return Opened(number=number, key=found.public.hex())

    def close(self, scope: str) -> None:
        """No window of a scope is opened, and no token of it given any more; an unknown one is none from now on."""
        with self._transaction():
            for table in ("windows", "taken"):
                self._db.execute(f"DELETE FROM {table} WHERE scope = ?", (scope,))  # noqa: S608
            self._db.execute("INSERT OR REPLACE INTO scopes VALUES (?, 1, 0, 1)", (scope,))
        _loaded.cache_clear()

    def public_key(self, scope: str, number: int) -> bytes:
        """A window's, as in its plan.

        Raises:
            UnknownWindow: it is not open.
        """
        with self._alone:
            return self._open_key(scope, number).public

    def issue(self, account: str, scope: str, number: int, body: bytes) -> bytes:
        """A blind signature.

        Args:
            account: that asks.
            scope: of the window.
            number: of the window.
            body: a `TokenRequest`, in any form.

        Raises:
            UnknownWindow: it is not open.
            BadTokenRequest: the body is none for it; nothing was taken.
            TokenTaken: the account has to wait.
        """
        with self._transaction():
            key = self._open_key(scope, number)
            try:
                request = TokenRequest.read(body)
                request.check(key.private.public_key(), key.key_id)
            except TokenError as error:
                raise BadTokenRequest(str(error)) from None
            self._take(account, scope, number, hashlib.sha256(request.blinded).digest())
        return blind_sign(key.private, request.blinded)  # only now, when it cannot be taken again

    def _take(self, account: str, scope: str, number: int, request: bytes) -> None:
        ((separation,),) = self._db.execute("SELECT separation FROM scopes WHERE name = ?", (scope,))
        sql = "SELECT number, request FROM taken WHERE scope = ? AND account = ?"
        for before, digest in self._db.execute(sql, (scope, account)):
            if before == number and hmac.compare_digest(digest, request):
                return
            if before > number - separation:
                raise TokenTaken(before + separation)
        self._db.execute("INSERT OR REPLACE INTO taken VALUES (?, ?, ?, ?)", (scope, account, number, request))

    def _last(self, scope: str, separation: int) -> int:
        """Number of the last window of a scope, which is begun where it is new."""
        found = self._db.execute("SELECT separation, last, closed FROM scopes WHERE name = ?", (scope,)).fetchone()
        if found is None:
            ((scopes,),) = self._db.execute("SELECT count(*) FROM scopes WHERE NOT closed")
            if scopes >= MAX_SCOPES:
                raise TooManyScopes(f"at most {MAX_SCOPES} scopes may be open: close those that are over")
            self._db.execute("INSERT INTO scopes VALUES (?, ?, 0, 0)", (scope, separation))
            return 0
        if found[2]:
            raise OtherWindow("the scope was closed, and what accounts took of it is forgotten: take another name")
        if found[0] != separation:
            raise OtherWindow(f"the scope's separation must stay {found[0]}, got {separation}")
        last: int = found[1]
        return last

    def _delete_old(self, scope: str, now_ms: int) -> None:
        newest = "SELECT number FROM windows WHERE scope = ? ORDER BY number DESC LIMIT ?"
        sql = f"DELETE FROM windows WHERE (scope = ? AND number NOT IN ({newest})) OR opened_ms < ?"  # noqa: S608
        self._db.execute(sql, (scope, scope, KEPT_WINDOWS, now_ms - int(KEPT_S * 1e3)))
        _loaded.cache_clear()

    def _open_key(self, scope: str, number: int) -> _Key:
        found = self._key(scope, number)
        if found is None:
            raise UnknownWindow("no such window is open")
        return found

    def _key(self, scope: str, number: int) -> _Key | None:
        sql = "SELECT key FROM windows WHERE scope = ? AND number = ?"
        found = self._db.execute(sql, (scope, number)).fetchone()
        return None if found is None else _loaded(found[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of the block, on the disk once it ends; or none of it."""
        with self._alone:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite ends some by itself, as where the disk is full
                    self._db.execute("ROLLBACK")
                raise


def _private_bytes(key: RSAPrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@lru_cache(maxsize=64)
def _loaded(data: bytes) -> _Key:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    key = load_der_private_key(data, None)
    assert isinstance(key, RSAPrivateKey)
    return _Key(key, encode_key(key.public_key()))


def application(issuer: Issuer, access: Access) -> Starlette:
    """The ASGI application that devices ask.

    Args:
        issuer: whose tokens.
        access: how accounts are known: a client of it is one account.

    Raises:
        ConfigError: it knows nobody.
    """
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    if access.credentials is None:
        raise ConfigError("access must know accounts: each gets one token a window")

    async def post(request: Request) -> Response:
        account = await access.admit(request.headers.getlist("authorization"))
        scope, number = _window(request)
        body = await read_body(request, REQUEST_BYTES)
        answer = await asyncio.to_thread(issuer.issue, account, scope, number, body)
        return Response(answer, media_type=RESPONSE_TYPE)

    async def get(request: Request) -> Response:
        key = await asyncio.to_thread(issuer.public_key, *_window(request))
        return Response(key, media_type="application/octet-stream")

    return Starlette(
        routes=[
            Route("/health", _health),
            Route(TOKENS, _answered(post), methods=["POST"]),
            Route(TOKENS, _answered(get), methods=["GET"]),
        ]
    )


def control_application(issuer: Issuer, token: str) -> Starlette:
    """The ASGI application for who signs plans.

    Args:
        issuer: whose windows.
        token: that each request must show as bearer.

    Raises:
        ConfigError: the token is none.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    check_token(token)

    def admit(request: Request) -> None:
        if not shown(request.headers.getlist("authorization"), token):
            raise Unauthenticated("show the control side's token as a bearer token")

    async def post(request: Request) -> Response:
        admit(request)
        scope, body = _scope(request), await read_body(request, MAX_OPENING)
        try:
            opening = Opening.model_validate_json(body)
        except ValidationError:
            raise BadTokenRequest("the body must be a separation, and a number or null, as JSON") from None
        opened = await asyncio.to_thread(issuer.open, scope, opening)
        log.info("window %d of scope %s is open", opened.number, scope)
        return JSONResponse(opened.model_dump())

    async def delete(request: Request) -> Response:
        admit(request)
        await asyncio.to_thread(issuer.close, _scope(request))
        return Response(status_code=204)

    return Starlette(
        routes=[
            Route("/health", _health),
            Route(WINDOWS, _answered(post), methods=["POST"]),
            Route(WINDOWS, _answered(delete), methods=["DELETE"]),
        ]
    )


Handler = Callable[["Request"], Awaitable["Response"]]


async def _health(_request: Request) -> Response:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse("ready\n")


def _answered(handler: Handler) -> Handler:
    """Turns errors into answers. Of one that nobody foresaw the class is logged, and no text: it may name somebody."""
    from starlette.responses import Response

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except ServingError as error:
            refused = error
        except Exception as error:
            log.error("internal error: %s", type(error).__name__)
            refused = ServingError("internal error")
        told: dict[str, Any] = {"error": refused.code, "message": str(refused)}
        if isinstance(refused, TokenTaken):
            told["earliest"] = refused.earliest
        headers = error_headers(refused)
        return Response(json.dumps(told), refused.status, headers, media_type="application/json")

    return answered


def _scope(request: Request) -> str:
    try:
        return _SCOPE.validate_python(request.path_params["scope"])
    except ValidationError:
        raise UnknownWindow("no scope has such a name") from None


def _window(request: Request) -> tuple[str, int]:
    number = request.path_params["number"]
    try:
        if not (number.isascii() and number.isdecimal()):
            raise UnknownWindow("no window has such a number")
        return _scope(request), _NUMBER.validate_python(int(number[:10]))
    except ValidationError:
        raise UnknownWindow("no window has such a number") from None


@contextmanager
def listening(
    app: Starlette, host: str = "127.0.0.1", port: int = 0, *, certificate: Certificate | None = None
) -> Iterator[int]:
    """Serves one side from a thread of its own until the block ends.

    Args:
        app: of `application` or `control_application`.
        host: where.
        port: 0: a free one.
        certificate: None: without TLS, which only this machine may use: keys are shown.

    Yields:
        The port.

    Raises:
        ConfigError: it cannot be listened on, or others could, without a certificate.
    """
    if certificate is None and not is_loopback(host):
        raise ConfigError(f"a certificate must be given where host is not a loopback address, got {host!r}")
    options = {"http": TimedHttp, "lifespan": "off", "limit_concurrency": CONNECTIONS}
    with http.listening(app, host, port, name="issuer", certificate=certificate, **options) as bound:
        yield bound


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="its own: keys, and who took a token; made if absent"
    )
    parser.add_argument("--api-keys", type=Path, required=True, metavar="FILE", help="of `python -m serving api-key`")
    parser.add_argument("--token", type=Path, required=True, help="file with what the control side asks for")
    parser.add_argument("--requests-per-s", type=float, metavar="RATE", help="of an account, at most")
    sides = {"": ("devices", 8092), "control-": ("who signs plans", 8093)}
    for side, (whose, port) in sides.items():
        http.add_side(parser, side, whose, port)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    devices, control = (http.certificate_of(arguments, parser, side) for side in sides)
    try:
        _serve(arguments, devices, control)
    except HybridError as error:
        raise SystemExit(f"issuer: {error}") from None


def _serve(arguments: argparse.Namespace, devices: Certificate | None, control: Certificate | None) -> None:
    """Both sides, until the process is told to end."""
    rate, ended = arguments.requests_per_s, http.told_to_end()
    access = Access(ApiKeys(arguments.api_keys), None if rate is None else Buckets(rate, max(rate, 1.0)))
    token = read_token(arguments.token)
    with (
        Issuer(arguments.folder) as issuer,
        listening(application(issuer, access), arguments.host, arguments.port, certificate=devices) as port,
        listening(
            control_application(issuer, token), arguments.control_host, arguments.control_port, certificate=control
        ) as side,
    ):
        print(f"devices ask for tokens at port {port}, who signs plans opens windows at port {side}", flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
