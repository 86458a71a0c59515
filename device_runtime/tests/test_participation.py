import asyncio
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.caller import Reply
from device_runtime.credentials import NoToken
from device_runtime.eligibility import Readings, Reason
from device_runtime.host import ScriptedHost
from device_runtime.participation import (
    ASK_AGAIN_S,
    ATTEMPTS,
    PATIENCE_S,
    SPREAD,
    Ending,
    Participation,
    parameters,
    read_policy,
    refusal,
)
from device_runtime.protocol import NEXT, Held, State, Upload
from hybrid import Clear, Numeric
from hybrid.bundle import Bundle, Keeping, Manifest, Parameter, TrainProgram
from hybrid.errors import ConfigError, StoreError
from hybrid.features import Features
from hybrid.journal import STOPS, Phase
from hybrid.plan import Halt, Local, Policy, QueryPlan, TrainPlan, Turn, sign
from hybrid.query import LABEL, Categories, Labels, Moments, Query
from hybrid.tokens import TOKEN_BYTES, Pending, Window
from hybrid.update import decode

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
NOW = 1_700_000_000_000
MANIFEST = Manifest(
    model="meals",
    version=7,
    definition_hash="ab" * 32,
    features=Features.of({"steps": Numeric()}),
    server_embedding=2,
    device_embedding=4,
    merge="server",
    release=Clear(reason="a test of taking part"),
    programs={},
    train=TrainProgram(
        rows=4,
        server=2,
        missing=False,
        parameters=(Parameter(name="weight", shape=(1, 2)), Parameter(name="bias", shape=(1,))),
    ),
    keeping=Keeping(max_examples=64, max_seconds=30, max_memory_mb=256),
)
PLAN = TrainPlan(
    id="0f" * 16,
    model="meals",
    version=7,
    definition_hash="ab" * 32,
    expires_ms=NOW + 600_000,
    examples=(2, 64),
    seconds=30,
    memory_mb=256,
    local=Local(steps=1, lr=0.5),
    clip=10.0,
    parameters=3,
)
QUERY = QueryPlan(
    id="2f" * 16,
    model="meals",
    version=7,
    definition_hash="ab" * 32,
    expires_ms=NOW + 600_000,
    seconds=30,
    query=Query(parts=(Moments(column="steps", low=0, high=8),), rows=64),
)
WEIGHTS = np.array([1.0, 2.0, 3.0], np.float32)
UPDATE = np.array([0.5, -0.25, 2.0], np.float32)
GOOD = Readings(
    consent=True, charging=True, battery=0.9, idle=True, metered=False, thermal="nominal", free_bytes=1 << 30
)
DAY_MS = 86_400_000
OFTEN = Policy(separation_s=0, participations=99)


@dataclass
class Examples:
    server: np.ndarray
    features: dict
    labels: np.ndarray


@dataclass
class Asked:
    columns: dict
    server: np.ndarray
    predicted: np.ndarray

    @property
    def features(self):
        return {"steps": self.columns["steps"]}


@dataclass
class MemoryJournal:
    """Keeps the latest line, and takes no word that is not of the closed list."""

    lines: list = field(default_factory=list)

    def note(self, version, phase, reason, now_ms):
        assert reason is None if phase is Phase.UPLOADED else reason in STOPS[phase], (phase, reason)
        self.lines.append((version, str(phase), reason))

    def forget(self):
        self.lines.clear()


@dataclass
class MemoryStore:
    """A device's store in memory; what it holds survives a session, as a file does.

    Attributes:
        decided: plan -> when, and whether it took part.
        waiting: plan -> its update.
        full: whether nothing can be kept any more.
    """

    rows: int = 5
    decided: dict = field(default_factory=dict)
    waiting: dict = field(default_factory=dict)
    stopped: dict = field(default_factory=dict)
    full: bool = False
    forgets: int = 0
    kept: list = field(default_factory=list)
    turns: dict = field(default_factory=dict)
    tokens: dict = field(default_factory=dict)
    noted: MemoryJournal = field(default_factory=MemoryJournal)

    def journal(self, device):
        return self.noted

    def held(self, scope, *, device=0):
        return self.tokens.get(scope)

    def hold(self, held, now_ms, *, device=0):
        self.tokens[held.scope] = held

    def spend(self, scope, *, device=0):
        del self.tokens[scope]

    def halted(self, version):
        return self.stopped.get(version)

    def halt(self, model, versions, reason):
        self.stopped |= dict.fromkeys(versions, reason)

    def history(self, since_ms, *, device=0):
        return [at for at, took_part in self.decided.values() if took_part and at >= since_ms]

    def begin(self, plan_id, at_ms, *, device=0, takes_part=True, turn=None):
        if plan_id in self.decided or (turn and turn.first_step < self.turns[turn.training]):
            return False
        self.decided[plan_id] = (at_ms, takes_part)
        if turn:
            self.turns[turn.training] = turn.last_step + turn.separation
        return True

    def next_step(self, training, *, device=0):
        return self.turns.get(training)

    def draw_turn(self, training, step, *, device=0):
        self.turns.setdefault(training, step)

    def examples(self, device, newest, now_ms):
        n = min(self.rows, newest)
        return Examples(np.ones((n, 2), np.float32), {"steps": [float(i) for i in range(n)]}, np.ones(n, np.float32))

    def asked(self, query, now_ms, *, device=0):
        n = min(self.rows, query.rows)
        steps = [float(i) for i in range(n)]
        return Asked({"steps": steps, LABEL: [1] * n}, np.ones((n, 2), np.float32), np.ones(n, np.float32))

    def forget(self):
        self.forgets += 1
        self.waiting.clear()

    def together(self):
        return nullcontext()

    def keep_upload(self, kept, *, device=0):
        if self.full:
            raise StoreError("no space is left")
        self.waiting[kept.plan] = kept
        self.kept.append(kept.body)

    def pending(self, now_ms, *, device=0, reports=False):
        return [kept for kept in self.waiting.values() if now_ms < kept.expires_ms and kept.reports == reports]

    def uploaded(self, plan_id, *, device=0):
        self.waiting.pop(plan_id, None)


