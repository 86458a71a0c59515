"""One device takes part: it asks for a plan, decides, trains or answers a query, and sends one clipped vector, once.

What it sends, its *update*, is in the store, under a random id of its own, before the first attempt to send it:
whatever ends the process after that, the same bytes go out under the same id, and are counted once. Training and
queries have one history: policies count both, whatever for the device was asked before.

A session notes in the device's journal how far it came (`hybrid.journal`); what the journal says is told by sessions of
another kind, see `device_runtime.reporting`.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from device_runtime import RUNTIME
from device_runtime.answering import Answerer, Readable
from device_runtime.caller import Reply
from device_runtime.credentials import Credentials, NoToken
from device_runtime.eligibility import Decision, Reason, both, decide
from device_runtime.protocol import Event, Held, State, Upload, advance
from hybrid.bundle import Bundle, Manifest
from hybrid.errors import ConfigError, PlanError, StoreError
from hybrid.journal import BROKE_OFF, WAITING, Noted, Phase
from hybrid.plan import (
    MAX_JSON,
    MAX_PAYLOAD,
    SIGNATURE,
    CheckIn,
    Halt,
    Plan,
    Policy,
    QueryPlan,
    TrainPlan,
    Turn,
    open_signed,
)
from hybrid.query import Query
from hybrid.trust import Trusted
from hybrid.update import encode

if TYPE_CHECKING:
    from device_runtime.answering import Rows
    from device_runtime.host import Host
    from device_runtime.trainer import Trainer

Float32 = NDArray[np.float32]

ATTEMPTS = 4  # to send an update, of one session
BACKOFF_S = 1.0  # before the second attempt at most; doubles
PATIENCE_S = 30.0  # a session waits no longer than this between attempts: what is asked beyond is the next session's
ASK_AGAIN_S = 3600.0  # where the aggregator does not say when
SPREAD = 0.25  # share of a wait by which it is made longer, by chance, so that a cohort does not come back at once
LOOK_S = 1.0  # how often the host is asked while training or answering
_RANDOM = secrets.SystemRandom()


class Ending(StrEnum):
    """How a session ended, as one stable word each."""

    UPLOADED = "uploaded"
    WAITING = "waiting"  # an update is in the store, to be sent by the next session
    NOTHING = "nothing"  # to do
    BUSY = "busy"
    UNREACHABLE = "unreachable"
    BAD_ANSWER = "bad_answer"
    BAD_PLAN = "bad_plan"
    HALTED = "halted"
    NO_TRAINING = "no_training"
    CANNOT_ANSWER = (
        "cannot_answer"  # the query reads what the bundle does not declare, or is for another kind of session
    )
    NO_CREDENTIALS = "no_credentials"  # for the issuer of the tokens that the plan asks for
    NOT_ISSUED = "not_issued"  # no token: the issuer cannot be asked, or its answer is none
    ACCOUNT_WAITS = (
        "account_waits"  # its token was taken by another device of the account, or by this one before it was wiped
    )
    OTHER_MODEL = "other_model"
    OTHER_VERSION = "other_version"
    OTHER_DEFINITION = "other_definition"
    EXPIRED = "expired"
    TOO_LARGE = "too_large"
    NOT_ELIGIBLE = "not_eligible"
    NO_CONSENT = "no_consent"
    FEW_EXAMPLES = "few_examples"
    TAKEN_PART = "taken_part"
    NOT_SAMPLED = "not_sampled"
    NOT_ITS_TURN = "not_its_turn"
    INTERRUPTED = "interrupted"
    FORGOTTEN = "forgotten"  # the person had something deleted that the update may have been trained with
    GAVE_UP = "gave_up"
    REFUSED = "refused"


PHASES: Mapping[State, Phase] = {
    State.IDLE: Phase.DOWNLOADED,  # without the version there is no session
    State.CHECKED_IN: Phase.ELIGIBLE,
    State.PLANNED: Phase.PLANNED,
    State.TRAINING: Phase.PLANNED,
    State.READY: Phase.TRAINED,
    State.UPLOADING: Phase.TRAINED,
    State.DONE: Phase.UPLOADED,
}
"""How far a device is, for its journal."""
UNNOTED = frozenset({Ending.NO_CONSENT, Ending.FORGOTTEN})  # the journal has gone, too


class Examples(Protocol):
    """A device's examples: see `device_runtime.store.Examples`."""

    @property
    def server(self) -> Float32:
        """(n, a) what the server side contributed."""
        ...

    @property
    def features(self) -> Mapping[str, Sequence[Any]]:
        """Device feature -> (n,) raw values."""
        ...

    @property
    def labels(self) -> Float32:
        """(n,)."""
        ...


