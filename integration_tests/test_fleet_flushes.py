"""Asynchronous training of real devices, and devices that take turns: stores, bundles, HTTP, Flower's apps."""

import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from device_runtime.aggregator import Aggregator
from device_runtime.eligibility import Readings
from device_runtime.host import ScriptedHost
from device_runtime.participation import Participation
from device_runtime.program import open_bundle
from device_runtime.store import Store
from device_runtime.trainer import Trainer
from hybrid.bundle import trusted_key
from hybrid.errors import BudgetExceeded, ConfigError
from hybrid.federation.aggregator import Round
from hybrid.federation.buffer import Buffer
from hybrid.federation.checkin import listening
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import FleetAggregator, Refused
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.local.devices import GOOD, Opened, command
from hybrid.local.fleet import Promoted
from hybrid.local.process import free_ports
from hybrid.privacy.ledger import Ledger, costs
from hybrid.privacy.matrix import Participation as Participants
from hybrid.privacy.matrix import optimised
from hybrid.privacy.mechanisms import clip_rows
from hybrid.spec import Training
from hybrid.version import TrainingRecord, Version
from integration_tests.aggregator_process import BUFFER, SEPARATION
from integration_tests.test_fleet_rounds import KEY, LAX, Killed, World, released, run_server

DEVICES = 12
TRAINED = [Readings(**GOOD)] * 3 + [Readings(**GOOD | {"charging": False})]  # unplugged before the update is sent


@dataclass
class Devices:
    """The first people's devices, whose sessions are begun one by one."""

    world: World
    store: Path
    url: str

    def __post_init__(self):
        self._bundle = open_bundle(self.world.bundle, self.world.trust)
        self._trainer, self._trusted = Trainer(self._bundle), trusted_key(self.world.trust)

    def session(self, device: int, readings: list[Readings]) -> str:
        with Store.open(self.store, KEY, self.world.manifest) as kept:
            asks = {"host": ScriptedHost(readings), "aggregator": Aggregator(self.url), "trusted": self._trusted}
            # A clock that stands still: the host is asked when the session says, however slow this machine trains.
            about = {"device": device, "own": LAX, "clock": lambda: 0.0}
            session = Participation(bundle=self._bundle, trainer=self._trainer, store=kept, **asks, **about)
            return str(asyncio.run(session.session()).ending)

    def train(self, *devices: int) -> None:
        """They begin at the version of now, and keep their updates."""
        assert [self.session(device, TRAINED) for device in devices] == ["waiting"] * len(devices)

    def send(self, *devices: int) -> None:
        """They send what they kept, or train and send."""
        assert [self.session(device, [Readings(**GOOD)]) for device in devices] == ["uploaded"] * len(devices)


@dataclass
class Flushes:
    """An aggregator with Flower's server app before it.

    Attributes:
        weights: number -> after it.
    """

    aggregator: FleetAggregator
    clock: ManualClock
    weights: dict = field(default_factory=dict)

    def __post_init__(self):
        self._stepped = threading.Condition()

    @contextmanager
    def running(self, world: World, planned: float, flushes: int) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            trained = thread.submit(run_server, self.aggregator, planned, flushes, world.weights, self._after)
            yield
            trained.result(60)

    def _after(self, number: int, flat: np.ndarray) -> None:
        with self._stepped:
            self.weights[number] = flat
            self._stepped.notify_all()

    def wait(self, number: int) -> None:
        """Until devices are given that version."""
        with self._stepped:
            assert self._stepped.wait_for(lambda: number in self.weights, 60)
        assert self.clock.waited_for.wait(60)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("flushes"))


@pytest.fixture
def store(world: World, tmp_path: Path) -> Path:
    return world.store(tmp_path / "devices.store", range(DEVICES))


def stepped(world: World, clip: float, flushes: list[Mapping[int, int]], weights: np.ndarray) -> dict:
    """The weights after each flush, by the simulator's engine.

    Args:
        world: of the people.
        clip: L2 norm.
        flushes: of each, user -> version that it began at.
        weights: (p,) the first.
    """
    engine, optimizer, found = world.engine(), ServerOptimizer("SGD", 1.0, weights, {"momentum": 0.5}), {0: weights}
    for number, flush in enumerate(flushes, start=1):
        total = np.zeros(len(weights))
        for user, version in flush.items():
            update = np.concatenate(list(engine.updates(found[version], np.array([user]))))
            total += (1 + number - 1 - version) ** -0.5 * clip_rows(update, clip)[0]
        found[number] = optimizer.step(total / 3).copy()
    return found


