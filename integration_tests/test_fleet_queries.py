"""Queries to real devices: `device_runtime` clients, stores and bundles answer what a simulation is asked."""

import asyncio
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from device_runtime.aggregator import Aggregator
from device_runtime.answering import Answerer
from device_runtime.eligibility import Readings
from device_runtime.host import ScriptedHost
from device_runtime.participation import Participation
from device_runtime.program import PredictProgram, open_bundle
from device_runtime.rows import Rows
from device_runtime.store import Served, Store
from hybrid.analytics.asking import EVALUATE, Exact, People
from hybrid.analytics.estimates import shares_of
from hybrid.analytics.fleet import FleetAsk
from hybrid.analytics.metrics import evaluate
from hybrid.bundle import Manifest, signing_key, trusted_key, write_bundle
from hybrid.errors import BudgetExceeded
from hybrid.export.executorch import device_programs
from hybrid.export.programs import device_parts
from hybrid.federation.checkin import listening
from hybrid.federation.clock import ManualClock
from hybrid.federation.fleet_aggregator import Audience, FleetAggregator
from hybrid.local.devices import GOOD, Opened, command
from hybrid.local.process import free_ports
from hybrid.network import Network
from hybrid.privacy.accountant import GaussianEvent, epsilon
from hybrid.privacy.ledger import Ledger
from hybrid.query import By, Categories, Histogram, Labels, Moments, Query
from hybrid.spec import load_model
from integration_tests.test_fleet_rounds import KEY, KILLS, LAX, Killed, World, released

COUPON = load_model(Path(__file__).parents[1] / "examples" / "coupon" / "model.py")
USERS, VERSION = 200, 3
AUDIENCE = Audience(model="coupon", version=VERSION, definition_hash="cd" * 32, policy=LAX, round_s=3600, wanted=USERS)
TIMES = ("7AM", "10AM", "2PM", "6PM", "10PM")
JOINT = (
    Moments(column="temperature", low=30, high=80),
    Histogram(column="temperature", edges=(40.0, 55.0, 70.0), cumulative=True),
    Categories(column="Bar", values=("never", "1~3", "gt8")),
    Categories(column="age", values=("21", "26", "50plus")),
    Labels(),
)


@dataclass
class Drivers:
    """A version of the coupon model, its bundle, and people who were asked about coupons."""

    folder: Path

    def __post_init__(self):
        network, key = Network.build(COUPON, seed=5), signing_key(self.folder / "keys")
        self.bundle, self.trust = self.folder / "coupon-3.bundle", self.folder / "keys" / "bundle-signing.pub"
        about = {"model": "coupon", "version": VERSION, "definition_hash": "cd" * 32, "programs": {}}
        sizes = {"server_embedding": network.server_embedding, "device_embedding": network.device_embedding}
        self.manifest = write_bundle(
            self.bundle,
            Manifest(
                **about,
                **sizes,
                features=COUPON.device_features,
                request={"time": "text"},
                merge="server",
                release=COUPON.release,
            ),
            device_programs(network),
            key,
        )
        self.key, self.opened = key, open_bundle(self.bundle, self.trust)
        self._draw(np.random.default_rng(17), network)

    def _draw(self, random, network):
        self.offsets = np.r_[0, np.cumsum(random.integers(0, 20, USERS))]
        n = int(self.offsets[-1])
        texts = {
            name: random.choice([*transform.vocabulary, "else", None], n).tolist()
            for name, transform in {**COUPON.device, **COUPON.request}.items()
            if transform.text
        }
        numbers = {
            name: [None if gone else value for gone, value in zip(random.random(n) < 0.05, values, strict=True)]
            for name, transform in COUPON.device.items()
            if not transform.text
            for values in [random.normal(transform.mean, transform.std, n).round(2).tolist()]
        }
        self.time = texts.pop("time")
        self.features = {name: (texts | numbers)[name] for name in COUPON.device}
        self.server = random.normal(0, 1, (n, self.manifest.server_embedding)).astype(np.float32)
        self.version = np.where(random.random(n) < 0.1, VERSION - 1, VERSION)  # some were served before the update
        self.labels = np.where(random.random(n) < 0.1, np.nan, random.integers(0, 2, n))
        inputs = self.manifest.features.inputs(self.features)
        program = PredictProgram(self.opened)
        scores = np.array([program.predict(inputs[i : i + 1], self.server[i : i + 1]) for i in range(n)])
        with torch.no_grad():
            predict = device_parts(network)["predict"].program
            np.testing.assert_allclose(
                scores, predict(torch.from_numpy(inputs), torch.from_numpy(self.server)).numpy(), atol=1e-5
            )
        self.scores = np.where(self.version == VERSION, scores, np.nan)

    @property
    def people(self) -> People:
        """Of a simulation."""
        own = {"time": self.time, "label": self.labels, "score": self.scores}
        return People(self.features | own, self.offsets)

    def store(self, file: Path) -> Path:
        """Everybody's devices, after their inferences."""
        rows, now_ms = range(int(self.offsets[-1])), time.time_ns() // 1_000_000 - int(self.offsets[-1])
        device = np.repeat(np.arange(USERS), np.diff(self.offsets))
        written = Rows(device, np.array(rows), ["offer"] * len(rows), {"time": self.time}, self.features)
        with Store.open(file, KEY, self.manifest) as store, store.together():
            store.write(written, now_ms)
            store.answered(
                (int(device[i]), i, Served(now_ms + i, int(self.version[i]), 0.5, self.server[i].tolist(), 0))
                for i in rows
            )
            for i in rows:
                if not np.isnan(self.labels[i]):
                    store.label(int(self.labels[i]), now_ms + i, inference=store.id_of(int(device[i]), i))
        return file