@dataclass
class Trainer:
    """Asks whether it may go on `looks` times, then gives an update."""

    world: "World"
    looks: int = 3
    update: np.ndarray | None = field(default_factory=lambda: UPDATE)
    gave_up: str | None = None
    trained: list = field(default_factory=list)

    def train(self, plan, weights, server, inputs, labels, *, go_on, rng):
        self.trained.append((plan.id, weights.tolist(), inputs.ravel().tolist()))
        for _ in range(self.looks):
            self.world.seconds += 2
            if not go_on():
                return None
        return self.update


@dataclass
class Aggregator:
    """Answers as it is told, and remembers what it was sent; the last answer stays."""

    checks: list = field(default_factory=lambda: [Reply(200, sign(PLAN, KEY, WEIGHTS))])
    uploads: list = field(default_factory=lambda: [Reply(200)])
    asked: list = field(default_factory=list)
    sent: list = field(default_factory=list)

    async def check_in(self, message, most):
        self.asked.append((message.model_dump(), most))
        return self.checks.pop(0) if len(self.checks) > 1 else self.checks[0]

    async def upload(self, plan, upload, body):
        self.sent.append((plan, upload, body))
        return self.uploads.pop(0) if len(self.uploads) > 1 else self.uploads[0]


@dataclass
class World:
    """One device, and the time that passes for it."""

    readings: tuple = (GOOD,)
    manifest: Manifest = MANIFEST
    own: Policy = field(default_factory=Policy)
    toss: float = 0.0
    now_ms: int = NOW
    seconds: float = 0.0
    store: MemoryStore = field(default_factory=MemoryStore)
    aggregator: Aggregator = field(default_factory=Aggregator)
    waited: list = field(default_factory=list)
    credentials: object = None

    def __post_init__(self):
        self.trainer = Trainer(self)

    def answers(self, *messages, key=KEY):
        """The aggregator's, as it signs them."""
        self.aggregator.checks = [
            Reply(200, sign(message, key, WEIGHTS if isinstance(message, TrainPlan) else None)) for message in messages
        ]
        return self

    async def _sleep(self, seconds):
        self.waited.append(seconds)
        self.now_ms += int(seconds * 1000)

    def session(self):
        """A new process's."""
        return asyncio.run(
            Participation(
                bundle=Bundle(self.manifest, {}),
                trainer=self.trainer,
                store=self.store,
                host=ScriptedHost(self.readings),
                aggregator=self.aggregator,
                trusted=KEY.public_key(),
                credentials=self.credentials,
                own=self.own,
                now_ms=lambda: self.now_ms,
                clock=lambda: self.seconds,
                sleep=self._sleep,
                toss=lambda: self.toss,
            ).session()
        )


def changed(**fields):
    return PLAN.model_copy(update=fields)


def test_a_device_trains_from_the_plans_weights_and_sends_one_update():
    """Its five examples, the plan's weights; the update arrives as it was trained, and nothing waits any more."""
    world = World()
    outcome = world.session()
    assert (outcome.ending, outcome.reasons, outcome.ask_again_s) == (Ending.UPLOADED, (), None)
    assert outcome.path == ("idle", "checked_in", "planned", "training", "ready", "uploading", "done")
    assert world.trainer.trained == [(PLAN.id, [1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 4.0])]
    ((plan, upload, body),) = world.aggregator.sent
    assert (plan, re.fullmatch("[0-9a-f]{32}", upload) is not None) == (PLAN.id, True)
    np.testing.assert_array_equal(decode(body, 3), UPDATE)
    assert (world.store.waiting, world.store.history(0)) == ({}, [NOW])


def test_a_check_in_says_model_version_and_runtime():
    """And takes no more than the largest plan: a signature, a length, 64 KiB of JSON, 1 MiB of a query's payload."""
    world = World()
    world.session()
    assert world.aggregator.asked == [({"model": "meals", "version": 7, "runtime": 4}, 64 + 4 + 65536 + (1 << 20))]


def test_an_update_is_kept_before_it_is_sent():
    """A store that cannot keep it: nothing is sent, and the plan is not begun again."""
    world = World()
    world.store.full = True
    with pytest.raises(StoreError):
        world.session()
    assert world.aggregator.sent == []
    world.store.full, world.now_ms = False, NOW + 1
    world.own = OFTEN
    world.answers(changed(policy=world.own))
    assert world.session().ending is Ending.TAKEN_PART


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({"model": "other"}, "other_model"),
        ({"version": 6}, "other_version"),
        ({"version": 8}, "other_version"),
        ({"definition_hash": "cd" * 32}, "other_definition"),
        ({"expires_ms": NOW}, "expired"),
        ({"examples": (2, 65)}, "too_large"),
        ({"seconds": 30.5}, "too_large"),
        ({"memory_mb": 257}, "too_large"),
        ({"examples": (6, 64)}, "few_examples"),
    ],
    ids=str,
)
def test_a_plan_that_is_not_for_this_device_is_refused(fields: dict, ending: str):
    """By one word and a sentence; nothing is trained or sent, and it is not counted as taking part."""
    world = World().answers(changed(**fields))
    outcome = world.session()
    assert (outcome.ending, outcome.path[-1]) == (ending, "dropped")
    assert (world.trainer.trained, world.aggregator.sent, world.store.decided) == ([], [], {})