class Journal(Protocol):
    """See `device_runtime.journal.Journal`."""

    def note(self, version: int, phase: Phase, reason: str | None, now_ms: int) -> None:
        """Notes that the device came to a phase with a version this week."""
        ...

    def of(self, week: str) -> Noted | None:
        """What is noted of the newest version of a week."""
        ...

    def due(self, week: str, drawn_ms: int) -> int | None:
        """When the device is to report about a week; None: it did."""
        ...

    def begin(self, week: str) -> bool:
        """Notes that it reports; False: it did."""
        ...

    def forget(self) -> None:
        """Deletes what is noted."""
        ...


class Store(Protocol):
    """What a session asks of the device's store: see `device_runtime.store.Store`."""

    def journal(self, device: int) -> Journal:
        """How far the device came."""
        ...

    def halted(self, version: int) -> str | None:
        """Why a version may not be used any more; None: it may."""
        ...

    def halt(self, model: str, versions: Iterable[int], reason: str) -> None:
        """Remembers the kill switch."""
        ...

    def held(self, scope: str, *, device: int = 0) -> Held | None:
        """See `device_runtime.credentials.Store`."""
        ...

    def hold(self, held: Held, now_ms: int, *, device: int = 0) -> None:
        """See `device_runtime.credentials.Store`."""
        ...

    def spend(self, scope: str, *, device: int = 0) -> None:
        """Deletes a token: it is in an update."""
        ...

    def history(self, since_ms: int, *, device: int = 0) -> Sequence[int]:
        """When it took part."""
        ...

    def begin(
        self, plan_id: str, at_ms: int, *, device: int = 0, takes_part: bool = True, turn: Turn | None = None
    ) -> bool:
        """Remembers that a plan was decided on, and the next turn after it; False: it was before, or is no turn yet."""
        ...

    def next_step(self, training: str, *, device: int = 0) -> int | None:
        """From which step on it is the device's turn; None: it never heard of the training."""
        ...

    def draw_turn(self, training: str, step: int, *, device: int = 0) -> None:
        """Remembers that for a training that it never heard of."""
        ...

    def examples(self, device: int, newest: int, now_ms: int) -> Examples:
        """The device's newest examples, the oldest of them first."""
        ...

    def asked(self, query: Query, now_ms: int, *, device: int = 0) -> Rows:
        """The rows of the device that a query counts over."""
        ...

    @property
    def forgets(self) -> int:
        """How often the person had something forgotten."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Calls within are one, and nobody's come between."""
        ...

    def keep_upload(self, upload: Upload, *, device: int = 0) -> None:
        """Keeps an update until it is sent, or expires; on the disk once this returns."""
        ...

    def pending(self, now_ms: int, *, device: int = 0, reports: bool = False) -> Sequence[Upload]:
        """Updates that wait and have not expired; or such reports."""
        ...

    def uploaded(self, plan_id: str, *, device: int = 0) -> None:
        """Deletes an update that was taken, or will never be."""
        ...


class Asks(Protocol):
    """See `device_runtime.aggregator.Aggregator`."""

    async def check_in(self, message: CheckIn, most: int) -> Reply:
        """Asks for something to do."""
        ...

    async def upload(self, plan: str, upload: str, body: bytes) -> Reply:
        """Sends an update."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of one session; nothing in it is private.

    Attributes:
        ending: how it ended.
        why: the same as a sentence.
        reasons: of `Ending.NOT_ELIGIBLE`, `INTERRUPTED` and `WAITING`: what spoke against it.
        path: the states that the participation went through.
        ask_again_s: in how many seconds to begin another session; None: whenever the device may.
    """

    ending: Ending
    why: str
    reasons: tuple[Reason, ...]
    path: tuple[State, ...]
    ask_again_s: float | None

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "ending": str(self.ending),
            "why": self.why,
            "reasons": [str(reason) for reason in self.reasons],
            "path": [str(state) for state in self.path],
            "ask_again_s": None if self.ask_again_s is None else round(self.ask_again_s, 1),
        }


