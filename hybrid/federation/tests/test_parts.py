from unittest.mock import patch

import numpy as np
import pytest

from hybrid import Training
from hybrid.errors import BudgetExceeded, ConfigError, FederationError
from hybrid.federation.aggregator import Round, SimulatedAggregator
from hybrid.federation.client_app import client_app
from hybrid.federation.fleet import PHONES, Trace
from hybrid.federation.parts import Budget, Part, PartAggregator, open_ledger, paid_mechanism, write_rows
from hybrid.federation.population import Examples
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.federation.training import OnFleet, Outcome, engine_for, optimizer_for, train
from hybrid.network import Network
from hybrid.privacy.ledger import Ledger

USERS = 61
BATCHES = Training(rounds=4, sampling=0.5, local_steps=2, local_lr=0.5, server_lr=0.05)


@pytest.fixture
def part(tiny_model, tiny_examples, tmp_path):
    """(index, of, **changes) -> one part's aggregator, the weights to start from, and its ledger."""
    ledgers = []

    def build(index=0, of=1, rounds=4, network=None, **changes):
        folder = tmp_path / f"{index}"
        network, everybody = network or Network.build(tiny_model(), seed=1), tiny_examples(USERS)
        settings = Part(
            **{
                "model_file": tmp_path,
                "folder": folder,
                "index": index,
                "of": of,
                "population": USERS,
                "seed": 3,
                "attempts_before": 0,
                "training": BATCHES,
                "sampling": 0.5,
                "clip": 0.1,
                "noise_multiplier": 1.0,
                "quantile": None,
                "planned_cohort": USERS / 2,
                "budget": Budget(delta=1e-3, rounds=rounds),
                "port": 1,
            }
            | changes
        )
        write_rows(folder, everybody, index, of)
        engine = engine_for(network, Examples.open(folder / "examples"), BATCHES)
        ledgers.append(open_ledger(settings))
        mechanism = paid_mechanism(settings, ledgers[-1], engine.size)
        return PartAggregator(settings, engine, mechanism), engine.side.flat(), ledgers[-1]

    yield build
    for ledger in ledgers:
        if ledger is not None:
            ledger.close()


@pytest.mark.parametrize("of", [1, 2, 5])
def test_without_noise_the_parts_add_up_to_one_simulation_of_everybody(part, tiny_model, tiny_examples, of):
    """The same coins, whoever tosses them, in each of three rounds."""
    engine = engine_for(Network.build(tiny_model(), seed=1), tiny_examples(USERS), BATCHES)
    whole = SimulatedAggregator(engine, None, Round(0.5, 0.1, 0.0, 0), seed=3)
    parts = [part(index, of, noise_multiplier=0.0, budget=None) for index in range(of)]
    for number in (1, 2, 3):
        flat = engine.side.flat() * number
        expected = whole.run_round(number, flat).sum
        found = np.sum([one.run_round(number, flat).sum for one, _, _ in parts], axis=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert np.abs(expected).max() > 0.01


def test_every_user_is_in_one_part(tiny_examples, tmp_path):
    """Users 0, 2, 4, ... and 1, 3, 5, ...; their rows are those they had."""
    everybody = tiny_examples(USERS)
    for index in range(2):
        write_rows(tmp_path / str(index), everybody, index, 2)
        part = Examples.open(tmp_path / str(index) / "examples")
        for own, user in enumerate(range(index, USERS, 2)):
            rows = slice(*everybody.offsets[user : user + 2])
            np.testing.assert_array_equal(part.device[slice(*part.offsets[own : own + 2])], everybody.device[rows])
        assert part.users == len(range(index, USERS, 2))


def test_noise_is_never_the_same_twice(part):
    """Of one part's rounds and attempts, and of two parts with one seed and hardly anybody whose coin falls."""
    hardly = {"sampling": 0.001, "rounds": 3}
    (one, flat, _), (other, _, _) = part(0, 2, **hardly), part(1, 2, **hardly)
    sums = [one.run_round(1, flat).sum, one.run_round(1, flat).sum, one.run_round(2, flat).sum]
    sums += [other.run_round(number, flat).sum for number in (1, 2)]
    assert len({float(total[0]) for total in sums}) == len(sums)


def test_no_more_is_released_than_was_paid_for_whoever_dies(part):
    """Four rounds are paid for: a process makes two, the next two; the fifth release is refused by it and its heir."""
    for first in (1, 3):
        one, flat, ledger = part()
        for number in (first, first + 1):
            one.run_round(number, flat)
        if first == 3:
            with pytest.raises(BudgetExceeded):
                one.run_round(5, flat)
        ledger.close()
    one, flat, ledger = part()
    with pytest.raises(BudgetExceeded):
        one.run_round(5, flat)
    assert [entry.round for entry in ledger.entries] == [1, 2, 3, 4]


def test_a_round_that_a_process_died_in_is_run_as_another_attempt(part):
    """Paid for twice, with coins of its own."""
    one, flat, ledger = part()
    one.run_round(1, flat)
    ledger.close()
    again, _, ledger = part()
    again.run_round(1, flat)
    assert [(entry.round, entry.attempt) for entry in ledger.entries] == [(1, 1), (1, 2)]


def test_the_coins_of_two_trainings_of_a_run_differ(part):
    """Without noise their first sums would be equal; with other coins they are not."""
    quiet = {"noise_multiplier": 0.0, "budget": None}
    one, flat, _ = part(**quiet)
    other, _, _ = part(attempts_before=1, **quiet)
    assert not np.allclose(one.run_round(1, flat).sum, other.run_round(1, flat).sum, atol=1e-6)


def test_an_adaptive_clip_goes_on_where_a_dead_process_left_it(part):
    """The next round clips to what the last one did, not to the first one's norm."""
    adaptive = {"quantile": 0.5, "noise_multiplier": 0.5, "clip": 5.0, "rounds": 9}
    one, flat, ledger = part(**adaptive)
    clips = [one.run_round(number, flat).clip for number in (1, 2, 3)]
    ledger.close()
    assert clips[2] < clips[0] == 5.0
    again, _, _ = part(**adaptive)
    assert again.run_round(4, flat).clip == clips[2]


def test_a_part_is_read_as_it_was_written(part, tmp_path):
    """Through its file; a file that is none is refused."""
    settings = part()[0].part
    (tmp_path / "part.json").write_text(settings.model_dump_json())
    assert Part.read(tmp_path / "part.json") == settings
    with pytest.raises(ConfigError, match="cannot be read"):
        Part.read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="index must be less"):
        Part(**settings.model_dump() | {"index": 1})