def test_a_plan_with_other_weights_than_the_program_is_refused():
    """Two of them; and any, where the bundle cannot train."""
    world = World()
    world.aggregator.checks = [Reply(200, sign(changed(parameters=2), KEY, WEIGHTS[:2]))]
    assert world.session().ending is Ending.BAD_PLAN
    world = World(manifest=MANIFEST.model_copy(update={"train": None}))
    assert world.session().ending is Ending.NO_TRAINING
    assert refusal(PLAN, MANIFEST, NOW) is None
    assert (parameters(MANIFEST), parameters(world.manifest)) == (3, 0)


@pytest.mark.parametrize("body", [b"", b"\0" * 200, sign(PLAN, OTHER, WEIGHTS), sign(PLAN, KEY, WEIGHTS)[:-1]])
def test_an_answer_that_the_trusted_key_did_not_sign_is_no_plan(body: bytes):
    """Empty, zeros, another's, cut: the device asks again later, and does nothing else."""
    world = World()
    world.aggregator.checks = [Reply(200, body)]
    outcome = world.session()
    assert (outcome.ending, outcome.path) == (Ending.BAD_PLAN, ("idle", "checked_in", "dropped"))
    assert outcome.ask_again_s is not None
    assert (world.trainer.trained, world.store.decided) == ([], {})


def test_a_plan_is_taken_part_in_once():
    """Offered again to the same device, by a peer that replays it, a day later too."""
    world = World(own=OFTEN).answers(changed(policy=OFTEN, expires_ms=NOW + 2 * DAY_MS))
    assert world.session().ending is Ending.UPLOADED
    for _ in range(2):
        world.now_ms += DAY_MS // 2
        assert world.session().ending is Ending.TAKEN_PART
    assert (len(world.trainer.trained), len(world.aggregator.sent)) == (1, 1)


@pytest.mark.parametrize(("toss", "ending"), [(0.249, "uploaded"), (0.25, "not_sampled")])
def test_a_device_tosses_with_the_plans_probability(toss: float, ending: str):
    """A quarter: below it takes part."""
    assert World(toss=toss).answers(changed(sampling=0.25)).session().ending == ending


def turns(*steps, separation=3, training="5" * 32, last=0):
    """A plan for each step, as an aggregator signs them one after another; an update may be in `last` more steps."""
    for number in steps:
        turn = Turn(training=training, first_step=number, last_step=number + last, separation=separation)
        yield changed(id=f"{number:016x}{training[:16]}", policy=OFTEN, turn=turn)


@pytest.mark.parametrize(("toss", "first"), [(0.0, 1), (0.34, 2), (0.99, 3)])
def test_a_device_takes_part_once_in_a_separation(toss: float, first: int):
    """In every third step, beginning at one of the first three by chance: else all would come to the first."""
    world, took_part = World(own=OFTEN, toss=toss), []
    for number, plan in enumerate(turns(*range(1, 11)), start=1):
        if world.answers(plan).session().ending is Ending.UPLOADED:
            took_part.append(number)
    assert took_part == list(range(first, 11, 3))


def test_where_an_update_may_be_in_a_later_step_the_next_turn_is_a_separation_after_that():
    """From step 4 on, two steps late at most: the next is 4 + 2 + 3. And nobody waits for the first."""
    world, took_part = World(own=OFTEN, toss=0.99), []
    for number, plan in enumerate(turns(*range(4, 20), last=2), start=4):
        outcome = world.answers(plan).session()
        if outcome.ending is Ending.UPLOADED:
            took_part.append(number)
        else:
            assert (outcome.ending, outcome.path[-1]) == (Ending.NOT_ITS_TURN, State.DROPPED)
            assert outcome.ask_again_s >= 600  # until the plan's end
    assert took_part == [4, 9, 14, 19]


def test_the_steps_of_one_training_say_nothing_of_anothers():
    """Which has been paid for by itself."""
    world = World(own=OFTEN)
    endings = [
        world.answers(plan).session().ending
        for training in ("5" * 32, "6" * 32, "5" * 32)
        for plan in turns(7 if training[0] == "5" and world.store.turns else 6, training=training)
    ]
    assert endings == [Ending.UPLOADED, Ending.UPLOADED, Ending.NOT_ITS_TURN]


def test_an_aggregator_that_goes_back_in_its_steps_gets_nothing_more():
    """Nor one whose update was refused, or never sent: it may have been counted."""
    world = World(own=OFTEN)
    world.aggregator.uploads = [Reply(404)]
    (plan, again, *_) = (*turns(5), *turns(5))
    assert world.answers(plan).session().ending is Ending.REFUSED
    for back in (again.model_copy(update={"id": "9" * 32}), *turns(1, 4)):
        assert world.answers(back).session().ending is Ending.NOT_ITS_TURN
    assert len(world.aggregator.sent) == 1