@dataclass
class Devices:
    """Everybody's devices, one session of each when it is asked for."""

    drivers: Drivers
    file: Path

    def sessions(self, port: int, devices: range = range(USERS)) -> list:
        """How they ended."""
        opened, trusted = self.drivers.opened, trusted_key(self.drivers.trust)
        host, asked, answerer = (
            ScriptedHost([Readings(**GOOD)]),
            Aggregator(f"http://127.0.0.1:{port}"),
            Answerer(opened),
        )
        with Store.open(self.file, KEY, self.drivers.manifest) as kept:

            async def one(device):
                asks = {"store": kept, "host": host, "aggregator": asked, "trusted": trusted, "device": device}
                about = {"bundle": opened, "trainer": None, "answerer": answerer, "own": LAX}
                return (await Participation(**asks, **about).session()).ending

            return [str(asyncio.run(one(device))) for device in devices]

    @contextmanager
    def attending(self, ledger: Ledger | None, rounds: int, devices: range = range(USERS)) -> Iterator:
        """An aggregator to whose next rounds they come; it, its port, and how their sessions ended."""
        clock, endings = ManualClock(), []
        aggregator = FleetAggregator(AUDIENCE, None, ledger, self.drivers.key, clock=clock)

        def attend(port: int) -> None:
            for _ in range(rounds):
                assert clock.waited_for.wait(120)
                endings.extend(self.sessions(port, devices))
                clock.waited_for.clear()
                clock.forward(3600)

        with listening(aggregator) as port, ThreadPoolExecutor(1) as thread:
            attended = thread.submit(attend, port)
            yield aggregator, port, endings
            attended.result(120)


@pytest.fixture(scope="module")
def devices(tmp_path_factory) -> Devices:
    folder = tmp_path_factory.mktemp("drivers")
    drivers = Drivers(folder)
    return Devices(drivers, drivers.store(folder / "devices.store"))


@pytest.mark.parametrize(("rows", "clip", "take"), [(4, None, "last"), (8, 3.0, "first")])
def test_200_devices_answer_what_a_simulation_does(devices: Devices, rows, clip, take):
    """Moments, histogram, categories and labels by the request's hour, without noise, to 1e-5; clipped and not."""
    query = Query(parts=JOINT, rows=rows, clip=clip, take=take, by=By(column="time", values=TIMES))
    with devices.attending(None, 1) as (aggregator, _, endings):
        ask = FleetAsk(aggregator, purpose=EVALUATE, epsilon=None)
        assert ask.answered == 0
        answer = ask(query)
    assert (endings, ask.answered) == (["uploaded"] * USERS, USERS)
    exact = Exact(devices.drivers.people)(query)
    assert (answer.people, np.count_nonzero(exact.total) > 60) == (USERS, True)
    np.testing.assert_allclose(answer.total, exact.total, rtol=1e-5, atol=1e-5)
    assert not aggregator.refused


