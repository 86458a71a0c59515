"""Rounds of real devices: `device_runtime` clients, stores, bundles and training, against the aggregator's service."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from device_runtime.aggregator import Aggregator
from device_runtime.eligibility import Readings
from device_runtime.host import ScriptedHost
from device_runtime.participation import Participation
from device_runtime.program import open_bundle
from device_runtime.store import Store
from device_runtime.trainer import Trainer
from hybrid import Categorical, Clear, Entity, HybridModel, Label, Log1p, Numeric, Privacy, Server, View
from hybrid.bundle import Manifest, signing_key, trusted_key, write_bundle
from hybrid.errors import BundleError
from hybrid.export.executorch import device_programs
from hybrid.export.training import training_program
from hybrid.federation.aggregator import Round, SimulatedAggregator
from hybrid.federation.checkin import listening
from hybrid.federation.client_app import client_app
from hybrid.federation.clock import ManualClock
from hybrid.federation.engine import Engine
from hybrid.federation.fleet_aggregator import FleetAggregator, Task
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.federation.population import Examples
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.local.devices import GOOD, Opened, People, command, running
from hybrid.local.process import free_ports
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.plan import Local, Policy
from hybrid.privacy.ledger import Ledger

USERS = 200
KILLS = int(os.environ.get("HYBRID_TEST_KILLS", "10"))  # of the aggregator, and as many of the devices
LAX = Policy(separation_s=0, participations=1000)
LOCAL = Local(steps=3, lr=0.5)
KEY = bytes(range(32))


class Match(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, server, device):
        return self.linear(torch.cat([server, device], dim=1)).squeeze(-1)


MODEL = HybridModel(
    name="kiosk",
    server=Server(
        service="kiosks",
        entity=Entity(name="shop", join_key="shop_id"),
        views=(View(name="shops", source=Path("shops.parquet"), features={"size": Numeric(mean=3, std=2)}),),
        max_feature_age=timedelta(hours=1),
    ),
    device={"mood": Categorical(vocabulary=("glad", "so-so", "sad")), "steps": Log1p(mean=8, std=2)},
    server_tower=lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4)),
    device_tower=lambda: nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 4)),
    head=Match,
    label=Label(column="bought", visible_to="server"),
    privacy=Privacy(epsilon=8, delta=1e-4, clip=1.0, unit="user"),
    merge="server",
    release=Clear(reason="a test of devices that take part"),
)


@dataclass
class World:
    """A version of the model, its bundle, and people."""

    folder: Path

    def __post_init__(self):
        self.network = Network.build(MODEL, seed=5)
        self.key = signing_key(self.folder / "keys")
        self.trust = self.folder / "keys" / "bundle-signing.pub"
        self.bundle = self.folder / "kiosk-4.bundle"
        program, train = training_program(self.network, server_tower=False, missing=False)
        manifest = Manifest(
            model="kiosk",
            version=4,
            definition_hash="cd" * 32,
            features=MODEL.device_features,
            request={},
            server_embedding=4,
            device_embedding=4,
            merge="server",
            release=MODEL.release,
            programs={},
            train=train,
        )
        self.manifest = write_bundle(
            self.bundle, manifest, device_programs(self.network) | {"train.pte": program}, self.key
        )
        self.key_file = self.folder / "store.key"
        self.key_file.write_text(KEY.hex())
        self.key_file.chmod(0o600)
        random = np.random.default_rng(17)
        offsets = np.r_[0, np.cumsum(random.integers(1, 30, USERS))]
        rows = offsets[-1]
        sizes = random.normal(3, 2, rows).round(3)
        slots = MODEL.server_features.slots(MODEL.server_features.inputs({"size": sizes.tolist()}))
        with torch.no_grad():
            embedded = self.network.server_program()(torch.from_numpy(slots)).numpy()
        self.people = People(
            offsets=offsets,
            entity=["bakery"] * rows,
            request={},
            features={
                "mood": [["glad", "so-so", "sad", "else", None][i] for i in random.integers(0, 5, rows)],
                "steps": [None if i == 0 else float(i * 100) for i in random.integers(0, 200, rows)],
            },
            server=embedded,
            labels=random.integers(0, 2, rows).astype(np.float32),
        )
        device = MODEL.device_features
        encoded = device.encode(device.slots(device.inputs(self.people.features)))
        self.examples = Examples(MODEL.server_features.encode(slots), encoded, self.people.labels, offsets, "people")

    def engine(self) -> Engine:
        return Engine.build(self.network, self.examples, LocalTraining(steps=LOCAL.steps, lr=LOCAL.lr))

    @property
    def weights(self) -> np.ndarray:
        return self.engine().side.flat()

    def task(self, **fields) -> Task:
        about = {"model": "kiosk", "version": 4, "definition_hash": "cd" * 32, "policy": LAX, "local": LOCAL}
        return Task(**about | {"parameters": len(self.weights), "round_s": 3600, "wanted": USERS} | fields)

    def store(self, file: Path, users: range) -> Path:
        with Store.open(file, KEY, self.manifest) as store:
            self.people.store(store, users, 4)
        return file

    def sessions(self, store: Path, devices: range, url: str) -> list:
        """One session of each device; how they ended."""
        bundle, trusted, host = (
            open_bundle(self.bundle, self.trust),
            trusted_key(self.trust),
            ScriptedHost([Readings(**GOOD)]),
        )
        trainer, asked = Trainer(bundle), Aggregator(url)
        with Store.open(store, KEY, self.manifest) as kept:

            async def one(device):
                about = {"store": kept, "host": host, "aggregator": asked, "trusted": trusted, "device": device}
                participation = Participation(bundle=bundle, trainer=trainer, own=LAX, **about)
                return (await participation.session()).ending

            return [asyncio.run(one(device)) for device in devices]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def everybody(world, tmp_path_factory) -> Path:
    """The store of all people's devices."""
    return world.store(tmp_path_factory.mktemp("stores") / "devices.store", range(USERS))


