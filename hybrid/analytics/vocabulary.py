"""Frequent texts of a feature, found without a list of what there may be: two noised sums, a threshold, and spelling.

The first sum counts people by a hash of their text; buckets that noise alone would not fill survive. The second spells:
in each surviving bucket, the bits of its people's texts are summed as 1 and -1, and where most of them hold one text,
the signs of the sums are its bits. Both are Gaussian releases of bounded sums; all that is made of them is
post-processing. So nothing here rests on the threshold: a text of one person would have to be spelled by the noise.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hybrid.analytics.asking import Answer, Ask
from hybrid.analytics.estimates import Estimate
from hybrid.query import (
    CHECK_BITS,
    SPELLED_BITS,
    SPELLED_BYTES,
    Floats,
    Hashed,
    Query,
    Spelled,
    bucket_of,
    spelling,
)

BUCKETS = 4096  # of 20 frequent texts, two share one in 5 % of all vocabularies; then the rarer is not found
EMPTY = 0.01  # chance that any bucket which nobody is in survives
HASHED_SHARE = 0.1  # of the epsilon: a bit's sum is 1 / 17 of a count, so spelling is what needs little noise
FLIPPED = 8  # bits of a text that may be other than their signs say: those whose sums are nearest to 0
WRONG_CHECKS = 4  # of the check's bits: a wrong text passes with a chance of 1e-5 in a bucket of its own, 2e-9 in all
PADDING = 0.25  # of the bits behind a text's end: more of them set, and it is longer than that


@dataclass(frozen=True)
class Frequent:
    """A text that many people hold.

    Attributes:
        text: in NFC.
        people: how many of those who were asked; noised.
        asked: how many were; public.
    """

    text: str
    people: Estimate
    asked: int


def phases(share: float = 1.0) -> tuple[float, float]:
    """Of a question's epsilon, the shares that the two queries of `discover` take: what `Ask.begin` is told."""
    return HASHED_SHARE * share, (1 - HASHED_SHARE) * share


def discover(ask: Ask, column: str, most: int, *, share: float = 1.0, buckets: int = BUCKETS) -> tuple[Frequent, ...]:
    """The most frequent texts of a feature, by each person's last row.

    Args:
        ask: whom; `begin` has been called with `phases(share)`, among others.
        column: a text feature. Texts that `hybrid.query.Spelled` leaves out are never found.
        most: texts at most; in [1, 1000].
        share: of the whole question's epsilon.
        buckets: of the hash. More of them part more texts, and raise the threshold a little.

    Returns:
        The most frequent first; none where nothing stands out. People with a rarer text of the same bucket count for
        it by as much as its bits are the same.

    Raises:
        BudgetExceeded: the ledger has not enough left.
    """
    hashed, spelled = phases(share)
    counted = ask(Query(parts=(Hashed(column=column, buckets=buckets),)), share=hashed)
    survivors = surviving(counted, most)
    if not survivors:
        return ()
    parts = (Spelled(column=column, buckets=buckets, survivors=survivors),)
    answer = ask(Query(parts=parts), share=spelled)
    found = []
    for bucket, sums in zip(survivors, answer.total.reshape(len(survivors), SPELLED_BITS), strict=True):
        text = spelled_by(sums, bucket, buckets)
        if text is not None:
            people = float(sums @ spelling(text)) / math.sqrt(SPELLED_BITS)
            held = min(max(people, 0.0), float(answer.people))
            variance = held * (1 - held / answer.people)
            estimate = Estimate.of(people, answer.sd, variance).within(0.0, answer.people)
            found.append(Frequent(text, estimate, answer.people))
    return tuple(sorted(found, key=lambda each: -each.people.value))


def surviving(counted: Answer, most: int) -> tuple[int, ...]:
    """The fullest buckets, so many at most, of those that are above the threshold.

    It is such that any bucket without people passes it with a chance of `EMPTY` at most, all of them together.

    Args:
        counted: the answer to one `Hashed` part.
        most: of them.
    """
    threshold = NormalDist().inv_cdf(1 - EMPTY / len(counted.total)) * counted.sd
    above = np.flatnonzero(counted.total > max(threshold, 0.5))
    fullest = above[np.argsort(-counted.total[above], kind="stable")][:most]
    return tuple(fullest.tolist())


def spelled_by(sums: Floats, bucket: int, buckets: int) -> str | None:
    """The text that the noised sums of a bucket's bits spell; None where they spell none.

    Of texts that fall into the bucket, and whose check differs from the signs in few bits, the one that agrees with
    the sums best. Candidates follow the signs but for bits that are nearest to 0, and end at each place behind which
    most signs are of padding.

    Args:
        sums: (SPELLED_BITS,).
        bucket: that they are of.
        buckets: how many there are.
    """
    best, text = -math.inf, None
    for candidate in _candidates(sums):
        if bucket_of(candidate, buckets) != bucket:
            continue
        bits = spelling(candidate)
        wrong = int(((sums[-CHECK_BITS:] > 0) != (bits[-CHECK_BITS:] > 0)).sum())
        agreement = float(sums @ bits)
        if wrong <= WRONG_CHECKS and agreement > best:
            best, text = agreement, candidate
    return text


def _candidates(sums: Floats) -> Iterator[str]:
    """Texts in NFC."""
    signs = sums[: 8 * SPELLED_BYTES] > 0
    for length in range(SPELLED_BYTES + 1):
        padding = signs[8 * length :]
        if len(padding) and padding.mean() > PADDING:
            continue
        unsure = np.argsort(np.abs(sums[: 8 * length]), kind="stable")[:FLIPPED]
        flips = np.arange(1 << len(unsure))[:, None] >> np.arange(len(unsure)) & 1
        bits = np.repeat(signs[None, : 8 * length], len(flips), axis=0)
        bits[:, unsure] ^= flips.astype(np.bool_)
        content = np.packbits(bits, axis=1)
        for row in content[content.all(axis=1)]:  # none with a zero character
            text = _text(row.tobytes())
            if text is not None:
                yield text


def _text(content: bytes) -> str | None:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return None
    return text if unicodedata.is_normalized("NFC", text) else None
