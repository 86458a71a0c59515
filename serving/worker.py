"""The merge worker: takes device embeddings, answers each row once or more, and says what it could not read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from hybrid.deployment import Deployment
from hybrid.errors import ConfigError, HybridError, Unavailable
from hybrid.messages import DeadLetter, Predictions
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S
from serving.kafka import Inbox, Outbox
from serving.merge import Batch, Reader, Sample, decode, forward, merge, probe
from serving.telemetry import UNREADABLE, Step, Telemetry
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
        telemetry: counts, times and traces.
        sample: called with each batch that was predicted.
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
        telemetry: Telemetry | None = None,
        sample: Sample = lambda *_: None,
    ) -> None:
        self._inbox, self._outbox, self._deployments = inbox, outbox, deployments
        self._open_reader, self._models, self._now_ms = open_reader, models, now_ms
        self._sample = sample
        self._deadline_s, self._telemetry = deadline_s, telemetry or Telemetry()
        self._readers: dict[tuple[str, int], Reader] = {}
        self._said: dict[str, str | None] = {}
        self._behind = False
        self._refreshed_ms = now_ms()

    def run(self, stopping: threading.Event, ready: Callable[[], bool], announce: Callable[[], None]) -> None:
        """Works until `stopping` is set, then ends between two polls; calls `announce` once `ready`."""
        announced = False
        self._open_readers()
        self._warm_up()
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
        step = Step()
        with step.stage("poll"):
            records = self._inbox.poll(POLL_S)
        if not records:
            return
        self._behind = True
        with step.stage("decode"):
            decoded = decode(records, self._find)
        answers = [*decoded.refused, *(answer for batch in decoded.batches for answer in self._merge(batch, step))]
        with step.stage("send"):
            self._answer(answers, decoded.dead)
        self._behind = False
        self._telemetry.stepped(step, len(records))

    def _answer(self, answers: Iterable[Predictions], dead: Iterable[DeadLetter]) -> None:
        """Returns once all of it lies in Kafka, and the offsets too."""
        for message in answers:
            self._outbox.send(Predictions.TOPIC, message.to_bytes(), message.reply_partition)
            self._telemetry.answered(message)
        for letter in dead:
            log.warning("dead letter: partition %d, offset %d: %s", letter.partition, letter.offset, letter.reason)
            self._outbox.send(DeadLetter.topic_for(letter.topic), letter.model_dump_json().encode())
            self._telemetry.dead_letter(UNREADABLE)
        self._outbox.flush()
        self._inbox.commit()

    def _find(self, model: str, version: int) -> Deployment | None:
        found = self._deployments.find(model, version)
        if found is None:  # the gateway may have seen a promotion first
            self._deployments.refresh()
            found = self._deployments.find(model, version)
        return found

    def _merge(self, batch: Batch, step: Step) -> list[Predictions]:
        part = step.part(batch.deployment, len(batch), batch.traces)
        return merge(
            batch,
            self._reader,
            self._models,
            self._now_ms(),
            self._deadline_s,
            stage=part.stage,
            sample=self._sample,
        )

    def _reader(self, deployment: Deployment) -> Reader:
        key = deployment.model, deployment.version
        if key not in self._readers:
            self._readers[key] = self._open_reader(deployment)
        return self._readers[key]

    def _refresh(self) -> None:
        if self._now_ms() - self._refreshed_ms >= REFRESH_MS:
            self._refreshed_ms = self._now_ms()
            self._deployments.refresh()
            self._open_readers()

    def _warm_up(self) -> None:
        """Runs each stage once for each model, which takes seconds that the first request would wait."""
        for deployment in self._deployments.current.values():
            batch, joined = probe(deployment)
            try:
                self._reader(deployment).read([""], self._now_ms())
                forward(batch, joined, self._models)
            except HybridError as error:
                log.warning("model %s could not be tried: %s", deployment.model, error)

    def _open_readers(self) -> None:
        """Ahead of the first request, which would wait for it for seconds."""
        for deployment in self._deployments.current.values():
            said = None
            try:
                self._reader(deployment)
            except ConfigError as error:
                said = f"cannot be predicted yet: {error}"
            if said and said != self._said.get(deployment.model):  # else once a second
                log.error("model %s %s", deployment.model, said)
            self._said[deployment.model] = said