def served(world: World, store: Path, devices: range, settings: Round, rounds: int, weights, on_round) -> list:
    """Flower's server app over the aggregator's service, each of its rounds once all devices have had a session."""
    clock, endings = ManualClock(), []
    aggregator = FleetAggregator(world.task(), settings, None, world.key, clock=clock)
    with listening(aggregator) as port, ThreadPoolExecutor(1) as thread:

        def attend() -> None:
            for _ in range(rounds):
                assert clock.waited_for.wait(60)
                endings.extend(world.sessions(store, devices, f"http://127.0.0.1:{port}"))
                clock.waited_for.clear()
                clock.forward(3600)

        attended = thread.submit(attend)
        run_server(aggregator, len(devices), rounds, weights, on_round)
        attended.result(60)
    return endings


def run_server(aggregator, planned: float, rounds: int, weights: np.ndarray, on_round) -> None:
    strategy = NoisedSum(planned, ServerOptimizer("SGD", 1.0, weights, {"momentum": 0.5}))
    simulate(server_app(strategy, weights, rounds, on_round), {1: client_app(aggregator)})


def test_200_devices_train_what_the_simulator_trains(world, everybody):
    """The same plan, people and server, two rounds, half of the updates longer than the clip, and no noise.

    Everybody takes part (sampling 1) with all rows in each local step, so that nothing is left to chance.
    """
    norms = np.linalg.norm(np.concatenate(list(world.engine().updates(world.weights, np.arange(USERS)))), axis=1)
    settings = Round(sampling=1.0, clip=float(np.median(norms)), noise_multiplier=0.0, minimum=USERS)
    wire, simulated = {}, {}
    endings = served(world, everybody, range(USERS), settings, 2, world.weights, wire.__setitem__)
    run_server(
        SimulatedAggregator(world.engine(), None, settings, seed=0), USERS, 2, world.weights, simulated.__setitem__
    )
    assert endings == ["uploaded"] * 2 * USERS
    for number in (1, 2):
        assert np.linalg.norm(simulated[number] - simulated[number - 1]) > 0.01
        np.testing.assert_allclose(wire[number], simulated[number], atol=1e-5)


