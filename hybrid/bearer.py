"""The token of a service's control side: who shows it as bearer may open rounds or windows, and halt versions."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path

from hybrid.errors import ConfigError
from hybrid.files import read_private, write_whole

SHORTEST, LONGEST = 32, 4096  # characters


def new_token(file: Path) -> str:
    """Writes a random token to a file that only its owner may read, and returns it."""
    token = secrets.token_urlsafe(32)
    write_whole(file, token.encode(), private=True)
    return token


def read_token(file: Path) -> str:
    """What `new_token`, or an operator, wrote.

    Raises:
        ConfigError: the file cannot be read, or others can read it, or what it holds is no token.
    """
    token = read_private(file, "token", LONGEST)
    check_token(token)
    return token


def check_token(token: str) -> None:
    """Raises ConfigError where it is too short to be one, or could not travel in a header."""
    if not SHORTEST <= len(token) <= LONGEST or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"token must be at least {SHORTEST} printable ASCII characters without spaces")


def shown(authorization: Sequence[str], token: str) -> bool:
    """Whether a request shows the token; how long that takes says nothing of it.

    Args:
        authorization: every value of its Authorization header, as Starlette has them.
        token: that is asked for.
    """
    given = authorization[0].encode("latin-1") if len(authorization) == 1 else b""
    return hmac.compare_digest(given, f"Bearer {token}".encode())