Work = Callable[[Callable[[], bool], np.random.Generator], "Float32 | None"]
"""What is done for a plan, in a thread: whether it may go on, asked now and again, and what is random -> an update."""


class Ended(Exception):
    """How a session ended before its update was taken: see `Outcome`."""

    def __init__(
        self, ending: Ending, why: str, *, reasons: Sequence[Reason] = (), ask_again_s: float | None = None
    ) -> None:
        super().__init__(why)
        self.ending, self.why, self.reasons, self.ask_again_s = ending, why, tuple(reasons), ask_again_s


@dataclass(kw_only=True)
class Session(ABC):
    """What every session of a device does: it asks the aggregator, and sends one update, once.

    Attributes:
        store: the device's own.
        host: asked before anything is sent.
        aggregator: who is asked.
        trusted: the host app's public key, which plans are signed by.
        device: whose examples and journal, where a store holds those of several.
        credentials: of the account, for plans that ask for a token; None: the device takes part in no such plan.
        now_ms: Unix time in UTC.
        clock: seconds that only go forward.
        sleep: waits so many seconds.
        toss: in [0, 1), from the operating system's randomness.
    """

    store: Store
    host: Host
    aggregator: Asks
    trusted: Trusted
    device: int = 0
    credentials: Credentials | None = None
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    toss: Callable[[], float] = _RANDOM.random
    _path: list[State] = field(default_factory=lambda: [State.IDLE], init=False, repr=False)

    async def session(self) -> Outcome:
        """Takes part once, or says why not; called once.

        Raises:
            StoreError: the store cannot be read or written. What was begun is not begun again.
            BundleError: a program does not do what its manifest says.
        """
        try:
            await self._session()
        except Ended as end:
            if end.ending is not Ending.WAITING:
                self._move(Event.ENDED)
            return Outcome(end.ending, end.why, end.reasons, tuple(self._path), end.ask_again_s)
        return Outcome(Ending.UPLOADED, "the update was counted", (), tuple(self._path), None)

    @abstractmethod
    async def _session(self) -> None:
        """Returns once an update was taken; else raises why not."""

    @abstractmethod
    def _policies(self, asked: Policy) -> tuple[Policy, ...]:
        """What must hold for an update to be sent; `asked` is of its plan."""

    @abstractmethod
    def _check_version(self, version: int) -> None:
        """Raises where an update of this version may not be sent any more."""

    async def _ask(self, said: CheckIn, numbers: int) -> tuple[Plan | Halt, Float32]:
        """What a verified answer says, which brings so many numbers along at most."""
        reply = await self.aggregator.check_in(said, SIGNATURE + 4 + MAX_JSON + 4 * numbers)
        self._move(Event.ASKED)
        later = self._later(reply.retry_after_s)
        if reply.status == 0:
            raise Ended(Ending.UNREACHABLE, reply.error, ask_again_s=later)
        if reply.status == 204:
            raise Ended(Ending.NOTHING, "the aggregator has nothing to do", ask_again_s=later)
        if reply.status in (429, 503):
            raise Ended(Ending.BUSY, f"the aggregator is busy ({reply.status})", ask_again_s=later)
        if reply.status != 200:
            raise Ended(Ending.BAD_ANSWER, f"the aggregator answered {reply.status}", ask_again_s=later)
        try:
            return open_signed(reply.body, self.trusted)
        except PlanError as error:
            raise Ended(Ending.BAD_PLAN, str(error), ask_again_s=later) from None

    def _heed(self, message: Halt, model: str) -> None:
        """Remembers the kill switch."""
        if message.model != model:
            why = f"what was stopped is {message.model!r}, not {model!r}"
            raise Ended(Ending.OTHER_MODEL, why, ask_again_s=self._later(None))
        self.store.halt(message.model, message.versions, message.reason)

    def _cannot_show(self, plan: Plan) -> tuple[Ending, str] | None:
        """Why the device has no token for a plan that asks for one, whatever the issuer says."""
        if plan.token is None or (self.credentials is not None and self.credentials.issuer == plan.token.issuer):
            return None
        has = "none" if self.credentials is None else f"those of {self.credentials.issuer!r}"
        return Ending.NO_CREDENTIALS, f"the plan asks for a token of {plan.token.issuer!r}, the app has {has}"

    async def _token(self, plan: Plan) -> bytes:
        """What an update for the plan begins with; nothing where it asks for no token.

        It is asked for before the device looks at its examples, and before it tosses its coin: the issuer, which knows
        the account, learns neither. An account with several devices tosses one coin so, not one for each.
        """
        if plan.token is None:
            return b""
        assert self.credentials is not None  # else it could not show one
        try:
            return await self.credentials.token(
                plan.token, self.store, plan.expires_ms, self.now_ms, device=self.device
            )
        except NoToken as error:
            ending = Ending.ACCOUNT_WAITS if error.taken else Ending.NOT_ISSUED
            raise Ended(ending, str(error), ask_again_s=self._later(error.retry_after_s)) from None

    async def _send(self, upload: Upload) -> None:
        """Sends an update until it is taken, refused, or this session's patience ends."""
        for attempt in range(ATTEMPTS):
            self._may_send(upload)
            self._move(Event.SENT)
            reply = await self.aggregator.upload(upload.plan, upload.upload, upload.body)
            if reply.status == 200:
                self.store.uploaded(upload.plan, device=self.device)
                self._move(Event.TAKEN)
                return
            if 400 <= reply.status < 500 and reply.status not in (408, 425, 429):
                self.store.uploaded(upload.plan, device=self.device)
                raise Ended(Ending.REFUSED, f"the aggregator does not take the update ({reply.status})")
            self._move(Event.LOST)
            wait = self._pause(attempt, reply)
            if attempt == ATTEMPTS - 1 or wait > PATIENCE_S:
                why = reply.error or f"the aggregator answered {reply.status}"
                raise Ended(Ending.WAITING, why, ask_again_s=wait)
            await self.sleep(wait)

    def _may_send(self, upload: Upload) -> None:
        now_ms = self.now_ms()
        if now_ms >= upload.expires_ms:
            self.store.uploaded(upload.plan, device=self.device)
            raise Ended(Ending.EXPIRED, "the plan expired before its update was taken")
        readings = self.host.read()
        if not readings.consent:
            self._withdraw()
        waiting = self.store.pending(now_ms, device=self.device, reports=upload.reports)
        if all(kept.plan != upload.plan for kept in waiting):
            raise Ended(Ending.FORGOTTEN, "something was forgotten, and the update that waited with it")
        self._check_version(upload.version)
        # How often it takes part was decided when it began.
        decision = both(*(decide(policy, readings, (), now_ms) for policy in self._policies(upload.policy)))
        if not decision.eligible:
            raise Ended(Ending.WAITING, "the update is sent when the device may again", reasons=decision.reasons)

    def _require(self, *policies: Policy, history: Sequence[int]) -> None:
        decision = self._decision(policies, history)
        if Reason.NO_CONSENT in decision.reasons:
            self._withdraw()
        if not decision.eligible:
            raise Ended(Ending.NOT_ELIGIBLE, "the device may not take part now", reasons=decision.reasons)

    def _decision(self, policies: Sequence[Policy], history: Sequence[int]) -> Decision:
        readings, now_ms = self.host.read(), self.now_ms()
        return both(*(decide(policy, readings, history, now_ms) for policy in policies))

    def _withdraw(self) -> NoReturn:
        """Without consent nothing is sent any more, what is ready included, and no journal is kept."""
        self._forget_uploads(reports=False)
        self._forget_uploads(reports=True)
        self.store.journal(self.device).forget()
        raise Ended(Ending.NO_CONSENT, "the person does not consent", reasons=(Reason.NO_CONSENT,))

    def _forget_uploads(self, *, reports: bool) -> None:
        for upload in self.store.pending(0, device=self.device, reports=reports):  # expired too: a clock may go back
            self.store.uploaded(upload.plan, device=self.device)

    def _pause(self, attempt: int, reply: Reply) -> float:
        if reply.retry_after_s is not None:
            return self._later(reply.retry_after_s)
        return BACKOFF_S * 2.0**attempt * _RANDOM.random()

    def _later(self, asked_s: float | None) -> float:
        """Never sooner than asked, and not all at once."""
        return (ASK_AGAIN_S if asked_s is None else asked_s) * (1 + SPREAD * _RANDOM.random())

    def _move(self, event: Event) -> None:
        self._path.append(advance(self._path[-1], event))


