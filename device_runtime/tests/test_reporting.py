"""What a device notes of itself, and how it tells."""

import asyncio
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from device_runtime.answering import reported
from device_runtime.caller import Reply
from device_runtime.eligibility import Readings, Reason
from device_runtime.host import ScriptedHost
from device_runtime.participation import UNNOTED, Ending, Participation
from device_runtime.reporting import SPREAD_S, Report
from device_runtime.store import Store
from hybrid.journal import CONDITIONS, LEFT, STOPPED, STOPS, UNTRIED, VERSION, Noted, Phase, stop
from hybrid.plan import Policy, QueryPlan, TrainPlan, sign
from hybrid.query import By, Categories, Histogram, Query
from hybrid.update import decode

SIGNS = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = bytes(range(32))
WEEK = "2026-W47"
MONDAY = int(datetime(2026, 11, 23, tzinfo=UTC).timestamp() * 1000)  # of week 48
LAST = MONDAY - 3 * 86_400_000  # in week 47
CONSENT = Readings(consent=True)  # and nothing else is known of the device
DEPTHS = Histogram(column=LEFT, edges=(0.5, 1.5, 2.5, 3.5, 4.5), cumulative=True)
JOURNALS = Query(
    parts=(DEPTHS, Categories(column=STOPPED, values=("downloaded:not_charging",))),
    by=By(column=VERSION, values=("8", "9")),
    week=WEEK,
)  # of each version six depths and none, this reason, others and none
PLAN = QueryPlan(
    id="3f" * 16, model="meals", version=9, definition_hash="ef" * 32, expires_ms=MONDAY + 10**9, query=JOURNALS
)


@dataclass
class Aggregator:
    """Gives one plan to whoever comes, and takes what is sent."""

    plan: object = PLAN
    said: list = field(default_factory=list)
    sent: list = field(default_factory=list)
    status: int = 200

    async def check_in(self, message, most):
        self.said.append(message.model_dump(exclude_none=True))
        numbers = np.zeros(3, np.float32) if isinstance(self.plan, TrainPlan) else None
        return Reply(200, sign(self.plan, SIGNS, numbers))

    async def upload(self, plan, upload, body):
        self.sent.append((upload, body))
        return Reply(self.status, retry_after_s=3600.0)


@dataclass
class Device:
    """With a real store, and nothing else that it needs to report."""

    store: Store
    aggregator: Aggregator = field(default_factory=Aggregator)
    readings: Readings = CONSENT
    now_ms: int = MONDAY
    toss: float = 0.0

    def report(self, **options):
        about = {"store": self.store, "host": ScriptedHost([self.readings]), "aggregator": self.aggregator}
        clock = {"now_ms": lambda: self.now_ms, "toss": lambda: self.toss, "trusted": SIGNS.public_key()}
        return asyncio.run(Report(model=self.store.model, **about, **clock, **options).session())

    def told(self):
        """What was sent last, decoded: of each version its cells."""
        (counts,) = JOURNALS.decode(decode(self.aggregator.sent[-1][1], JOURNALS.size)[None].astype(float))
        return np.round(counts, 5).tolist()


@pytest.fixture
def store(tmp_path: Path, manifest):
    with Store.open(tmp_path / "d.sqlite", KEY, manifest, now_ms=LAST) as opened:
        yield opened


def test_the_furthest_phase_of_a_week_stays_with_its_latest_reason(store: Store):
    """A phase that is less far changes nothing; that nothing was tried takes no other reason's place."""
    journal = store.journal(0)
    for phase, reason, noted in (
        (Phase.DOWNLOADED, UNTRIED, (Phase.DOWNLOADED, UNTRIED)),
        (Phase.DOWNLOADED, "not_charging", (Phase.DOWNLOADED, "not_charging")),
        (Phase.DOWNLOADED, UNTRIED, (Phase.DOWNLOADED, "not_charging")),
        (Phase.ELIGIBLE, "busy", (Phase.ELIGIBLE, "busy")),
        (Phase.CHECKED, "refused", (Phase.ELIGIBLE, "busy")),
        (Phase.ELIGIBLE, "nothing", (Phase.ELIGIBLE, "nothing")),
        (Phase.UPLOADED, None, (Phase.UPLOADED, None)),
        (Phase.TRAINED, "refused", (Phase.UPLOADED, None)),
    ):
        journal.note(7, phase, reason, LAST)
        assert journal.of(WEEK) == Noted(7, *noted)
    journal.note(8, Phase.CHECKED, "refused", LAST)
    assert journal.of(WEEK) == Noted(8, Phase.CHECKED, "refused"), "the newest version's"
    assert (journal.of("2026-W48"), store.journal(1).of(WEEK)) == (None, None)
    journal.note(8, Phase.DOWNLOADED, UNTRIED, MONDAY + 7 * 86_400_000)
    assert journal.of(WEEK) is None, "nothing is kept for longer than it is asked about"


