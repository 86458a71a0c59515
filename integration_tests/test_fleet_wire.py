"""A fleet behind Flower's wire: real devices, aggregators' processes, SuperNodes and a SuperLink."""

import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid.bundle import trusted_key
from hybrid.cli import app
from hybrid.errors import BudgetExceeded, ConfigError, RoundEnded
from hybrid.federation.aggregator import Round, SimulatedAggregator
from hybrid.federation.checkin import Service, Tokens
from hybrid.federation.flower_app import Job
from hybrid.federation.tests.test_checkin import SERVICE, body, checked_in, end, name, process, put, until
from hybrid.local.fleet import Order, Promoted, train_over_flower
from hybrid.local.prepared import prepare
from hybrid.plan import Policy, open_signed
from hybrid.privacy.ledger import Ledger
from hybrid.spec import Training
from hybrid.version import TrainingRecord, Version
from integration_tests.test_fleet_rounds import LOCAL, USERS, World, run_server

KILLS = 2 + int(os.environ.get("HYBRID_TEST_KILLS", "1"))
ROUND_S = (
    30  # enough for a hundred devices that train one after another on a third of a core: it is the clock that closes
)


def promoted(world: World, rounds: int, **changes: Any) -> Promoted:
    settings = Training(
        rounds=rounds,
        sampling=1.0,
        local_steps=LOCAL.steps,
        local_lr=LOCAL.lr,
        server_optimizer="SGD",
        server_lr=1.0,
        server_options={"momentum": 0.5},
        **changes,
    )
    record = TrainingRecord(kind="noiseless", run="before", population="people", users=USERS, examples=0)
    version = Version("kiosk", 4, "cd" * 32, {}, record, world.network.weights())
    return Promoted(version, world.network, settings, world.bundle, world.trust, world.manifest)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fleet"))


def test_200_devices_behind_flower_train_what_the_simulator_trains(world, tmp_path, processes_naming):
    """The same plan, people and server, two rounds, half of the updates longer than the clip, and no noise, to 1e-5.

    Each of two aggregators has a hundred devices; everybody takes part, with all rows in each local step, so that
    nothing is left to chance.
    """
    norms = np.linalg.norm(np.concatenate(list(world.engine().updates(world.weights, np.arange(USERS)))), axis=1)
    settings, simulated = Round(sampling=1.0, clip=float(np.median(norms)), noise_multiplier=0.0, minimum=0), {}
    run_server(
        SimulatedAggregator(world.engine(), None, settings, seed=0), USERS, 2, world.weights, simulated.__setitem__
    )
    order = Order(promoted(world, 2), settings, world.people, ROUND_S, 2, world.folder / "keys", print)
    outcome = train_over_flower(order, None, tmp_path / "run", print)
    assert (outcome.failed, outcome.endings["uploaded"]) == (0, 2 * USERS)
    np.testing.assert_allclose(order.promoted.side.flat(), simulated[2], atol=1e-5)
    assert np.linalg.norm(simulated[2] - simulated[1]) > 0.01
    assert processes_naming(str(tmp_path)) == []
    left = {path.name for path in (tmp_path / "run").glob("federation-1/**/*") if path.is_file()}
    assert {name for name in left if not name.endswith(".log")} == {"done.json"}


def test_devices_behind_flower_come_when_they_like(world, tmp_path, processes_naming):
    """Four flushes of five at each of two aggregators: none fails, and the run paid for all steps of a horizon."""
    settings = {"separation": 1, "buffer": 5, "max_staleness": 1, "noise": "banded", "noise_memory": 1}
    going_on = promoted(world, 4, **settings)
    people = world.people.of(range(40))
    with going_on.paid(6.0, 40, tmp_path / "run") as (rounds, ledger):
        order = Order(going_on, rounds, people, ROUND_S, 2, world.folder / "keys", print)
        outcome = train_over_flower(order, ledger, tmp_path / "run", print)
        paid = ledger.spent().epsilon
    assert outcome.failed == 0
    assert outcome.endings["uploaded"] >= 2 * 4 * 5
    assert np.isfinite(going_on.side.flat()).all()
    assert [entry.step for entry in Ledger.read(tmp_path / "run").entries] == [1, 2, 3, 4]
    assert paid == pytest.approx(6.0, abs=1e-2)
    assert processes_naming(str(tmp_path)) == []