@dataclass(kw_only=True)
class Participation(Session):
    """One session of one device: it sends what waits in the store, or else asks for a plan. See `Session`.

    Attributes:
        bundle: verified; plans for other versions are refused.
        trainer: of the same bundle; None: it has no training program, and asks for the sake of the kill switch.
        answerer: of the same bundle; None: one is made at the first query.
        own: the host app's own conditions, which hold beside those of a plan, asked again and again while training.
    """

    bundle: Bundle
    trainer: Trainer | None
    answerer: Answerer | None = None
    own: Policy = field(default_factory=Policy)
    _waited: int | None = field(default=None, init=False, repr=False)  # version of an update that waited

    async def session(self) -> Outcome:
        """See `Session`; and notes how far it came."""
        outcome = await super().session()
        if outcome.ending not in UNNOTED:
            reached = [state for state in outcome.path if state is not State.DROPPED][-1]
            why = None if outcome.ending is Ending.UPLOADED else str([*outcome.reasons, outcome.ending][0])
            with suppress(StoreError):  # a full disk is what the session ended for, and keeps no journal
                self._note(PHASES[reached], why)
        return outcome

    def _note(self, phase: Phase, why: str | None) -> None:
        version = self.bundle.manifest.version if self._waited is None else self._waited
        self.store.journal(self.device).note(version, phase, why, self.now_ms())

    async def _session(self) -> None:
        manifest = self.bundle.manifest
        if not self.host.read().consent:
            self._withdraw()
        self._check_version(manifest.version)
        if waiting := self.store.pending(self.now_ms(), device=self.device):
            self._waited = waiting[0].version
            self._move(Event.FOUND)
            await self._send(waiting[0])
            return
        self._require(self.own, history=self.store.history(0, device=self.device))
        said = CheckIn(model=manifest.model, version=manifest.version, runtime=RUNTIME)
        message, numbers = await self._ask(said, max(parameters(manifest), MAX_PAYLOAD))
        if isinstance(message, Halt):
            self._halt(message)
        if found := refusal(message, manifest, self.now_ms()) or self._cannot_show(message):
            raise Ended(*found, ask_again_s=self._later(None))
        self._move(Event.OFFERED)
        await self._send(await self._take_part(message, numbers))

    def _policies(self, asked: Policy) -> tuple[Policy, ...]:
        return self.own, asked

    def _check_version(self, version: int) -> None:
        if (reason := self.store.halted(version)) is not None:
            self._forget_uploads(reports=False)
            raise Ended(Ending.HALTED, f"version {version} was stopped: {reason}")

    def _halt(self, message: Halt) -> NoReturn:
        manifest = self.bundle.manifest
        self._heed(message, manifest.model)
        self._check_version(manifest.version)
        raise Ended(Ending.NOTHING, "other versions were stopped", ask_again_s=self._later(None))

    async def _take_part(self, plan: Plan, numbers: Float32) -> Upload:
        """An update that is in the store."""
        history = self.store.history(0, device=self.device)
        self._require(self.own, plan.policy, history=history)
        if plan.turn is not None:
            self._require_turn(plan.turn, plan.expires_ms)
        token = await self._token(plan)
        forgets = self.store.forgets
        work = self._training(plan, numbers) if isinstance(plan, TrainPlan) else self._answering(plan, numbers)
        self._begin(plan, history)
        self._move(Event.BEGUN)
        watch, rng = _Watch(self, plan, history), np.random.default_rng()
        try:
            update = await asyncio.to_thread(work, watch.go_on, rng)
        except PlanError as error:
            raise Ended(Ending.BAD_PLAN, str(error), ask_again_s=self._later(None)) from None
        finally:
            watch.stop.set()
        if update is None:
            self._interrupted(watch, plan)
        body = token + encode(update, plan.upload, rng)
        upload = Upload(plan.id, secrets.token_hex(16), body, plan.expires_ms, plan.version, plan.policy)
        with self.store.together():
            if self.store.forgets != forgets:
                raise Ended(Ending.FORGOTTEN, "something was forgotten meanwhile; the update is too")
            self.store.keep_upload(upload, device=self.device)
            self._note(Phase.TRAINED, WAITING)
            if plan.token is not None:
                self.store.spend(plan.token.scope, device=self.device)
        self._move(Event.TRAINED)
        return upload

    def _begin(self, plan: Plan, history: Sequence[int]) -> None:
        """Notes that the device takes part, or that it does not: it decides once, for what was so when it looked."""
        # Whoever loses the toss has decided too: another toss for the same plan would change its odds.
        takes_part = self.toss() < plan.sampling
        with self.store.together():
            if self.store.history(0, device=self.device) != history:  # another process's, which looked when we did
                raise Ended(Ending.TAKEN_PART, "the device took part meanwhile", ask_again_s=self._later(None))
            begun = self.store.begin(plan.id, self.now_ms(), device=self.device, takes_part=takes_part, turn=plan.turn)
            if begun and takes_part:
                self._note(Phase.PLANNED, BROKE_OFF)  # if it is the last that is heard
        if not begun:
            raise Ended(Ending.TAKEN_PART, "this plan was decided on before", ask_again_s=self._later(None))
        if not takes_part:
            raise Ended(Ending.NOT_SAMPLED, "the toss fell the other way", ask_again_s=self._later(None))

    def _training(self, plan: TrainPlan, weights: Float32) -> Work:
        """With the newest examples, if there are enough."""
        trainer = self.trainer
        assert trainer is not None  # the refusal looked for a training program
        newest = self.store.examples(self.device, plan.examples[1], self.now_ms())
        if len(newest.labels) < plan.examples[0]:
            why = f"the plan asks for at least {plan.examples[0]} examples"
            raise Ended(Ending.FEW_EXAMPLES, why, ask_again_s=self._later(None))
        arguments = (newest.server, self.bundle.manifest.features.inputs(newest.features), newest.labels)
        return lambda go_on, rng: trainer.train(plan, weights, *arguments, go_on=go_on, rng=rng)

    def _answering(self, plan: QueryPlan, payload: Float32) -> Work:
        """With all rows that count, none included: that a device answers says nothing of what it has."""
        answerer = self.answerer = self.answerer or Answerer(self.bundle)
        rows = self.store.asked(plan.query, self.now_ms(), device=self.device)
        return lambda go_on, _: answerer.answer(plan, payload, rows, go_on=go_on)

    def _require_turn(self, turn: Turn, expires_ms: int) -> None:
        """Waits a separation from turn to turn, and before the first for a share of it by chance.

        Else all of a fleet would come to the first step, and nobody to those after it. Where updates of several steps
        are released together, the aggregator paces: nobody waits for the first.
        """
        if self.store.next_step(turn.training, device=self.device) is None:
            together = turn.first_step == turn.last_step
            spread = int(self.toss() * turn.separation) if together else 0
            self.store.draw_turn(turn.training, turn.first_step + spread, device=self.device)
        step = self.store.next_step(turn.training, device=self.device)
        assert step is not None
        if turn.first_step < step:
            left_s = (expires_ms - self.now_ms()) / 1e3  # until the next step, where all begin and end together
            why = f"its turn is in {step - turn.first_step} steps at the earliest"
            raise Ended(Ending.NOT_ITS_TURN, why, ask_again_s=self._later(min(left_s, ASK_AGAIN_S)))

    def _interrupted(self, watch: _Watch, plan: Plan) -> NoReturn:
        worker = self.trainer if isinstance(plan, TrainPlan) else self.answerer
        assert worker is not None
        if Reason.NO_CONSENT in watch.reasons:
            self._withdraw()
        if watch.reasons:
            raise Ended(Ending.INTERRUPTED, "the device may no longer take part", reasons=watch.reasons)
        if watch.expired:
            raise Ended(Ending.EXPIRED, "the plan expired meanwhile")
        raise Ended(Ending.GAVE_UP, worker.gave_up or "no update came of it")


