"""Tokens that show that an account has its turn, and not whose it is: what device, issuer and aggregator say, as bytes.

Privacy Pass with blind RSA of 2048 bits, type 0x0002: RFC 9577 (challenge, token), RFC 9578, section 6 (request,
response, key). A device asks the issuer, which knows its account, for a token of one *window*, and shows it with its
update to the aggregator, which knows no account. An account gets one token a window, whatever devices it has.

A window is a scope, in which separations count, and a number in it. Each has a key of its own, so that a token says
nothing but its window, and those of a window are all alike. The plan, signed and the same for a whole cohort, holds
the key: an issuer that gave each device another one could tell them apart.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hybrid.blind_rsa import blind, check_blinded, finalize, verify
from hybrid.errors import TokenError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

TOKENS = "/v1/tokens/{scope}/{number}"  # of the issuer: POST a request, with the account's key as bearer; GET the key
WINDOWS = "/v1/windows/{scope}"  # of its control side: POST an `Opening`, answered by an `Opened`; DELETE: for good
REQUEST_TYPE = "application/private-token-request"
RESPONSE_TYPE = "application/private-token-response"
TYPE = 0x0002
KEY_BITS = 2048
EXPONENT = 65537
NK = KEY_BITS // 8  # of a blinded message, and of a signature
REQUEST_BYTES = 3 + NK
RESPONSE_BYTES = NK
INPUT_BYTES = 2 + 32 + 32 + 32  # of what is signed
TOKEN_BYTES = INPUT_BYTES + NK
CONTEXT_BYTES = 32
MAX_KEY_BYTES = 512  # of its DER
_WINDOW = b"hybrid token window 1\0"
_TYPE = struct.Struct(">H")
_HEAD = struct.Struct(">HB")
# AlgorithmIdentifier: id-RSASSA-PSS with SHA-384, MGF1 of SHA-384 and a salt of 48 bytes (RFC 4055, as RFC 9578 asks).
_ALGORITHM = bytes.fromhex(
    "303d06092a864886f70d01010a3030a00d300b0609608648016503040202a11a301806092a864886f70d010108300b0609608648016503040202"
    "a203020130"
)

ScopeName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Host = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9.\[\]:-]{0,252}[a-z0-9\]])?$")]
Number = Annotated[int, Field(ge=1, lt=1 << 31)]


def window_context(scope: str, number: int) -> bytes:
    """The redemption context of a window: 32 bytes.

    >>> window_context("spring", 3) == hashlib.sha256(_WINDOW + bytes([6]) + b"spring" + bytes([0, 0, 0, 3])).digest()
    True
    """
    name = scope.encode()
    return hashlib.sha256(_WINDOW + bytes([len(name)]) + name + number.to_bytes(4)).digest()


def encode_key(key: RSAPublicKey) -> bytes:
    """A public key as SubjectPublicKeyInfo, in DER, with the algorithm that RFC 9578, section 6.5, asks for."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    bare = key.public_bytes(Encoding.DER, PublicFormat.PKCS1)
    return _der(0x30, _ALGORITHM + _der(0x03, b"\0" + bare))


@lru_cache(maxsize=64)  # an aggregator reads one for each upload
def decode_key(data: bytes) -> RSAPublicKey:
    """What `encode_key` wrote.

    Raises:
        TokenError: it is no key of 2048 bits and exponent 65537 in exactly that form. With another exponent the
            blinding might not cover all of a message; in another form one key would have two ids.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise TokenError("an issuer's key must be SubjectPublicKeyInfo in DER") from None
    if not isinstance(key, RSAPublicKey) or key.key_size != KEY_BITS or key.public_numbers().e != EXPONENT:
        raise TokenError(f"an issuer's key must be of RSA with {KEY_BITS} bits and exponent {EXPONENT}")
    if encode_key(key) != data:
        raise TokenError("an issuer's key must name RSASSA-PSS with SHA-384 and a salt of 48 bytes, in DER")
    return key


def token_key_id(data: bytes) -> bytes:
    """SHA-256 of a public key as `encode_key` writes it."""
    return hashlib.sha256(data).digest()


def new_key() -> RSAPrivateKey:
    """A window's key."""
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key

    return generate_private_key(public_exponent=EXPONENT, key_size=KEY_BITS)


