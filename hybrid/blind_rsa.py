"""RSA blind signatures: who signs learns nothing of what it signs, nor ever which signature came of which request.

RSABSSA-SHA384-PSS of RFC 9474, whose steps the functions here follow one by one. `cryptography` makes keys and verifies
the signatures, which are plain RSASSA-PSS (RFC 8017); no maintained library of Python does the blinding.

A request is m x r^e mod n for an encoded message m and an r that is drawn uniformly among the units of n. For whatever
message there is one r that explains a given request, so a request says nothing of its message, whatever the signer
keeps and however long it computes.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid.errors import TokenError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey

SALT_BYTES = 48  # of the variants PSS; those named PSSZERO have none
PREFIX_BYTES = 32  # of a message that is randomized
_HASH_BYTES = 48  # of SHA-384
_TRAILER = 0xBC
_SCREEN_BITS = 64  # of randomness in each exponent of the private operation


@dataclass(frozen=True)
class Blinded:
    """A message that is blinded.

    Attributes:
        message: for the signer, as long as the modulus.
        inverse: 1 / r mod n, that takes the blinding off again; for nobody else.
    """

    message: bytes
    inverse: int = field(repr=False)


def prepare(message: bytes, *, prefix: bytes | None = None) -> bytes:
    """A message with 32 random bytes before it (PrepareRandomize): for messages that the signer could guess from keys.

    Messages with randomness of their own, as tokens are, are signed as they are (PrepareIdentity).

    Args:
        message: to be signed.
        prefix: the random bytes; None: they are drawn.

    Source:
        RFC 9474, section 4.1.
    """
    return (secrets.token_bytes(PREFIX_BYTES) if prefix is None else prefix) + message


def blind(
    key: RSAPublicKey, message: bytes, *, salt_bytes: int = SALT_BYTES, salt: bytes | None = None, r: int | None = None
) -> Blinded:
    """Blinds a prepared message.

    Args:
        key: the signer's.
        message: prepared.
        salt_bytes: 48 or 0, as the variant says.
        salt: for tests; None: it is drawn.
        r: the same.

    Raises:
        TokenError: the message cannot be blinded under this key, or `r` is no unit of its modulus.

    Source:
        RFC 9474, section 4.2.
    """
    n, e = _numbers(key)
    salt = secrets.token_bytes(salt_bytes) if salt is None else salt
    encoded = int.from_bytes(encode(message, n.bit_length() - 1, salt))
    if math.gcd(encoded, n) != 1:  # who meets one has factored the modulus
        raise TokenError("the message cannot be blinded: it shares a factor with the modulus")
    r = _unit(n) if r is None else r
    try:
        inverse = pow(r, -1, n)
    except ValueError:
        raise TokenError("the blinding factor must be a unit of the modulus") from None
    return Blinded((encoded * pow(r, e, n) % n).to_bytes(_length(n)), inverse)


def check_blinded(key: RSAPublicKey, blinded: bytes) -> int:
    """A blinded message as a number, to be signed.

    Raises:
        TokenError: it is not as long as the modulus, not below it, or no unit of it: no honest device sends one.
    """
    n, _ = _numbers(key)
    number = int.from_bytes(blinded)
    if len(blinded) != _length(n) or not number < n or math.gcd(number, n) != 1:
        raise TokenError(f"a blinded message must be a unit of the modulus in {_length(n)} bytes")
    return number


def blind_sign(key: RSAPrivateKey, blinded: bytes) -> bytes:
    """Signs a blinded message: the signer's one step.

    The number that is raised is screened by a random factor, the exponents by random multiples of their orders: how
    long it takes has nothing to do with the message, and little with the key. What comes out is checked, since a fault
    in one half would give the key away.

    Args:
        key: the signer's.
        blinded: as it came.

    Raises:
        TokenError: see `check_blinded`; or the machine computed wrongly, and nothing may leave.

    Source:
        RFC 9474, section 4.3; screening: Kocher, CRYPTO 1996, section 10.
    """
    private = key.private_numbers()
    n, e = private.public_numbers.n, private.public_numbers.e
    number = check_blinded(key.public_key(), blinded)
    screen = _unit(n)
    screened = number * pow(screen, e, n) % n

    def half(prime: int, exponent: int) -> int:
        return pow(screened % prime, exponent + secrets.randbits(_SCREEN_BITS) * (prime - 1), prime)

    in_p, in_q = half(private.p, private.dmp1), half(private.q, private.dmq1)
    root = in_q + private.q * ((in_p - in_q) * private.iqmp % private.p)
    signature = root * pow(screen, -1, n) % n
    if pow(signature, e, n) != number:
        raise TokenError("signing failed: the machine computed wrongly")
    return signature.to_bytes(_length(n))


def finalize(
    key: RSAPublicKey, message: bytes, blind_signature: bytes, inverse: int, *, salt_bytes: int = SALT_BYTES
) -> bytes:
    """Takes the blinding off a signature.

    Args:
        key: the signer's.
        message: the prepared one that was blinded.
        blind_signature: what the signer answered.
        inverse: of `Blinded`.
        salt_bytes: as in `blind`.

    Returns:
        The signature of `message`.

    Raises:
        TokenError: the signer answered something else. Then it holds nothing that it could know again.

    Source:
        RFC 9474, section 4.4.
    """
    n, _ = _numbers(key)
    if len(blind_signature) != _length(n):
        raise TokenError(f"a blind signature must have {_length(n)} bytes, got {len(blind_signature)}")
    signature = (int.from_bytes(blind_signature) * inverse % n).to_bytes(_length(n))
    if not verify(key, message, signature, salt_bytes=salt_bytes):
        raise TokenError("what the signer answered is no signature of the message under its key")
    return signature


def verify(key: RSAPublicKey, message: bytes, signature: bytes, *, salt_bytes: int = SALT_BYTES) -> bool:
    """Whether it is a signature of the prepared message: RSASSA-PSS with SHA-384 and a salt of that length.

    Source:
        RFC 9474, section 4.5; RFC 8017, section 8.1.2.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    scheme = padding.PSS(padding.MGF1(hashes.SHA384()), salt_bytes)
    try:
        key.verify(signature, message, scheme, hashes.SHA384())
    except InvalidSignature:
        return False
    return True


