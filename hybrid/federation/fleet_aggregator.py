"""The aggregator of a fleet: it opens a round, gives its plan to who checks in, and lets one noised sum out.

A round is not durable. After a restart its plan is unknown, late uploads are answered 404, and the round is a failed
attempt: what its noise would have cost is spent only if it was written before the process died.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from hybrid.errors import ConfigError, Halted, RoundStopped
from hybrid.features import Float32
from hybrid.federation.aggregator import PaidMechanism, Round
from hybrid.federation.clock import Clock, SystemClock
from hybrid.federation.pace import MEMORY, Arrivals, wait_s
from hybrid.federation.rounds import Answer, OpenRound
from hybrid.plan import (
    MAX_PARAMETERS,
    CheckIn,
    Count,
    Digest,
    Halt,
    Local,
    Name,
    Policy,
    Positive,
    TrainPlan,
    sign,
)
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import ClippedSum, Release
from hybrid.update import Upload

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

log = logging.getLogger(__name__)

LAST_OFFER = 0.9  # of a round's length: who comes later would hardly be done in time
IDLE_ROUNDS = 10.0  # round lengths after which no next round is counted on
IDLE_S = 3600.0  # how long devices stay away then
REMEMBERED = 1000  # ended plans whose ids are told from unknown ones
_RANDOM = secrets.SystemRandom()


class Task(BaseModel):
    """What every round of a training asks of devices: a `TrainPlan` but for what each round has of its own.

    Attributes:
        model, version, definition_hash, policy, examples, seconds, memory_mb, local, upload, parameters: see
            `TrainPlan`.
        round_s: how long a round is open: it closes by the clock, whoever came.
        wanted: how many devices are to check in to one round; sampling decides which of them take part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Name
    version: Count
    definition_hash: Digest
    policy: Policy = Policy()
    examples: tuple[Count, Count] = (1, 1024)
    seconds: Positive = 60.0
    memory_mb: Count = 512
    local: Local
    upload: Upload = "float32"
    parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)]
    round_s: Annotated[float, Field(gt=0, le=7 * 86_400)]
    wanted: Positive

    def plan(self, *, sampling: float, clip: float, expires_ms: int) -> TrainPlan:
        """Of one attempt at a round."""
        fields = self.model_dump(exclude={"round_s", "wanted"})
        return TrainPlan(id=secrets.token_hex(16), sampling=sampling, clip=clip, expires_ms=expires_ms, **fields)


class Refused(StrEnum):
    """Why an upload was not taken, for counters. None of them depends on what is in an update of its plan's form."""

    OVERSIZE = "oversize"
    MALFORMED = "malformed"
    UNKNOWN_PLAN = "unknown_plan"
    STALE = "stale"
    REPLAYED = "replayed"  # other bytes under an id that came before
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
    Answer.ENDED: (410, Refused.STALE),
    Answer.FULL: (503, Refused.FULL),
}


@dataclass(frozen=True)
class _Offer:
    """An open round, as devices are given it."""

    round: OpenRound
    signed: bytes
    until_ms: int
    stop: threading.Event = field(default_factory=threading.Event)


