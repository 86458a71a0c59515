"""The aggregator of a fleet: it opens a round, gives its plan to who checks in, and lets one noised sum out.

A round is of a training, or it asks a query: what devices send, how it is summed and how it is paid for are the same.

A round is not durable. After a restart its plan is unknown, late uploads are answered 404, and the round is a failed
attempt: what its noise would have cost is spent only if it was written before the process died. The same holds for what
waits in a buffer, where training is asynchronous: see `hybrid.federation.buffer`.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hybrid.errors import ConfigError, Halted, NotFound, RoundEnded, RoundStopped
from hybrid.features import Float32
from hybrid.federation.aggregator import PURPOSE, PaidMechanism, Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.clock import Clock, SystemClock
from hybrid.federation.horizon import Horizon
from hybrid.federation.pace import MEMORY, Arrivals, wait_s
from hybrid.federation.rounds import MOST_UPLOADS, Answer, OpenSum, Uploads
from hybrid.plan import (
    JOURNAL_RUNTIME,
    MAX_PARAMETERS,
    QUERY_RUNTIME,
    TOKEN_RUNTIME,
    CheckIn,
    Count,
    Digest,
    Halt,
    Local,
    Name,
    Plan,
    Policy,
    Positive,
    QueryPlan,
    TrainPlan,
    Turn,
    sign,
)
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import ClippedSum, Release
from hybrid.query import Query
from hybrid.tokens import Window
from hybrid.update import Upload

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

LAST_OFFER = 0.9  # of a plan's time: who comes later would hardly be done before its end
HELD = 0.1  # of a flush's time limit, for which a device that was sent off is counted on
FULL_S = 1.0  # after which who finds a buffer full comes again: the control side takes it out as soon as it can
IDLE_ROUNDS = 10.0  # round lengths after which no next round is counted on
IDLE_S = 3600.0  # how long devices stay away then
REMEMBERED = 1000  # ended plans whose ids are told from unknown ones
_RANDOM = secrets.SystemRandom()


class Windows(Protocol):
    """Where the windows are opened that tokens are of: see `hybrid.federation.issuer.RemoteIssuer`."""

    def open(self, turn: Turn | None) -> Window:
        """A window that no plan had before.

        Args:
            turn: of the plan: an account gets no token of two windows that are nearer than its separation. None: one
                of each.

        Raises:
            IssuerError: the issuer cannot be reached, or refuses.
        """
        ...


class Audience(BaseModel):
    """Whose devices are asked, whatever they are asked: what all plans of an aggregator have in common.

    Attributes:
        model, version, definition_hash, policy, seconds: see `TrainPlan`.
        round_s: how long a round is open: it closes by the clock, whoever came. With a buffer, how long a flush waits
            at most.
        wanted: how many devices are to check in to one round; sampling decides which of them take part. With a
            buffer, how many may be on their way at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Name
    version: Count
    definition_hash: Digest
    policy: Policy = Policy()
    seconds: Positive = 60.0
    round_s: Annotated[float, Field(gt=0, le=7 * 86_400)]
    wanted: Positive

    @property
    def _planned(self) -> dict[str, Any]:
        """What goes into its plans as it is."""
        return self.model_dump(exclude={"round_s", "wanted"})

    def asked(self, query: Query) -> Question:
        """A query to them."""
        return Question(query=query, **self.model_dump(include=set(Audience.model_fields)))


class Task(Audience):
    """What every round of a training asks of devices: a `TrainPlan` but for what each round has of its own.

    Attributes:
        examples, memory_mb, local, upload, parameters: see `TrainPlan`.
    """

    examples: tuple[Count, Count] = (1, 1024)
    memory_mb: Count = 512
    local: Local
    upload: Upload = "float32"
    parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)]

    def plan(
        self, *, sampling: float, clip: float, expires_ms: int, turn: Turn | None = None, token: Window | None = None
    ) -> TrainPlan:
        """Of one attempt at a round."""
        fields = self._planned | {"turn": turn, "token": token}
        return TrainPlan(id=secrets.token_hex(16), sampling=sampling, clip=clip, expires_ms=expires_ms, **fields)


class Question(Audience):
    """What a round asks that is a query's.

    Attributes:
        query: which.
    """

    query: Query

    @property
    def parameters(self) -> int:
        """Length of an answer."""
        return self.query.size

    def plan(
        self, *, sampling: float, clip: float, expires_ms: int, turn: Turn | None = None, token: Window | None = None
    ) -> QueryPlan:
        """Of one attempt: everybody is asked, and clips to the query's norm."""
        assert (sampling, clip, turn) == (1.0, self.query.norm, None)
        return QueryPlan(id=secrets.token_hex(16), expires_ms=expires_ms, token=token, **self._planned)