def test_who_lost_the_toss_does_not_toss_again_for_the_same_plan():
    """Nor has it taken part: the next plan may have it at once."""
    world = World(toss=0.9).answers(changed(sampling=0.25))
    assert world.session().ending is Ending.NOT_SAMPLED
    world.toss = 0.0
    assert world.session().ending is Ending.TAKEN_PART
    assert world.store.history(0) == []
    assert world.answers(changed(id="1e" * 16, sampling=0.25)).session().ending is Ending.UPLOADED


def test_the_toss_is_fair():
    """By the operating system's randomness: 3,000 tosses at 0.3, within five standard deviations of 900."""
    device = Participation.__dataclass_fields__["toss"].default
    hits = sum(device() < 0.3 for _ in range(3000))
    assert abs(hits - 900) < 5 * (3000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"charging": False}, "not_charging"), ({"idle": None}, "idle_unknown"), ({"metered": True}, "metered")],
)
def test_a_device_that_is_not_eligible_asks_nobody(change: dict, reason: str):
    """The host app's own conditions come before the first request."""
    world = World(readings=(replace(GOOD, **change),))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.NOT_ELIGIBLE, (reason,))
    assert world.aggregator.asked == []


def test_the_plans_conditions_hold_beside_the_devices_own():
    """90 % of charge is enough for the app, and not for the plan; and the other way round."""
    world = World().answers(changed(policy=Policy(battery=0.95)))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.NOT_ELIGIBLE, (Reason.BATTERY_LOW,))
    assert world.store.decided == {}
    world = World(own=Policy(battery=0.95)).answers(changed(policy=Policy(battery=0)))
    assert world.session().ending is Ending.NOT_ELIGIBLE


def test_a_second_participation_waits_for_the_separation():
    """A day by the plan's policy and the app's: an hour later it asks nobody; a day later it takes part."""
    world = World()
    assert world.session().ending is Ending.UPLOADED
    world.now_ms += 3_600_000
    world.answers(changed(id="1e" * 16, expires_ms=NOW + 9 * DAY_MS))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.NOT_ELIGIBLE, (Reason.TOO_SOON, Reason.TOO_OFTEN))
    world.now_ms = NOW + DAY_MS
    assert world.session().ending is Ending.UPLOADED


def test_of_two_processes_with_one_store_one_takes_part():
    """Both looked before either had begun; the other's plan is another one, and begins within the separation."""
    world = World()
    examples = world.store.examples

    def meanwhile(*arguments):
        world.store.begin("1e" * 16, NOW - 1)
        return examples(*arguments)

    world.store.examples = meanwhile
    outcome = world.session()
    assert (outcome.ending, outcome.path[-1]) == (Ending.TAKEN_PART, "dropped")
    assert (world.trainer.trained, world.aggregator.sent, world.store.history(0)) == ([], [], [NOW - 1])


def test_a_clock_that_was_set_back_speaks_against_it():
    """It took part in what is now the future."""
    world = World()
    assert world.session().ending is Ending.UPLOADED
    world.now_ms = NOW - 1
    assert world.answers(changed(id="1e" * 16)).session().reasons == (Reason.CLOCK_BEHIND,)


LOOKS = 3  # before it trains: consent, the app's conditions, the plan's


@pytest.mark.parametrize("place", range(3))
def test_training_ends_where_a_condition_does(place: int):
    """Somebody takes the device up at any of three looks: no update, nothing sent, and never again for this plan."""
    world = World(readings=(GOOD,) * (LOOKS + place) + (replace(GOOD, idle=False), GOOD))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.INTERRUPTED, (Reason.IN_USE,))
    assert outcome.path[-2:] == ("training", "dropped")
    assert (world.aggregator.sent, world.store.kept, world.store.history(0)) == ([], [], [NOW])


def test_the_participation_that_goes_on_does_not_count_against_itself():
    """It is in the history as begun; the looks while training do not take it for an earlier one."""
    assert World().answers(changed(policy=Policy(separation_s=1e6))).session().ending is Ending.UPLOADED


def test_training_that_gives_no_update_ends_with_the_trainers_reason():
    """A limit that was passed, say."""
    world = World()
    world.trainer.update, world.trainer.gave_up = None, "it took more than 30 s"
    outcome = world.session()
    assert (outcome.ending, outcome.why) == (Ending.GAVE_UP, "it took more than 30 s")
    assert world.aggregator.sent == []


def test_training_ends_when_its_plan_does():
    """The clock passes the plan's end between two looks."""
    world = World()

    def train(plan, weights, server, inputs, labels, *, go_on, rng):
        world.now_ms, world.seconds = PLAN.expires_ms, 10.0
        assert not go_on()
        assert not go_on()

    world.trainer.train = train
    assert world.session().ending is Ending.EXPIRED
    assert world.aggregator.sent == []


@pytest.mark.parametrize("place", range(LOOKS + 4))
def test_consent_withdrawn_at_any_moment_ends_everything(place: int):
    """At each of the seven times that the host is read in a session: nothing is sent, and nothing waits."""
    world = World(readings=(GOOD,) * place + (replace(GOOD, consent=False), GOOD))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.NO_CONSENT, (Reason.NO_CONSENT,))
    assert (world.aggregator.sent, world.store.waiting) == ([], {})
    assert (world.aggregator.asked == []) == (place < 2)


def test_consent_withdrawn_deletes_an_update_that_waits():
    """It is not sent when the person consents anew."""
    world = World()
    world.aggregator.uploads = [Reply(0, error="the aggregator cannot be reached")]
    assert world.session().ending is Ending.WAITING
    assert len(world.store.waiting) == 1
    world.readings = (Readings(),)
    assert world.session().ending is Ending.NO_CONSENT
    assert world.store.waiting == {}


