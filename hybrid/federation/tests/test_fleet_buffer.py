"""Asynchronous flushes at a fleet's aggregator."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import CohortTooSmall, ConfigError, RoundStopped
from hybrid.federation.aggregator import Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.clock import SystemClock
from hybrid.federation.fleet_aggregator import FULL_S, FleetAggregator, Refused, Task
from hybrid.plan import CheckIn, Local, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.matrix import optimised
from hybrid.update import head

KEY = Ed25519PrivateKey.generate()
SAID = CheckIn(model="kiosk", version=4, runtime=1)
CLIP, SEPARATION, LIMIT_S = 5.0, 3, 60.0


class Scripted:
    """A clock by which things happen while a flush is waited for; what does not end it ends by its time limit."""

    def __init__(self):
        self.at_ms, self.happens = 1_900_000_000_000, lambda: None

    def now_ms(self):
        return self.at_ms

    def wait(self, stop, until_ms):
        if not stop.is_set():
            self.happens()
        if not stop.is_set():
            self.at_ms = until_ms


class Fleet:
    """Devices of one aggregator, which flushes `updates` at a time.

    Attributes:
        plans: of the versions, as devices were given them.
    """

    def __init__(self, folder, updates=2, oldest=1, noise=0.0, ledger=None, size=2, **fields):
        about = {"model": "kiosk", "version": 4, "definition_hash": "ab" * 32, "local": Local(steps=1, lr=0.1)}
        task = Task(**about, parameters=size, round_s=LIMIT_S, wanted=fields.pop("wanted", 1000))
        matrix = optimised("independent", 100, SEPARATION)
        asked = Round(1.0, CLIP, noise, fields.pop("minimum", 0), matrix=matrix)
        self.clock, self.size, self.plans = Scripted(), size, []
        self.aggregator = FleetAggregator(
            task,
            asked,
            ledger,
            KEY,
            noise_state=folder / "noise.state",
            buffer=Buffer(updates, oldest),
            clock=self.clock,
        )

    def check_in(self):
        reply = self.aggregator.check_in(SAID)
        if reply.status == 200:
            plan, _ = open_signed(reply.body, KEY.public_key())
            if plan not in self.plans:
                self.plans.append(plan)
            return plan
        assert reply.status == 204
        return None

    def send(self, plan, upload, *values):
        body = head(self.size, "float32") + np.array(values, "<f4").tobytes()
        return self.aggregator.upload(plan.id, f"{upload:032x}", body).status

    def flush(self, happens=lambda: None):
        self.clock.happens = happens
        return self.aggregator.run_round(1, np.zeros(self.size, np.float32))


def test_a_flush_is_over_once_k_updates_came_whatever_version_they_began_at(tmp_path):
    """Of the first version one comes late: (30, 40), clipped to (3, 4), counts 1 / sqrt 2. The clock stands still."""
    fleet = Fleet(tmp_path)
    begun = fleet.clock.at_ms

    def first():
        plan = fleet.check_in()
        assert [fleet.send(plan, number, 1, number) for number in (1, 2)] == [200, 200]

    def second():
        assert fleet.send(fleet.plans[0], 3, 30, 40) == 200
        assert fleet.send(fleet.check_in(), 4, 1, 1) == 200

    one, two = fleet.flush(first), fleet.flush(second)
    np.testing.assert_allclose(one.sum, [2, 3])
    np.testing.assert_allclose(two.sum, [1 + 3 / math.sqrt(2), 1 + 4 / math.sqrt(2)])
    assert (one.received, two.received, fleet.clock.at_ms) == (2, 2, begun)
    assert [(plan.turn.first_step, plan.turn.last_step, plan.turn.separation) for plan in fleet.plans] == [
        (1, 2, SEPARATION),
        (2, 3, SEPARATION),
    ]
    assert fleet.plans[0].expires_ms == begun + 2 * LIMIT_S * 1000


def test_what_comes_between_two_flushes_is_in_the_next(tmp_path):
    """It is one version late by then. Devices still begin at the last version; the next flush does not wait."""
    fleet = Fleet(tmp_path)
    fleet.flush(lambda: [fleet.send(fleet.check_in(), number, 1, 0) for number in (1, 2)])
    plan = fleet.check_in()
    assert plan == fleet.plans[0]
    assert [fleet.send(plan, number, 0, 1) for number in (3, 4)] == [200, 200]
    np.testing.assert_allclose(fleet.flush().sum, [0, 2 / math.sqrt(2)])


def test_a_full_buffer_takes_no_more_until_it_is_taken_out(tmp_path):
    """503, and the same bytes again a second later are counted in the next flush; a repeat is answered as ever."""
    fleet = Fleet(tmp_path)
    statuses = []

    def happens():
        plan = fleet.check_in()
        statuses.extend(fleet.send(plan, number, 1, 0) for number in (1, 2, 3, 2))

    assert fleet.flush(happens).received == 2
    assert statuses == [200, 200, 503, 200]
    assert fleet.aggregator.refused == {Refused.FULL: 1}
    body = head(2, "float32") + bytes(8)
    fleet.send(fleet.plans[0], 3, 1, 0)
    fleet.send(fleet.plans[0], 4, 1, 0)
    assert fleet.aggregator.upload(fleet.plans[0].id, "9" * 32, body).retry_after_s == FULL_S
    np.testing.assert_allclose(fleet.flush().sum, [2 / math.sqrt(2), 0])


def test_an_update_that_is_too_late_is_not_taken_and_a_repeat_is_known_for_a_flush_more(tmp_path):
    """At most one version late. The first version's are ended after two flushes, and forgotten after three."""
    fleet, statuses = Fleet(tmp_path), []
    fleet.flush(lambda: [fleet.send(fleet.check_in(), number, 1, 0) for number in (1, 2)])
    for late in range(1, 4):
        statuses.append([fleet.send(fleet.plans[0], 10 + late, 1, 0), fleet.send(fleet.plans[0], 1, 1, 0)])
        fleet.flush()  # by the time limit, with what there is
        fleet.clock.at_ms -= int(LIMIT_S * 1000)  # not by the plan's own end
    assert statuses == [[200, 200], [410, 200], [410, 410]]
    assert fleet.aggregator.refused == {Refused.STALE: 3}


