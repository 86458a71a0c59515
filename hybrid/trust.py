"""Whose signatures a device takes: keys that its host app brings, and never one that comes with what is signed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


class Trusted(Protocol):
    """Verifies signatures, as one public key does."""

    def verify(self, signature: bytes, data: bytes, /) -> None:
        """Raises `cryptography.exceptions.InvalidSignature` where it is none of `data`."""


@dataclass(frozen=True)
class TrustedKeys:
    """Several keys of which one is enough: the control plane's, and the one that is to follow it.

    Attributes:
        keys: at least one.
    """

    keys: tuple[Ed25519PublicKey, ...]

    def verify(self, signature: bytes, data: bytes, /) -> None:
        """See `Trusted`."""
        from cryptography.exceptions import InvalidSignature

        for key in self.keys:
            with suppress(InvalidSignature):
                key.verify(signature, data)
                return
        raise InvalidSignature