def test_every_word_that_a_session_ends_with_is_in_the_closed_list():
    """And no word in it is anybody's own: all but two are an ending, a condition or a download's."""
    assert {str(reason) for reason in Reason if reason is not Reason.NO_CONSENT} == set(CONDITIONS)
    words = {word for reasons in STOPS.values() for word in reasons} - set(CONDITIONS)
    told_by_conditions = {Ending.NOT_ELIGIBLE, Ending.UPLOADED}
    endings = {str(ending) for ending in Ending if ending not in UNNOTED | told_by_conditions}
    assert words - endings == {UNTRIED, "broke_off"}
    assert endings - words == set()


def test_a_device_reports_its_last_week_once_and_says_nothing_else(store: Store):
    """Not charging, nothing known of it but consent: it told of version 8, and its check-in names no version."""
    store.journal(0).note(8, Phase.DOWNLOADED, "not_charging", LAST)
    device = Device(store)
    outcome = device.report()
    assert (outcome.ending, outcome.path[-1]) == (Ending.UPLOADED, "done")
    assert device.aggregator.said == [{"model": "meals", "runtime": 4}]
    assert device.told() == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0] + [0] * 10
    for later in (0, 86_400_000, 6 * 86_400_000):
        device.now_ms = MONDAY + later
        assert device.report().ending is Ending.TAKEN_PART
    device.now_ms = LAST
    assert device.report().ending is Ending.TAKEN_PART, "nor where the clock went back"
    assert len(device.aggregator.sent) == 1
    assert store.history(0) == [], "and it took part in no training"


def test_a_device_with_an_empty_journal_sends_zeros(store: Store):
    device = Device(store)
    assert device.report().ending is Ending.UPLOADED
    assert device.told() == [0] * 20


def test_nothing_is_told_or_kept_without_consent(store: Store):
    store.journal(0).note(8, Phase.UPLOADED, None, LAST)
    device = Device(store, readings=Readings(consent=False))
    assert device.report().ending is Ending.NO_CONSENT
    assert (device.aggregator.said, store.journal(0).of(WEEK)) == ([], None)


def test_forgetting_deletes_the_journal_and_not_that_it_was_told(store: Store):
    """Else a person who forgets would be counted twice; an entity's events are not what it is about."""
    device = Device(store)
    store.journal(0).note(8, Phase.UPLOADED, None, LAST)
    store.journal(1).note(8, Phase.UPLOADED, None, LAST)
    device.aggregator.status = 503
    assert device.report().ending is Ending.WAITING
    store.forget(device=0, entity="shop-1", now_ms=MONDAY)
    assert store.journal(0).of(WEEK) is not None
    kinds = [line["kind"] for line in store.export(0)]
    assert (kinds.count("journal"), kinds.count("report")) == (1, 1)
    store.forget(device=0, now_ms=MONDAY)
    assert (store.journal(0).of(WEEK), store.pending(0, reports=True)) == (None, [])
    assert store.journal(1).of(WEEK) is not None
    assert device.report().ending is Ending.TAKEN_PART


def test_a_report_waits_for_the_time_that_it_drew(store: Store):
    """Half of six days: Thursday; the draw is remembered, whatever is tossed later."""
    device = Device(store, toss=0.5)
    outcome = device.report()
    assert (outcome.ending, outcome.ask_again_s) == (Ending.NOT_ITS_TURN, SPREAD_S / 2)
    device.toss = 0.0
    device.now_ms = MONDAY + 3 * 86_400_000 - 1
    assert device.report().ending is Ending.NOT_ITS_TURN
    assert device.aggregator.said == []
    device.now_ms += 1
    assert device.report().ending is Ending.UPLOADED


