"""Where requests wait: rows of many callers go out as one record, and answers find their callers."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hybrid.deployment import Deployment
from hybrid.errors import Overloaded, ServingError, Unavailable
from hybrid.messages import DeviceEmbeddings, Predictions
from hybrid.protocol import CONSTANT, FALLBACKS, answered
from hybrid.tracing import MAX_TRACES
from serving.oip import MAX_ENTITY_BYTES, Answers, Rows
from serving.telemetry import current_traceparent

ID_BYTES = 16
DEADLINE_S = 5.0
LINGER_S = 0.02  # at most; a worker that died owes an answer, for which nobody waits longer
MAX_RECORD_BYTES = 768 << 10  # below Kafka's default limit of 1 MiB, with room for the framing
EXPLAIN = {
    "missing_device": "it came without a device embedding, and the model declares no answer without one",
    "bad_request": "the worker refused it as malformed",
    "unknown_model": "the worker does not serve this version",
    "unknown_entity": "the feature store has no row for the entity",
    "stale_features": "the entity's features are older than the model allows",
    "schema_drift": "the entity's features were packed by another schema than the model's",
    "unavailable": "the feature store or Triton did not answer, or gave no finite number for it",
}
ERRORS: dict[str, type[ServingError]] = {error.code: error for error in ServingError.__subclasses__()}
T = TypeVar("T")
Send = Callable[[DeviceEmbeddings, Sequence[str], Callable[[], None]], None]


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how long.

    Attributes:
        deadline_s: from the question to its answer.
        record_rows: of one record, at most; so many leave at once, without waiting for the record before.
        waiting_rows: rows in flight; more are refused.
        waiting_bytes: of those rows' numbers; more are refused.
    """

    deadline_s: float = DEADLINE_S
    record_rows: int = 512
    waiting_rows: int = 20_000
    waiting_bytes: int = 64 << 20

    def wait_s(self, timeout_s: float | None) -> float:
        """How long a question waits whose caller waits `timeout_s`, or did not say."""
        return self.deadline_s if timeout_s is None else min(self.deadline_s, timeout_s)

    def ends_ms(self, asked_ms: int, timeout_s: float | None) -> int:
        """When it has waited so long, in whole milliseconds: never sooner than the caller is told so."""
        return asked_ms + math.ceil(1000 * self.wait_s(timeout_s))

    async def within(self, answer: asyncio.Future[T], timeout_s: float | None) -> T:
        """Waits for an answer as long as these limits and its caller do.

        Raises:
            Unavailable: it did not come in time.
        """
        deadline_s = self.wait_s(timeout_s)
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            raise Unavailable(f"no answer in time ({deadline_s:g} s)") from None


class Room:
    """For the rows that may wait at once."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._rows, self._bytes = limits, 0, 0

    @contextmanager
    def taken(self, rows: Rows) -> Iterator[None]:
        """As long as these rows wait.

        Raises:
            Overloaded: there is no room for them.
        """
        n, size = len(rows), rows.nbytes
        if self._rows + n > self._limits.waiting_rows or self._bytes + size > self._limits.waiting_bytes:
            raise Overloaded("too many rows wait for an answer; try again in a second")
        self._rows, self._bytes = self._rows + n, self._bytes + size
        try:
            yield
        finally:
            self._rows, self._bytes = self._rows - n, self._bytes - size


@dataclass
class _Question:
    """One caller's rows, on their way or half answered; `done` ends with the last of them, or without."""

    asked: tuple[str, int]  # model, version
    rows: Rows
    ids: list[bytes]
    done: asyncio.Future[None]
    left: int
    prediction: NDArray[np.float32]
    age_ms: NDArray[np.int64]
    status: list[str]
    fallback: list[str]
    expires_ms: NDArray[np.int64]
    server_embedding: NDArray[np.float32]  # (n, 0) where it is not asked for
    server_slots: NDArray[np.float32]  # the same
    deadline_ms: int
    on_device: bool  # whether the device merges
    trace: str | None


@dataclass
class _Queue:
    """Questions to one deployment that leave together; of earlier ones, `asked` records are not answered yet."""

    deployment: Deployment
    questions: list[_Question] = field(default_factory=list)
    rows: int = 0
    asked: int = 0
    timer: asyncio.TimerHandle | None = None