def test_a_flush_that_waits_too_long_is_released_with_what_there_is(tmp_path):
    """By its time limit; with a minimum it is withheld, and what was in it is not in the next."""
    fleet = Fleet(tmp_path, updates=3, minimum=2)
    begun = fleet.clock.at_ms
    with pytest.raises(CohortTooSmall):
        fleet.flush(lambda: fleet.send(fleet.check_in(), 1, 1, 0))
    assert fleet.clock.at_ms == begun + LIMIT_S * 1000

    def two():
        plan = fleet.check_in()
        for number in (2, 3):
            fleet.send(plan, number, 0, 1)

    np.testing.assert_allclose(fleet.flush(two).sum, [0, 2])
    assert [plan.turn.first_step for plan in fleet.plans] == [1, 2]


def test_after_a_restart_what_waited_is_lost_and_its_plan_unknown(tmp_path):
    """The step that it waited for never left: the next process opens it again, of the same training."""
    fleet = Fleet(tmp_path)
    fleet.flush(lambda: [fleet.send(fleet.check_in(), number, 1, 0) for number in (1, 2)])
    fleet.send(fleet.plans[0], 3, 1, 0)
    again = Fleet(tmp_path)
    assert again.send(fleet.plans[0], 4, 1, 0) == 404
    assert again.send(fleet.plans[0], 3, 1, 0) == 404
    np.testing.assert_array_equal(again.flush(again.check_in).sum, [0, 0])
    assert (again.plans[0].turn.training, again.plans[0].turn.first_step) == (fleet.plans[0].turn.training, 2)


def test_a_stopped_flush_releases_nothing_and_takes_nothing_more(tmp_path):
    fleet = Fleet(tmp_path)

    def happens():
        fleet.send(fleet.check_in(), 1, 1, 0)
        fleet.aggregator.stop("enough")

    with pytest.raises(RoundStopped):
        fleet.flush(happens)
    assert fleet.send(fleet.plans[0], 2, 1, 0) == 410
    with pytest.raises(RoundStopped, match="enough"):
        fleet.flush()


def test_no_more_devices_are_sent_off_than_may_be_on_their_way(tmp_path):
    """Of three places one comes free with each upload; those of devices that do not come do, after 6 of 60 s."""
    fleet = Fleet(tmp_path, updates=3, wanted=3)

    def happens():
        plan = fleet.check_in()
        assert [fleet.check_in() is None for _ in range(3)] == [False, False, True]
        fleet.send(plan, 1, 1, 0)
        fleet.send(plan, 1, 1, 0)  # a repeat frees none
        assert [fleet.check_in() is None for _ in range(2)] == [False, True]
        fleet.clock.at_ms += 5999
        assert fleet.check_in() is None
        fleet.clock.at_ms += 1
        assert [fleet.check_in() is None for _ in range(4)] == [False, False, False, True]

    fleet.flush(happens)