def test_devices_that_come_when_they_like_train_what_the_engine_computes(world: World, store: Path, tmp_path: Path):
    """Four flushes of three updates, up to two versions late, half of them longer than the clip, and no noise, to 1e-5.

    Each device begins and sends when the test says. An update for the first version might be in the third flush, so
    who began there has no turn before the fifth.
    """
    norms = np.linalg.norm(np.concatenate(list(world.engine().updates(world.weights, np.arange(DEVICES)))), axis=1)
    settings = Round(1.0, float(np.median(norms)), 0.0, minimum=0, matrix=optimised("independent", 4, 2))
    clock, state = ManualClock(), tmp_path / "noise.state"
    aggregator = FleetAggregator(
        world.task(), settings, None, world.key, noise_state=state, buffer=Buffer(3, oldest=2), clock=clock
    )
    with listening(aggregator) as port:
        flushes, devices = Flushes(aggregator, clock), Devices(world, store, f"http://127.0.0.1:{port}")
        with flushes.running(world, 3, 4):
            flushes.wait(0)
            devices.train(3, 4, 11)
            devices.send(0, 1, 2)
            flushes.wait(1)
            devices.train(7)
            devices.send(3, 5, 6)
            flushes.wait(2)
            devices.send(8, 4, 7)
            flushes.wait(3)
            assert devices.session(0, [Readings(**GOOD)]) == "not_its_turn"
            assert devices.session(11, [Readings(**GOOD)]) == "refused"  # three versions late
            devices.send(9, 10)
            assert devices.session(8, [Readings(**GOOD)]) == "not_its_turn"
            clock.forward(3600)  # the last flush is one short: it does not wait for ever
    expected = stepped(
        world,
        settings.clip,
        [{0: 0, 1: 0, 2: 0}, {3: 0, 5: 1, 6: 1}, {8: 2, 4: 0, 7: 1}, {9: 3, 10: 3}],
        world.weights,
    )
    for number in range(1, 5):
        assert np.linalg.norm(expected[number] - expected[number - 1]) > 0.01
        np.testing.assert_allclose(flushes.weights[number], expected[number], atol=1e-5)
    assert aggregator.refused == {Refused.STALE: 1}


def test_devices_take_turns_by_what_their_stores_remember(world: World, store: Path, tmp_path: Path):
    """Six rounds, separation 3, twelve devices that ask in each: each takes part twice, three rounds apart."""
    settings = Round(1.0, 1.0, 0.0, minimum=0, matrix=optimised("independent", 6, 3))
    clock = ManualClock()
    aggregator = FleetAggregator(
        world.task(), settings, None, world.key, noise_state=tmp_path / "noise.state", clock=clock
    )
    took_part: dict[int, list[int]] = {device: [] for device in range(DEVICES)}
    received = []
    with listening(aggregator) as port:
        devices = Devices(world, store, f"http://127.0.0.1:{port}")
        for number in range(1, 7):
            with clock.during(lambda number=number: aggregator.run_round(number, world.weights), 3600) as release:
                endings = [devices.session(device, [Readings(**GOOD)]) for device in range(DEVICES)]
            received.append(release.result().received)
            for device, ending in enumerate(endings):
                assert ending in ("uploaded", "not_its_turn")
                if ending == "uploaded":
                    took_part[device].append(number)
    assert received == [sum(number in rounds for rounds in took_part.values()) for number in range(1, 7)]
    assert all(second - first == 3 for first, second in took_part.values())


def turning(world: World, **fields: object) -> Promoted:
    """The version, to be trained by turns."""
    asked = Training(rounds=8, separation=2, noise="banded", server_optimizer="SGD", **fields)
    record = TrainingRecord(kind="noiseless", run="before", population="people", users=40, examples=0)
    version = Version("kiosk", 4, "cd" * 32, {}, record, world.network.weights())
    return Promoted(version, world.network, asked, world.bundle, world.trust, world.manifest)