@dataclass(frozen=True)
class TokenChallenge:
    """What a token answers to.

    Attributes:
        issuer: its name.
        context: none, or 32 bytes.
        origin: who may ask for the token, names with commas between them; empty: anybody.

    Source:
        RFC 9577, section 2.1.
    """

    issuer: str
    context: bytes = b""
    origin: str = ""

    def __bytes__(self) -> bytes:
        issuer, origin = self.issuer.encode(), self.origin.encode()
        assert len(self.context) in (0, CONTEXT_BYTES)
        assert 0 < len(issuer) < 1 << 16 > len(origin)
        parts = (_TYPE.pack(len(issuer)) + issuer, bytes([len(self.context)]) + self.context)
        return _TYPE.pack(TYPE) + b"".join(parts) + _TYPE.pack(len(origin)) + origin

    @property
    def digest(self) -> bytes:
        """Its SHA-256, which is in each token."""
        return hashlib.sha256(bytes(self)).digest()

    @classmethod
    def read(cls, data: bytes) -> Self:
        """From bytes.

        Raises:
            TokenError: it is none of this type.
        """
        try:
            (kind,), rest = _TYPE.unpack_from(data), data[2:]
            issuer, rest = _cut(rest, 2)
            context, rest = _cut(rest, 1)
            origin, rest = _cut(rest, 2)
            found = cls(issuer.decode("ascii"), context, origin.decode("ascii"))
        except (struct.error, UnicodeDecodeError):
            raise TokenError("a token challenge is damaged") from None
        if kind != TYPE or rest or not issuer or len(context) not in (0, CONTEXT_BYTES):
            raise TokenError(
                f"a token challenge must be of type {TYPE}, name an issuer, and have 0 or 32 bytes of context"
            )
        return found


@dataclass(frozen=True)
class TokenRequest:
    """What the issuer sees: RFC 9578, section 6.1.

    Attributes:
        key: last byte of the key's id.
        blinded: message.
    """

    key: int
    blinded: bytes

    def __bytes__(self) -> bytes:
        return _HEAD.pack(TYPE, self.key) + self.blinded

    @classmethod
    def read(cls, data: bytes) -> Self:
        """From bytes.

        Raises:
            TokenError: it is none of this type.
        """
        if len(data) != REQUEST_BYTES or _HEAD.unpack_from(data)[0] != TYPE:
            raise TokenError(f"a token request must have {REQUEST_BYTES} bytes and be of type {TYPE}")
        return cls(data[2], data[3:])

    def check(self, key: RSAPublicKey, key_id: bytes) -> None:
        """Before an issuer remembers it.

        Raises:
            TokenError: it is for another key, or its message is none that can be signed.
        """
        if self.key != key_id[-1]:
            raise TokenError("a token request must name the window's key")
        check_blinded(key, self.blinded)


@dataclass(frozen=True)
class Token:
    """What the aggregator sees: RFC 9577, section 2.2. Its response is the authenticator, blinded: RFC 9578, 6.2.

    Attributes:
        nonce: 32 random bytes, the device's.
        challenge: digest of what it answers to.
        key_id: of the issuer's key.
        authenticator: signature of all of these.
    """

    nonce: bytes
    challenge: bytes
    key_id: bytes
    authenticator: bytes = field(repr=False)

    def __bytes__(self) -> bytes:
        return self.signed + self.authenticator

    @property
    def signed(self) -> bytes:
        """What the authenticator is of."""
        return _TYPE.pack(TYPE) + self.nonce + self.challenge + self.key_id

    @classmethod
    def read(cls, data: bytes) -> Self:
        """From bytes; nothing is verified.

        Raises:
            TokenError: it is none of this type.
        """
        if len(data) != TOKEN_BYTES or _TYPE.unpack_from(data)[0] != TYPE:
            raise TokenError(f"a token must have {TOKEN_BYTES} bytes and be of type {TYPE}")
        return cls(data[2:34], data[34:66], data[66:98], data[98:])