def test_consent_withdrawn_deletes_an_update_that_has_expired_too():
    """A clock that is set back would bring it to life again, when the person consents anew."""
    world = World()
    world.aggregator.uploads = [Reply(0)]
    world.session()
    world.now_ms, world.readings = PLAN.expires_ms, (Readings(),)
    assert world.session().ending is Ending.NO_CONSENT
    assert world.store.waiting == {}


def test_what_is_forgotten_while_training_is_in_no_update():
    """Another process deletes: nothing is kept, nothing is sent."""
    world = World()
    trained = world.trainer.train

    def train(*arguments, **more):
        world.store.forget()
        return trained(*arguments, **more)

    world.trainer.train = train
    assert world.session().ending is Ending.FORGOTTEN
    assert (world.store.kept, world.aggregator.sent) == ([], [])


def test_what_is_forgotten_between_two_attempts_is_not_sent_again():
    """The update that waited went with it, however much this process still has in memory."""
    world = World()
    world.aggregator.uploads = [Reply(0)]
    sleep = world._sleep

    async def forgetful(seconds):
        world.store.forget()
        await sleep(seconds)

    world._sleep = forgetful
    assert world.session().ending is Ending.FORGOTTEN
    assert len(world.aggregator.sent) == 1


def test_a_lost_answer_is_followed_by_the_same_bytes_under_the_same_id():
    """In one session, and in the sessions of later processes, until one is answered; then never again."""
    world = World()
    world.aggregator.uploads = [Reply(0), Reply(500), Reply(0), Reply(503), Reply(0), Reply(200), Reply(400)]
    outcome = world.session()
    assert (outcome.ending, outcome.path[-1]) == (Ending.WAITING, "ready")
    assert len(world.aggregator.sent) == ATTEMPTS == 4
    outcome = world.session()
    assert (outcome.ending, outcome.path) == (
        Ending.UPLOADED,
        ("idle", "ready", "uploading", "ready", "uploading", "done"),
    )
    assert len(set(world.aggregator.sent)) == 1
    assert len(world.aggregator.asked) == len(world.trainer.trained) == 1
    assert world.store.waiting == {}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 415])
def test_an_update_that_will_never_be_taken_is_deleted(status: int):
    """One attempt; it is not sent again."""
    world = World()
    world.aggregator.uploads = [Reply(status)]
    assert world.session().ending is Ending.REFUSED
    assert (len(world.aggregator.sent), world.store.waiting) == (1, {})


@pytest.mark.parametrize("status", [0, 302, 408, 425, 429, 500, 502, 503, 504])
def test_an_update_that_was_not_taken_is_kept(status: int):
    """As often as a session has patience; then it waits for the next."""
    world = World()
    world.aggregator.uploads = [Reply(status)]
    outcome = world.session()
    assert outcome.ending is Ending.WAITING
    assert (len(world.aggregator.sent), len(world.store.waiting)) == (ATTEMPTS, 1)
    assert all(wait <= 2**attempt for attempt, wait in enumerate(world.waited))


def test_an_expired_update_is_deleted_unsent():
    """By the clock of the next session, and by that of a session that waits."""
    world = World()
    world.aggregator.uploads = [Reply(0)]
    world.session()
    world.now_ms = PLAN.expires_ms
    world.answers(changed(id="1e" * 16, expires_ms=NOW + 9 * DAY_MS))
    world.own = OFTEN
    sent = len(world.aggregator.sent)
    world.session()
    assert [plan for plan, *_ in world.aggregator.sent[sent:]] == []
    assert world.store.pending(world.now_ms) == []  # the store deletes it when it is opened next
    world = World().answers(changed(expires_ms=NOW + 20_000))
    world.aggregator.uploads = [Reply(503, retry_after_s=20.0)]
    assert world.session().ending is Ending.EXPIRED
    assert (len(world.aggregator.sent), world.store.waiting) == (1, {})


def test_an_update_waits_while_the_device_is_in_use():
    """Trained, then taken up: it is sent by a later session, however soon after the participation."""
    world = World(readings=(GOOD,) * (LOOKS + 3) + (replace(GOOD, idle=False),))
    outcome = world.session()
    assert (outcome.ending, outcome.reasons, outcome.path[-1]) == (Ending.WAITING, (Reason.IN_USE,), "ready")
    assert world.aggregator.sent == []
    world.readings, world.now_ms = (GOOD,), NOW + 60_000
    assert world.session().ending is Ending.UPLOADED


def test_an_update_that_waits_keeps_to_its_plans_conditions():
    """The app would send over a network that costs; the plan of an earlier session would not."""
    costly = replace(GOOD, metered=True)
    world = World(own=Policy(unmetered=False))
    world.aggregator.uploads = [Reply(0)]
    assert world.session().ending is Ending.WAITING
    sent, world.readings = len(world.aggregator.sent), (costly,)
    outcome = world.session()
    assert (outcome.ending, outcome.reasons) == (Ending.WAITING, (Reason.METERED,))
    assert len(world.aggregator.sent) == sent


def test_an_update_of_a_halted_version_is_not_sent_by_the_version_after_it():
    """Nor by the session that trained it, where another one heard of the halt meanwhile."""
    world = World()
    world.aggregator.uploads = [Reply(0)]
    world.session()
    sent = len(world.aggregator.sent)
    world.store.halt("meals", (7,), "it predicts nonsense")
    world.manifest = MANIFEST.model_copy(update={"version": 8})
    outcome = world.session()
    assert (outcome.ending, outcome.why) == (Ending.HALTED, "version 7 was stopped: it predicts nonsense")
    assert (len(world.aggregator.sent), world.store.waiting) == (sent, {})


