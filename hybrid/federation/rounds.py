"""An open round at a fleet's aggregator: uploads come in, one clipped sum goes out. No I/O, no clock.

What is kept of an upload is its id, a digest of its bytes, and its part of the sum: memory grows with the cohort by
some 200 bytes an upload, whatever the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import UpdateError
from hybrid.plan import TrainPlan
from hybrid.privacy.mechanisms import ClippedSum, clip_and_sum
from hybrid.update import decode, head, length

MOST_UPLOADS = 1_000_000  # of one round: 200 MB of ids and digests
DIGEST_BYTES = 16


class Answer(StrEnum):
    """What became of one upload. None of these words depends on what is in an update that has its plan's form."""

    COUNTED = "counted"  # it took part, even where it is not finite and adds nothing
    REPEATED = "repeated"  # the same bytes under the same id: counted once
    OTHER_BYTES = "other_bytes"  # under an id that came before
    MALFORMED = "malformed"  # not of the length and encoding that the plan asks for
    ENDED = "ended"
    FULL = "full"


@dataclass
class OpenRound:
    """One attempt at a round, from its plan to its sum.

    It changes in place: a new state for each upload would copy the sum. Whoever calls it from several threads
    lets one in at a time.

    Attributes:
        plan: that the cohort was given.
        most: uploads; those beyond are not taken. To be set far above what honest devices send: whom a full round
            turns away depends on who else came, which amplification by sampling does not allow for.
    """

    plan: TrainPlan
    most: int = MOST_UPLOADS
    _seen: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    _total: NDArray[np.float64] | None = field(init=False, repr=False)
    _below: int = field(default=0, init=False, repr=False)
    _above: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._total = np.zeros(self.plan.parameters)

    @property
    def body_bytes(self) -> int:
        """Of each upload, exactly."""
        return length(self.plan.parameters, self.plan.upload)

    def take(self, upload: str, body: bytes, now_ms: int) -> Answer:
        """Adds an upload, once.

        Args:
            upload: its id, 32 hex digits.
            body: as it travelled, from anybody.
            now_ms: Unix time; from the plan's end on nothing is added. A repeat is answered as before all the same.
        """
        name, digest = bytes.fromhex(upload), blake2b(body, digest_size=DIGEST_BYTES).digest()
        if (before := self._seen.get(name)) is not None:
            return Answer.REPEATED if before == digest else Answer.OTHER_BYTES
        if self._total is None or now_ms >= self.plan.expires_ms:
            return Answer.ENDED
        if len(body) != self.body_bytes or not body.startswith(head(self.plan.parameters, self.plan.upload)):
            return Answer.MALFORMED
        if len(self._seen) >= self.most:
            return Answer.FULL
        self._add(self._total, body)
        self._seen[name] = digest
        return Answer.COUNTED

    def _add(self, total: NDArray[np.float64], body: bytes) -> None:
        """Clips it again, whatever its sender did: sensitivity does not rest on a device's arithmetic."""
        size = self.plan.parameters
        try:
            update = decode(body, size)
        except UpdateError:  # not finite: it took part and adds nothing, and nobody is told that it did
            return
        one = clip_and_sum([update[None]], size, self.plan.clip)
        total += one.total
        self._below += one.below
        self._above += one.above

    def close(self) -> ClippedSum:
        """The sum, which nothing changes any more. What came stays known by id; called once."""
        total, self._total = self._total, None
        assert total is not None
        total.flags.writeable = False
        return ClippedSum(total, len(self._seen), self._below, self._above)
