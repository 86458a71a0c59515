"""What a device says to the aggregator.

A check-in and an upload share nothing that tells devices apart, see `device_runtime.caller`; answers are believed only
where they are signed.
"""

from __future__ import annotations

from device_runtime.caller import TIMEOUT_S, Caller, Reply
from hybrid.plan import CHECK_IN, UPDATE, CheckIn

MAX_SAID = 4096  # bytes of an answer that says no more than its status


class Aggregator:
    """The aggregator's two requests.

    Args:
        url: base URL, https:// or of this machine.
        timeout_s: of one request, all of its answer included.

    Raises:
        ConfigError: `url` is none that an update may be sent to, or `timeout_s` is not positive.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._caller = Caller(url, "aggregator", timeout_s=timeout_s)

    async def check_in(self, message: CheckIn, most: int) -> Reply:
        """Asks for something to do; `most`: bytes of the answer."""
        content, headers = message.model_dump_json(exclude_none=True).encode(), {"Content-Type": "application/json"}
        return await self._caller.ask("POST", CHECK_IN, content, headers, most=most)

    async def upload(self, plan: str, upload: str, body: bytes) -> Reply:
        """Sends an update, once or again."""
        path, headers = UPDATE.format(plan=plan, upload=upload), {"Content-Type": "application/octet-stream"}
        return await self._caller.ask("PUT", path, body, headers, most=MAX_SAID)