def test_a_training_that_is_prepared_with_an_issuer_counts_accounts(world, tmp_path):
    """Its aggregator is told which, and its record says `user`; of two aggregators each would count an account."""
    tokens = Tokens(name="issuer.example", url="https://issuer:8093", scope="kiosk", authority=Path("ca.crt"))
    about = {"round_s": 30, "devices": 200, "population": "people", "run": "spring"}
    going_on = promoted(world, 2)
    with going_on.paid(6.0, 200, tmp_path / "run") as (settings, ledger):
        with pytest.raises(ConfigError, match="aggregators must be 1 with tokens"):
            prepare(tmp_path / "two", going_on, settings, ledger, **about, aggregators=2, tokens=tokens)
        assert not (tmp_path / "two").exists()
        assert ledger.entries == []
        prepared = prepare(tmp_path / "one", going_on, settings, ledger, **about, aggregators=1, tokens=tokens)
    assert Service.read(tmp_path / "one" / "aggregator.json").tokens == tokens
    assert prepared.record.unit == "user"
    assert any("whatever devices it has" in line for line in prepared.record.privacy_lines())


TURNS = {"separation": 2, "noise": "banded"}


@pytest.mark.parametrize(("changes", "planned", "wanted"), [(TURNS, 100, 100), (TURNS | {"buffer": 3}, 6, 12)])
def test_a_prepared_training_by_turns_has_one_horizon_at_each_aggregator(world, tmp_path, changes, planned, wanted):
    """Three steps: who takes over goes on with the noise; without its state nothing is left to begin anew."""
    going_on = promoted(world, 3, **changes)
    with going_on.paid(6.0, 200, tmp_path / "run") as (settings, ledger):
        about = {"round_s": 0.05, "devices": 200, "aggregators": 2, "population": "people", "run": "spring"}
        prepare(tmp_path / "spring", going_on, settings, ledger, **about)
    service, job = Service.read(tmp_path / "spring" / "aggregator.json"), Job.read(tmp_path / "spring/job/job.json")
    assert (job.planned_cohort, service.task.wanted) == (planned, wanted)
    assert service.round == replace(settings, planned_cohort=None)
    own, keys = tmp_path / "aggregator", world.folder / "keys"
    for number in (1, 2):
        with service.aggregator(own, keys) as aggregator:
            aggregator.run_round(number, world.weights)
    assert [entry.step for entry in Ledger.read(own).entries] == [1, 2]
    (own / "noise.state").rename(own / "lost")
    with service.aggregator(own, keys) as aggregator, pytest.raises(BudgetExceeded):
        aggregator.run_round(3, world.weights)
    (own / "lost").replace(own / "noise.state")
    with service.aggregator(own, keys) as aggregator:
        aggregator.run_round(3, world.weights)
        with pytest.raises(BudgetExceeded):
            aggregator.run_round(4, world.weights)
    spent = [Ledger.read(folder).spent().epsilon for folder in (own, tmp_path / "run")]
    assert spent[0] == spent[1] == pytest.approx(6.0, abs=1e-2)


def test_a_prepared_training_is_paid_for_before_its_first_round_and_no_process_can_release_more(world, tmp_path):
    """Two rounds: two entries in the run's ledger; an aggregator releases two and no third; epsilon is the same."""
    going_on = promoted(world, 2)
    with going_on.paid(6.0, 200, tmp_path / "run") as (settings, ledger):
        about = {"round_s": 0.05, "devices": 200, "aggregators": 2, "population": "people", "run": "spring"}
        prepared = prepare(tmp_path / "spring", going_on, settings, ledger, **about)
        with pytest.raises(ConfigError, match="folder must be a new one"):
            prepare(tmp_path / "spring", going_on, settings, ledger, **about)
    assert [entry.round for entry in Ledger.read(tmp_path / "run").entries] == [1, 2]
    service, job = Service.read(tmp_path / "spring" / "aggregator.json"), Job.read(tmp_path / "spring/job/job.json")
    assert (job.nodes, job.rounds, job.planned_cohort, service.task.wanted) == (2, 2, 200, 100)
    assert service.task.policy == Policy(), "a device takes part at most once a day"
    with service.aggregator(tmp_path / "aggregator", world.folder / "keys") as aggregator:
        for number in (1, 2):
            aggregator.run_round(number, np.load(tmp_path / "spring/job/initial.npy"))
        with pytest.raises(BudgetExceeded):
            aggregator.run_round(3, world.weights)
    spent = Ledger.read(tmp_path / "aggregator").spent().epsilon
    assert spent == pytest.approx(prepared.record.epsilon) == Ledger.read(tmp_path / "run").spent().epsilon
    assert (prepared.record.rounds, prepared.record.examples, prepared.record.users) == (2, None, 200)