class InThisProcess:
    """A federation of two parts without servers; notes what the run's ledger says when it begins, and where it is.

    Killed when so many rounds are over, once, it goes on from what its parts and its strategy know.
    """

    name, assumption = "test", "as a test says"

    def __init__(self, part, fails_after=None):
        self.part, self.fails_after, self.begun, self.parts = part, fails_after, [], []

    def train(self, rounds, after):
        self.begun.append((rounds.folder.name, rounds.done, rounds.attempts_before))
        self.charged = Ledger.read(rounds.folder.parent).entries if rounds.delta else None
        noise = {} if rounds.delta else {"budget": None}
        how = {"noise_multiplier": rounds.round.noise_multiplier, "clip": rounds.round.clip, **noise}
        how["network"] = rounds.network
        if not self.parts:
            self.parts = [self.part(index, 2, rounds=rounds.settings.rounds, **how)[0] for index in range(2)]
            self.strategy = NoisedSum(rounds.planned_cohort, optimizer_for(rounds.settings, rounds.initial))

        def handed_on(number, flat):
            if number > rounds.done:
                after(number, flat)
            if number == self.fails_after:
                self.fails_after = None
                raise FederationError("all of it was killed")

        start, done = self.strategy.optimizer.weights, rounds.done
        app = server_app(self.strategy, start, rounds.settings.rounds, handed_on, done=done)
        simulate(app, {index + 1: client_app(one) for index, one in enumerate(self.parts)})
        return Outcome(rounds.round.clip, self.strategy.failed_rounds)


def test_all_rounds_are_in_the_runs_ledger_before_the_first_one_begins(part, tiny_model, tiny_examples, tmp_path):
    """What aggregators release while this process dies is there already, and the budget holds."""
    federation = InThisProcess(part)
    run = tmp_path / "run"
    result = train(tiny_model(training=BATCHES), tiny_examples(USERS), run_dir=run, federation=federation, epsilon=4)
    assert [entry.round for entry in federation.charged] == [1, 2, 3, 4]
    assert Ledger.read(run).spent().epsilon == result.record.epsilon <= 4
    assert result.record.rounds == 4
    assert result.record.assumption.endswith("as a test says")