def encode(message: bytes, bits: int, salt: bytes) -> bytes:
    """EMSA-PSS-ENCODE with SHA-384 and MGF1 of it.

    Args:
        message: any.
        bits: of the result at most.
        salt: random, or empty.

    Raises:
        TokenError: `bits` are too few for the hash and the salt.

    Source:
        RFC 8017, section 9.1.1; its steps' numbers stand beside them.
    """
    length = -(-bits // 8)
    if length < _HASH_BYTES + len(salt) + 2:  # 3
        raise TokenError(f"a message needs {_HASH_BYTES + len(salt) + 2} bytes when encoded, the key has {length}")
    digest = hashlib.sha384(bytes(8) + hashlib.sha384(message).digest() + salt).digest()  # 2, 5, 6
    block = bytes(length - len(salt) - _HASH_BYTES - 2) + b"\x01" + salt  # 7, 8
    masked = bytearray(a ^ b for a, b in zip(block, _mask(digest, len(block)), strict=True))  # 9, 10
    masked[0] &= 0xFF >> (8 * length - bits)  # 11
    return bytes(masked) + digest + bytes([_TRAILER])  # 12


def _mask(seed: bytes, length: int) -> bytes:
    """MGF1 with SHA-384: RFC 8017, appendix B.2.1."""
    blocks = range(-(-length // _HASH_BYTES))
    return b"".join(hashlib.sha384(seed + number.to_bytes(4)).digest() for number in blocks)[:length]


def _unit(n: int) -> int:
    """Uniform among the units of n."""
    while True:
        drawn = 1 + secrets.randbelow(n - 1)
        if math.gcd(drawn, n) == 1:
            return drawn


def _numbers(key: RSAPublicKey) -> tuple[int, int]:
    numbers = key.public_numbers()
    return numbers.n, numbers.e


def _length(n: int) -> int:
    return -(-n.bit_length() // 8)