class Refused(StrEnum):
    """Why an upload was not taken, for counters. None of them depends on what is in an update of its plan's form."""

    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    UNKNOWN_PLAN = "unknown_plan"
    STALE = "stale"
    REPLAYED = "replayed"  # other bytes under an id that came before
    FORGED = "forged"  # it shows no token of its plan's window
    SPENT = "spent"  # a token that came before, under another id
    FULL = "full"


@dataclass(frozen=True)
class Reply:
    """An answer to a device.

    Attributes:
        status: of HTTP.
        body: of a 200; the same object for everybody.
        retry_after_s: when to come again; None: not said.
    """

    status: int
    body: bytes = field(default=b"", repr=False)
    retry_after_s: float | None = None


_ANSWERS: dict[Answer, tuple[int, Refused | None]] = {
    Answer.COUNTED: (200, None),
    Answer.REPEATED: (200, None),
    Answer.OTHER_BYTES: (409, Refused.REPLAYED),
    Answer.MALFORMED: (400, Refused.MALFORMED),
    Answer.FORGED: (403, Refused.FORGED),
    Answer.SPENT: (409, Refused.SPENT),
    Answer.ENDED: (410, Refused.STALE),
    Answer.FULL: (503, Refused.FULL),
}


@dataclass(frozen=True)
class _Work:
    """What a round is for.

    Attributes:
        task: what it asks.
        settings: how it is sampled, clipped and noised.
        mechanism: that releases it, and pays.
        horizon: of noise that spans rounds.
    """

    task: Task | Question
    settings: Round
    mechanism: PaidMechanism
    horizon: Horizon | None = None

    @property
    def name(self) -> str:
        """For the log."""
        return "round" if self.mechanism.purpose == PURPOSE else f"query ({self.mechanism.purpose})"


@dataclass(frozen=True)
class _Version:
    """A plan that uploads may come for.

    Attributes:
        uploads: that came.
        step: of the first sum that they may be in: how many were closed before it.
    """

    uploads: Uploads
    step: int

    @property
    def plan(self) -> Plan:
        return self.uploads.plan

    @property
    def reports(self) -> bool:
        """Whether it is for devices that come to report, of any version, and for no others."""
        return isinstance(self.plan, QueryPlan) and self.plan.query.week is not None

    @property
    def runtime(self) -> int:
        """Of devices that know such a plan, at least."""
        if self.reports:
            return JOURNAL_RUNTIME
        if self.plan.token is not None:
            return TOKEN_RUNTIME
        return QUERY_RUNTIME if isinstance(self.plan, QueryPlan) else 1

    def is_for(self, said: CheckIn) -> bool:
        """Whether a device that says this is given the plan."""
        return said.runtime >= self.runtime and self.reports == (said.version is None)


@dataclass(frozen=True)
class _Offer:
    """What devices that check in are given, and until when."""

    version: _Version
    signed: bytes = field(repr=False)
    until_ms: int


