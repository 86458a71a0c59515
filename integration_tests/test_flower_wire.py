"""Federated rounds through a real SuperLink, SuperNodes and aggregators, and what kill -9 does to them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import psutil
import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import FederationError
from hybrid.federation.population import Examples
from hybrid.federation.training import train
from hybrid.local.flower import LocalFlower
from hybrid.privacy.ledger import Ledger
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.workspace import Workspace

USERS, ROWS = 200, 6
KILLS = int(os.environ.get("HYBRID_TEST_KILLS", "1"))  # of each server; one takes about seven rounds, 50 s
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
    "superlink": ("flower-superlink",),
    "supernode": ("flower-supernode", "aggregator-1"),
    "aggregator": ("hybrid.local", "aggregate", "aggregator-2"),
    "serverapp": ("flwr-serverapp",),
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
    return model.training.model_copy(update={"rounds": rounds})


def entries(run):
    """Lines of releases in the ledgers of both aggregators."""
    files = run.glob("federation-1/aggregator-*/ledger.jsonl")
    return sum(line.startswith('{"kind":"spent"') for file in files for line in file.read_text().splitlines())


def kill(victim, run):
    """SIGKILL to the process of this run; whether there was one."""
    found = False
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(run) in line and all(word in line for word in VICTIMS[victim]):
                process.send_signal(signal.SIGKILL)
                found = True
    return found


@contextlib.contextmanager
def killing(run, *victims):
    """Kills each at a random point of a round, the next when two more releases were made. Yields who was killed."""
    seed = random.randrange(10**6)
    print(f"seed of the kills: {seed}")
    chance, over, killed = random.Random(seed), threading.Event(), []

    def work():
        for victim in victims:
            before = entries(run)
            while entries(run) < before + 2 and not over.wait(0.05):
                pass
            over.wait(chance.uniform(0, 7))  # a round takes so long
            while not over.is_set() and not kill(victim, run):
                over.wait(0.05)
            if not over.is_set():
                killed.append(victim)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def check_ledgers(run, rounds):
    """Nobody was charged less than was released, and the run's ledger covers each aggregator's."""
    whole = Ledger.read(run)
    assert [entry.round for entry in whole.entries] == list(range(1, rounds + 1))
    for folder in run.glob("federation-1/aggregator-*"):
        own = Ledger.read(folder)
        assert len(own.entries) <= rounds
        assert len({(entry.round, entry.attempt) for entry in own.entries}) == len(own.entries)
        assert own.spent().epsilon <= whole.spent().epsilon


def check_nothing_private_is_left(run):
    """Ledgers and logs stay; no key, no token, no row."""
    left = {path.name for path in run.glob("federation-1/**/*") if path.is_file()}
    assert not [name for name in left if not name.endswith((".log", ".old")) and name != "ledger.jsonl"]


def test_the_wire_gives_the_weights_of_one_process(model_file, tmp_path, processes_naming):
    """The same seed, plan and people without noise: to 1e-5, over TLS, two SuperNodes and two aggregators."""
    model = load_model(model_file)
    here = train(model, people(model), kind="noiseless", seed=5, run_dir=tmp_path / "here")
    run = tmp_path / "wire"
    wire = train(
        model, people(model), kind="noiseless", seed=5, run_dir=run, federation=LocalFlower(model_file, say=print)
    )
    start = train(
        model, people(model), kind="noiseless", seed=5, run_dir=tmp_path / "one", settings=with_rounds(model, 1)
    )
    for name, value in here.weights.items():
        np.testing.assert_allclose(wire.weights[name], value, atol=1e-5, err_msg=name)
    assert max(np.abs(value - start.weights[name]).max() for name, value in here.weights.items()) > 0.01
    assert processes_naming(str(run)) == []
    check_nothing_private_is_left(run)


def test_servers_killed_at_random_points_cost_shares_of_rounds_and_no_privacy(model_file, tmp_path, processes_naming):
    """A SuperNode, an aggregator and the SuperLink die by SIGKILL, each in another round: the training ends."""
    model, rounds, run = load_model(model_file), 2 + 8 * KILLS, tmp_path / "run"
    victims = ["supernode", "aggregator", "superlink"] * KILLS
    flower = LocalFlower(model_file, say=print, round_timeout_s=60)
    with killing(run, *victims) as killed:
        result = train(model, people(model), run_dir=run, settings=with_rounds(model, rounds), federation=flower)
    assert killed == victims
    assert all(np.isfinite(value).all() for value in result.weights.values())
    assert result.record.rounds >= rounds - len(killed)
    assert result.record.epsilon == Ledger.read(run).spent().epsilon <= 6
    check_ledgers(run, rounds)
    assert processes_naming(str(run)) == []
    check_nothing_private_is_left(run)


def test_a_killed_server_app_ends_the_training_with_a_sentence(model_file, tmp_path, processes_naming):
    """What the rounds may have cost is in the ledger; no process is left, and no row of anybody's."""
    model, run = load_model(model_file), tmp_path / "run"
    with killing(run, "serverapp") as killed, pytest.raises(FederationError, match="the ServerApp ended before"):
        train(
            model,
            people(model),
            run_dir=run,
            settings=with_rounds(model, 50),
            federation=LocalFlower(model_file, say=print),
        )
    assert killed == ["serverapp"]
    check_ledgers(run, 50)
    assert processes_naming(str(run)) == []
    check_nothing_private_is_left(run)


def test_nothing_outlives_a_training_that_is_killed(model_file, tmp_path, processes_naming):
    """SIGKILL to the training itself, after a round: within seconds no process of it is left, and all is charged."""
    run = tmp_path / "run"
    code = f"""
        from pathlib import Path
        from integration_tests import test_flower_wire as wire
        file, run = Path({str(model_file)!r}), Path({str(run)!r})
        model = wire.load_model(file)
        federation = wire.LocalFlower(file, say=print)
        wire.train(model, wire.people(model), run_dir=run, settings=wire.with_rounds(model, 50), federation=federation)
    """
    training = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        while entries(run) < 2:
            assert training.poll() is None
            time.sleep(0.1)
    finally:
        training.kill()
        training.wait()
    deadline = time.monotonic() + 15
    while processes_naming(str(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_naming(str(run)) == []
    check_ledgers(run, 50)


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
