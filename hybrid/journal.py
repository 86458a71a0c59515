"""How far a device came with a version in a week, and why no further: what its journal says, and what a funnel counts.

The words are a closed list: nothing that a server or a person wrote gets into a journal, or out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """How far a device came, in order; whoever came to one came through those before it."""

    CHECKED = "checked"  # it asked for a bundle, and was offered this version
    DOWNLOADED = "downloaded"  # and has it
    ELIGIBLE = "eligible"  # by the host app's conditions it could take part, and it asked for something to do
    PLANNED = "planned"  # and was given a plan for this version
    TRAINED = "trained"  # or answered: what it sends is in its store
    UPLOADED = "uploaded"

    @property
    def left(self) -> int:
        """Phases between it and the last.

        >>> Phase.UPLOADED.left, Phase.CHECKED.left
        (0, 5)
        """
        return len(Phase) - 1 - list(Phase).index(self)

    @classmethod
    def with_left(cls, left: int) -> Phase:
        """The one with so many behind it."""
        return list(cls)[len(cls) - 1 - left]


UNTRIED = "untried"  # nothing was tried after the download
BROKE_OFF = "broke_off"  # the process ended, or failed, in the midst of its work
WAITING = "waiting"  # what was trained is to be sent by a later session

CONDITIONS = (
    *("not_charging", "charging_unknown", "battery_low", "battery_unknown", "in_use", "idle_unknown", "metered"),
    *("metered_unknown", "too_warm", "thermal_unknown", "low_space", "space_unknown", "clock_behind", "too_soon"),
    "too_often",
)
"""Of a device that may not take part."""

STOPS: Mapping[Phase, tuple[str, ...]] = {
    Phase.CHECKED: ("refused", "interrupted"),
    Phase.DOWNLOADED: (UNTRIED, "halted", *CONDITIONS),
    Phase.ELIGIBLE: (
        *("unreachable", "nothing", "busy", "bad_answer", "bad_plan", "halted", "no_training", "cannot_answer"),
        *("no_credentials", "other_model", "other_version", "other_definition", "expired", "too_large"),
    ),
    Phase.PLANNED: (
        *("not_issued", "account_waits", "few_examples", "taken_part", "not_sampled", "not_its_turn", "bad_plan"),
        *("expired", "gave_up", BROKE_OFF, *CONDITIONS),
    ),
    Phase.TRAINED: (WAITING, "refused", "expired", "halted", *CONDITIONS),
}
"""Why a device came to a phase, and no further: the words of `device_runtime.participation.Ending`, of its conditions
(`device_runtime.eligibility.Reason`) and of downloads."""

VERSION, LEFT, STOPPED = "version", "left", "stopped"
TEXTS: Mapping[str, bool] = {VERSION: True, LEFT: False, STOPPED: True}
"""Columns that a query about journals may read -> whether they hold text: the version's number, the phases that were
left to go, and where and why it stopped, see `stop`."""


def stop(phase: Phase, reason: str) -> str:
    """Where and why a device stopped, as the column has it.

    >>> stop(Phase.DOWNLOADED, "not_charging")
    'downloaded:not_charging'
    """
    return f"{phase}:{reason}"


@dataclass(frozen=True)
class Noted:
    """What a journal says of one version in one week.

    Attributes:
        version: which.
        phase: the furthest that was reached.
        reason: why no further, one of `STOPS`; None for the last phase.
    """

    version: int
    phase: Phase
    reason: str | None

    @property
    def columns(self) -> dict[str, list[Any]]:
        """As the one row that a query reads."""
        stopped = None if self.reason is None else stop(self.phase, self.reason)
        return {VERSION: [str(self.version)], LEFT: [self.phase.left], STOPPED: [stopped]}