def test_no_device_is_sent_off_that_would_come_too_late(tmp_path):
    """Where no update may be late, the plan of a flush that is over is not given any more."""
    fleet = Fleet(tmp_path, oldest=0)
    fleet.flush(lambda: [fleet.send(fleet.check_in(), number, 1, 0) for number in (1, 2)])
    assert fleet.check_in() is None


def test_who_is_told_to_come_again_is_paced_by_how_long_flushes_last(tmp_path):
    """No longer than half of a flush, whose limit is a minute, for a fleet that is small; the last one took 2 s."""
    fleet = Fleet(tmp_path, wanted=2)

    def happens():
        plans = [fleet.check_in() for _ in range(2)]
        fleet.clock.at_ms += 2000
        for number, plan in enumerate(plans):
            fleet.send(plan, number, 1, 0)

    fleet.flush(happens)
    fleet.check_in()
    fleet.check_in()
    assert fleet.aggregator.check_in(SAID).retry_after_s <= 1.0


def test_one_machine_that_fills_the_buffer_moves_it_by_the_clip_each_and_changes_no_noise(tmp_path):
    """K = 20 lies of 3e38 or NaN: 4,000 weights of N(0, (2 x 5)^2) beside what they sum to, as if nobody had lied.

    The entries of the ledger are the same; flushes are as many as it likes, each a step of the horizon that is paid.
    """
    size = 4000
    with Ledger.open(tmp_path / "run", budget_epsilon=1e6, delta=1e-5) as ledger:
        fleet = Fleet(tmp_path, updates=20, noise=2.0, ledger=ledger, size=size)
        along = np.eye(1, size)[0]
        for lie, moved in ((3e38 * along, 20 * CLIP), (np.full(size, np.nan), 0.0), (0 * along, 0.0)):
            names = iter(range(100 * len(fleet.plans), 1 << 32))
            released = fleet.flush(
                lambda lie=lie, names=names: [fleet.send(fleet.check_in(), next(names), *lie) for _ in range(20)]
            )
            assert released.received == 20
            rest = released.sum - moved * along
            assert abs(rest.std() - 10) < 5 * 10 / math.sqrt(2 * size)
            assert abs(rest[0]) < 60
        assert [(entry.step, entry.clip, entry.noise_multiplier) for entry in ledger.entries] == [
            (step, CLIP, 2.0) for step in (1, 2, 3)
        ]
    assert not fleet.aggregator.refused


def test_an_upload_that_was_seen_for_one_plan_is_not_taken_for_another(tmp_path):
    """Its id, with the same bytes or others. Under another id nobody can tell, without tokens."""
    fleet = Fleet(tmp_path, updates=3)

    def happens():
        assert fleet.send(fleet.check_in(), 1, 1, 0) == 200
        fleet.send(fleet.plans[0], 2, 1, 0)
        fleet.send(fleet.plans[0], 3, 1, 0)

    fleet.flush(happens)
    statuses = []

    def again():
        plan = fleet.check_in()
        statuses.extend([fleet.send(plan, 1, 1, 0), fleet.send(plan, 1, 2, 0), fleet.send(fleet.plans[0], 1, 1, 0)])
        statuses.append(fleet.send(plan, 4, 1, 0))

    assert fleet.flush(again).received == 1
    assert statuses == [409, 409, 200, 200]
    assert fleet.aggregator.refused == {Refused.REPLAYED: 2}


@pytest.mark.parametrize(
    ("fields", "buffer", "why"),
    [
        ({"matrix": None}, Buffer(2), "buffer needs a matrix"),
        ({"minimum": 3}, Buffer(2), "minimum must be at most the buffer's 2"),
    ],
)
def test_what_a_buffer_needs_is_asked_for(tmp_path, fields, buffer, why):
    about = {"model": "kiosk", "version": 4, "definition_hash": "ab" * 32, "local": Local(steps=1, lr=0.1)}
    task = Task(**about, parameters=2, round_s=60, wanted=10)
    asked = {"sampling": 1.0, "clip": 1.0, "noise_multiplier": 0.0, "minimum": 0}
    asked |= {"matrix": optimised("independent", 10, 2)} | fields
    with pytest.raises(ConfigError, match=why):
        FleetAggregator(task, Round(**asked), None, KEY, noise_state=tmp_path / "state", buffer=buffer)