def test_processes_of_devices_take_part_until_they_are_told_to_end(world, tmp_path):
    """Ten devices in two processes: each has a session, and the round has all ten; then no process is left."""
    few = replace(world.people, offsets=world.people.offsets[:11])
    clock = ManualClock()
    aggregator = FleetAggregator(world.task(), Round(1.0, 0.05, 0.0, minimum=10), None, world.key, clock=clock)
    with (
        listening(aggregator) as port,
        clock.during(lambda: aggregator.run_round(1, world.weights), 3600) as release,
        running(
            Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", 3600), few, tmp_path, processes=2
        ) as both,
    ):
        both.wait_ready()
        assert both.finish() == {"uploaded": 10}
    assert release.result().received == 10
    assert not aggregator.refused


def test_devices_that_cannot_start_say_why(world, tmp_path):
    """Their bundle is trusted by another key."""
    signing_key(tmp_path / "others")
    opened = Opened(world.bundle, tmp_path / "others" / "bundle-signing.pub", "http://127.0.0.1:1", rest_s=1)
    with pytest.raises(BundleError), running(opened, world.people, tmp_path, processes=1):
        pass


@dataclass
class Killed:
    """A process that is killed and started again."""

    words: list

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self):
        pipe, self._ready = subprocess.PIPE, False
        self.process = subprocess.Popen([*map(str, self.words)], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=30)

    def ready(self):
        self._ready = self._ready or "ready" in self.process.stdout.readline()
        assert self._ready, self.process.communicate()


def released(folder: Path) -> list[dict]:
    file = folder / "released.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_kill_9_of_aggregator_and_devices_spends_no_privacy_unseen_and_counts_nobody_twice(world, tmp_path):
    """Ten times each, one after the other, at any moment of its start, of a round, or between two.

    The ledger has an entry for each release, and none twice; what was released went on from round to round; no round
    had more updates than there are devices, though their updates are sent again after each kill; no two sums have
    the same noise.
    """
    devices, random = 6, np.random.default_rng(20)
    (tmp_path / "task.json").write_text(world.task(round_s=3, wanted=devices).model_dump_json())
    np.save(tmp_path / "weights.npy", world.weights)
    shutil.copytree(world.folder / "keys", tmp_path / "keys")
    (port,) = free_ports(1)
    store = world.store(tmp_path / "devices.store", range(devices))
    opened = Opened(world.bundle, world.trust, f"http://127.0.0.1:{port}", rest_s=0.5)
    script = Path(__file__).with_name("aggregator_process.py")
    with (
        Killed([sys.executable, script, tmp_path, port]) as aggregator,
        Killed(command(opened, store, world.key_file, devices)) as fleet,
    ):
        for kill in range(2 * KILLS):
            if random.random() < 0.8:  # else while it starts
                aggregator.ready()
                fleet.ready()
            time.sleep(random.uniform(0, 5))  # any moment is as good as another
            victim = (aggregator, fleet)[kill % 2]
            victim.kill()
            victim.start()
        before = len(released(tmp_path))
        deadline = time.monotonic() + 60
        while len(released(tmp_path)) < before + 2 or released(tmp_path)[-1]["received"] < devices:
            assert time.monotonic() < deadline
            assert aggregator.process.poll() is None, aggregator.process.communicate()
            assert fleet.process.poll() is None, fleet.process.communicate()
            time.sleep(0.1)
    found = released(tmp_path)
    entries = [(entry.round, entry.attempt) for entry in Ledger.read(tmp_path / "run").entries]
    assert [line["round"] for line in found] == list(range(1, len(found) + 1))
    assert len(entries) == len(set(entries)) >= len(found)
    assert {line["round"] for line in found} <= {number for number, _ in entries}
    assert max(line["received"] for line in found) == devices
    sums = [tuple(line["sum"]) for line in found]
    assert len(set(sums)) == len(sums)
