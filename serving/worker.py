"""The merge worker: takes device embeddings, answers each row once or more, and says what it could not read.

One thread polls and commits; a few others each carry a batch through its stages,
so that one's Python runs while another's waits for Triton, Feast or Kafka.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrid.deployment import Deployment
from hybrid.errors import Unavailable
from hybrid.messages import DeadLetter, Predictions
from serving.deployments import Deployments
from serving.exchange import DEADLINE_S
from serving.kafka import Inbox, Outbox, Record
from serving.merge import Batch, Joined, Reader, Sample, decode, merge, within_limit
from serving.readers import Readers
from serving.shadow import Shadows
from serving.telemetry import Step, Telemetry
from serving.topics import PARTITIONS
from serving.triton import Float32, Models

if TYPE_CHECKING:
    from hybrid.sealing import SealingKey

log = logging.getLogger(__name__)

POLL_S = 0.2
BUSY_POLL_S = 0.02  # while batches are on their way, whose offsets wait to be committed
STALLED_S = 0.5  # batches that take longer hold up polling: without it the group would give our share away
BUDGET_S = 0.02
LEAST_BYTES, MOST_BYTES = 64 << 10, 1 << 20  # of a batch
IN_FLIGHT = 3
PAUSE_S = 1.0  # before records are tried again whose answers Kafka did not take
REFRESH_MS = 1_000


class Pace:
    """How many records a batch takes: as many as are through within a budget of time.

    A few records are never kept waiting for company. Under load a batch grows while
    it stays within the budget, and shrinks when it does not; to no less than
    `least_bytes`, below which what each batch costs would make all of them later.

    Args:
        budget_s: of a batch, from its bytes to its answers in Kafka.
        least_bytes, most_bytes: of a batch; at least one record.

    Source:
        Crankshaw et al., Clipper, NSDI 2017, section 4.3.1: additive increase, multiplicative decrease.
    """

    def __init__(
        self, budget_s: float = BUDGET_S, *, least_bytes: int = LEAST_BYTES, most_bytes: int = MOST_BYTES
    ) -> None:
        self._budget_s, self._least, self._most = budget_s, least_bytes, most_bytes
        self._bytes, self._record_bytes = least_bytes, 1_000.0

    @property
    def records(self) -> int:
        """Of the next batch, at most."""
        return max(1, int(self._bytes / self._record_bytes))

    def took(self, records: int, size: int, seconds: float) -> None:
        """Learns from a batch of `size` bytes."""
        full = records >= self.records
        self._record_bytes += 0.2 * (size / records - self._record_bytes)
        if seconds > self._budget_s:
            self._bytes = max(self._least, int(0.9 * self._bytes))
        elif full:
            self._bytes = min(self._most, self._bytes + self._least)


@dataclass(frozen=True)
class _Flight:
    """A batch on its way: the offsets that may be committed once it has arrived, and how long it took."""

    upto: dict[int, int]
    records: int
    size: int  # bytes
    seconds: Future[float]


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
        in_flight: batches at once; with more, none is taken.
        pace: how large they are.
        key: seals the bytes of records that cannot be read; without one they are not kept.
        telemetry: counts, times and traces.
        sample: called with each batch that was predicted.
        shadows: run beside the default; None: none does.
        reply_partitions: of the topic of answers.
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
        in_flight: int = 1,
        pace: Pace | None = None,
        key: SealingKey | None = None,
        telemetry: Telemetry | None = None,
        sample: Sample = lambda *_: None,
        shadows: Shadows | None = None,
        reply_partitions: int = PARTITIONS[Predictions.TOPIC],
    ) -> None:
        self._inbox, self._outbox, self._deployments = inbox, outbox, deployments
        self._readers, self._models, self._now_ms = Readers(open_reader), models, now_ms
        self._deadline_s, self._key = deadline_s, key
        self._telemetry, self._sample, self._shadows = telemetry or Telemetry(), sample, shadows
        self._reply_partitions = reply_partitions
        self._in_flight, self._pace = in_flight, pace or Pace()
        self._flights: deque[_Flight] = deque()
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix="merge")
        self._refreshing = threading.Lock()  # the deployments, which the threads share
        self._behind = False
        self._refreshed_ms = now_ms()

    def run(self, stopping: threading.Event, ready: Callable[[], bool], announce: Callable[[], None]) -> None:
        """Works until `stopping` is set, then finishes what it has taken; calls `announce` once `ready`."""
        announced, health = False, self._telemetry.health
        health.begin()
        self._readers.warm_up(self._deployments.current, self._models, self._now_ms())
        while not stopping.is_set():
            try:
                self.step()
            except Unavailable as error:
                log.error("%s; the records will be tried again", error)
                stopping.wait(PAUSE_S)
            health.beat()
            if not announced and ready():
                announced = True
                announce()
        try:
            self._land(most=0)
        except Unavailable as error:
            log.error("%s; the next worker will try the records again", error)
        self._threads.shutdown()

    def step(self) -> None:
        """Polls once, sends what came on its way, commits what has arrived.

        Raises:
            Unavailable: Kafka did not take the answers; the next step starts from the last commit.
        """
        self._refresh()
        if self._behind:
            self._inbox.rewind()
            self._behind = False
        self._take(BUSY_POLL_S if self._flights else POLL_S)
        self._land(most=self._in_flight - 1)

    def _take(self, timeout_s: float) -> None:
        """The next records, if any, as a batch."""
        step = Step()
        with step.stage("poll"):
            records = self._inbox.poll(timeout_s, self._pace.records)
        if records:
            upto = {record.partition: record.offset + 1 for record in records}  # in order, so the last counts
            size = sum(len(record.value) for record in records)
            self._flights.append(_Flight(upto, len(records), size, self._threads.submit(self._answer, records, step)))

    def _land(self, most: int) -> None:
        """Commits the batches that have arrived, in their order; waits until at most so many are on their way.

        Raises:
            Unavailable: one cannot arrive; nothing after the last commit counts.
        """
        upto: dict[int, int] = {}
        try:
            self._wait(most)
            while self._flights and self._flights[0].seconds.done():
                flight = self._flights[0]
                self._pace.took(flight.records, flight.size, flight.seconds.result())
                upto |= self._flights.popleft().upto
        except BaseException:
            wait([flight.seconds for flight in self._flights])
            self._flights.clear()
            self._behind = True
            raise
        finally:
            if upto:
                self._inbox.commit(upto)

    def _wait(self, most: int) -> None:
        """Should it take long, polls go on with the share paused, lest the group give it away."""
        paused = False
        while wait(self._surplus(most), STALLED_S).not_done:
            self._inbox.pause()
            paused = True
            self._take(0)  # a rebalance may bring partitions that are not paused
        if paused:
            self._inbox.resume()

    def _surplus(self, most: int) -> list[Future[float]]:
        """All but the `most` youngest batches."""
        return [flight.seconds for flight in self._flights][: max(0, len(self._flights) - most)]

    def _answer(self, records: Sequence[Record], step: Step) -> float:
        """Carries a batch through its stages until its answers lie in Kafka; returns the seconds that took.

        Raises:
            Unavailable: Kafka did not take them.
        """
        begun = time.perf_counter()
        with step.stage("decode"):
            decoded = decode(records, self._find, self._key, self._reply_partitions)
        merged: list[tuple[Batch, Joined]] = []
        parts = (self._merge(batch, step, merged) for batch in decoded.batches)
        answers = [*decoded.refused, *(answer for part in parts for answer in part)]
        with step.stage("send"):
            self._send(answers, decoded.dead)
        for batch, joined in merged:
            self._shade(batch, joined)
        self._telemetry.stepped(step, len(records))
        return time.perf_counter() - begun

    def _send(self, answers: Sequence[Predictions], dead: Sequence[DeadLetter]) -> None:
        """Returns once all of it lies in Kafka."""
        for message in (part for whole in answers for part in within_limit(whole)):
            self._outbox.send(Predictions.TOPIC, message.to_bytes(), message.reply_partition)
        for letter in dead:
            place = letter.partition, letter.offset
            log.warning("dead letter: partition %d, offset %d: %s: %s", *place, letter.code, letter.reason)
            self._outbox.send(DeadLetter.topic_for(letter.topic), letter.model_dump_json().encode())
        self._outbox.flush()
        for message in answers:
            self._telemetry.answered(message)
        for letter in dead:
            self._telemetry.dead_letter(letter.code)

    def _find(self, model: str, version: int) -> Deployment | None:
        found = self._deployments.find(model, version)
        if found is None:  # the gateway may have seen a promotion first
            with self._refreshing:
                self._deployments.refresh()
            found = self._deployments.find(model, version)
        return found

    def _shade(self, batch: Batch, joined: Joined) -> None:
        """Once the batch was answered: nobody waits for it any more."""
        if self._shadows is not None and (beside := self._deployments.shadow(batch.deployment)) is not None:
            self._shadows.offer(batch, joined, *beside)

    def _merge(self, batch: Batch, step: Step, merged: list[tuple[Batch, Joined]]) -> list[Predictions]:
        part = step.part(batch.deployment, len(batch), batch.traces)

        def sample(batch: Batch, joined: Joined, prediction: Float32, now_ms: int) -> None:
            self._sample(batch, joined, prediction, now_ms)
            merged.append((batch, joined))

        return merge(
            batch,
            self._readers.of,
            self._models,
            self._now_ms(),
            self._deadline_s,
            stage=part.stage,
            sample=sample,
        )

    def _refresh(self) -> None:
        if self._now_ms() - self._refreshed_ms >= REFRESH_MS:
            self._refreshed_ms = self._now_ms()
            with self._refreshing:
                self._deployments.refresh()
            self._readers.open_all(self._deployments.current)