def test_retry_after_is_honoured_within_a_sessions_patience():
    """Twenty seconds are waited, a little more by chance; an hour is the next session's."""
    world = World()
    world.aggregator.uploads = [Reply(503, retry_after_s=20.0), Reply(429, retry_after_s=3600.0)]
    outcome = world.session()
    (waited,) = world.waited
    assert 20 <= waited <= 20 * (1 + SPREAD) <= PATIENCE_S
    assert outcome.ask_again_s is not None
    assert 3600 <= outcome.ask_again_s <= 3600 * (1 + SPREAD)


@pytest.mark.parametrize(
    ("reply", "ending"),
    [
        (Reply(204), "nothing"),
        (Reply(429), "busy"),
        (Reply(503), "busy"),
        (Reply(0, error="the aggregator cannot be reached"), "unreachable"),
        (Reply(404), "bad_answer"),
        (Reply(302), "bad_answer"),
        (Reply(500), "bad_answer"),
    ],
)
@pytest.mark.parametrize("asked", [None, 7.0])
def test_a_device_comes_back_when_it_is_told_and_not_with_all_others(reply: Reply, ending: str, asked: float | None):
    """In the time that was asked or a quarter more, by chance; an hour where nothing was."""
    least = ASK_AGAIN_S if asked is None else asked
    again = []
    for _ in range(20):
        world = World()
        world.aggregator.checks = [replace(reply, retry_after_s=asked)]
        outcome = world.session()
        assert (outcome.ending, outcome.path[-1]) == (ending, "dropped")
        again.append(outcome.ask_again_s)
    assert all(least <= wait <= least * 1.25 for wait in again)
    assert len(set(again)) > 15


def test_the_kill_switch_stops_a_version_until_there_is_another():
    """At the check-in; an update that waits is not sent, and nobody is asked again. Version 8 goes on."""
    world = World()
    world.aggregator.uploads = [Reply(0)]
    world.session()
    world.store.waiting["1e" * 16] = Upload("1e" * 16, "00" * 16, b"", NOW + DAY_MS, 7)
    halt = Halt(model="meals", versions=(6, 7), reason="it predicts nonsense")
    halted = World(store=MemoryStore()).answers(halt)
    outcome = halted.session()
    assert (outcome.ending, outcome.why) == (Ending.HALTED, "version 7 was stopped: it predicts nonsense")
    world.store.halt("meals", (6, 7), "it predicts nonsense")
    sent = len(world.aggregator.sent)
    assert world.session().ending is Ending.HALTED
    assert (len(world.aggregator.sent), len(world.aggregator.asked), world.store.waiting) == (sent, 1, {})
    halted.manifest = MANIFEST.model_copy(update={"version": 8})
    assert halted.answers(changed(version=8)).session().ending is Ending.UPLOADED


def test_a_halt_of_others_stops_nothing_here():
    """Another model's is not even remembered; another version's is, since it could still be installed."""
    world = World().answers(Halt(model="other", versions=(7,), reason="x"))
    assert (world.session().ending, world.store.stopped) == (Ending.OTHER_MODEL, {})
    world.answers(Halt(model="meals", versions=(6,), reason="x"))
    assert (world.session().ending, world.store.stopped) == (Ending.NOTHING, {6: "x"})
    assert world.answers(PLAN).session().ending is Ending.UPLOADED


def test_who_finds_nothing_to_do_comes_back_later():
    """A peer that replays another model's halt, or a plan that asks for too many examples, is not asked at once."""
    for message in (Halt(model="other", versions=(7,), reason="x"), changed(examples=(6, 64))):
        assert World().answers(message).session().ask_again_s >= ASK_AGAIN_S


def test_a_halt_that_nobody_signed_stops_nothing():
    """A peer that lies cannot switch devices off."""
    world = World().answers(Halt(model="meals", versions=(7,), reason="x"), key=OTHER)
    assert (world.session().ending, world.store.stopped) == (Ending.BAD_PLAN, {})


def test_an_outcome_names_no_example_and_no_weight():
    """What a host app may log: words, sentences, states and a time."""
    world = World()
    world.aggregator.uploads = [Reply(503)]
    summary = world.session().summary()
    assert set(summary) == {"ending", "why", "reasons", "path", "ask_again_s"}
    assert summary["ending"] == "waiting"
    ((_, upload, _), *_) = world.aggregator.sent
    assert upload not in str(summary)


