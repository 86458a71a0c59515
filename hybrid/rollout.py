"""What a gateway tells devices of a model: which version to fetch, and which to leave.

`GET ROLLOUT` answers the same to all of them, so that nobody needs to know who asks. A device that finds a canary draws
a number for it, once, and keeps it to itself: below the canary's share it fetches that version, else the default. Who
has a version that was taken back goes to the one before it, if the control plane's key says so: a gateway alone cannot.
A shadow is told of where devices are to compute it beside the default; those whose host app lets them draw likewise.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybrid.deployment import MOST_HALTED, Canary, Window
from hybrid.errors import PlanError
from hybrid.plan import Count, Halt, Name, open_signed
from hybrid.trust import Trusted

ROLLOUT = "/v2/models/{model}/rollout"
MAX_BYTES = 64 << 10
MAX_HALT = 2 << 10  # bytes of one signed halt


class Rollout(BaseModel):
    """What devices of a model are to fetch.

    Attributes:
        model: whose.
        default: version that devices fetch.
        canary: what some fetch in its place.
        shadow: what some of those that let it fetch too, and ask about each row after the default; None: nobody does.
        halted: signed `hybrid.plan.Halt`s in base64, of versions that were taken back.
    """

    model_config = ConfigDict(frozen=True)  # what a later gateway says beside it is not for this device

    model: Name
    default: Count
    canary: Canary | None = None
    shadow: Canary | None = None
    halted: Annotated[tuple[str, ...], Field(max_length=MOST_HALTED)] = ()

    @classmethod
    def of(cls, window: Window) -> Rollout:
        """As a gateway says it."""
        signed = tuple(halted.signed for halted in window.halted)
        default, shadow = window.default, window.shadow
        return cls(
            model=default.model,
            default=default.version,
            canary=window.canary,
            shadow=Canary(version=shadow.version, share=shadow.share) if shadow and shadow.devices else None,
            halted=signed,
        )

    @classmethod
    def read(cls, data: bytes, model: str) -> Rollout:
        """As it came.

        Args:
            data: an answer's body.
            model: that was asked for.

        Raises:
            PlanError: it is none, or another model's.
        """
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            raise PlanError(f"the gateway's rollout is none: {error.error_count()} fields differ") from None
        if found.model != model:
            raise PlanError(f"the gateway's rollout is of {found.model!r}, not of {model!r}")
        return found

    def halts(self, trusted: Trusted) -> dict[int, str]:
        """Version -> why it was taken back, where the control plane says so; anybody else's word counts for nothing.

        Args:
            trusted: the host app's key.
        """
        found: dict[int, str] = {}
        for text in self.halted:
            try:
                message, _ = open_signed(base64.b64decode(text, validate=True), trusted, most=MAX_HALT)
            except (PlanError, binascii.Error):
                continue
            if isinstance(message, Halt) and message.model == self.model:
                found |= dict.fromkeys(message.versions, message.reason)
        return found
