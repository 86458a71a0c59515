"""What a device shows the gateway, so that it may ask: an API key, or a token in its place.

Source: RFC 6750 (bearer tokens), section 2.1 for their form, 5.3 for where they may be sent.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from hybrid.errors import ConfigError, Unauthenticated
from hybrid.files import read_private
from hybrid.protocol import is_loopback

MAX_KEY = 8 << 10  # characters, as the gateway takes
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")


def read_api_key(file: Path) -> str:
    """The one API key in a file, which its owner alone may read.

    Raises:
        ConfigError: the file cannot be read, or others can read it.
    """
    return read_private(file, "API key", MAX_KEY)


def authorization(api_key: str | None, gateway: str) -> dict[str, str]:
    """The header that shows `api_key` to a gateway; none without one.

    Args:
        api_key: see `InferenceClient`.
        gateway: base URL.

    Raises:
        ConfigError: it is no key, or the gateway is none that it may be sent to. The text does not hold the key.
    """
    try:
        url = httpx.URL(gateway)
    except httpx.InvalidURL as error:
        raise ConfigError(f"gateway must be an http:// or https:// URL: {error}") from None
    if url.userinfo:  # httpx would send it in the key's place, and errors and process lists show the URL
        raise ConfigError("gateway must be a URL without user name and password; give an API key instead")
    if api_key is None:
        return {}
    if len(api_key) > MAX_KEY or not _KEY.fullmatch(api_key):
        raise ConfigError(
            f"the API key must be one line of 1 to {MAX_KEY} letters, digits and any of . _ ~ + / -, "
            f"got {min(len(api_key), MAX_KEY + 1)} characters"
        )
    if url.scheme != "https" and not is_loopback(url.host):
        raise ConfigError(
            f"gateway must be an https:// URL, or of this machine, where an API key is sent, got {gateway!r}"
        )
    return {"Authorization": f"Bearer {api_key}"}


def refused(shown: bool) -> Unauthenticated:
    """What a gateway says with 401, as a sentence that names what to set; `shown`: whether it was shown a key."""
    if shown:
        why = "the gateway does not know the API key, or no longer (401): it must be one that the gateway was given"
    else:
        why = "the gateway asks for an API key (401): set HYBRID_API_KEY, or name a file with --api-key-file"
    return Unauthenticated(why, shown=shown)
