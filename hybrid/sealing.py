"""Bytes that whoever writes them cannot read again: sealed to a public key whose private half is elsewhere.

HPKE (RFC 9180) in base mode, with X25519, HKDF-SHA256 and ChaCha20-Poly1305: an
ephemeral key for each message, so two sealings of the same bytes have nothing in common.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import ConfigError, HybridError
from hybrid.files import check_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hpke import Suite

OVERHEAD = 32 + 16  # bytes that sealing adds: the ephemeral public key and the tag


class CannotOpen(HybridError):
    """Sealed bytes are of another key or another place, or were changed."""


@dataclass(frozen=True)
class SealingKey:
    """The public half: seals, and opens nothing.

    Attributes:
        key_id: the first 16 hexadecimal digits of the SHA-256 of the raw public key.
    """

    key_id: str
    _key: X25519PublicKey

    @classmethod
    def read(cls, file: Path) -> SealingKey:
        """Reads a public key in PEM.

        Raises:
            ConfigError: the file is not there, or holds no X25519 public key.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            key = load_pem_public_key(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file.name} must hold an X25519 public key in PEM: {type(error).__name__}") from None
        if not isinstance(key, X25519PublicKey):
            raise ConfigError(f"{file.name} must hold an X25519 public key, it holds another kind")
        return cls(_key_id(key), key)

    def seal(self, data: bytes, context: bytes) -> bytes:
        """The bytes, `OVERHEAD` longer; they open only with the same `context`, which is not in them."""
        return _suite().encrypt(data, self._key, info=context)


@dataclass(frozen=True)
class OpeningKey:
    """The private half, for whoever may read what was sealed.

    Attributes:
        key_id: the same as the public half's.
    """

    key_id: str
    _key: X25519PrivateKey

    @classmethod
    def read(cls, file: Path) -> OpeningKey:
        """Reads a private key in PEM.

        Raises:
            ConfigError: the file is not there, others can read it, or it holds no X25519 private key.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            check_private(file.stat(), file.name)
            key = load_pem_private_key(file.read_bytes(), password=None)
        except FileNotFoundError:
            raise ConfigError(f"{file} does not exist; `hybrid dead-letters keygen` makes a pair of keys") from None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file.name} must hold an X25519 private key in PEM: {type(error).__name__}") from None
        if not isinstance(key, X25519PrivateKey):
            raise ConfigError(f"{file.name} must hold an X25519 private key, it holds another kind")
        return cls(_key_id(key.public_key()), key)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed.

        Raises:
            CannotOpen: by another key, in another context, or changed since.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return _suite().decrypt(sealed, self._key, info=context)
        except (InvalidTag, ValueError):
            raise CannotOpen("the bytes were sealed to another key or for another place, or were changed") from None


def generate(private: Path, public: Path) -> str:
    """Makes a pair of key files, the private one its owner's alone, and returns the key's id.

    Raises:
        ConfigError: one of the files exists: what was sealed to its key could never be read again.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    for file in (private, public):
        if file.exists():
            raise ConfigError(f"{file} exists; move it away, or give another path")
    key, encoding = X25519PrivateKey.generate(), serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    open_half = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    for file, data, mode in ((private, secret, 0o600), (public, open_half, 0o644)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(data)
    return _key_id(key.public_key())


def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def _key_id(key: X25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]