def test_a_policy_is_read_from_json(tmp_path: Path):
    """What it leaves out is as strict as by default; what it does not know is refused by name."""
    assert read_policy(None) == Policy()
    file = tmp_path / "policy.json"
    file.write_text('{"charging": false, "participations": 3}')
    assert read_policy(file) == Policy(charging=False, participations=3)
    for text, fault in (
        ('{"chargin": false}', "chargin: Extra"),
        ('{"battery": 30}', "battery: Input"),
        ("", "the whole: Invalid"),
        ("[]", "the whole: Input should be an object"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"'policy.json' must be a policy as JSON: {fault}"):
            read_policy(file)
    with pytest.raises(ConfigError, match="cannot be read: IsADirectoryError"):
        read_policy(tmp_path)


replies = st.sampled_from([Reply(status) for status in (0, 200, 204, 302, 404, 429, 500, 503)])
readings = st.sampled_from(
    [GOOD, GOOD, GOOD, replace(GOOD, idle=False), replace(GOOD, consent=False), replace(GOOD, charging=None)]
)


@given(
    st.lists(
        st.tuples(
            st.lists(readings, min_size=1, max_size=9),
            st.lists(replies, min_size=1, max_size=6),
            st.sampled_from(
                [
                    changed(policy=OFTEN),
                    changed(policy=OFTEN, id="1e" * 16),
                    Halt(model="meals", versions=(6,), reason="x"),
                ]
            ),
            st.integers(0, 400_000),
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_each_plan_has_at_most_one_update_and_it_was_kept_first(sessions: list):
    """Sessions in which anything goes wrong: one upload id and one body a plan, each kept before, steps by the table.

    After consent is withdrawn nothing waits.
    """
    world = World(own=OFTEN)
    for seen, answers, message, passed in sessions:
        world.answers(message)
        world.readings, world.aggregator.uploads = tuple(seen), list(answers)
        before = len(world.aggregator.sent)
        outcome = world.session()
        lines = {(state, after) for (state, _), after in NEXT.items()}
        assert all(step in lines for step in pairwise(outcome.path))
        assert all(body in world.store.kept for _, _, body in world.aggregator.sent[before:])
        assert (outcome.ending is Ending.UPLOADED) == (outcome.path[-1] is State.DONE)
        assert outcome.ending is not Ending.NO_CONSENT or world.store.waiting == {}
        world.now_ms += passed
    by_plan = {}
    for plan, upload, body in world.aggregator.sent:
        by_plan.setdefault(plan, set()).add((upload, body))
    assert all(len(uploads) == 1 for uploads in by_plan.values())
    ids = [plan for plan, *_ in world.trainer.trained]
    assert len(ids) == len(set(ids))


# Queries


def asked(**fields):
    return QUERY.model_copy(update=fields)


def test_a_device_answers_a_query_once():
    """Steps 0 to 4 of [0, 8]: five, 10/8 and 30/64, through the states of a training, and not the same plan again."""
    world = World(own=OFTEN).answers(asked(policy=OFTEN))
    outcome = world.session()
    assert outcome.ending is Ending.UPLOADED
    assert outcome.path == ("idle", "checked_in", "planned", "training", "ready", "uploading", "done")
    ((plan, upload, body),) = world.aggregator.sent
    assert (plan, re.fullmatch("[0-9a-f]{32}", upload) is not None) == (QUERY.id, True)
    np.testing.assert_allclose(decode(body, 3), [5, 1.25, 0.46875], rtol=1e-6)
    assert (world.store.history(0), world.trainer.trained) == ([NOW], [])
    assert world.session().ending is Ending.TAKEN_PART


def test_a_device_without_a_training_program_or_rows_answers_too():
    """Zeros."""
    world = World(manifest=MANIFEST.model_copy(update={"train": None})).answers(QUERY)
    world.trainer, world.store.rows = None, 0
    assert world.session().ending is Ending.UPLOADED
    np.testing.assert_array_equal(decode(world.aggregator.sent[0][2], 3), [0, 0, 0])


@pytest.mark.parametrize(("first", "second"), [(QUERY, PLAN), (PLAN, QUERY), (QUERY, asked(id="3f" * 16))])
def test_training_and_queries_rest_after_each_other(first, second):
    """A day by default, whatever for the device was asked: it says so before it sends anything."""
    world = World().answers(first)
    assert world.session().ending is Ending.UPLOADED
    world.now_ms += DAY_MS - 1
    assert world.answers(later(second, world)).session().reasons == (Reason.TOO_SOON, Reason.TOO_OFTEN)
    world.now_ms += 1
    assert world.answers(later(second, world)).session().ending is Ending.UPLOADED


def later(plan, world):
    return plan.model_copy(update={"expires_ms": world.now_ms + 600_000})


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({"model": "other"}, "other_model"),
        ({"version": 6}, "other_version"),
        ({"definition_hash": "cd" * 32}, "other_definition"),
        ({"expires_ms": NOW}, "expired"),
        ({"seconds": 30.5}, "too_large"),
        ({"query": Query(parts=(Labels(),), rows=65)}, "too_large"),
        ({"query": Query(parts=(Moments(column="weight", low=0, high=1),))}, "cannot_answer"),
        ({"query": Query(parts=(Categories(column="steps", values=("a",)),))}, "cannot_answer"),
    ],
    ids=str,
)
def test_a_query_that_is_not_for_this_device_is_refused(fields: dict, ending: str):
    """By one word; nothing is sent, and it is not counted as taking part."""
    world = World().answers(asked(**fields))
    outcome = world.session()
    assert (outcome.ending, outcome.path[-1]) == (ending, "dropped")
    assert (world.aggregator.sent, world.store.decided) == ([], {})


def test_an_answer_is_kept_before_it_is_sent_and_sent_again_the_same():
    """An aggregator that cannot be reached: the next session sends the same bytes under the same id."""
    world = World(own=OFTEN).answers(asked(policy=OFTEN))
    world.aggregator.uploads = [Reply(0, error="it broke")] * ATTEMPTS + [Reply(200)]
    assert world.session().ending is Ending.WAITING
    assert world.session().ending is Ending.UPLOADED
    assert len(set(world.aggregator.sent)) == 1
    assert len(world.aggregator.asked) == 1


def test_an_answer_of_what_was_forgotten_meanwhile_is_not_sent():
    """The person had something forgotten after the rows were read."""
    world = World().answers(QUERY)
    read = world.store.asked

    def then_forgotten(query, now_ms, *, device=0):
        rows = read(query, now_ms)
        world.store.forget()
        return rows

    world.store.asked = then_forgotten
    assert world.session().ending is Ending.FORGOTTEN
    assert (world.aggregator.sent, world.store.waiting) == ([], {})


def test_without_consent_no_query_is_answered():
    """Withdrawn while it would answer: nothing is sent."""
    world = World(readings=(GOOD, GOOD, replace(GOOD, consent=False))).answers(QUERY)
    assert world.session().ending is Ending.NO_CONSENT
    assert (world.aggregator.sent, world.store.waiting) == ([], {})


# Tokens

WINDOW = Window(issuer="issuer.example", scope="spring", number=3, key="30" * 342)
ASKS = PLAN.model_copy(update={"token": WINDOW})
TOKEN = bytes(range(256)) + bytes(TOKEN_BYTES - 256)


@dataclass
class Credentials:
    """Gives the token, or says why not; and says what was decided when it was asked.

    Attributes:
        refuses: in place of a token.
        asked: (window, whether the device had begun, and whether it had looked at its examples).
    """

    world: "World"
    issuer: str = "issuer.example"
    refuses: NoToken | None = None
    asked: list = field(default_factory=list)

    async def token(self, window, store, expires_ms, now_ms, *, device=0):
        self.asked.append((window, dict(store.decided), list(self.world.looked)))
        store.hold(Held(window.scope, window.number, Pending(bytes(98), bytes(256), 1), expires_ms, TOKEN), now_ms())
        if self.refuses:
            raise self.refuses
        return TOKEN


def with_credentials(**fields):
    world = World(own=OFTEN, **fields).answers(ASKS)
    world.looked, examples = [], world.store.examples
    world.store.examples = lambda *arguments: world.looked.append(arguments) or examples(*arguments)
    world.credentials = Credentials(world)
    return world


def test_an_update_begins_with_a_token_where_the_plan_asks_for_one():
    """It is spent with it: kept in the upload alone, which goes out as it is until it is taken."""
    world = with_credentials()
    world.aggregator.uploads = [Reply(503, retry_after_s=99.0), Reply(200)]
    assert world.session().ending is Ending.WAITING
    assert world.store.tokens == {}
    assert world.session().ending is Ending.UPLOADED
    (_, first, body), (_, second, again) = world.aggregator.sent
    assert (first, body) == (second, again)
    assert body[:TOKEN_BYTES] == TOKEN
    np.testing.assert_array_equal(decode(body[TOKEN_BYTES:], 3), UPDATE)
    assert len(world.credentials.asked) == 1


def test_the_issuer_is_asked_before_the_coin_and_before_the_examples():
    """It knows the account: it learns neither who takes part, nor who has something to train with."""
    for changes, ending in (({"toss": 0.7}, Ending.NOT_SAMPLED), ({}, Ending.FEW_EXAMPLES)):
        world = with_credentials(**changes)
        world.answers(ASKS.model_copy(update={"sampling": 0.5}))
        world.store.rows = 1 if ending is Ending.FEW_EXAMPLES else 5
        assert world.session().ending is ending
        assert world.credentials.asked == [(WINDOW, {}, [])]
        assert world.aggregator.sent == []


@pytest.mark.parametrize("issuer", [None, "else.example"])
def test_a_device_without_credentials_of_the_plans_issuer_takes_no_part(issuer):
    """It asks nobody, trains nothing, and comes again: another plan may ask for none."""
    world = with_credentials()
    world.credentials = Credentials(world, issuer=issuer) if issuer else None
    outcome = world.session()
    assert (outcome.ending, world.trainer.trained, world.store.decided) == (Ending.NO_CREDENTIALS, [], {})
    assert "'issuer.example'" in outcome.why
    assert outcome.ask_again_s >= ASK_AGAIN_S
    assert world.answers(PLAN).session().ending is Ending.UPLOADED


@pytest.mark.parametrize(
    ("refused", "ending", "again_s"),
    [
        (NoToken("taken", taken=True), Ending.ACCOUNT_WAITS, ASK_AGAIN_S),
        (NoToken("unreachable"), Ending.NOT_ISSUED, ASK_AGAIN_S),
        (NoToken("busy", retry_after_s=5.0), Ending.NOT_ISSUED, 5.0),
    ],
)
def test_without_a_token_nothing_is_begun(refused, ending, again_s):
    world = with_credentials()
    world.credentials.refuses = refused
    outcome = world.session()
    assert (outcome.ending, world.store.decided, world.aggregator.sent) == (ending, {}, [])
    assert again_s <= outcome.ask_again_s <= again_s * (1 + SPREAD)


def test_who_is_not_eligible_or_not_at_its_turn_asks_for_no_token():
    busy = with_credentials(readings=(replace(GOOD, idle=False),))
    later = with_credentials(toss=0.99)
    turn = Turn(training="5" * 32, first_step=1, last_step=1, separation=9)
    later.answers(ASKS.model_copy(update={"turn": turn}))
    for world, ending in ((busy, Ending.NOT_ELIGIBLE), (later, Ending.NOT_ITS_TURN)):
        assert world.session().ending is ending
        assert world.credentials.asked == []


def test_a_query_is_answered_with_a_token_too():
    world = with_credentials().answers(QUERY.model_copy(update={"token": WINDOW}))
    assert world.session().ending is Ending.UPLOADED
    assert world.aggregator.sent[0][2][:TOKEN_BYTES] == TOKEN