def test_a_federation_that_ends_early_costs_all_that_it_may_have_released(part, tiny_model, tiny_examples, tmp_path):
    """One round was released; the ledger holds four."""
    federation = InThisProcess(part, fails_after=1)
    with pytest.raises(FederationError):
        train(tiny_model(training=BATCHES), tiny_examples(USERS), run_dir=tmp_path / "run", federation=federation)
    assert len(Ledger.read(tmp_path / "run").entries) == 4


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kind": "central"}, "federation must be left out"),
        ({"settings": BATCHES.model_copy(update={"buffer": 2, "separation": 1})}, "left out with a buffer, .*, got 2"),
        ({"fleet": OnFleet(Trace.load(PHONES), 60.0)}, "federation must be left out with a fleet"),
    ],
)
def test_a_federation_is_refused_with_what_it_cannot_do(part, tiny_model, tiny_examples, tmp_path, given, told):
    """Before anything is written."""
    with pytest.raises(ConfigError, match=told):
        train(
            tiny_model(training=BATCHES),
            tiny_examples(USERS),
            run_dir=tmp_path / "run",
            federation=InThisProcess(part),
            **given,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails_after", [0, 1, 3, 4])
def test_a_federation_that_ended_early_goes_on_to_the_weights_of_one_process(
    part, tiny_model, tiny_examples, tmp_path, fails_after
):
    """Without noise: where it left its rounds, in its own folder, and with the whole curve."""
    model, people, run = tiny_model(training=BATCHES), tiny_examples(USERS), tmp_path / "run"
    here = train(model, people, kind="noiseless", seed=3, run_dir=tmp_path / "here")
    quiet = InThisProcess(part, fails_after)
    with pytest.raises(FederationError):
        train(model, people, people, kind="noiseless", seed=3, run_dir=run, federation=quiet)
    result = train(model, people, people, kind="noiseless", seed=3, run_dir=run, federation=quiet, resume=True)
    assert quiet.begun == [("federation-1", 0, 0), ("federation-1", fails_after, 0)]
    for name, value in here.weights.items():
        np.testing.assert_allclose(result.weights[name], value, atol=1e-5)
    assert [number for number, _ in result.curves["oracle_auc"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fails_after", [0, 3, 4])
def test_a_federation_that_goes_on_is_charged_once(part, tiny_model, tiny_examples, tmp_path, fails_after):
    """For all rounds, whichever were released."""
    model, people, run = tiny_model(training=BATCHES), tiny_examples(USERS), tmp_path / "run"
    federation = InThisProcess(part, fails_after)
    with pytest.raises(FederationError):
        train(model, people, run_dir=run, federation=federation)
    before = (run / "ledger.jsonl").read_bytes()
    result = train(model, people, run_dir=run, federation=federation, resume=True)
    assert (run / "ledger.jsonl").read_bytes() == before
    assert [entry.round for entry in Ledger.read(run).entries] == [1, 2, 3, 4]
    assert result.record.epsilon == Ledger.read(run).spent().epsilon


@pytest.mark.parametrize("paid", [0, 2, 3])
def test_a_federation_killed_while_it_was_charged_is_charged_the_rest(part, tiny_model, tiny_examples, tmp_path, paid):
    """The run's budget is that of four rounds: not one entry is made twice."""
    model, people, run = tiny_model(training=BATCHES), tiny_examples(USERS), tmp_path / "run"
    federation, spend, entries = InThisProcess(part), Ledger.spend, []

    def dying(ledger, *arguments, **named):
        if len(entries) == paid:
            raise KeyboardInterrupt
        entries.append(named)
        spend(ledger, *arguments, **named)

    with patch.object(Ledger, "spend", dying), pytest.raises(KeyboardInterrupt):
        train(model, people, run_dir=run, federation=federation)
    assert not federation.begun
    train(model, people, run_dir=run, federation=federation, resume=True)
    assert [(entry.round, entry.attempt) for entry in federation.charged] == [(n, 1) for n in (1, 2, 3, 4)]
    assert federation.begun == [("federation-1", 0, 0)]


def test_an_interrupted_federation_is_not_resumed_in_one_process(part, tiny_model, tiny_examples, tmp_path):
    """Its noise was drawn elsewhere: the run's config says so, and what it was charged stays."""
    model, people, run = tiny_model(training=BATCHES), tiny_examples(USERS), tmp_path / "run"
    with pytest.raises(FederationError):
        train(model, people, run_dir=run, federation=InThisProcess(part, fails_after=1))
    with pytest.raises(ConfigError, match="federation of run 'run' must stay 'test' to resume it, got None"):
        train(model, people, run_dir=run, resume=True)
    assert len(Ledger.read(run).entries) == 4


def test_a_second_training_of_a_run_is_charged_besides_the_first(part, tiny_model, tiny_examples, tmp_path):
    """The first was given the whole budget: the second is refused, and adds nothing to the ledger."""
    model, people = tiny_model(training=BATCHES), tiny_examples(USERS)
    train(model, people, run_dir=tmp_path / "run", federation=InThisProcess(part))
    with pytest.raises(BudgetExceeded):
        train(model, people, run_dir=tmp_path / "run", federation=InThisProcess(part))
    assert len(Ledger.read(tmp_path / "run").entries) == 4


def test_noiseless_rounds_elsewhere_give_the_weights_of_rounds_here(part, tiny_model, tiny_examples, tmp_path):
    """The same seed, plan and people: to 1e-5."""
    model, people = tiny_model(training=BATCHES), tiny_examples(USERS)
    here = train(model, people, kind="noiseless", seed=3, run_dir=tmp_path / "here")
    there = train(model, people, kind="noiseless", seed=3, run_dir=tmp_path / "there", federation=InThisProcess(part))
    assert any(np.abs(here.weights[name]).max() > 0.01 for name in here.weights)
    for name, value in here.weights.items():
        np.testing.assert_allclose(there.weights[name], value, atol=1e-5)
