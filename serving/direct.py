"""The direct transport: the gateway asks the feature store and Triton itself, without Kafka between.

While one batch is merged, what comes in waits, and leaves together as the next
batch: a lone request waits for nobody, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hybrid.deployment import Deployment
from hybrid.errors import Unavailable
from hybrid.messages import Predictions
from serving.exchange import Limits, Room, answers
from serving.merge import MAX_BATCH_ROWS, Batch, merge
from serving.oip import Answers, Rows
from serving.readers import Readers
from serving.telemetry import Step, Telemetry
from serving.triton import Models


@dataclass(frozen=True)
class _Question:
    """One caller's rows, and where their answers are awaited."""

    deployment: Deployment
    rows: Rows
    asked_ms: int
    deadline_ms: int
    done: asyncio.Future[Predictions]

    @property
    def pair(self) -> tuple[str, int]:
        return self.deployment.model, self.deployment.version


class Direct:
    """Merges in a thread of its own, one batch after another. Lives on one event loop.

    Args:
        readers: the feature stores; used in that thread alone.
        models: the networks.
        now_ms: Unix time in milliseconds, UTC.
        limits: of what may wait, and how long.
        telemetry: counts and times; a batch has no span of its own, as each request waits for it within its own.
    """

    def __init__(
        self,
        readers: Readers,
        models: Models,
        now_ms: Callable[[], int],
        limits: Limits,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._readers, self._models, self._now_ms, self._limits = readers, models, now_ms, limits
        self._telemetry = telemetry or Telemetry()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="direct")
        self._waiting: deque[_Question] = deque()
        self._room = Room(limits)
        self._merging: asyncio.Task[None] | None = None
        self._prepared = False

    @property
    def ready(self) -> bool:
        """Whether what was served at the start has been prepared."""
        return self._prepared

    async def prepare(self, deployments: Sequence[Deployment]) -> None:
        """Of those that are declared for this transport: see `Readers.warm_up`."""
        loop, now_ms = asyncio.get_running_loop(), self._now_ms()
        direct = [deployment for deployment in deployments if deployment.serving.transport == "direct"]
        await loop.run_in_executor(self._thread, self._readers.warm_up, direct, self._models, now_ms)
        self._prepared = True

    def close(self) -> None:
        """Ends after the batch that is being merged."""
        self._thread.shutdown(cancel_futures=True)

    async def ask(self, deployment: Deployment, rows: Rows, timeout_s: float | None = None) -> Answers:
        """Waits for the predictions of all rows: see `Exchange.ask`."""
        with self._room.taken(rows):
            done: asyncio.Future[Predictions] = asyncio.get_running_loop().create_future()
            asked_ms = self._now_ms()
            deadline_ms = self._limits.ends_ms(asked_ms, timeout_s)
            self._waiting.append(_Question(deployment, rows, asked_ms, deadline_ms, done))
            if self._merging is None or self._merging.done():
                self._merging = asyncio.create_task(self._merge_all())
            found = await self._limits.within(done, timeout_s)
        return answers(
            Answers(
                found.prediction,
                found.feature_age_ms,
                found.status.tolist(),
                found.fallback.tolist(),
                found.expires_ms,
                found.server_embedding,
                found.server_slots,
            )
        )

    async def _merge_all(self) -> None:
        """Until nobody waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            together = self._next_batch()
            if not together:
                return
            try:
                found = await loop.run_in_executor(self._thread, self._merge, together)
            except RuntimeError:  # the thread is closed
                found = None
            place = 0
            for question in together:
                here = slice(place, place + len(question.rows))
                place = here.stop
                if question.done.done():  # its caller gave up
                    continue
                if found is None:
                    question.done.set_exception(Unavailable("the gateway is stopping"))
                else:
                    question.done.set_result(found[here])

    def _next_batch(self) -> list[_Question]:
        """The longest waiting question, with those to the same version that fit; what nobody waits for is dropped."""
        together: list[_Question] = []
        left: deque[_Question] = deque()
        rows = 0
        for question in self._waiting:
            fits = not together or (question.pair == together[0].pair and rows + len(question.rows) <= MAX_BATCH_ROWS)
            if question.done.done():
                continue
            if fits:
                together.append(question)
                rows += len(question.rows)
            else:
                left.append(question)
        self._waiting = left
        return together

    def _merge(self, together: Sequence[_Question]) -> Predictions:
        sizes = [len(question.rows) for question in together]
        n = sum(sizes)
        batch = Batch(
            together[0].deployment,
            reply_partition=np.zeros(n, np.int64),
            request_id=np.zeros(n, "V16"),
            entity=np.concatenate([question.rows.entity for question in together]),
            request=np.concatenate([question.rows.request for question in together]),
            embedding=np.concatenate([question.rows.embedding for question in together]),
            event_ms=np.repeat([question.asked_ms for question in together], sizes),
            wants_server=np.repeat([question.rows.contribution > 0 for question in together], sizes),
            deadline_ms=np.repeat([question.deadline_ms for question in together], sizes),
            wants_slots=np.repeat([question.rows.slots > 0 for question in together], sizes),
        )
        step = Step()
        stage = step.part(batch.deployment, n, ()).stage
        (found,) = merge(batch, self._readers.of, self._models, self._now_ms(), self._limits.deadline_s, stage=stage)
        self._telemetry.answered(found)
        self._telemetry.merged(step)
        return found
