"""A device's tokens: asked of the issuer under the account's key, kept, and shown once with an update.

The issuer sees the account and a blinded message; the aggregator sees a token and no account. Both together cannot
say which is of which: see `hybrid.blind_rsa`. The account's key goes to the issuer that the host app names, and to no
other.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Protocol, Self
from urllib.parse import urlsplit

from device_runtime.access import authorization
from device_runtime.caller import TIMEOUT_S, Caller, Reply
from device_runtime.protocol import Held
from hybrid.errors import TokenError
from hybrid.tokens import REQUEST_TYPE, RESPONSE_BYTES, TOKENS, Window


class Store(Protocol):
    """What is kept of tokens: see `device_runtime.store.Store`."""

    def held(self, scope: str, *, device: int = 0) -> Held | None:
        """A token of a scope, or what it was asked for with."""
        ...

    def hold(self, held: Held, now_ms: int, *, device: int = 0) -> None:
        """Keeps it, on the disk once this returns."""
        ...


class NoToken(Exception):
    """There is none now.

    Attributes:
        taken: whether the account had its own, of this window or of one that is too near.
        retry_after_s: when the issuer wants to be asked again; None: it does not say.
    """

    def __init__(self, why: str, *, taken: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.taken, self.retry_after_s = taken, retry_after_s


class Credentials:
    """An account's, at one issuer.

    Args:
        url: of the issuer, https:// or of this machine.
        api_key: the account's.
        issuer: its name, as plans have it; None: the URL's host, with its port where it has one.
        timeout_s: of one request, all of its answer included.

    Raises:
        ConfigError: `url` is none that a key may be sent to, it is no key, or `timeout_s` is not positive.
    """

    def __init__(self, url: str, api_key: str, *, issuer: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._caller = Caller(url, "issuer", timeout_s=timeout_s)
        self._headers = {"Content-Type": REQUEST_TYPE, **authorization(api_key, url)}
        self.issuer = issuer or urlsplit(url).netloc.lower()
        self._url = url

    def of(self, api_key: str) -> Self:
        """Another account's, at the same issuer: for processes that stand for many devices."""
        found = copy(self)
        found._headers = self._headers | authorization(api_key, self._url)
        return found

    async def token(
        self, window: Window, store: Store, expires_ms: int, now_ms: Callable[[], int], *, device: int = 0
    ) -> bytes:
        """The device's token of a window: from the store, or else from the issuer.

        The request is in the store before it goes out, so that whatever ends the process the same one goes out again,
        which the issuer answers again. No other one would be answered.

        Args:
            window: of a verified plan.
            store: the device's.
            expires_ms: until when updates of the plan are taken.
            now_ms: Unix time.
            device: whose, where a store holds those of several.

        Raises:
            NoToken: the account has to wait, or the issuer cannot be asked, or what it answers is not signed by the
                plan's key.
            StoreError: the store cannot be read or written.
        """
        kept = held = store.held(window.scope, device=device)
        if held is None or not window.asks(held.asked):
            try:
                held = Held(window.scope, window.number, window.ask(), expires_ms)
            except TokenError as error:
                raise NoToken(f"the plan's window is none: {error}") from None
        held = replace(held, expires_ms=max(held.expires_ms, expires_ms))
        if held != kept:
            store.hold(held, now_ms(), device=device)
        if held.token is not None:
            return held.token
        path = TOKENS.format(scope=window.scope, number=window.number)
        content = bytes(held.asked.request)
        reply = await self._caller.ask("POST", path, content, self._headers, most=RESPONSE_BYTES)
        if reply.status != 200:
            raise _refused(reply)
        try:
            token = window.finish(held.asked, reply.body)
        except TokenError as error:
            raise NoToken(f"the issuer's answer makes no token: {error}") from None
        store.hold(replace(held, token=token), now_ms(), device=device)
        return token


def _refused(reply: Reply) -> NoToken:
    if reply.status == 0:
        return NoToken(reply.error)
    if reply.status == 409:
        return NoToken("the account took its token of this window, or of one too near to it", taken=True)
    return NoToken(f"the issuer answered {reply.status}", retry_after_s=reply.retry_after_s)
