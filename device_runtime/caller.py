"""One request over a connection of its own, with nothing that lasts.

Requests share no connection, no cookie and no header that is not the same for every device of a release, so that
nothing but their content and the network's address can join them. Answers are read up to a limit of bytes and of time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from hybrid.errors import ConfigError
from hybrid.protocol import is_loopback

TIMEOUT_S = 60.0  # of one request, from its connection to the last byte of its answer
MAX_WAIT_S = 86_400.0  # a Retry-After that asks for more is cut to it
# Every header that a request has beside its length: the library's own would tell its version, and what is installed.
_HEADERS = {
    "User-Agent": "hybrid-device",
    "Accept": "application/octet-stream",
    "Accept-Encoding": "identity",  # nothing is unpacked either
    "Connection": "close",
}


@dataclass(frozen=True)
class Reply:
    """What came of one request.

    Attributes:
        status: of HTTP; 0: there is no answer that can be used, and `error` says why.
        body: of a 200.
        retry_after_s: in how many seconds to ask again, in [0, MAX_WAIT_S]; None: not said.
        error: one sentence.
    """

    status: int
    body: bytes = b""
    retry_after_s: float | None = None
    error: str = ""


class Caller:
    """Asks one peer.

    Args:
        url: base URL, https:// or of this machine.
        name: the peer's, for errors.
        timeout_s: of one request, all of its answer included.

    Raises:
        ConfigError: `url` is none that may be asked, or `timeout_s` is not positive.
    """

    def __init__(self, url: str, name: str, *, timeout_s: float = TIMEOUT_S) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be > 0, got {timeout_s}")
        self._url, self._name, self._timeout_s = _checked(url, name), name, timeout_s
        # Reading the authorities takes as long as a training. No session of TLS is kept with them.
        self._authorities = httpx.create_ssl_context(trust_env=False)

    async def ask(self, method: str, path: str, content: bytes, headers: Mapping[str, str], *, most: int) -> Reply:
        """One request; `headers`: beside those of every request; `most`: bytes of its answer."""
        # No proxy from the environment, and no other host that an answer names: who sees an update is declared.
        client = httpx.AsyncClient(
            base_url=self._url,
            headers=_HEADERS,
            timeout=self._timeout_s,
            verify=self._authorities,
            trust_env=False,
            follow_redirects=False,
        )
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                client,
                client.stream(method, path, content=content, headers=headers) as response,
            ):
                return await _read(response, most, self._name)
        except TimeoutError:
            return Reply(0, error=f"the {self._name} did not answer in time")
        except httpx.ConnectError:
            return Reply(0, error=f"the {self._name} cannot be reached")
        except httpx.HTTPError as error:
            return Reply(0, error=f"the connection to the {self._name} broke ({type(error).__name__})")


async def _read(response: httpx.Response, most: int, name: str) -> Reply:
    """An answer; of one that is too large, or that would have to be unpacked, no more than its head."""
    wait = _retry_after(response.headers.get("Retry-After"))
    if response.status_code != httpx.codes.OK:
        return Reply(response.status_code, retry_after_s=wait)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return Reply(0, error=f"the {name}'s answer is compressed, which was not asked for")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > most:
            return Reply(0, error=f"the {name}'s answer has more than {most} bytes")
    return Reply(response.status_code, bytes(body), wait)


def _retry_after(text: str | None) -> float | None:
    """Seconds; a date, which needs a clock that can be believed, counts as not said."""
    if text is None or not (text.isascii() and text.isdecimal()):
        return None
    return min(float(text[:9]), MAX_WAIT_S) if len(text) < 10 else MAX_WAIT_S


def _checked(text: str, name: str) -> str:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{name} must be an https:// URL: {error}") from None
    if url.userinfo:
        raise ConfigError(f"{name} must be a URL without user name and password: they would tell devices apart")
    if url.query or url.fragment:
        raise ConfigError(f"{name} must be a URL without '?' and '#'")
    if not url.host or not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.host))):
        raise ConfigError(f"{name} must be an https:// URL, or of this machine, got {text!r}")
    return text