class FleetAggregator:
    """Where a fleet's updates are clipped, summed and noised; the noise is the operating system's.

    `run_round` is called by whoever holds the weights, from one thread; `check_in` and `upload` by what speaks to
    devices, from another one.

    Args:
        task: what every round asks.
        settings: how a round is sampled, clipped and noised.
        ledger: pays for each round before its noise is drawn; None where there is no noise, and so no privacy.
        key: signs plans and halts; devices trust its public half.
        clock: by which rounds close.

    Attributes:
        refused: how many uploads were not taken, by reason. Those that were taken are counted nowhere: how many
            took part is as private as who (docs/decisions/0009).

    Raises:
        ConfigError: the clip adapts, which needs norms before the clip, which devices do not tell; a minimum is
            asked for beside sampling below 1, whose amplification it would break; or there is noise and no ledger.
    """

    def __init__(
        self,
        task: Task,
        settings: Round,
        ledger: Ledger | None,
        key: Ed25519PrivateKey,
        *,
        clock: Clock | None = None,
    ) -> None:
        if settings.quantile is not None:
            raise ConfigError("clip_quantile must be left out on a fleet: devices send updates that are clipped")
        if settings.sampling < 1 and settings.minimum:
            raise ConfigError(
                f"minimum must be 0 where sampling is below 1, got {settings.minimum}: "
                "a round that is withheld because few came tells who was in one that is not"
            )
        self._task, self._settings, self._key = task, settings, key
        self._mechanism = PaidMechanism(settings, ledger, seed=None, size=task.parameters)
        self._clock: Clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._summing = threading.Lock()  # of its own: a large update keeps nobody from checking in
        self._offer: _Offer | None = None
        self._ended: OrderedDict[str, OpenRound | None] = OrderedDict()  # only of the last one uploads are known
        self._closed_ms = self._clock.now_ms()
        self._halts: dict[int, bytes] = {}
        self._stopped: RoundStopped | None = None
        self._arrivals = Arrivals(MEMORY * task.round_s, time.monotonic())
        self.refused: Counter[Refused] = Counter()

    @property
    def clip(self) -> float:
        """The L2 norm that the next round clips to."""
        return self._mechanism.clip

    # The control side

    def run_round(self, number: int, flat: Float32) -> Release:
        """See `hybrid.federation.client_app.Aggregator`. Blocks until the round has closed, by the clock.

        A round run again is a new attempt, with another plan, other noise and a ledger entry of its own.

        Raises:
            ConfigError: a round is open already.
            PlanError: `flat` is not (parameters,) finite.
            Halted, RoundStopped: it was halted or stopped, before or in the round; nothing is spent.
        """
        attempt = self._mechanism.next_attempt(number)
        release = self._mechanism.release(number, attempt, lambda clip: self._collect(flat, clip))
        log.info("round %d, attempt %d: released", number, attempt)
        return release

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

    def _end(self, why: RoundStopped) -> None:
        with self._lock:
            if not isinstance(self._stopped, Halted):
                self._stopped = why
            if self._offer is not None:
                self._offer.stop.set()

    def _collect(self, flat: Float32, clip: float) -> ClippedSum:
        """Opens a round, waits for its end, and fixes its sum; noise is drawn after that."""
        offer = self._open(flat, clip)
        try:
            self._clock.wait(offer.stop, offer.round.plan.expires_ms)
        finally:
            with self._summing:
                total = offer.round.close()
            with self._lock:
                self._offer, self._closed_ms = None, self._clock.now_ms()
                self._remember(offer.round)
        if offer.stop.is_set():
            assert self._stopped is not None
            raise type(self._stopped)(f"the round was stopped: {self._stopped}; nothing is spent")
        return total

    def _open(self, flat: Float32, clip: float) -> _Offer:
        begins_ms, lasts_ms = self._clock.now_ms(), self._task.round_s * 1e3
        plan = self._task.plan(sampling=self._settings.sampling, clip=clip, expires_ms=begins_ms + math.ceil(lasts_ms))
        signed = sign(plan, self._key, flat)
        offer = _Offer(OpenRound(plan), signed, begins_ms + int(LAST_OFFER * lasts_ms))
        with self._lock:
            if self._offer is not None:
                raise ConfigError("a round is open already: an aggregator runs one at a time")
            if self._stopped is not None:
                raise type(self._stopped)(f"no round is opened any more: {self._stopped}")
            self._offer = offer
        return offer

    def _remember(self, ended: OpenRound) -> None:
        """Uploads of the round before are known no more, its id still is."""
        for plan in self._ended:
            self._ended[plan] = None
        self._ended[ended.plan.id] = ended
        if len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    # The devices' side

    def check_in(self, said: CheckIn) -> Reply:
        """A plan, a halt, or a time to come back."""
        now_ms, now_s = self._clock.now_ms(), time.monotonic()
        task = self._task
        with self._lock:
            if said.model == task.model and said.version in self._halts:
                return Reply(200, self._halts[said.version])
            if (said.model, said.version) != (task.model, task.version):
                return Reply(204, retry_after_s=IDLE_S)
            offer = self._offer
            if offer is not None and now_ms < offer.until_ms:
                return Reply(200, offer.signed)  # and it rests as its policy says, which is not for us to pace
            wait = self._wait(now_ms, now_s)
            self._arrivals.add(now_s, wait)
        return Reply(204, retry_after_s=wait)

    def body_bytes(self, plan: str) -> int | None:
        """Of an update for a plan whose uploads are known; None: it will not be taken, whatever it is."""
        with self._lock:
            known = self._round(plan)
        return None if known is None else known.body_bytes

    def upload(self, plan: str, upload: str, body: bytes) -> Reply:
        """Takes an update, once.

        Args:
            plan: its id, 32 hex digits.
            upload: the same of the upload.
            body: in any form.
        """
        with self._lock:
            known, ended = self._round(plan), plan in self._ended
        if known is not None:
            with self._summing:
                status, reason = _ANSWERS[known.take(upload, body, self._clock.now_ms())]
        else:
            status, reason = (410, Refused.STALE) if ended else (404, Refused.UNKNOWN_PLAN)
        if reason is not None:
            with self._lock:
                self.refused[reason] += 1
        return Reply(status, retry_after_s=self._task.round_s if status == 503 else None)

    def oversize(self) -> Reply:
        """For an update that is longer than any that is taken."""
        with self._lock:
            self.refused[Refused.OVERSIZE] += 1
        return Reply(413)

    def _round(self, plan: str) -> OpenRound | None:
        if self._offer is not None and self._offer.round.plan.id == plan:
            return self._offer.round
        return self._ended.get(plan)

    def _wait(self, now_ms: int, now_s: float) -> float:
        """Seconds until a device is to come again. Where rounds follow each other, the next opens when one closes."""
        task = self._task
        if self._stopped is not None or (
            self._offer is None and now_ms - self._closed_ms > IDLE_ROUNDS * 1e3 * task.round_s
        ):
            return IDLE_S
        opens_s = 0.0 if self._offer is None else max(0.0, (self._offer.round.plan.expires_ms - now_ms) / 1e3)
        fleet = self._arrivals.fleet(now_s)
        return wait_s(opens_s, task.round_s, wanted=task.wanted, fleet=fleet, toss=_RANDOM.random())
