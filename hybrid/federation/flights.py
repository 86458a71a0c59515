"""Simulated asynchronous training: which device begins when, at which version, and in which flush its update is.

Columns, not events: time goes in ticks, at each of which free places are taken by
devices that are there and may take part again. No weights, no data: whoever trains
them asks for one flush after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import ConfigError
from hybrid.federation.buffer import Buffer
from hybrid.federation.fleet import FLEET, Fleet, Work

TICK_S = 5.0
"""How often devices look whether there is a place: the more often, the fewer places are empty."""

IDLE_TICKS = 12
"""That pass at once where nobody is on the way and nobody came: a fleet may be away for hours."""

LIMIT_S = 86_400.0
"""After which a flush is over, whoever came, as a fleet's is after its time limit."""

Users = NDArray[np.int64]


@dataclass(frozen=True)
class Flush:
    """Updates that leave in one sum.

    Attributes:
        number: from 1; the version after it.
        time_s: when it was over: seconds since midnight, UTC, of the first day.
        users: (k,) distinct, in the order of their coming; K, but where time ran out.
        began: (k,) the version that each trained from, in [0, number).
        lost: devices since the flush before that began and sent nothing: gone, too slow, or too stale.
    """

    number: int
    time_s: float
    users: Users = field(repr=False)
    began: Users = field(repr=False)
    lost: int

    @property
    def staleness(self) -> Users:
        """(k,) flushes that happened while each trained."""
        return self.number - 1 - self.began


@dataclass(frozen=True)
class Flights:
    """Who is on the way between two flushes.

    Attributes:
        tick: how many are over.
        version: flushes so far.
        users, began, ends_s: (m,) each on the way: which, from which version, and until when.
        lost: (m,) whether it will send nothing.
        came, came_began: (w,) those in the buffer, in the order of their coming; fewer than K.
        free_at: (n,) version from which on each user may begin again.
    """

    tick: int
    version: int
    users: Users = field(repr=False)
    began: Users = field(repr=False)
    ends_s: NDArray[np.float64] = field(repr=False)
    lost: NDArray[np.bool_] = field(repr=False)
    came: Users = field(repr=False)
    came_began: Users = field(repr=False)
    free_at: Users = field(repr=False)

    @classmethod
    def none(cls, users: int) -> Flights:
        """Before the first tick."""
        empty = np.zeros(0, np.int64)
        return cls(0, 0, empty, empty, np.zeros(0), np.zeros(0, bool), empty, empty, np.zeros(users, np.int64))


@dataclass(frozen=True)
class Schedule:
    """How flights come about. Pure but for numbers that the seed fixes.

    Attributes:
        fleet: who is there, and how fast.
        work: what each does; after its `deadline_s` a device gives up.
        buffer: when a flush is full, and how stale an update may be.
        separation: b: in any b flushes one after another a user is in one at most. A device cannot know in which of
            the next it will be: it begins again as if that were the last that may be (`hybrid.plan.Turn`).
        at_once: devices on the way at the same time, at most.
        examples: (n,) rows of each user.
        seed: of who takes a free place, and who is lost.

    Raises:
        ConfigError: the users are too few for so many updates so far apart, or `at_once` is less than 1.
    """

    fleet: Fleet
    work: Work
    buffer: Buffer
    separation: int
    at_once: int
    examples: NDArray[np.integer] = field(repr=False)
    seed: int

    def __post_init__(self) -> None:
        updates, oldest, users = self.buffer.updates, self.buffer.oldest, self.fleet.users
        if updates * (self.separation + oldest) > users:
            raise ConfigError(
                f"buffer x (separation + max_staleness) must be at most the {users} users, got {updates} x "
                f"({self.separation} + {oldest}): nobody would be left whose turn it is"
            )
        if self.at_once < 1:
            raise ConfigError(f"concurrency must be at least 1, got {self.at_once!r}")

    def flush(self, flights: Flights) -> tuple[Flights, Flush]:
        """Goes on until the buffer is full, or time is up."""
        lost, first = 0, flights.tick
        while True:
            flights, flush, gone = self._landed(flights, self._time(flights.tick) >= self._time(first) + LIMIT_S)
            lost += gone
            if flush is not None:
                return flights, replace(flush, lost=lost)
            flights = self._started(flights)

    def _landed(self, flights: Flights, over: bool) -> tuple[Flights, Flush | None, int]:
        """Takes up whose time is over, in their order, until the buffer is full; and how many of them sent nothing."""
        now = self._time(flights.tick)
        order = np.argsort(flights.ends_s, kind="stable")
        order = order[: np.searchsorted(flights.ends_s[order], now, side="right")]
        if not len(order) and not over:
            return flights, None, 0
        stale = flights.version - flights.began[order] > self.buffer.oldest
        counts = ~(flights.lost[order] | stale)
        wanted = self.buffer.updates - len(flights.came)
        full = int(counts.sum()) >= wanted
        if full:
            taken = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
            order, counts = order[:taken], counts[:taken]
        came = np.concatenate([flights.came, flights.users[order][counts]])
        began = np.concatenate([flights.came_began, flights.began[order][counts]])
        flying = np.delete(np.arange(len(flights.users)), order)
        after = replace(
            flights,
            users=flights.users[flying],
            began=flights.began[flying],
            ends_s=flights.ends_s[flying],
            lost=flights.lost[flying],
            came=came,
            came_began=began,
        )
        gone = int((~counts).sum())
        if not (full or over):
            return after, None, gone
        number, none = flights.version + 1, np.zeros(0, np.int64)
        flush = Flush(number, float(flights.ends_s[order[-1]]) if full else now, came, began, 0)
        return replace(after, version=number, came=none, came_began=none), flush, gone

    def _started(self, flights: Flights) -> Flights:
        """Free places are taken, and the tick is over."""
        now, places = self._time(flights.tick), self.at_once - len(flights.users)
        if places <= 0:
            return replace(flights, tick=flights.tick + 1)
        rng = np.random.default_rng([self.seed, FLEET, 1 + flights.tick])
        rested = rng.permutation(np.flatnonzero(flights.free_at <= flights.version))
        there = rested[self.fleet.available(rested, now)]
        users = there[:places]
        idle = not len(users) and not len(flights.users)
        kinds = self.fleet.device_class[users]
        dropout = np.array([one.dropout for one in self.fleet.trace.classes])
        seconds = self.fleet.seconds(users, self.work, self.examples[users])
        lost = (rng.random(len(users)) < dropout[kinds]) | (seconds > self.work.deadline_s)
        free_at = flights.free_at.copy()
        free_at[users] = flights.version + self.buffer.oldest + self.separation  # whether or not it will be counted
        return replace(
            flights,
            tick=flights.tick + (IDLE_TICKS if idle else 1),
            users=np.concatenate([flights.users, users]),
            began=np.concatenate([flights.began, np.full(len(users), flights.version)]),
            ends_s=np.concatenate([flights.ends_s, now + np.minimum(seconds, self.work.deadline_s)]),
            lost=np.concatenate([flights.lost, lost]),
            free_at=free_at,
        )

    def _time(self, tick: int) -> float:
        return self.fleet.trace.start_s(1) + tick * TICK_S
