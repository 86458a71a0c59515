"""How a participation goes on, as a table of which event leads from where to where, and the update that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from hybrid.plan import Policy
from hybrid.tokens import Pending


@dataclass(frozen=True)
class Upload:
    """An update that waits to be sent, and what it may be sent under.

    Attributes:
        plan, upload: the plan's id, and its own.
        body: as it travels, each time the same.
        expires_ms: after which nobody takes it.
        version: of the bundle that it was trained with.
        policy: the plan's, which holds for every attempt.
        reports: whether it is of the device's journal, and sent by sessions that report alone.
    """

    plan: str
    upload: str
    body: bytes = field(repr=False)
    expires_ms: int
    version: int
    policy: Policy = field(default_factory=Policy)
    reports: bool = False


@dataclass(frozen=True)
class Held:
    """A token of a window, or what it is asked for with: kept before the issuer is asked, so that it can be again.

    Attributes:
        scope, number: of the window.
        asked: the request, and what its answer is made a token with.
        expires_ms: after which no update is taken with it.
        token: None: the issuer has not answered.
    """

    scope: str
    number: int
    asked: Pending
    expires_ms: int
    token: bytes | None = field(default=None, repr=False)


class State(StrEnum):
    """Where a participation is."""

    IDLE = "idle"
    CHECKED_IN = "checked_in"  # asked; whatever was answered is not believed yet
    PLANNED = "planned"  # a plan that was verified, and is for this device
    TRAINING = "training"  # in the store as begun: never again for this plan
    READY = "ready"  # the update is in the store, with its upload's id
    UPLOADING = "uploading"
    DONE = "done"
    DROPPED = "dropped"


class Event(StrEnum):
    """What happens to it."""

    ASKED = "asked"  # the aggregator was asked for something to do
    FOUND = "found"  # the store holds an update that an earlier process did not get rid of
    OFFERED = "offered"  # a plan that holds
    BEGUN = "begun"
    TRAINED = "trained"  # and kept
    SENT = "sent"
    LOST = "lost"  # no answer, or one that asks for patience: the same again, later
    TAKEN = "taken"
    ENDED = "ended"  # nothing to do, not eligible, not wanted, expired, or consent withdrawn


NEXT: Mapping[tuple[State, Event], State] = {
    (State.IDLE, Event.ASKED): State.CHECKED_IN,
    (State.IDLE, Event.FOUND): State.READY,
    (State.IDLE, Event.ENDED): State.DROPPED,
    (State.CHECKED_IN, Event.OFFERED): State.PLANNED,
    (State.CHECKED_IN, Event.ENDED): State.DROPPED,
    (State.PLANNED, Event.BEGUN): State.TRAINING,
    (State.PLANNED, Event.ENDED): State.DROPPED,
    (State.TRAINING, Event.TRAINED): State.READY,
    (State.TRAINING, Event.ENDED): State.DROPPED,
    (State.READY, Event.SENT): State.UPLOADING,
    (State.READY, Event.ENDED): State.DROPPED,
    (State.UPLOADING, Event.LOST): State.READY,  # sent again with the same id and the same bytes
    (State.UPLOADING, Event.TAKEN): State.DONE,
    (State.UPLOADING, Event.ENDED): State.DROPPED,
}
OVER = frozenset({State.DONE, State.DROPPED})


def advance(state: State, event: Event) -> State:
    """The state after an event.

    Raises:
        ValueError: the table has no such line.

    >>> advance(State.UPLOADING, Event.LOST)
    <State.READY: 'ready'>
    """
    try:
        return NEXT[state, event]
    except KeyError:
        raise ValueError(f"a participation that is {state} cannot be {event}") from None
