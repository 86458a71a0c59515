"""The merge worker: takes device embeddings, answers each row once or more, and says what it could not read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hybrid.deployment import Deployment
from hybrid.errors import Unavailable
from hybrid.messages import DeadLetter, Predictions
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S
from serving.kafka import Inbox, Outbox
from serving.merge import Batch, Reader, decode, merge
from serving.readers import Readers
from serving.triton import Models

log = logging.getLogger(__name__)

POLL_S = 0.2
PAUSE_S = 1.0  # before records are tried again whose answers Kafka did not take
REFRESH_MS = 1_000


class Worker:
    """One process of the consumer group.

    Offsets are committed after the replies lie in Kafka: a worker that dies is
    followed by one that answers the same rows again, and the gateway drops repeats.

    Args:
        inbox, outbox: its two ends.
        deployments: what is served.
        open_reader: opens the feature store for a deployment; called once for each.
        models: the networks.
        now_ms: Unix time in milliseconds, UTC.
        deadline_s: the gateways'; nobody waits longer for an answer.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        outbox: Outbox,
        deployments: Deployments,
        open_reader: Callable[[Deployment], Reader],
        models: Models,
        now_ms: Callable[[], int],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._inbox, self._outbox, self._deployments = inbox, outbox, deployments
        self._readers, self._models, self._now_ms = Readers(open_reader), models, now_ms
        self._deadline_s = deadline_s
        self._behind = False
        self._refreshed_ms = now_ms()

    def run(self, stopping: threading.Event, ready: Callable[[], bool], announce: Callable[[], None]) -> None:
        """Works until `stopping` is set, then ends between two polls; calls `announce` once `ready`."""
        announced = False
        self._readers.warm_up(self._deployments.current, self._models, self._now_ms())
        while not stopping.is_set():
            try:
                self.step()
            except Unavailable as error:
                log.error("%s; the records will be tried again", error)
                stopping.wait(PAUSE_S)
            if not announced and ready():
                announced = True
                announce()

    def step(self) -> None:
        """Polls once, answers what came, commits.

        Raises:
            Unavailable: Kafka did not take the answers; the next step starts from the last commit.
        """
        self._refresh()
        if self._behind:
            self._inbox.rewind()
            self._behind = False
        records = self._inbox.poll(POLL_S)
        if not records:
            return
        self._behind = True
        decoded = decode(records, self._find)
        for message in [*decoded.refused, *(answer for batch in decoded.batches for answer in self._merge(batch))]:
            self._outbox.send(Predictions.TOPIC, message.to_bytes(), message.reply_partition)
        for letter in decoded.dead:
            log.warning("dead letter: partition %d, offset %d: %s", letter.partition, letter.offset, letter.reason)
            self._outbox.send(DeadLetter.topic_for(letter.topic), letter.model_dump_json().encode())
        self._outbox.flush()
        self._inbox.commit()
        self._behind = False

    def _find(self, model: str, version: int) -> Deployment | None:
        found = self._deployments.find(model, version)
        if found is None:  # the gateway may have seen a promotion first
            self._deployments.refresh()
            found = self._deployments.find(model, version)
        return found

    def _merge(self, batch: Batch) -> list[Predictions]:
        return merge(batch, self._readers.of, self._models, self._now_ms(), self._deadline_s)

    def _refresh(self) -> None:
        if self._now_ms() - self._refreshed_ms >= REFRESH_MS:
            self._refreshed_ms = self._now_ms()
            self._deployments.refresh()
            self._readers.open_all(self._deployments.current)
