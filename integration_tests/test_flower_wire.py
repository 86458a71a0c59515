"""Federated rounds through a real SuperLink, SuperNodes and aggregators, and what kill -9 does to them."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.federation.aggregator import coins, local_stream
from hybrid.federation.population import Examples
from hybrid.federation.training import engine_for, train
from hybrid.local.flower import LocalFlower
from hybrid.network import Network
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.workspace import Workspace

USERS, ROWS = 200, 6
KILLS = int(os.environ.get("HYBRID_TEST_KILLS", "1"))  # of each; one costs about two rounds of six seconds
ROUND_S = 6.0
MODEL = """
    from datetime import timedelta

    from hybrid import Clear, Entity, HybridModel, Label, Numeric, Privacy, Server, Training, View


    def tower():
        from torch import nn

        return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))


    def head():
        import torch

        class Match(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.server = torch.nn.Linear(2, 1)

            def forward(self, server, device):
                return self.server(server).squeeze(-1) + (server * device).sum(-1)

        return Match()


    model = HybridModel(
        name="clicks",
        server=Server(
            service="clicks_offers",
            entity=Entity(name="offer", join_key="offer_id"),
            views=(View(name="offers", source="offers.parquet", features={"rate": Numeric()}),),
            max_feature_age=timedelta(days=300),
        ),
        device={"age": Numeric(mean=30, std=10)},
        server_tower=tower,
        device_tower=tower,
        head=head,
        label=Label(column="clicked", visible_to="server"),
        privacy=Privacy(epsilon=6, delta=1e-3, clip=1.0, unit="user"),
        merge="server",
        release=Clear(reason="a test of the wire"),
        training=Training(rounds=3, sampling=0.6, local_steps=2, local_lr=2.0, server_lr=0.5),
    )
"""
VICTIMS = {
    "serverapp": ("flwr-serverapp",),
    "superlink": ("flower-superlink",),
    "supernode": ("flower-supernode", "aggregator-{part}"),
    "aggregator": ("hybrid.local aggregate", "aggregator-{part}"),
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("team") / "model.py"
    file.write_text(textwrap.dedent(MODEL))
    return file


def people(model):
    """Rows of 200 users, labels that the device's feature decides."""
    rng = np.random.default_rng(0)
    rows = USERS * ROWS
    device = rng.normal(size=(rows, model.device_features.width)).astype(np.float32)
    server = rng.normal(size=(rows, model.server_features.width)).astype(np.float32)
    labels = (device[:, 0] > 0).astype(np.float32)
    return Examples(server, device, labels, np.arange(0, rows + 1, ROWS), "people")


def with_rounds(model, rounds):
    return model.training.model_copy(update={"rounds": rounds, "server_optimizer": "SGD"})


def hardly_noised(model):
    """With a budget that no declaration may have: the noise is there, and paid for, but moves no weight by 1e-6."""
    return model.model_copy(update={"privacy": model.privacy.model_copy(update={"epsilon": 1e10})})


@dataclass(frozen=True)
class Noted(LocalFlower):
    """Leaves the weights before the first round, and after each, in `<run>.rounds`, also when it goes on."""

    def train(self, rounds, after):
        folder = noted(rounds.folder.parent)
        folder.mkdir(exist_ok=True)
        if not rounds.done:
            np.save(folder / "000000.npy", rounds.initial)

        def note(number, flat):
            np.save(folder / f"{number:06d}.npy", flat)
            after(number, flat)

        return super().train(rounds, note)


def noted(run):
    return run.with_name(f"{run.name}.rounds")


def rounds_over(run):
    """How many, as far as the weights after them tell."""
    return len(list(noted(run).glob("*.npy"))) - 1


def kill(victim, run, part):
    """SIGKILL to the process of this run; whether there was one."""
    words, found = [word.format(part=part) for word in VICTIMS[victim]], False
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(run) in line and all(word in line for word in words):
                process.send_signal(signal.SIGKILL)
                found = True
    return found


@contextlib.contextmanager
def killing(run, victims, seed):
    """Kills one after another, each a random time after a second round is over, now and then once more at its restart.

    Yields who was killed: those of the list at least.
    """
    chance, over, killed = random.Random(seed), threading.Event(), []

    def strike(victim, part):
        while not over.is_set() and not kill(victim, run, part):
            over.wait(0.05)
        killed.extend([] if over.is_set() else [victim])

    def work():
        for number, victim in enumerate(victims):
            while rounds_over(run) < 1 + 2 * number and not over.wait(0.05):
                pass
            over.wait(chance.uniform(0, ROUND_S))
            part = chance.choice([1, 2])
            strike(victim, part)
            if chance.random() < 0.2:
                over.wait(chance.uniform(0, ROUND_S))
                strike(victim, part)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def watching(run):
    """Yields a dictionary of all sums that an aggregator let out: (aggregator, name of the round) -> digests."""
    seen, over = {}, threading.Event()

    def work():
        while not over.wait(0.02):
            for file in run.glob("federation-1/aggregator-*/release/latest.sum"):
                with contextlib.suppress(FileNotFoundError):
                    named, _, released = file.read_bytes().partition(b"\n")
                    key = file.parts[-3], *json.loads(named)["key"]
                    seen.setdefault(key, set()).add(hashlib.sha256(released).hexdigest())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def aggregator(run, part):
    """The folder of one."""
    return run / f"federation-1/aggregator-{part}"


def check_ledgers(run, rounds, released=()):
    """Nobody was charged less than was released, and the run's ledger covers each aggregator's."""
    whole = Ledger.read(run)
    assert [entry.round for entry in whole.entries] == list(range(1, rounds + 1))
    for folder in run.glob("federation-1/aggregator-*"):
        own = Ledger.read(folder)
        assert len(own.entries) <= rounds
        assert len({(entry.round, entry.attempt) for entry in own.entries}) == len(own.entries)
        assert own.spent().epsilon <= whole.spent().epsilon
        left = [number for name, _, number, _ in released if name == folder.name]
        assert len(left) <= len(own.entries)
        assert set(left) <= {entry.round for entry in own.entries}


def shares(model, run, rounds, seed):
    """(rounds, 2) of bool: whose sums each round's step is made of, worked out from the weights and the ledgers.

    A step is the mean of those people's updates whose coins fell at the attempt that their aggregator's ledger has
    last.
    """
    settings, found = with_rounds(model, rounds), []
    network = Network.build(model, seed=seed)
    with np.load(run / "checkpoint.npz") as kept:
        network.load_weights({name: value for name, value in kept.items() if "." in name})  # the server's as fitted
    everybody = people(model)
    engine = engine_for(network, everybody, settings)
    attempts = [
        {entry.round: entry.attempt for entry in Ledger.read(aggregator(run, part + 1)).entries} for part in range(2)
    ]
    weights = [np.load(noted(run) / f"{number:06d}.npy") for number in range(rounds + 1)]
    for number in range(1, rounds + 1):
        parts = [
            part_sum(engine, weights[number - 1], number, attempts[part].get(number, 1), part, seed, settings, model)
            for part in range(2)
        ]
        step = (weights[number] - weights[number - 1]) * (settings.sampling * USERS) / settings.server_lr
        ways = list(itertools.product([True, False], repeat=2))
        off = [np.abs(step - sum(s * w for s, w in zip(parts, way, strict=True))).max() for way in ways]
        assert min(off) / (settings.sampling * USERS) * settings.server_lr < 1e-5, (number, off)
        found.append(ways[int(np.argmin(off))])
    return np.array(found)


def part_sum(engine, flat, number, attempt, part, seed, settings, model):
    """What one aggregator's people add up to."""
    fell = coins(seed, number, attempt, USERS) < settings.sampling
    users = np.flatnonzero(fell & (np.arange(USERS) % 2 == part))
    total = engine.clipped_sum(flat, users, model.privacy.clip, stream=(*local_stream(seed, number, attempt), part))
    return total.total


def check_nothing_private_is_left(run):
    """Ledgers, logs and that it is over stay; no key, no token, no row."""
    left = {path.name for path in run.glob("federation-1/**/*") if path.is_file()}
    assert not [name for name in left - {"ledger.jsonl", "done.json"} if not name.endswith((".log", ".old"))]


def test_servers_killed_at_random_moments_cost_shares_of_rounds_and_no_privacy(model_file, tmp_path, processes_naming):
    """ServerApp, SuperLink, SuperNodes and aggregators die by SIGKILL, each so many times: the training ends.

    Every sum that left is in its aggregator's ledger, and each round has one; each step is that of the people of both
    aggregators, of one, or of none, to 1e-5; and few are missing.
    """
    victims = list(VICTIMS) * KILLS
    random.Random(7).shuffle(victims)
    model, rounds, run = hardly_noised(load_model(model_file)), 2 + 2 * len(victims), tmp_path / "run"
    flower = Noted(model_file, say=print, round_timeout_s=60)
    with watching(run) as released, killing(run, victims, seed=KILLS) as killed:
        result = train(
            model, people(model), seed=3, run_dir=run, settings=with_rounds(model, rounds), federation=flower
        )
    counted = shares(model, run, rounds, seed=3)
    print(f"killed {Counter(killed)}; {rounds} rounds, {(~counted).sum()} of {counted.size} shares missing")
    assert Counter(killed) >= Counter(victims)
    assert all(np.isfinite(value).all() for value in result.weights.values())
    assert result.record.rounds == counted.any(axis=1).sum()
    assert (~counted).sum() <= 4 * (len(killed) - Counter(killed)["serverapp"])
    assert all(len(digests) == 1 for digests in released.values())
    assert len({name for _, name, _, _ in released}) == 1  # whatever died, it is one training
    check_ledgers(run, rounds, released)
    assert processes_naming(str(run)) == []
    check_nothing_private_is_left(run)


def test_a_training_that_is_killed_goes_on_to_the_weights_of_one_process(model_file, tmp_path, processes_naming):
    """SIGKILL to all of it at random moments, resumed each time; after a kill no process is left.

    Over TLS, two SuperNodes and two aggregators each step is that of its round's people, to 1e-5, and so are the
    weights those of one process without noise; but where an aggregator died with a release that was paid for and not
    kept, its people's coins are others, and the last round, for which no room is left, is without them.
    """
    rounds, run, chance, killed = 2 + KILLS, tmp_path / "run", random.Random(KILLS), 0
    model = load_model(model_file)
    with watching(run) as released:
        while killed < KILLS:
            training = start_training(model_file, run, rounds)
            before = rounds_over(run)
            while training.poll() is None and rounds_over(run) == before and chance.random() < 0.9:
                time.sleep(chance.uniform(0, ROUND_S))  # any moment is as good as another
            training.kill()
            assert training.wait() == -signal.SIGKILL
            killed += 1
            await_end(processes_naming, run)
        training = start_training(model_file, run, rounds)
        try:
            assert training.wait(60 + 30 * rounds) == 0
        finally:
            training.kill()
    check_ledgers(run, rounds, released)
    assert all(len(digests) == 1 for digests in released.values())
    counted = shares(model, run, rounds, seed=5)
    lost = sum(entry.attempt - 1 for part in (1, 2) for entry in Ledger.read(aggregator(run, part)).entries)
    print(
        f"killed {killed}; {rounds} rounds, {(~counted).sum()} of {counted.size} shares missing, {lost} attempts lost"
    )
    assert (~counted).sum() == lost
    how = {"kind": "noiseless", "seed": 5, "settings": with_rounds(model, rounds)}
    here = train(model, people(model), run_dir=tmp_path / "here", **how)
    with np.load(run / "checkpoint.npz") as wire:
        off = max(np.abs(wire[name] - value).max() for name, value in here.weights.items())
    assert off < 1e-5 or lost
    first, last = (np.load(noted(run) / f"{number:06d}.npy") for number in (1, rounds))
    assert np.abs(last - first).max() > 0.01
    check_nothing_private_is_left(run)


GO_ON = """
    import sys
    from pathlib import Path
    from integration_tests.test_flower_wire import Noted, hardly_noised, load_model, people, train, with_rounds
    file, run, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    model = hardly_noised(load_model(file))
    how = {"seed": 5, "run_dir": run, "settings": with_rounds(model, rounds)}
    begun = (run / "config.json").exists()
    train(model, people(model), **how, federation=Noted(file, say=print, round_timeout_s=60), resume=begun)
"""


def start_training(model_file, run, rounds):
    """A process that trains in `run`, or goes on with what was killed there."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(GO_ON), model_file, run, str(rounds)])


def await_end(processes_naming, run):
    """Returns when no process is left of a training that was killed, which must be within seconds."""
    deadline = time.monotonic() + 15
    while processes_naming(str(run)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_command_makes_a_version_like_any_other(model_file, monkeypatch):
    """`hybrid train clicks --federation local`: record, curves, ledger; a command that cannot be is one sentence."""
    folder, now = model_file.parent, datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    monkeypatch.setenv("HYBRID_HOME", str(folder / ".hybrid"))
    monkeypatch.chdir(folder)
    offers = pd.DataFrame({"offer_id": ["o1", "o2"], "rate": [1.0, 0.5], "event_timestamp": now - timedelta(days=9)})
    offers.assign(event_timestamp=offers.event_timestamp.dt.tz_localize("UTC")).to_parquet("offers.parquet")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"person": rng.integers(0, 300, 2000), "offer_id": rng.choice(["o1", "o2"], 2000)})
    rows["age"], rows["at"] = rng.normal(30, 10, 2000), now
    rows["clicked"] = (rows.age > 30).astype(int)
    rows.to_parquet("rows.parquet")

    def run(*words):
        return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout

    run("register", "model.py")
    run("features", "apply", "clicks")
    run("population", "import", "rows.parquet", "--user", "person", "--time", "at", "--name", "clicks")
    words = ("train", "clicks", "--federation", "local", "--rounds", "2", "--fold", "1/4", "--json")
    printed = json.loads(run(*words))
    version = Registry(Workspace.current()).version("clicks", printed["version"])
    assert version.training.rounds == 2
    assert version.training.epsilon <= 6
    assert "of each aggregator for its own people" in version.training.assumption
    assert 0 <= version.training.oracle["auc"] <= 1
    check_ledgers(Workspace.current().runs / version.training.run, 2)
