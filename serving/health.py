"""Whether a process lives and is ready, for probes, on the port of its metrics.

Alive is who works, whatever Kafka and Triton do: to restart a process because they are away helps nobody. Ready is
who has all that an answer needs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

WITHIN_S = 60.0  # between two rounds of a loop that works; each wait of it for Kafka, Triton or a store is shorter
STARTING_S = 300.0  # for its first round: libraries are imported, and networks warmed up, before it
LIVE, READY = "/health/live", "/health/ready"
Asgi = Callable[[Any, Any, Any], Any]


class Health:
    """Of one process.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until_s: float | None = None
        self._lacking: Callable[[], str | None] = lambda: "starting"

    def watch(self, lacking: Callable[[], str | None]) -> None:
        """Is asked, in some thread, what keeps the process from being ready; None: nothing does."""
        self._lacking = lacking

    def begin(self) -> None:
        """Says that a loop will soon work; a process that never says so is alive as long as it answers."""
        self._until_s = self._clock() + STARTING_S

    def beat(self) -> None:
        """Says that it has gone round."""
        self._until_s = self._clock() + WITHIN_S

    def live(self) -> str | None:
        """Why the process should be restarted, in a word; None: it should not."""
        return "stuck" if self._until_s is not None and self._clock() > self._until_s else None

    def ready(self) -> str | None:
        """Why nothing should be sent to the process, in a word; None: it can be."""
        return self._lacking()


def with_health(app: Asgi, health: Health) -> Asgi:
    """Answers `GET /health/live` and `/health/ready` beside another ASGI application: 200 `ok`, or 503 and a word."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        ask = {LIVE: health.live, READY: health.ready}.get(scope["path"])
        if ask is None:
            await app(scope, receive, send)
            return
        lacking = await asyncio.to_thread(ask)  # it may ask others, for a second or two
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 503 if lacking else 200, "headers": headers})
        await send({"type": "http.response.body", "body": f"{lacking or 'ok'}\n".encode()})

    return answer
