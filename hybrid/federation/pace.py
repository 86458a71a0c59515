"""When devices are told to come back: so many a second as the next round wants, and never all at once.

Nothing is known of single devices. How many there are follows from how often they come and how long they were told
to stay away (Little's law): a hundred that come once a second are a hundred, and so are those that come once a minute
each, 1.7 a second in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

SMALL_SPREAD = 0.5  # of a round's length: even a small fleet does not come in the same second
LONGEST_S = 86_400.0  # devices cut a longer wait
MEMORY = 10.0  # round lengths over which arrivals are remembered


def wait_s(opens_in_s: float, round_s: float, *, wanted: float, fleet: float, toss: float) -> float:
    """How long a device stays away.

    A small fleet, of no more than a round wants, comes within the first half of the next round. A larger one is
    spread so that each device comes once in fleet / wanted rounds, on average, and `wanted` come to each.

    Args:
        opens_in_s: until the next round opens; >= 0.
        round_s: that a round is open.
        wanted: how many are to come to one round; > 0.
        fleet: how many there are that wait for a round.
        toss: uniform in [0, 1), the device's own.

    Returns:
        Seconds in [0, LONGEST_S].

    Source:
        Bonawitz et al., MLSys 2019, section 2.3 (pace steering). https://arxiv.org/abs/1902.01046

    >>> wait_s(10, 60, wanted=100, fleet=50, toss=0.5), wait_s(10, 60, wanted=100, fleet=100_000, toss=0.5)
    (25.0, 60010.0)
    """
    # Uniform, so half of the spread on average.
    rounds = SMALL_SPREAD if fleet <= wanted else 2 * fleet / wanted
    return min(opens_in_s + toss * round_s * rounds, LONGEST_S)


@dataclass
class Arrivals:
    """How many devices wait for a round, by how often they come; older arrivals count for less.

    Attributes:
        memory_s: time constant; > 0.
        begun_s: when it began to look, on a clock that only goes forward.
    """

    memory_s: float
    begun_s: float
    _away_s: float = field(default=0.0, repr=False)
    _last_s: float = field(default=-math.inf, repr=False)

    def add(self, now_s: float, away_s: float) -> None:
        """A device came, and stays away for about as long."""
        self._away_s = self._decayed(now_s) + away_s
        self._last_s = now_s

    def fleet(self, now_s: float) -> float:
        """How many devices wait: arrivals a second x seconds away, over what is remembered.

        Few, where it has looked for less than a tenth of its memory.
        """
        looked_s = self.memory_s * -math.expm1(-(now_s - self.begun_s) / self.memory_s)
        return self._decayed(now_s) / max(looked_s, self.memory_s / MEMORY)

    def _decayed(self, now_s: float) -> float:
        return self._away_s * math.exp((self._last_s - now_s) / self.memory_s) if self._away_s else 0.0
