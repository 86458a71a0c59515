"""Whether a device may take part now: a table of conditions, without I/O.

The person's consent comes first, and without it nothing else is looked at. Then every condition of the policy must
hold. What a host cannot tell counts against taking part, and is named apart from what it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from hybrid.plan import Policy

THERMAL = ("nominal", "fair", "serious", "critical")  # from cool to warm
Thermal = Literal["nominal", "fair", "serious", "critical"]


class Reason(StrEnum):
    """Why not, as one stable word each, for the host app and its counters."""

    NO_CONSENT = "no_consent"
    NOT_CHARGING = "not_charging"
    CHARGING_UNKNOWN = "charging_unknown"
    BATTERY_LOW = "battery_low"
    BATTERY_UNKNOWN = "battery_unknown"
    IN_USE = "in_use"
    IDLE_UNKNOWN = "idle_unknown"
    METERED = "metered"
    METERED_UNKNOWN = "metered_unknown"
    TOO_WARM = "too_warm"
    THERMAL_UNKNOWN = "thermal_unknown"
    LOW_SPACE = "low_space"
    SPACE_UNKNOWN = "space_unknown"
    CLOCK_BEHIND = "clock_behind"
    TOO_SOON = "too_soon"
    TOO_OFTEN = "too_often"


@dataclass(frozen=True)
class Readings:
    """What a host says of the device at one moment; None: it cannot tell.

    Attributes:
        consent: whether the person agrees to take part; what is not known is no.
        charging: whether it is on external power.
        battery: charge as a share in [0, 1]; 1 where there is none.
        idle: whether nobody is using it.
        metered: whether the network costs by volume.
        thermal: how warm it is.
        free_bytes: that a file may still take where the store lies.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # for readings that come in a file

    consent: bool = False
    charging: bool | None = None
    battery: float | None = None
    idle: bool | None = None
    metered: bool | None = None
    thermal: Thermal | None = None
    free_bytes: int | None = None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of what the host cannot tell."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is None)


@dataclass(frozen=True)
class Decision:
    """Whether a device may take part, and every reason why not; none where it may."""

    reasons: tuple[Reason, ...] = ()

    @property
    def eligible(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


@dataclass(frozen=True)
class Condition:
    """One line of the table.

    Attributes:
        reading: of `Readings`.
        asked: whether a policy has the condition.
        holds: whether it holds for a reading that the host can tell; a value outside its range does not.
        refused, unknown: the reason where it does not, or where the host cannot tell.
    """

    reading: str
    asked: Callable[[Policy], bool]
    holds: Callable[[Policy, Any], bool]
    refused: Reason
    unknown: Reason


CONDITIONS = (
    Condition("charging", lambda p: p.charging, lambda _, on: on is True, Reason.NOT_CHARGING, Reason.CHARGING_UNKNOWN),
    Condition(
        "battery",
        lambda p: p.battery > 0,
        lambda p, share: p.battery <= share <= 1,
        Reason.BATTERY_LOW,
        Reason.BATTERY_UNKNOWN,
    ),
    Condition("idle", lambda p: p.idle, lambda _, idle: idle is True, Reason.IN_USE, Reason.IDLE_UNKNOWN),
    Condition("metered", lambda p: p.unmetered, lambda _, paid: paid is False, Reason.METERED, Reason.METERED_UNKNOWN),
    Condition(
        "thermal",
        lambda _: True,
        lambda p, state: state in THERMAL[: THERMAL.index(p.thermal) + 1],
        Reason.TOO_WARM,
        Reason.THERMAL_UNKNOWN,
    ),
    Condition(
        "free_bytes",
        lambda p: p.free_mb > 0,
        lambda p, free: free >= p.free_mb << 20,
        Reason.LOW_SPACE,
        Reason.SPACE_UNKNOWN,
    ),
)


def decide(policy: Policy, readings: Readings, history: Sequence[int], now_ms: int) -> Decision:
    """Whether a device may take part.

    Args:
        policy: of the plan, or of the host app.
        readings: of this moment.
        history: when it took part before, in Unix milliseconds, in any order; at least those of the policy's longest
            time, and all that lie in the future. While it takes part, without the participation that goes on.
        now_ms: Unix time by the same clock.

    Returns:
        Every reason against it, in the order of the table. Where a time of its history lies ahead, the clock went back,
        and what it says of earlier times is not relied upon: `clock_behind` alone speaks for the history.
    """
    if not readings.consent:
        return Decision((Reason.NO_CONSENT,))
    reasons = [reason for condition in CONDITIONS if (reason := _reason(condition, policy, readings))]
    return Decision((*reasons, *_of_history(policy, history, now_ms)))


def both(*decisions: Decision) -> Decision:
    """May it by each of them; a reason that several give is named once."""
    return Decision(tuple(dict.fromkeys(reason for decision in decisions for reason in decision.reasons)))


def _reason(condition: Condition, policy: Policy, readings: Readings) -> Reason | None:
    if not condition.asked(policy):
        return None
    value = getattr(readings, condition.reading)
    if value is None:
        return condition.unknown
    return None if condition.holds(policy, value) else condition.refused


def _of_history(policy: Policy, history: Sequence[int], now_ms: int) -> tuple[Reason, ...]:
    if not history:
        return ()
    if max(history) > now_ms:
        return (Reason.CLOCK_BEHIND,)
    too_soon = now_ms - max(history) < policy.separation_s * 1000
    recent = sum(now_ms - at < policy.period_s * 1000 for at in history)
    too_often = recent >= policy.participations
    return (Reason.TOO_SOON,) * too_soon + (Reason.TOO_OFTEN,) * too_often