class _Watch:
    """Asks the host, now and again, whether what was begun may go on; from its thread."""

    def __init__(self, session: Participation, plan: Plan, history: Sequence[int]) -> None:
        self._session, self._plan, self._history = session, plan, history
        self._looked = session.clock()
        self.stop = threading.Event()
        self.reasons: tuple[Reason, ...] = ()
        self.expired = False

    def go_on(self) -> bool:
        """Whether it may; once it may not, never again."""
        now_s = self._session.clock()
        if not self.stop.is_set() and now_s - self._looked >= LOOK_S:
            self._looked = now_s
            self.reasons = self._session._decision((self._session.own, self._plan.policy), self._history).reasons
            self.expired = self._session.now_ms() >= self._plan.expires_ms
            if self.reasons or self.expired:
                self.stop.set()
        return not self.stop.is_set()


def read_policy(file: Path | None) -> Policy:
    """The host app's own conditions, from JSON; the default of each where it is left out.

    Raises:
        ConfigError: it cannot be read, or is no policy.
    """
    if file is None:
        return Policy()
    try:
        return Policy.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"policy {str(file)!r} cannot be read: {type(error).__name__}") from None
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigError(f"{file.name!r} must be a policy as JSON: {faults}") from None


def parameters(manifest: Manifest) -> int:
    """How many weights the bundle's training program has; 0 without one."""
    return 0 if manifest.train is None else manifest.train.size


