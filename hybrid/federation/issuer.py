"""Windows of tokens, opened at an issuer over HTTP: see `serving.issuer`."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from hybrid.errors import ConfigError, IssuerError, TokenError
from hybrid.plan import Turn
from hybrid.protocol import is_loopback
from hybrid.tokens import WINDOWS, Opened, Opening, Window, decode_key

TIMEOUT_S = 20.0  # of a window; a key of 2048 bits is made in a tenth of a second


@dataclass(frozen=True)
class RemoteIssuer:
    """An issuer's control side: each plan has a window of its own.

    Where devices take turns, a horizon is a scope, its steps are the numbers, and the separation is the horizon's and
    as many steps as an update may be late. Else every round and every query is one window of `scope`, in which an
    account may have a token of each.

    Attributes:
        name: the issuer's, as devices have it from their host app.
        url: of its control side: https://HOST:PORT, or http:// on this machine.
        token: that it asks for.
        scope: of what has no turns; who shares it with others gets every other number.
        authority: a PEM file of the certificate authority that signed its; by default the system's.

    Raises:
        ConfigError: the URL is no such, or the authority no such file.
    """

    name: str
    url: str
    token: str = field(repr=False)
    scope: str
    authority: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if not parts.hostname or not (parts.scheme == "https" or local):
            raise ConfigError(f"url must be https://HOST:PORT, or of this machine, got {self.url!r}")
        if self.authority is not None and not self.authority.is_file():
            raise ConfigError(f"authority must be a PEM file, got {str(self.authority)!r}")

    def open(self, turn: Turn | None) -> Window:
        """See `hybrid.federation.fleet_aggregator.Windows`."""
        if turn is None:
            return self._opened(self.scope, Opening(separation=1))
        separation = turn.separation + turn.last_step - turn.first_step
        return self._opened(turn.training, Opening(separation=separation, number=turn.first_step))

    def _opened(self, scope: str, opening: Opening) -> Window:
        import httpx

        verify: Any = ssl.create_default_context(cafile=self.authority) if self.authority else True
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        content = opening.model_dump_json().encode()
        try:
            with httpx.Client(base_url=self.url, verify=verify, timeout=TIMEOUT_S, trust_env=False) as client:
                answer = client.post(WINDOWS.format(scope=scope), content=content, headers=headers)
            if answer.status_code != httpx.codes.OK:
                raise IssuerError(f"the issuer at {self.url} opens no window of scope {scope!r}: {_why(answer)}")
            opened = Opened.model_validate_json(answer.content)
            decode_key(bytes.fromhex(opened.key))
            return Window(issuer=self.name, scope=scope, number=opened.number, key=opened.key)
        except httpx.TransportError as error:
            raise IssuerError(f"the issuer at {self.url} cannot be reached: {type(error).__name__}") from None
        except (ValidationError, ValueError, TokenError):
            raise IssuerError(f"the issuer at {self.url} answers with what is no window") from None


def _why(answer: Any) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answered with status {answer.status_code}"