def test_a_report_that_was_lost_is_sent_by_the_next_that_reports_and_by_no_training(store: Store, bundle):
    """With the same id and bytes; a session that takes part does not see it."""
    device = Device(store)
    device.aggregator.status = 503
    assert device.report().ending is Ending.WAITING
    host, trusted = ScriptedHost([replace(CONSENT, charging=False)]), SIGNS.public_key()
    trains = Participation(
        bundle=bundle, trainer=None, store=store, host=host, aggregator=device.aggregator, trusted=trusted
    )
    assert asyncio.run(trains.session()).ending is Ending.NOT_ELIGIBLE
    device.aggregator.status = 200
    assert device.report().ending is Ending.UPLOADED
    assert device.aggregator.sent[0] == device.aggregator.sent[-1]


@pytest.mark.parametrize(
    ("plan", "ending"),
    [
        (PLAN.model_copy(update={"query": JOURNALS.model_copy(update={"week": "2026-W46"})}), "cannot_answer"),
        (PLAN.model_copy(update={"query": JOURNALS.model_copy(update={"week": None})}), "cannot_answer"),
        (PLAN.model_copy(update={"model": "drinks"}), "other_model"),
        (PLAN.model_copy(update={"expires_ms": MONDAY}), "expired"),
    ],
    ids=["another week", "examples", "another model", "expired"],
)
def test_a_report_answers_nothing_but_last_week_s_journals(store: Store, plan, ending):
    device = Device(store, Aggregator(plan))
    assert device.report().ending == ending
    assert device.aggregator.sent == []
    device.aggregator.plan = PLAN
    assert device.report().ending is Ending.UPLOADED, "and the week is not spent"


def test_a_session_that_takes_part_does_not_answer_about_journals(store: Store, bundle):
    """The plan is for its version, and every condition holds."""
    plan = PLAN.model_copy(update={"version": 7, "definition_hash": "ab" * 32})
    good = Readings(True, True, 1.0, True, False, "nominal", 1 << 30)
    aggregator, host = Aggregator(plan), ScriptedHost([good])
    about = {"store": store, "host": host, "aggregator": aggregator, "trusted": SIGNS.public_key()}
    outcome = asyncio.run(
        Participation(bundle=bundle, trainer=None, now_ms=lambda: MONDAY, own=Policy(), **about).session()
    )
    assert (outcome.ending, aggregator.sent) == (Ending.CANNOT_ANSWER, [])
    assert store.journal(0).of("2026-W48") == Noted(7, Phase.ELIGIBLE, "cannot_answer")


def test_a_process_that_dies_in_its_work_is_remembered(store: Store):
    """It is noted before the work begins, so that no ending is needed."""
    store.journal(0).note(8, Phase.PLANNED, "broke_off", LAST)
    device = Device(store)
    device.report()
    assert device.told()[:6] == [0, 0, 1, 0, 0, 0], "planned, and two phases left to go"


PLACES = [(phase, reason) for phase, reasons in STOPS.items() for reason in reasons] + [(Phase.UPLOADED, None)]
ANY = Query(
    parts=(DEPTHS, Categories(column=STOPPED, values=tuple(stop(*place) for place in PLACES if place[1]))),
    by=By(column=VERSION, values=("7", "8")),
    week=WEEK,
)


@settings(max_examples=100, deadline=None)
@given(st.none() | st.tuples(st.integers(1, 1 << 30) | st.just(7), st.sampled_from(PLACES)))
def test_whatever_its_journal_says_a_device_moves_the_sum_by_the_norm_at_most(line):
    """Which is that of 1, 1/2, 3/8, ... for six phases, and 1 for the reason: 1.62."""
    noted = None if line is None else Noted(line[0], *line[1])
    sent = reported(PLAN.model_copy(update={"query": ANY}), noted).astype(np.float64)
    assert ANY.norm == pytest.approx(np.sqrt(1 + 1 / 4 + 9 / 64 + 25 / 256 + 1225 / 16384 + 3969 / 65536 + 1))
    assert np.linalg.norm(sent) <= ANY.norm * (1 + 1e-15)
    assert (noted is not None and noted.version in (7, 8)) == bool(np.any(sent))