@pytest.mark.parametrize(("fields", "planned", "what"), [({}, 20, "rounds"), ({"buffer": 5}, 5, "flushes")])
def test_a_training_by_turns_costs_its_budget_and_says_what_it_assumes(
    world: World, tmp_path: Path, fields: dict, planned: int, what: str
):
    """Its horizon is reserved whole; the record names separation and participations, ceil(8 / 2), and no sampling."""
    promoted = turning(world, **fields)
    with promoted.paid(2.0, 40, tmp_path) as (settings, ledger):
        assert ledger is not None
        assert settings.matrix is not None
        assert settings.matrix.participation == Participants(rounds=8, separation=2)
        with pytest.raises(BudgetExceeded):
            ledger.reserve([settings.event])
        ledger.spend(settings.event, purpose="train", clip=1.0, round_number=1, step=1)
        about = {"users": 40, "examples": 0, "aggregators": 1, "population": "people", "run": "run"}
        record = promoted.record(settings, ledger, **about)
    assert promoted.planned(40) == planned
    assert promoted.planned(40, aggregators=2) == (10 if fields else 20)  # buffers of two; halves of the people
    assert record.epsilon == pytest.approx(2.0, abs=1e-2)
    assert (record.sampling, record.unit) == (None, "device")
    assert (
        f"at most one of any 2 {what} one after another and in at most 4, in a fixed horizon of 8" in record.assumption
    )
    assert "banded" in record.mechanism


def test_a_buffer_that_the_fleet_cannot_fill_is_refused(world: World, tmp_path: Path):
    with (
        pytest.raises(ConfigError, match="buffer must be at most the 4 devices"),
        turning(world, buffer=5).paid(2.0, 4, tmp_path),
    ):
        pass


def test_kill_9_of_aggregator_and_devices_shows_no_noise_twice_and_takes_no_turn_twice(world: World, tmp_path: Path):
    """Twenty times, one or the other, at any moment of its start, of a flush, or between two.

    All that was released is of one horizon, paid once, each step once and with an entry; no flush had more updates
    than its buffer takes, and no device began more often than its separation, from the last step that its update might
    have been in, allows.
    """
    devices, random = 6, np.random.default_rng(21)
    (tmp_path / "task.json").write_text(world.task(round_s=3, wanted=devices).model_dump_json())
    np.save(tmp_path / "weights.npy", world.weights)
    shutil.copytree(world.folder / "keys", tmp_path / "keys")
    (port,) = free_ports(1)
    store = world.store(tmp_path / "devices.store", range(devices))
    opened = Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", rest_s=0.5)
    script = Path(__file__).with_name("aggregator_process.py")
    with (
        Killed([sys.executable, script, tmp_path, port, "flushes"]) as aggregator,
        Killed(command(opened, store, world.key_file, devices)) as fleet,
    ):
        for kill in range(20):
            if random.random() < 0.8:  # else while it starts
                aggregator.ready()
                fleet.ready()
            time.sleep(random.uniform(0, 4))  # any moment is as good as another
            victim = (aggregator, fleet)[kill % 2]
            victim.kill()
            victim.start()
        before, deadline = len(released(tmp_path)), time.monotonic() + 90
        while sum(line["received"] for line in released(tmp_path)[before:]) < devices:
            assert time.monotonic() < deadline
            for each in (aggregator, fleet):
                assert each.process.poll() is None, each.process.communicate()
            time.sleep(0.1)
    found, entries = released(tmp_path), Ledger.read(tmp_path / "run").entries
    assert len(costs(entries)) == 1
    assert all(later["step"] > earlier["step"] for earlier, later in pairwise(found))
    assert {line["step"] for line in found} <= {entry.step for entry in entries}
    assert {line["received"] for line in found} <= set(range(BUFFER.updates + 1))
    assert len({tuple(line["sum"]) for line in found}) == len(found)
    opened_steps = entries[-1].step + 1
    with Store.open(store, KEY, world.manifest) as kept:
        begun = [len(kept.history(0, device=device)) for device in range(devices)]
    assert all(count <= 1 + (opened_steps - 1) / (BUFFER.oldest + SEPARATION) for count in begun)
    assert sum(begun) >= sum(line["received"] for line in found)