class Exchange:
    """Matches answers to questions by request id. Lives on one event loop.

    A lone request waits for nobody. While a record is unanswered, what comes in
    waits for that, `LINGER_S` at most, and leaves together: so records grow with the
    load, as each costs everyone on its way as much as many rows do.

    Args:
        send: hands a record to Kafka without blocking, with the traceparents of the traced
            requests in it, and calls its last argument, in any thread, if it was not delivered.
        reply_partition: of the predictions topic that this gateway reads.
        now_ms: Unix time in milliseconds, UTC.
        limits: see there.
    """

    def __init__(self, send: Send, reply_partition: int, now_ms: Callable[[], int], limits: Limits) -> None:
        self._send, self._reply_partition, self._now_ms, self._limits = send, reply_partition, now_ms, limits
        self._queues: dict[tuple[str, int], _Queue] = {}
        self._asked: dict[bytes, tuple[_Question, int]] = {}
        self._room = Room(limits)

    def start(self) -> None:
        """Binds it to the running event loop; to be called first."""
        self._loop = asyncio.get_running_loop()

    @property
    def in_flight(self) -> int:
        """Rows that wait for their answer."""
        return len(self._asked)

    @property
    def queued(self) -> int:
        """Rows that wait for company."""
        return sum(waiting.rows for waiting in list(self._queues.values()))  # asked for in another thread

    async def ask(self, deployment: Deployment, rows: Rows, timeout_s: float | None = None) -> Answers:
        """Waits for the predictions of all rows.

        Args:
            deployment: the model that is asked.
            rows: what about.
            timeout_s: how long the caller waits; the limits' deadline where that is sooner, or with None.

        Raises:
            Overloaded: too much waits already; nothing was sent.
            ServingError: a row cannot be predicted, or no answer came in time.
        """
        with self._room.taken(rows):
            question = self._question(deployment, rows, self._limits.ends_ms(self._now_ms(), timeout_s))
            try:
                self._enqueue(deployment, question)
                await self._limits.within(question.done, timeout_s)
            finally:
                for key in question.ids:
                    self._asked.pop(key, None)
        return answers(
            Answers(
                question.prediction,
                question.age_ms,
                question.status,
                question.fallback,
                question.expires_ms,
                question.server_embedding,
                question.server_slots,
            )
        )

    def deliver(self, message: Predictions) -> None:
        """`answer` for other threads."""
        self._loop.call_soon_threadsafe(self.answer, message)

    def answer(self, message: Predictions) -> None:
        """Takes predictions; those that nobody waits for, or that no worker of ours can have made, are dropped."""
        raw = message.request_id.tobytes()
        for row, start in enumerate(range(0, len(raw), ID_BYTES)):
            key = raw[start : start + ID_BYTES]
            question, place = self._asked.get(key, (None, 0))
            if question is None or not _credible(message, row, question):
                continue
            del self._asked[key]
            question.prediction[place] = message.prediction[row]
            question.age_ms[place] = message.feature_age_ms[row]
            question.status[place] = message.status[row]
            question.fallback[place] = message.fallback[row]
            question.expires_ms[place] = message.expires_ms[row]
            if message.server_embedding.shape[1] == question.rows.contribution:
                question.server_embedding[place] = message.server_embedding[row]
            if question.rows.slots and message.server_slots.shape[1] == question.rows.slots:
                question.server_slots[place] = message.server_slots[row]
            question.left -= 1
            if question.left == 0 and not question.done.done():
                question.done.set_result(None)

    def _question(self, deployment: Deployment, rows: Rows, deadline_ms: int) -> _Question:
        n = len(rows)
        raw = os.urandom(ID_BYTES * n)
        ids = [raw[start : start + ID_BYTES] for start in range(0, len(raw), ID_BYTES)]
        done = self._loop.create_future()
        question = _Question(
            (deployment.model, deployment.version),
            rows,
            ids,
            done,
            n,
            prediction=np.full(n, np.nan, np.float32),
            age_ms=np.full(n, -1),
            status=[""] * n,
            fallback=[""] * n,
            expires_ms=np.full(n, -1),
            server_embedding=np.full((n, rows.contribution), np.nan, np.float32),
            server_slots=np.full((n, rows.slots), np.nan, np.float32),
            deadline_ms=deadline_ms,
            on_device=deployment.merge == "device",
            trace=current_traceparent(),
        )
        self._asked |= {key: (question, place) for place, key in enumerate(ids)}
        return question

    def _enqueue(self, deployment: Deployment, question: _Question) -> None:
        queue = self._queues.setdefault(question.asked, _Queue(deployment))
        queue.questions.append(question)
        queue.rows += len(question.rows)
        if queue.rows >= self._limits.record_rows:
            self._flush(queue)
        elif queue.timer is None:  # at 0 s it goes with all that arrive in this turn of the loop
            linger_s = LINGER_S if queue.asked else 0
            queue.timer = self._loop.call_later(linger_s, self._flush, queue)

    def _flush(self, queue: _Queue) -> None:
        """Sends what waits."""
        if queue.timer is not None:
            queue.timer.cancel()
        questions, queue.questions, queue.rows, queue.timer = queue.questions, [], 0, None
        queue.asked += 1
        together = asyncio.gather(*(question.done for question in questions), return_exceptions=True)
        together.add_done_callback(lambda _: self._answered(queue))
        for record, traces in self._records(queue.deployment, questions):
            try:
                self._send(record, traces, lambda: self._fail_later(questions))
            except Unavailable:
                _fail(questions)

    def _answered(self, queue: _Queue) -> None:
        """All that left together is answered or given up."""
        queue.asked -= 1
        if queue.timer is not None and not queue.asked:
            self._flush(queue)

    def _fail_later(self, questions: list[_Question]) -> None:
        self._loop.call_soon_threadsafe(_fail, questions)

    def _records(
        self, deployment: Deployment, questions: list[_Question]
    ) -> Iterator[tuple[DeviceEmbeddings, list[str]]]:
        """The rows of all questions, in as few records as Kafka's size limit allows, and the traces in each."""
        floats = deployment.sent_embedding + len(deployment.request)
        size = max(1, min(self._limits.record_rows, MAX_RECORD_BYTES // (40 + MAX_ENTITY_BYTES + 4 * floats)))
        ids = np.frombuffer(b"".join(key for q in questions for key in q.ids), dtype=f"V{ID_BYTES}")
        entity = np.concatenate([q.rows.entity for q in questions])
        request = np.concatenate([q.rows.request for q in questions])
        embedding = np.concatenate([q.rows.embedding for q in questions])
        sizes = [len(q.rows) for q in questions]
        wants_server = np.repeat([q.rows.contribution > 0 for q in questions], sizes)
        deadline_ms = np.repeat([q.deadline_ms for q in questions], sizes)
        wants_slots = np.repeat([q.rows.slots > 0 for q in questions], sizes)
        for start in range(0, len(ids), size):
            part = slice(start, start + size)
            message = DeviceEmbeddings(
                deployment.model,
                deployment.version,
                self._reply_partition,
                request_id=ids[part],
                entity=entity[part],
                request=request[part],
                embedding=embedding[part],
                event_ms=np.full(len(ids[part]), self._now_ms()),
                wants_server=wants_server[part],
                deadline_ms=deadline_ms[part],
                wants_slots=wants_slots[part],
            )
            yield message, _traces(questions, start, start + size)


def _traces(questions: Iterable[_Question], start: int, end: int) -> list[str]:
    """The contexts of the traced questions with rows from `start` to `end`, at most `MAX_TRACES`."""
    found, row = [], 0
    for question in questions:
        before, row = row, row + len(question.rows)
        if question.trace and before < end and row > start:
            found.append(question.trace)
    return found[:MAX_TRACES]


def _credible(message: Predictions, row: int, question: _Question) -> bool:
    """Whether a worker of ours can have said it: whoever may write to the topic may write anything."""
    if (message.model, message.version) != question.asked or message.fallback[row] not in FALLBACKS:
        return False
    if not answered(message.status[row], message.fallback[row]):
        return True
    if not question.on_device and not 0 <= message.prediction[row] <= 1:
        return False
    rows = question.rows
    if rows.contribution:
        server = message.server_embedding[row]
        is_whole = bool(np.isfinite(server).all()) or message.fallback[row] == CONSTANT
        if not is_whole or len(server) != rows.contribution:
            return False
    if rows.slots:  # NaN is a missing value, and throughout where a fallback stands in for the server's side
        slots = message.server_slots[row]
        return len(slots) == rows.slots and not np.isinf(slots).any()
    return True


def _fail(questions: Iterable[_Question]) -> None:
    for question in questions:
        if not question.done.done():
            question.done.set_exception(Unavailable("Kafka did not take the request"))


def answers(found: Answers) -> Answers:
    """What a caller is told of its rows.

    Raises:
        ServingError: of the first row that nothing answers.
    """
    for row, (code, instead) in enumerate(zip(found.status, found.fallback, strict=True)):
        if not answered(code, instead):
            why = EXPLAIN.get(code, "the worker gave no known reason")
            raise (ERRORS[code] if code in EXPLAIN else Unavailable)(f"row {row + 1} of {len(found.status)}: {why}")
    return found