def refusal(plan: Plan, manifest: Manifest, now_ms: int) -> tuple[Ending, str] | None:
    """Why a verified plan is none for this bundle, or asks for more than it allows; None: it is and does not."""
    own = _training_refusals(plan, manifest) if isinstance(plan, TrainPlan) else _query_refusals(plan, manifest)
    too_large = [
        f"{name} {value:g} of at most {most:g}" for name, value, most in _limits(plan, manifest) if value > most
    ]
    checks = (
        (plan.model != manifest.model, Ending.OTHER_MODEL, f"the plan is for model {plan.model!r}"),
        (plan.version != manifest.version, Ending.OTHER_VERSION, f"the plan is for version {plan.version}"),
        (
            plan.definition_hash != manifest.definition_hash,
            Ending.OTHER_DEFINITION,
            "the plan is for another definition of the model",
        ),
        *own,
        (now_ms >= plan.expires_ms, Ending.EXPIRED, "the plan has expired"),
        (bool(too_large), Ending.TOO_LARGE, f"the plan asks for more than the bundle allows: {', '.join(too_large)}"),
    )
    return next(((ending, why) for refused, ending, why in checks if refused), None)


def _limits(plan: Plan, manifest: Manifest) -> list[tuple[str, float, float]]:
    """Name, what the plan asks for, and what the bundle allows at most."""
    keeping = manifest.keeping
    seconds = ("seconds", plan.seconds, keeping.max_seconds)
    if isinstance(plan, QueryPlan):
        return [("rows", plan.query.rows, keeping.max_examples), seconds]
    memory = ("memory_mb", plan.memory_mb, keeping.max_memory_mb)
    return [("examples", plan.examples[1], keeping.max_examples), seconds, memory]


def _training_refusals(plan: TrainPlan, manifest: Manifest) -> tuple[tuple[bool, Ending, str], ...]:
    weights = f"the plan has {plan.parameters} weights, the bundle's program {parameters(manifest)}"
    return (
        (manifest.train is None, Ending.NO_TRAINING, "the bundle has no training program"),
        (plan.parameters != parameters(manifest), Ending.BAD_PLAN, weights),
    )


def _query_refusals(plan: QueryPlan, manifest: Manifest) -> tuple[tuple[bool, Ending, str], ...]:
    lacking = Readable(manifest).lacks(plan.query)
    return (
        (plan.query.week is not None, Ending.CANNOT_ANSWER, "a query about journals is for a session that reports"),
        (bool(lacking), Ending.CANNOT_ANSWER, f"the bundle does not declare what the query reads: {lacking}"),
    )