def test_200_devices_measure_a_version_as_a_simulation_does(devices: Devices):
    """Its scores are computed on the devices, of the rows that it was given; both phases, without noise, to 1e-5."""
    with devices.attending(None, 2) as (aggregator, _, endings):
        found = evaluate(FleetAsk(aggregator, purpose=EVALUATE, epsilon=None))
    exact = evaluate(Exact(devices.drivers.people))
    assert endings == ["uploaded"] * 2 * USERS
    assert found.rows.value == pytest.approx(exact.rows.value, abs=1e-4)
    assert exact.rows.value > 500
    for name, estimate in exact.metrics.items():
        ours = found.metrics[name]
        np.testing.assert_allclose(ours.value, estimate.value, atol=1e-5)
        np.testing.assert_allclose([ours.full.low, ours.full.high], [estimate.full.low, estimate.full.high], atol=1e-4)


def test_a_fleet_s_queries_are_in_the_ledger_and_past_the_budget_nobody_is_asked(devices: Devices, tmp_path: Path):
    """Two phases of an epsilon of 0.6, of 0.7; the next is refused, and a device that checks in has nothing to do."""
    few = range(20)
    with (
        Ledger.open(tmp_path, budget_epsilon=0.7, delta=1e-5) as ledger,
        devices.attending(ledger, 2, few) as (aggregator, port, endings),
    ):
        ask = FleetAsk(aggregator, purpose=EVALUATE, epsilon=0.6, minimum=20)
        ask.begin(shares_of(1.0, full=True))
        found = evaluate(ask)
        for refused in (lambda: ask.begin(shares_of(1.0, full=True)), lambda: evaluate(ask)):
            with pytest.raises(BudgetExceeded):
                refused()
        assert devices.sessions(port, few) == ["nothing"] * 20
    assert endings == ["uploaded"] * 40
    assert found.people == 20
    account = Ledger.read(tmp_path)
    assert [(e.purpose, e.round, e.attempt) for e in account.entries] == [("evaluate", 1, 1), ("evaluate", 2, 1)]
    assert 0.59 < account.spent().epsilon <= 0.6


def test_kill_9_of_an_aggregator_that_asks_never_counts_less_than_left(tmp_path: Path):
    """At any moment, and as soon as a query is paid for: each sum that left has an entry, and noise, of its own."""
    world, people, random = World(tmp_path), 6, np.random.default_rng(21)
    (tmp_path / "task.json").write_text(world.task(round_s=2, wanted=people).model_dump_json())
    np.save(tmp_path / "weights.npy", world.weights)
    (port,) = free_ports(1)
    store = world.store(tmp_path / "devices.store", range(people))
    opened = Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", rest_s=0.5)
    script = Path(__file__).with_name("aggregator_process.py")
    with (
        Killed([sys.executable, script, tmp_path, port, "queries"]) as aggregator,
        Killed(command(opened, store, world.key_file, people)) as fleet,
    ):
        fleet.ready()
        for kill in range(KILLS):
            aggregator.ready()
            if kill % 2:
                time.sleep(random.uniform(0, 4))  # any moment is as good as another
            else:
                _until_paid(tmp_path / "run" / "ledger.jsonl", aggregator)
            aggregator.kill()
            aggregator.start()
        before, deadline = len(released(tmp_path)), time.monotonic() + 120
        while len(released(tmp_path)) < before + 2 or released(tmp_path)[-1]["received"] < people:
            assert time.monotonic() < deadline
            assert aggregator.process.poll() is None, aggregator.process.communicate()
            assert fleet.process.poll() is None, fleet.process.communicate()
            time.sleep(0.1)
    found, account = released(tmp_path), Ledger.read(tmp_path / "run")
    numbers = [(entry.purpose, entry.round, entry.attempt) for entry in account.entries]
    assert numbers == [("analyze", number, 1) for number in range(1, len(numbers) + 1)]
    left = [line["round"] for line in found]
    assert left == sorted(set(left))
    assert set(left) <= {number for _, number, _ in numbers}
    assert len({tuple(line["sum"]) for line in found}) == len(found)
    assert max(line["received"] for line in found) == people
    each = account.entries[0].noise_multiplier
    assert account.spent().epsilon >= epsilon([GaussianEvent(each, count=len(found))], account.delta).epsilon


def _until_paid(ledger: Path, aggregator: Killed) -> None:
    """Returns when there is one more entry."""
    before, deadline = _entries(ledger), time.monotonic() + 60
    while _entries(ledger) == before:
        assert time.monotonic() < deadline
        assert aggregator.process.poll() is None, aggregator.process.communicate()


def _entries(ledger: Path) -> int:
    return ledger.read_bytes().count(b'"spent"') if ledger.exists() else 0