def test_what_is_kept_does_not_grow_with_the_flushes(tmp_path):
    """Of 50 flushes' plans the uploads of three are known: those at most two versions late, and one for repeats."""
    fleet = Fleet(tmp_path, oldest=2)
    for number in range(50):
        fleet.flush(lambda number=number: [fleet.send(fleet.check_in(), 2 * number + each, 1, 0) for each in range(2)])
    known = [plan for plan in fleet.plans if fleet.aggregator.body_bytes(plan.id) is not None]
    assert (len(fleet.plans), known) == (50, fleet.plans[-3:])


def test_many_at_once_are_in_one_flush_each(tmp_path):
    """Eight threads send 25 updates each, the i-th along its own axis: in 66 flushes of three, each is counted once."""
    size, threads = 200, 8
    fleet = Fleet(tmp_path, updates=3, oldest=1000, size=size)
    fleet.aggregator._clock = SystemClock()

    def flushes():
        return [fleet.aggregator.run_round(1, np.zeros(size, np.float32)) for _ in range(66)]

    def send(numbers):
        for number in numbers:
            while (plan := fleet.check_in()) is None:
                pass
            while (status := fleet.send(plan, number, *np.eye(size)[number])) == 503:
                pass
            assert status == 200

    with ThreadPoolExecutor(threads + 1) as pool:
        flushing = pool.submit(flushes)
        for sent in [pool.submit(send, range(first, size, threads)) for first in range(threads)]:
            sent.result(60)
        released = flushing.result(60)
    assert [one.received for one in released] == [3] * 66
    totals = np.sum([one.sum for one in released], axis=0)
    assert ((totals > 0) & (totals <= 1)).sum() == 3 * 66


class Device:
    """An honest one: it remembers its next turn before it sends, and sends until it is answered."""

    def __init__(self):
        self.next_step, self.plan, self.upload = 1, None, -1

    def check_in(self, fleet, upload):
        plan = fleet.check_in() if self.plan is None else None
        if plan is not None and plan.turn.first_step >= self.next_step:
            self.plan, self.upload = plan, upload
            self.next_step = plan.turn.last_step + plan.turn.separation


class Story:
    """Five devices; device d's update is d + 1 along the axis d, so that sums show whose updates are in them.

    Attributes:
        counted: of each device, the flushes that its updates were in.
    """

    def __init__(self, fleet, told, oldest):
        self._fleet, self._told, self._oldest = fleet, list(told), oldest
        self._devices, self._names, self._flushes = [Device() for _ in range(5)], iter(range(1000)), 0
        self._expected = np.zeros(5)
        self.counted = [[] for _ in range(5)]

    def run(self, updates):
        while self._told:
            self._fleet.clock.at_ms = 1_900_000_000_000  # flushes, not plans' ends, make updates stale here
            released = self._fleet.flush(self._until_flush)
            np.testing.assert_allclose(released.sum, self._expected, atol=1e-12)
            assert released.received <= updates
            self._expected, self._flushes = np.zeros(5), self._flushes + 1
            while self._told and self._told[0][1] == "come":  # between two flushes
                self._come(self._told.pop(0)[0])

    def _until_flush(self):
        while self._told and not self._fleet.aggregator._over.is_set():
            number, what = self._told.pop(0)
            if what == "flush":
                return
            if what == "ask":
                self._devices[number].check_in(self._fleet, next(self._names))
            else:
                self._come(number)

    def _come(self, number):
        device, values = self._devices[number], (number + 1) * np.eye(5)[number]
        if device.plan is None:
            return
        late = self._flushes - (device.plan.turn.first_step - 1)
        status = self._fleet.send(device.plan, device.upload, *values)
        if status == 503:
            return
        assert status == (200 if late <= self._oldest else 410)
        assert self._fleet.send(device.plan, device.upload, *values) == status  # the answer was lost
        device.plan = None
        if status == 200:
            self._expected += values / math.sqrt(1 + late)
            self.counted[number].append(self._flushes + 1)


@settings(max_examples=150, deadline=None)
@given(
    told=st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["ask", "come", "come", "flush"])), max_size=80),
    updates=st.integers(1, 3),
    oldest=st.integers(0, 3),
)
def test_each_update_is_in_one_flush_and_a_persons_are_a_separation_apart(tmp_path_factory, told, updates, oldest):
    """In whichever order devices ask and come. Each flush is the weighted sum of those that came since the last."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), updates, oldest, size=5)
    story = Story(fleet, told, oldest)
    story.run(updates)
    for flushes in story.counted:
        assert all(later - earlier >= SEPARATION for earlier, later in pairwise(flushes))
