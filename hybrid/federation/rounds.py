"""What a fleet's aggregator has open: plans that uploads come for, and the clipped sum that they go into.

No I/O, no clock. What is kept of an upload is its id, a digest of its bytes, its token's nonce where it needs one, and
its part of the sum: memory grows with the cohort by some 200 bytes an upload, 300 with tokens, whatever the model's
size. A spent nonce is remembered as long as its plan's uploads are taken, and so as long as any sum that it could go
into: where a process dies, both are gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UpdateError
from hybrid.plan import Plan
from hybrid.privacy.mechanisms import ClippedSum, clip_and_sum
from hybrid.tokens import TOKEN_BYTES
from hybrid.update import decode, head, length

MOST_UPLOADS = 1_000_000  # of one sum: 200 MB of ids and digests
DIGEST_BYTES = 16


class Answer(StrEnum):
    """What became of one upload. None of these words depends on what is in an update that has its plan's form.

    Nor does a word say whose it is: a token is of nobody.
    """

    COUNTED = "counted"  # it took part, even where it is not finite and adds nothing
    REPEATED = "repeated"  # the same bytes under the same id: counted once
    OTHER_BYTES = "other_bytes"  # under an id that came before
    MALFORMED = "malformed"  # not of the length and encoding that the plan asks for
    FORGED = "forged"  # what it shows is no token of the plan's window
    SPENT = "spent"  # its token came before, under another id
    ENDED = "ended"
    FULL = "full"


@dataclass
class OpenSum:
    """A sum of clipped updates in the making.

    It changes in place: a new one for each upload would copy it. Whoever calls it from several threads lets one in
    at a time; so with `Uploads`.

    Attributes:
        size: p.
        most: updates; a full sum takes no more. Of a round that closes by the clock it is to be far above what honest
            devices send: whom a full round turns away depends on who else came, which amplification by sampling does
            not allow for.
        received: updates so far, those that are not finite among them.
    """

    size: int
    most: int = MOST_UPLOADS
    received: int = field(default=0, init=False)
    _total: NDArray[np.float64] | None = field(init=False, repr=False)
    _below: int = field(default=0, init=False, repr=False)
    _above: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._total = np.zeros(self.size)

    @property
    def full(self) -> bool:
        """Whether it has all that it takes."""
        return self.received >= self.most

    def add(self, body: bytes, clip: float, weight: float = 1.0) -> None:
        """Adds an update of the right form, clipped again, whatever its sender did, and then weighed.

        Args:
            body: as it came.
            clip: of its plan.
            weight: in (0, 1]: sensitivity rests on its being at most 1, and on nothing that a device does.
        """
        assert self._total is not None
        assert 0 < weight <= 1
        self.received += 1
        try:
            update = decode(body, self.size)
        except UpdateError:  # not finite: it took part and adds nothing, and nobody is told that it did
            return
        one = clip_and_sum([update[None]], self.size, clip)
        self._total += weight * one.total
        self._below += one.below
        self._above += one.above

    def close(self) -> ClippedSum:
        """The sum, which nothing changes any more; called once."""
        total, self._total = self._total, None
        assert total is not None
        total.flags.writeable = False
        return ClippedSum(total, self.received, self._below, self._above)


@dataclass
class Uploads:
    """What came for one plan.

    Attributes:
        plan: that devices were given. Where another one has the same window of tokens, its sum died with its process.
    """

    plan: Plan
    _seen: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    _spent: set[bytes] = field(default_factory=set, repr=False)

    def __contains__(self, upload: str) -> bool:
        """Whether one of that id was counted."""
        return bytes.fromhex(upload) in self._seen

    @property
    def body_bytes(self) -> int:
        """Of each upload, exactly."""
        return self._token_bytes + length(self.plan.parameters, self.plan.upload)

    @property
    def _token_bytes(self) -> int:
        return 0 if self.plan.token is None else TOKEN_BYTES

    def take(self, upload: str, body: bytes, now_ms: int, total: OpenSum | None, weight: float = 1.0) -> Answer:
        """Adds an upload to the sum that is open now, once.

        Args:
            upload: its id, 32 hex digits.
            body: as it travelled, from anybody.
            now_ms: Unix time; from the plan's end on nothing is added. A repeat is answered as before all the same.
            total: None: none that it may be in.
            weight: of the clipped update.
        """
        name, digest = bytes.fromhex(upload), blake2b(body, digest_size=DIGEST_BYTES).digest()
        if (before := self._seen.get(name)) is not None:
            return Answer.REPEATED if before == digest else Answer.OTHER_BYTES
        if total is None or now_ms >= self.plan.expires_ms:
            return Answer.ENDED
        token, update = body[: self._token_bytes], body[self._token_bytes :]
        if len(body) != self.body_bytes or not update.startswith(head(self.plan.parameters, self.plan.upload)):
            return Answer.MALFORMED
        answer = Answer.FULL if total.full else self._spend(token)
        if answer is Answer.COUNTED:
            total.add(update, self.plan.clip, weight)
            self._seen[name] = digest
        return answer

    def _spend(self, token: bytes) -> Answer:
        """Whether an upload counts by its token, which then is spent."""
        if self.plan.token is None:
            return Answer.COUNTED
        nonce = self.plan.token.verify(token)
        if nonce is None:
            return Answer.FORGED
        if nonce in self._spent:
            return Answer.SPENT
        self._spent.add(nonce)
        return Answer.COUNTED
