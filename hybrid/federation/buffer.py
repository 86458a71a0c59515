"""Asynchronous training: a noised sum leaves when enough updates came, whatever version each of them began at.

Devices begin when they are there, at the newest version. Each update is clipped,
multiplied by a weight of at most 1 that falls with its staleness, and added to
the sum; the K-th lets the noised sum out, and the server steps: a flush. Nobody
waits for the slowest, and the memory is one sum.

What is claimed. No sampling: who takes part in which flush, and so when a flush
happens, may be known. A person's update has at most the clip's norm, as the
weight comes after the clip; it is in one flush, and the person's next is at least
`separation` flushes later. So all flushes of a fixed horizon are one mechanism of
`hybrid.privacy.matrix`, of independent or correlated noise. How fast a device is,
and so at which flush it arrives, is taken not to depend on its private features.

Source:
    Nguyen et al., Federated learning with buffered asynchronous aggregation, AISTATS 2022 (algorithm 1; section 5 for
    the weights). https://arxiv.org/abs/2106.06639
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid.errors import ConfigError

OLDEST = 10
"""Flushes, by default."""


@dataclass(frozen=True)
class Buffer:
    """When a noised sum leaves, and what a stale update counts.

    Attributes:
        updates: K, of a flush; >= 1. What the sum is divided by.
        oldest: flushes that may happen between an update's beginning and its end; those that are later are not
            taken; >= 0.

    Raises:
        ConfigError: an attribute is outside its range.

    >>> Buffer(updates=10).weight(3)
    0.5
    """

    updates: int
    oldest: int = OLDEST

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("oldest", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")

    def weight(self, staleness: int) -> float:
        """Of a clipped update whose device began `staleness` flushes before the newest version; in (0, 1]."""
        return 1.0 / math.sqrt(1.0 + staleness)