class FleetAggregator:
    """Where a fleet's updates are clipped, summed and noised; the noise is the operating system's.

    `run_round` is called by whoever holds the weights, and `ask` by whoever has a question, from one thread; `check_in`
    and `upload` by what speaks to devices, from another one.

    With a buffer a round is a flush: it is over as soon as K updates are there, those that came between two calls
    among them. Devices begin at the newest version and may come up to `oldest` flushes later. A buffer that is full
    takes no more until it is taken out: what waits is one sum, whatever comes.

    Args:
        task: what every round of a training asks; an `Audience`: there is no training, and only queries are asked.
        settings: how a round of it is sampled, clipped and noised; None without a training.
        ledger: pays for each round before its noise is drawn; None where there is no noise, and so no privacy.
        key: signs plans and halts; devices trust its public half.
        noise_state: a file for the noise of earlier rounds, which later ones need where `settings` have a matrix. It
            is secret, and goes on where a process before left it, see `hybrid.federation.horizon`; what goes on is paid
            for, and not to be reserved again.
        buffer: asynchronous training, with a matrix in `settings`; None: rounds that all begin and end together.
        windows: of tokens, one for each attempt at a round, of which every upload needs one; None: none is asked for,
            and nothing keeps a person with two devices from being counted twice.
        clock: by which rounds close.

    Attributes:
        refused: how many uploads were not taken, by reason. Those that were taken are counted nowhere: how many
            took part is as private as who (docs/decisions/0009).

    Raises:
        ConfigError: a task without settings, or settings without a task; the clip adapts, which needs norms before the
            clip, which devices do not tell; a minimum is asked for beside sampling below 1, whose amplification it
            would break; there is noise and no ledger; or a matrix, and sampling below 1, which it claims nothing of, or
            no file for its state, or another's; or a buffer, and no matrix, or a minimum that it never reaches.
    """

    def __init__(
        self,
        task: Audience,
        settings: Round | None,
        ledger: Ledger | None,
        key: Ed25519PrivateKey,
        *,
        noise_state: Path | None = None,
        buffer: Buffer | None = None,
        windows: Windows | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._task, self._ledger, self._key, self._buffer, self._windows = task, ledger, key, buffer, windows
        self._oldest = 0 if buffer is None else buffer.oldest
        self._training = self._training_of(task, settings, noise_state)
        self._clock: Clock = clock or SystemClock()
        self._alone = threading.Lock()  # of a round
        self._lock = threading.Lock()
        self._summing = threading.Lock()  # of its own: a large update keeps nobody from checking in
        self._over = threading.Event()  # set where a round does not wait for the clock any more
        self._offer: _Offer | None = None
        self._versions: OrderedDict[str, _Version | None] = OrderedDict()  # None: ended, so that uploads are forgotten
        self._step = 0  # how many sums were closed
        self._sum: OpenSum | None = None
        self._began_ms = self._closed_ms = self._clock.now_ms()
        self._lasted_s = task.round_s  # the last round
        self._sent_off: deque[int] = deque()  # when devices were, that are counted on to come to the buffer
        self._halts: dict[int, bytes] = {}
        self._stopped: RoundStopped | None = None  # for good
        self._suspended: RoundStopped | None = None  # until it is resumed
        self._cut: RoundStopped | None = None  # why the open round ends unreleased
        self._is_open = False
        self._arrivals = Arrivals(MEMORY * task.round_s, time.monotonic())
        self.refused: Counter[Refused] = Counter()

    def _training_of(self, task: Audience, settings: Round | None, noise_state: Path | None) -> _Work | None:
        """The training that the rounds are of, if there is one."""
        if settings is None or not isinstance(task, Task):
            if settings is not None or isinstance(task, Task) or self._buffer is not None:
                raise ConfigError("task and settings go together: an audience that is only asked queries has neither")
            return None
        _check_settings(settings, self._buffer)
        mechanism = PaidMechanism(settings, self._ledger, seed=None, size=task.parameters)
        if settings.matrix is None:
            return _Work(task, settings, mechanism)
        if noise_state is None:
            raise ConfigError(
                "noise_state must be a file with a matrix: without the noise of earlier rounds none goes on"
            )
        horizon = Horizon(noise_state, mechanism, settings, self._ledger, size=task.parameters)
        return _Work(task, settings, mechanism, horizon)

    @property
    def clip(self) -> float:
        """The L2 norm that the next round of the training clips to."""
        return self._trained.mechanism.clip

    @property
    def ledger(self) -> Ledger | None:
        """What pays; None: nothing is noised."""
        return self._ledger

    @property
    def _trained(self) -> _Work:
        if self._training is None:
            raise ConfigError("task must be a Task to train: this aggregator only asks queries")
        return self._training

    # The control side

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. Blocks until the round has closed, by the clock.

        A round run again is a new attempt, with another plan, other noise and a ledger entry of its own. With a matrix
        each attempt uses up a step of the horizon.

        Raises:
            BudgetExceeded, CohortTooSmall: see `hybrid.federation.client_app.Aggregator`.
            OSError: the state of the noise cannot be written; nothing leaves.
            ConfigError: a round is open already.
            PlanError: `flat` is not (parameters,) finite.
            Halted, RoundEnded, RoundStopped: it was halted, ended or stopped, before or in the round; nothing is spent.
            IssuerError: there are windows, and none could be opened; no device was asked.
        """
        return self._run(self._trained, number, flat)

    def ask(
        self,
        query: Query,
        payload: Float32 | None = None,
        *,
        purpose: str,
        number: int,
        noise_multiplier: float,
        minimum: int,
    ) -> Release:
        """Asks a query of everybody who checks in while its round is open. Blocks until it has closed, by the clock.

        Args:
            query: what.
            payload: float32, of a query with `spread`.
            purpose: of its entry in the ledger.
            number: of the query, of those with this purpose, from 1.
            noise_multiplier: standard deviation of the noise over `query.norm`.
            minimum: fewest answers that are released together.

        Raises:
            BudgetExceeded: the ledger does not allow it; devices were asked, and what they sent is forgotten. Who
                reserves it in the ledger first asks nobody in vain.
            CohortTooSmall: fewer answered. Nothing is spent.
            ConfigError: a round is open already; there is noise and no ledger; or there is a buffer, whose flushes go
                on between rounds: queries then need an aggregator of their own.
            PlanError: the payload is not the query's, or the query is larger than a plan may be. Nobody was asked.
            Halted, RoundStopped, IssuerError: as in `run_round`.
        """
        if self._buffer is not None:
            raise ConfigError("buffer must be None to ask queries: a flush goes on between rounds")
        settings = Round(sampling=1.0, clip=query.norm, noise_multiplier=noise_multiplier, minimum=minimum)
        mechanism = PaidMechanism(settings, self._ledger, seed=None, size=query.size, purpose=purpose)
        return self._run(_Work(self._task.asked(query), settings, mechanism), number, payload)

    def _run(self, work: _Work, number: int, numbers: Float32 | None) -> Release:
        if not self._alone.acquire(blocking=False):
            raise ConfigError("a round is open already: an aggregator runs one at a time")
        try:
            attempt = work.mechanism.next_attempt(number)
            release = self._released(work, number, attempt, numbers)
        finally:
            self._alone.release()
        log.info("%s %d, attempt %d: released", work.name, number, attempt)
        return release

    def _released(self, work: _Work, number: int, attempt: int, numbers: Float32 | None) -> Release:
        before = work.mechanism.released
        try:
            return work.mechanism.release(number, attempt, lambda clip: self._collect(work, numbers, clip))
        finally:
            if work.horizon is not None:
                work.horizon.settle(before)

    def halt(self, versions: Iterable[int], reason: str) -> None:
        """The kill switch: devices of these versions are told to stop, and a round for one of them ends unreleased."""
        numbers = tuple(versions)
        signed = sign(Halt(model=self._task.model, versions=numbers, reason=reason), self._key)
        with self._lock:
            self._halts |= dict.fromkeys(numbers, signed)
        if self._task.version in numbers:
            self._end(Halted(f"version {self._task.version} was halted"))

    def stop(self, reason: str) -> None:
        """Ends the open round, unreleased, and opens no other."""
        self._end(RoundStopped(reason))

    @property
    def open_plan(self) -> str | None:
        """The id of the plan that devices are given now."""
        with self._lock:
            return None if self._offer is None or self._barred is not None else self._offer.version.plan.id

    @property
    def suspended(self) -> str | None:
        """Why no plan is given; None: they are."""
        with self._lock:
            return None if self._suspended is None else str(self._suspended)

    def end_plan(self, plan: str, reason: str) -> None:
        """Ends the round that a plan is of, unreleased; the next one is run. What came is forgotten, with a buffer too.

        Raises:
            NotFound: devices are not given that plan now.
        """
        with self._summing, self._lock:
            if self._offer is None or self._offer.version.plan.id != plan:
                raise NotFound("plan must be the one that is open now: it is over, or never was")
            log.info("plan %s: ended: %s", plan, reason)
            for each in [name for name, version in self._versions.items() if version is not None]:
                self._versions[each] = None
            self._offer, self._sum = None, None if self._sum is None else OpenSum(self._sum.size, self._sum.most)
            if self._is_open:
                self._cut = RoundEnded(reason)
                self._over.set()
            else:
                self._over.clear()  # what filled the buffer is gone

    def suspend(self, reason: str) -> None:
        """Halts all training: the open round ends unreleased, and until `resume` nobody is given a plan.

        What devices upload meanwhile is refused.
        """
        with self._lock:
            self._suspended = RoundStopped(reason)
            if self._is_open:
                self._cut = self._cut or self._suspended
                self._over.set()

    def resume(self) -> None:
        """Rounds are opened again."""
        with self._lock:
            self._suspended = None

    @property
    def _barred(self) -> RoundStopped | None:
        return self._stopped or self._suspended

    def _end(self, why: RoundStopped) -> None:
        with self._lock:
            if not isinstance(self._stopped, Halted):
                self._stopped = why
            self._cut = self._stopped
            self._over.set()

    def _check_opens(self) -> None:
        """Raises: RoundStopped: no round is opened now."""
        if self._barred is not None:
            raise type(self._barred)(f"no round is opened now: {self._barred}")

    def _collect(self, work: _Work, numbers: Float32 | None, clip: float) -> ClippedSum:
        """Opens a round, waits for its end, and fixes its sum; noise is drawn after that."""
        self._check_opens()  # before an issuer opens a window for it
        ends_ms = self._open(work, numbers, clip)
        try:
            self._clock.wait(self._over, ends_ms)
        finally:
            total, cut = self._close(work)
        if cut is not None:
            raise type(cut)(f"the round was stopped: {cut}; nothing is spent")
        if work.horizon is not None:
            work.horizon.draws()
        return total

    def _open(self, work: _Work, numbers: Float32 | None, clip: float) -> int:
        """Offers a plan; returns when the round ends at the latest, in Unix milliseconds."""
        turn = None if work.horizon is None else work.horizon.turn(self._oldest)
        token = None if self._windows is None else self._windows.open(turn)
        begins_ms, lasts_ms = self._clock.now_ms(), math.ceil(self._task.round_s * 1e3)
        plan_ms = lasts_ms * (1 + self._oldest)
        plan = work.task.plan(
            sampling=work.settings.sampling,
            clip=clip,
            expires_ms=begins_ms + plan_ms,
            turn=turn,
            token=token,
        )
        version = _Version(Uploads(plan), self._step)
        offer = _Offer(version, sign(plan, self._key, numbers), begins_ms + int(LAST_OFFER * plan_ms))
        with self._summing:
            self._sum = self._sum or self._empty(work)
        with self._lock:
            self._check_opens()
            self._is_open, self._cut = True, None
            if work.horizon is not None:
                work.horizon.opened()
            self._offer, self._versions[plan.id], self._began_ms = offer, version, begins_ms
        return begins_ms + lasts_ms

    def _close(self, work: _Work) -> tuple[ClippedSum, RoundStopped | None]:
        """What is in the sum, and why it is not released; what comes from now on is in the next one."""
        with self._summing, self._lock:
            assert self._sum is not None
            total = self._sum.close()
            self._step += 1
            self._sum = None if self._buffer is None else self._empty(work)
            if self._buffer is None:
                self._offer = None
            self._over.clear()
            self._is_open = False
            self._closed_ms = self._clock.now_ms()
            self._lasted_s = (self._closed_ms - self._began_ms) / 1e3
            self._forget()
            return total, self._cut

    def _empty(self, work: _Work) -> OpenSum:
        return OpenSum(work.task.parameters, MOST_UPLOADS if self._buffer is None else self._buffer.updates)

    def _forget(self) -> None:
        """Uploads of an ended plan stay known for one round, so that a lost answer is given again; then its id is."""
        for plan, version in self._versions.items():
            if version is not None and self._step - version.step > self._oldest + 1:
                self._versions[plan] = None
        if len(self._versions) > REMEMBERED + self._oldest:
            self._versions.popitem(last=False)

    # The devices' side

    def check_in(self, said: CheckIn) -> Reply:
        """A plan, a halt, or a time to come back."""
        now_ms, now_s = self._clock.now_ms(), time.monotonic()
        task = self._task
        with self._lock:
            if said.model == task.model and said.version in self._halts:
                return Reply(200, self._halts[said.version])
            if said.model != task.model or said.version not in (task.version, None):
                return Reply(204, retry_after_s=IDLE_S)
            offer = self._offer
            if offer is not None and offer.version.is_for(said) and self._may_send_off(offer, now_ms):
                return Reply(200, offer.signed)  # and it rests as its policy says, which is not for us to pace
            wait = self._wait(now_ms, now_s)
            self._arrivals.add(now_s, wait)
        return Reply(204, retry_after_s=wait)

    def _may_send_off(self, offer: _Offer, now_ms: int) -> bool:
        """Whether a device may be given the plan, and, with a buffer, takes one of the places of those on their way.

        A place comes free with each upload. Of those who have no turn yet, or die, nothing is heard: theirs do after
        a while.
        """
        late = now_ms >= offer.until_ms or self._staleness(offer.version) > self._oldest
        if late or self._barred is not None:
            return False
        if self._buffer is None:
            return True
        while self._sent_off and now_ms - self._sent_off[0] >= HELD * 1e3 * self._task.round_s:
            self._sent_off.popleft()
        if len(self._sent_off) >= self._task.wanted:
            return False
        self._sent_off.append(now_ms)
        return True

    def _open_versions(self) -> list[_Version]:
        """Those whose uploads are taken."""
        return [each for each in self._versions.values() if each is not None and self._staleness(each) <= self._oldest]

    def _staleness(self, version: _Version) -> int:
        return self._step - version.step

    def body_bytes(self, plan: str) -> int | None:
        """Of an update for a plan whose uploads are known; None: it will not be taken, whatever it is."""
        with self._lock:
            known = self._versions.get(plan)
        return None if known is None else known.uploads.body_bytes

    def upload(self, plan: str, upload: str, body: bytes) -> Reply:
        """Takes an update, once.

        Args:
            plan: its id, 32 hex digits.
            upload: the same of the upload.
            body: in any form.
        """
        with self._lock:
            known, ever = self._versions.get(plan), plan in self._versions
            others = [each.uploads for each in self._open_versions() if each is not known]
        if known is not None:
            with self._summing:
                answer = self._take(known, others, upload, body)
            status, reason = _ANSWERS[answer]
            if self._buffer is not None and answer is Answer.COUNTED:
                with self._lock:
                    if self._sent_off:
                        self._sent_off.popleft()
        else:
            status, reason = (410, Refused.STALE) if ever else (404, Refused.UNKNOWN_PLAN)
        if reason is not None:
            with self._lock:
                self.refused[reason] += 1
        wait = self._task.round_s if self._buffer is None else FULL_S
        return Reply(status, retry_after_s=wait if status == 503 else None)

    def _take(self, version: _Version, others: Iterable[Uploads], upload: str, body: bytes) -> Answer:
        """Into the sum that is open now, if it may still be in that one."""
        uploads, late = version.uploads, self._staleness(version)
        if upload not in uploads and any(upload in other for other in others):
            return Answer.OTHER_BYTES  # no honest device draws an id twice: it was taken from another plan's
        ended = self._versions.get(uploads.plan.id) is None
        total = self._sum if late <= self._oldest and self._barred is None and not ended else None
        weight = 1.0 if self._buffer is None else self._buffer.weight(late)
        answer = uploads.take(upload, body, self._clock.now_ms(), total, weight)
        if self._buffer is not None and total is not None and total.full:
            self._over.set()
        return answer

    def oversize(self) -> Reply:
        """For an update that is longer than any that is taken."""
        with self._lock:
            self.refused[Refused.OVERSIZE] += 1
        return Reply(413)

    def _wait(self, now_ms: int, now_s: float) -> float:
        """Seconds until a device is to come again. Where rounds follow each other, the next opens when one closes."""
        task = self._task
        idle = not self._alone.locked() and now_ms - self._closed_ms > IDLE_ROUNDS * 1e3 * task.round_s
        if self._barred is not None or idle:
            return IDLE_S
        fleet, toss = self._arrivals.fleet(now_s), _RANDOM.random()
        if self._buffer is not None:  # as many are to come as a flush takes, while one lasts
            return wait_s(0.0, self._lasted_s, wanted=self._buffer.updates, fleet=fleet, toss=toss)
        opens_s = 0.0 if self._offer is None else max(0.0, (self._offer.version.plan.expires_ms - now_ms) / 1e3)
        return wait_s(opens_s, task.round_s, wanted=task.wanted, fleet=fleet, toss=toss)


def _check_settings(settings: Round, buffer: Buffer | None) -> None:
    """Raises: ConfigError: no fleet can keep them."""
    if settings.quantile is not None:
        raise ConfigError("clip_quantile must be left out on a fleet: devices send updates that are clipped")
    if settings.sampling < 1 and settings.minimum:
        raise ConfigError(
            f"minimum must be 0 where sampling is below 1, got {settings.minimum}: "
            "a round that is withheld because few came tells who was in one that is not"
        )
    if buffer is not None and settings.matrix is None:
        raise ConfigError("buffer needs a matrix: no coins are tossed, so a separation must protect")
    if buffer is not None and settings.minimum > buffer.updates:
        raise ConfigError(f"minimum must be at most the buffer's {buffer.updates}, got {settings.minimum}")
    if settings.matrix is not None and settings.sampling < 1:
        raise ConfigError(f"sampling must be 1 with a matrix, which claims none, got {settings.sampling!r}")