@dataclass(frozen=True)
class Pending:
    """What a device keeps from its request to the answer: with it the same request can go out again.

    Attributes:
        signed: what is to be signed, of `Token`.
        blinded: the same, blinded.
        inverse: takes the blinding off.
    """

    signed: bytes
    blinded: bytes
    inverse: int = field(repr=False)

    @property
    def request(self) -> TokenRequest:
        """For the issuer."""
        return TokenRequest(self.signed[-1], self.blinded)

    def __bytes__(self) -> bytes:
        return self.signed + self.blinded + self.inverse.to_bytes(NK)

    @classmethod
    def read(cls, data: bytes) -> Self:
        """What `bytes` gave."""
        assert len(data) == INPUT_BYTES + 2 * NK
        signed, rest = data[:INPUT_BYTES], data[INPUT_BYTES:]
        return cls(signed, rest[:NK], int.from_bytes(rest[NK:]))


class Window(BaseModel):
    """Whose tokens a plan asks for.

    Attributes:
        issuer: its name, as devices have it from their host app.
        scope: in which separations count: a training's horizon, or a name.
        number: in the scope; later windows have larger ones.
        key: the issuer's for this window: hexadecimal of SubjectPublicKeyInfo in DER, see `encode_key`.

    Raises:
        ValueError: (pydantic's) a field is not of its form. Whether the key is one is asked when it is used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: Host
    scope: ScopeName
    number: Number
    key: Annotated[str, Field(pattern=r"^[0-9a-f]+$", max_length=2 * MAX_KEY_BYTES)]

    @field_validator("key")
    @classmethod
    def _whole(cls, key: str) -> str:
        if len(key) % 2:
            raise ValueError("must be whole bytes")
        return key

    @property
    def key_id(self) -> bytes:
        """Of its key."""
        return token_key_id(bytes.fromhex(self.key))

    @property
    def challenge(self) -> TokenChallenge:
        """What its tokens answer to."""
        return TokenChallenge(self.issuer, window_context(self.scope, self.number))

    @property
    def _public(self) -> RSAPublicKey:
        return decode_key(bytes.fromhex(self.key))

    @property
    def _about(self) -> bytes:
        """What its tokens have in common."""
        return self.challenge.digest + self.key_id

    def ask(self, *, nonce: bytes | None = None, salt: bytes | None = None, r: int | None = None) -> Pending:
        """A new request.

        Args:
            nonce: for tests; None: it is drawn.
            salt: the same.
            r: the same.

        Raises:
            TokenError: its key is none.
        """
        signed = _TYPE.pack(TYPE) + (secrets.token_bytes(32) if nonce is None else nonce) + self._about
        blinded = blind(self._public, signed, salt=salt, r=r)
        return Pending(signed, blinded.message, blinded.inverse)

    def asks(self, asked: Pending) -> bool:
        """Whether a request is for this window, under this key."""
        return asked.signed[34:] == self._about

    def finish(self, asked: Pending, response: bytes) -> bytes:
        """The token that an answer makes of a request.

        Raises:
            TokenError: the answer is not signed by this window's key, or that is none.
        """
        return asked.signed + finalize(self._public, asked.signed, response, asked.inverse)

    def verify(self, token: bytes) -> bytes | None:
        """The nonce of a token of this window; None: it is none.

        Raises:
            TokenError: its key is none.
        """
        try:
            read = Token.read(token)
        except TokenError:
            return None
        if read.challenge + read.key_id != self._about:
            return None
        return read.nonce if verify(self._public, read.signed, read.authenticator) else None


class Opening(BaseModel):
    """What the issuer is asked by who signs plans: to open a window of a scope.

    Attributes:
        separation: from a window of which an account took a token to the next of which it may; the same in all of a
            scope.
        number: the window's, as a horizon's steps have numbers of their own; open already, it is the same window.
            None: one more than the last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    separation: Number
    number: Number | None = None


class Opened(BaseModel):
    """The answer.

    Attributes:
        number, key: see `Window`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Number
    key: str


def _cut(data: bytes, width: int) -> tuple[bytes, bytes]:
    """A vector with its length before it, and what follows."""
    length = int.from_bytes(data[:width])
    if len(data) < width + length:
        raise struct.error
    return data[width : width + length], data[width + length :]


def _der(tag: int, content: bytes) -> bytes:
    length = len(content)
    size = bytes([length]) if length < 0x80 else bytes([0x80 | -(-length.bit_length() // 8)]) + _minimal(length)
    return bytes([tag]) + size + content


def _minimal(number: int) -> bytes:
    return number.to_bytes(-(-number.bit_length() // 8))