def test_kill_9_of_an_aggregator_spends_nothing_unseen_and_repeats_no_noise(tmp_path):
    """At any moment of a round, or between two, while a ClientApp asks for one round after another.

    Each round is answered in the end, by noise of its own; the ledger has an entry for each, and none twice; asked for
    the last one again, it gives the same bytes.
    """
    flat, sums, over = np.zeros(2, np.float32), [], threading.Event()
    budget = {"task": SERVICE["task"] | {"round_s": 1}, "rounds": 200, "epsilon": 1000.0}
    seed = random.randrange(10**6)
    print(f"seed of the kills: {seed}")
    chance = random.Random(seed)

    def ask(client):
        while not over.is_set():
            sums.append(client.run_round(len(sums) + 1, flat).sum.tobytes())

    with process(tmp_path, **budget) as (first, _, impatient):
        client = replace(impatient, timeout_s=600)  # longer than all of its lives together
        asking = threading.Thread(target=ask, args=(client,))
        asking.start()
        time.sleep(chance.uniform(0, 3))
        first.kill()
    port = int(client.url.split(":")[-1])
    try:
        for _ in range(KILLS - 1):
            with process(tmp_path, port, **budget) as (killed, _, _):
                time.sleep(chance.uniform(0, 3))  # any moment is as good as another
                killed.kill()
        with process(tmp_path, port, **budget) as (started, _, _):
            before = len(sums)
            while len(sums) < before + 2:
                assert asking.is_alive()
                time.sleep(0.05)
            over.set()
            asking.join(30)
            assert client.run_round(len(sums), flat).sum.tobytes() == sums[-1]
            end(started)
    finally:
        over.set()
        asking.join(60)
    entries = [(entry.round, entry.attempt) for entry in Ledger.read(tmp_path / "run").entries]
    assert len(set(entries)) == len(entries) >= len(sums) == len(set(sums))
    assert {number for number, _ in entries} == set(range(1, len(sums) + 1))


def test_training_is_halted_by_the_commands_and_goes_on_where_it_stopped(tmp_path):
    """Over kill -9: devices are given no plan, uploads are refused, nothing is spent; then the same round is run.

    A round that is ended fails for who asked for it, and the next one is run.
    """
    budget = {"task": SERVICE["task"] | {"round_s": 2}}

    def fleet(client, command, *words):
        where = ["--aggregator", client.url, "--token", str(tmp_path / "token")]
        return CliRunner().invoke(app, ["fleet", command, "kiosk", *words, *where], catch_exceptions=False).stdout

    with ThreadPoolExecutor(1) as thread:
        with process(tmp_path, **budget) as (killed, port, client):
            coming = thread.submit(replace(client, timeout_s=120).run_round, 1, np.zeros(2, np.float32))
            until(lambda: checked_in(port).status_code == 200)
            plan, _ = open_signed(checked_in(port).content, trusted_key(tmp_path / "keys" / "bundle-signing.pub"))
            assert "training is halted" in fleet(client, "halt-training", "--reason", "loss rose")
            assert checked_in(port).status_code == 204
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as device:
                assert put(device, plan.id, name(1), body(3, 4)).status_code == 410
            killed.kill()
            killed.wait()
        with process(tmp_path, int(client.url.split(":")[-1]), **budget) as (started, port, _):
            assert client.training().halted == "loss rose"
            assert checked_in(port).status_code == 204
            assert not Ledger.read(tmp_path / "run").entries
            assert "training goes on" in fleet(client, "resume-training")
            until(lambda: checked_in(port).status_code == 200)
            assert np.isfinite(coming.result(60).sum).all()
            coming = thread.submit(client.run_round, 2, np.zeros(2, np.float32))
            until(lambda: client.training().plan is not None)
            assert "nothing is released" in fleet(client, "end-round", "--reason", "wrong clip")
            with pytest.raises(RoundEnded, match="wrong clip"):
                coming.result(30)
            client.run_round(3, np.zeros(2, np.float32))
            started.terminate()
            assert started.wait(30) == 0
    assert [(entry.round, entry.attempt) for entry in Ledger.read(tmp_path / "run").entries] == [(1, 1), (3, 1)]
