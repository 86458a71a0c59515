import json
import multiprocessing
import os
import random
import shutil
import signal
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from hybrid import Label, Numeric, Training
from hybrid.errors import BudgetExceeded, ConfigError, NotFound
from hybrid.federation import checkpoint, resume, training
from hybrid.federation.aggregator import PaidMechanism, Round
from hybrid.federation.balance import Balancing
from hybrid.federation.checkpoint import Checkpoint, Checkpoints
from hybrid.federation.fleet import PHONES, Trace
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.federation.training import OnFleet, train
from hybrid.privacy.ledger import Ledger
from hybrid.privacy.mechanisms import ClippedSum

ROUNDS = 20
QUICK = Training(rounds=ROUNDS, sampling=1.0, local_lr=2.0, server_lr=0.05)  # its noise is quickly worked out
FLEET = OnFleet(Trace.load(PHONES), deadline_s=60.0)
AWAKE = replace(
    FLEET,
    trace=FLEET.trace.model_copy(
        update={
            "classes": tuple(
                one.model_copy(update={"availability": (0.9,) * 24, "spread": 1.0}) for one in FLEET.trace.classes
            )
        }
    ),
)

# Where a process may be killed: (owner, name) of what it calls, and before or after the call.
POINTS = {
    "before-spend": (Ledger, "spend", "before"),
    "after-spend": (Ledger, "spend", "after"),
    "before-the-optimisers-step": (ServerOptimizer, "step", "before"),
    "after-the-optimisers-step": (ServerOptimizer, "step", "after"),
    "before-the-checkpoints-rename": (Path, "replace", "before"),
    "after-the-checkpoints-rename": (Path, "replace", "after"),
}
OUTSIDE = {
    "after-the-reservation": (Ledger, "reserve", "after"),
    "before-the-servers-fit": (training, "fit_server_side", "before"),
    "after-the-rounds": (training, "_finish", "before"),
    "before-an-answer-is-kept": (Balancing, "_write", "before"),
    "after-an-answer-is-kept": (Balancing, "_write", "after"),
}
BALANCED = {"balance": 0.7, "server_tower": "federated", "hidden": True}
WAYS = {
    "fedavg": {"server_optimizer": "SGD", "server_lr": 1.0, "server_options": {"momentum": 0.9}},
    "adam": {"server_optimizer": "Adam"},
    "yogi": {"server_optimizer": "Yogi"},
    "adaptive-clip": {"clip_quantile": 0.5},
    "banded": {"separation": 3, "noise": "banded", "server_optimizer": "SGD"},
    "blt": {"separation": 3, "noise": "blt", "server_optimizer": "SGD"},
    "tail-average": {"average_last": 0.5},
    "federated-tower": {"server_tower": "federated"},
    "frozen-tower": {"server_tower": "frozen"},
    "dropout-int8": {"tower_dropout": 0.2, "upload": "int8", "local_steps": 2, "local_batch": 3},
    "poisson": {"sampling": 0.5},
    "fleet": {"sampling": 0.3, "fleet": FLEET},
    "turns": {"separation": 3},
    "asynchronous": {
        "separation": 3,
        "buffer": 60,
        "max_staleness": 1,
        "noise": "banded",
        "server_optimizer": "SGD",
        "fleet": AWAKE,
    },
    "noiseless": {"kind": "noiseless"},
}


@pytest.fixture(scope="module")
def people(tiny_examples):
    return tiny_examples(300), tiny_examples(50, seed=1)


@pytest.fixture(scope="module")
def start(tiny_model, people):
    """(folder, **changes) -> trains in `folder`; fields of Training among the changes are settings."""
    return partial(_start, tiny_model(), people)


@pytest.fixture(scope="module")
def killed(tiny_model, people):
    """(folder, point, call, share=1.0, elsewhere=False, **changes) -> whether it was killed there.

    Trains like `start`, in a process of its own that SIGKILL ends at a call of that number.
    """
    processes = multiprocessing.get_context("forkserver")  # a fork of this one could not train, once this one has
    processes.set_forkserver_preload([__name__, "opacus.accountants.analysis.prv", "opacus.accountants.analysis.rdp"])

    def kill(folder, point, call, **changes):
        arguments = (tiny_model(), people, folder, point, call)
        process = processes.Process(target=_start_and_die, args=arguments, kwargs=changes)
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    return kill


def _start(model, people, folder, *, resume=False, **changes):
    if changes.pop("hidden", False):
        model = model.model_copy(update={"label": Label(column="clicked", visible_to="device")})
    fields = {name: changes.pop(name) for name in list(changes) if name in Training.model_fields}
    settings = QUICK.model_copy(update=fields)
    return train(model, *people, run_dir=folder, settings=settings, resume=resume, **changes)


def _start_and_die(model, people, folder, point, call, *, share=1.0, elsewhere=False, noisier=False, **changes):
    _die_at((POINTS | OUTSIDE)[point], call)
    training.Checkpoints = partial(Checkpoints, share=share)
    with ExitStack() as stack:
        stack.enter_context(ELSEWHERE if elsewhere else nullcontext())
        stack.enter_context(_twice_the_noise() if noisier else nullcontext())
        _start(model, people, folder, **changes)


ELSEWHERE = patch.object(resume, "machine", lambda: {"processor": "another"})


def _twice_the_noise():
    """So that the budget has room for rounds that are charged again."""
    real = training._noise_multiplier
    return patch.object(training, "_noise_multiplier", lambda run, *rest: (2 - bool(run.begun)) * real(run, *rest))


def _die_at(point, call):
    owner, name, side = point
    real, calls = getattr(owner, name), []

    def dying(*arguments, **named):
        of_interest = owner is not Path or str(arguments[1]).endswith(checkpoint.FILE)
        calls.extend([None] if of_interest else [])
        if of_interest and len(calls) == call and side == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **named)
        if of_interest and len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def _entries(folder):
    """The ledger's releases, but for when they were made."""
    try:
        return [entry.model_copy(update={"time": None}) for entry in Ledger.read(folder).entries]
    except NotFound:
        return []


def _assert_same(resumed, whole, folder, whole_folder):
    """Weights, predictions, record, curves and ledger entries; only the run's name may differ."""
    assert resumed.weights.keys() == whole.weights.keys()
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], value)
    np.testing.assert_array_equal(resumed.test_predictions, whole.test_predictions)
    assert resumed.record.model_copy(update={"run": ""}) == whole.record.model_copy(update={"run": ""})
    assert resumed.curves == whole.curves
    assert len(resumed.seconds) == len(whole.seconds)
    assert _entries(folder) == _entries(whole_folder)
    files = {file.name for file in whole_folder.iterdir()}
    assert {file.name for file in folder.iterdir()} - {f".{checkpoint.FILE}"} == files
    for name in files & {"config.json", "metrics.json", "fleet.json"}:
        assert json.loads((folder / name).read_text()) == json.loads((whole_folder / name).read_text())


@pytest.mark.parametrize("way", WAYS)
def test_a_training_killed_anywhere_goes_on_to_the_same_bits(start, killed, tmp_path, way):
    """Killed with SIGKILL at every kind of point, one after another, until it ends by itself."""
    rng = random.Random(way)
    whole = start(tmp_path / "whole", **WAYS[way])
    folder, points = tmp_path / "killed", [point for point in POINTS if way != "noiseless" or "spend" not in point]
    for number, point in enumerate(rng.sample(points, len(points))):
        changes = {"share": rng.choice([0.02, 0.3, 1.0]), "resume": number > 0, **WAYS[way]}
        killed(folder, point, rng.randint(1, 6), **changes)
    _assert_same(start(folder, resume=True, **WAYS[way]), whole, folder, tmp_path / "whole")


@pytest.mark.parametrize("call", [1, 2, 9, ROUNDS])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_each_point_costs_no_entry_and_no_bit(start, killed, whole, tmp_path, point, call):
    """At the first, second, ninth and last call; where there are not so many, it ends, and can be resumed."""
    folder = tmp_path / "killed"
    assert killed(folder, point, call) or "rename" in point
    if "rename" not in point:
        done = call - 1 if point == "before-spend" else call
        assert len(_entries(folder)) == done
    _assert_same(start(folder, resume=True), whole[0], folder, whole[1])


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A training that nobody killed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return start(folder), folder


@pytest.mark.parametrize("point", ["before-the-servers-fit", "after-the-rounds"])
def test_a_kill_outside_the_rounds_is_resumed_too(start, killed, whole, tmp_path, point):
    """While the server tower is fitted, when nothing is spent, and when all rounds are done."""
    folder = tmp_path / "killed"
    assert killed(folder, point, 1)
    assert len(_entries(folder)) == (0 if point == "before-the-servers-fit" else ROUNDS)
    _assert_same(start(folder, resume=True), whole[0], folder, whole[1])


def test_a_kill_before_anything_was_started_leaves_a_run_that_can_be_started(start, killed, whole, tmp_path):
    """Not resumed, and told so; the ledger it opened is as good as new."""
    folder = tmp_path / "killed"
    assert killed(folder, "after-the-reservation", 1)
    with pytest.raises(NotFound, match="start it again"):
        start(folder, resume=True)
    _assert_same(start(folder), whole[0], folder, whole[1])


@pytest.fixture(scope="module")
def balanced(start, tmp_path_factory):
    """A balanced training that nobody killed, and its folder."""
    folder = tmp_path_factory.mktemp("balanced")
    return start(folder, **BALANCED), folder


@pytest.mark.parametrize(
    ("point", "call", "spent"),
    [
        ("after-an-answer-is-kept", 1, 1),
        ("after-spend", 9, 9),
        ("after-an-answer-is-kept", 2, 1 + ROUNDS),
        ("after-an-answer-is-kept", 3, 2 + ROUNDS),
        ("after-the-rounds", 1, 2 + ROUNDS),
    ],
)
def test_a_balanced_training_asks_each_question_once_however_often_it_is_killed(
    start, killed, balanced, tmp_path, point, call, spent
):
    """Before, between and after its phases: the same examples are kept, and no question is paid for twice."""
    folder = tmp_path / "killed"
    assert killed(folder, point, call, **BALANCED)
    assert len(_entries(folder)) == spent
    _assert_same(start(folder, resume=True, **BALANCED), balanced[0], folder, balanced[1])


def test_a_prior_that_was_paid_for_and_lost_is_asked_and_paid_for_again(start, killed, tmp_path):
    """Nobody saw the first one's noise; both are in the ledger, and the rounds have what is left."""
    folder = tmp_path / "killed"
    assert killed(folder, "before-an-answer-is-kept", 1, **BALANCED)
    record = start(folder, resume=True, **BALANCED).record
    assert [entry.purpose for entry in _entries(folder)].count("label-prior") == 2
    assert 0.99 * 8 < record.epsilon <= 8


def test_a_rest_that_was_paid_for_and_lost_is_given_up(start, killed, balanced, tmp_path):
    """The budget has room for one: the version has the analytic shift alone, and its record says so."""
    folder = tmp_path / "killed"
    assert killed(folder, "before-an-answer-is-kept", 3, **BALANCED)
    found, whole = start(folder, resume=True, **BALANCED), balanced[0]
    assert [entry.purpose for entry in _entries(folder)].count("recalibrate") == 1
    assert found.record.epsilon == whole.record.epsilon
    assert found.record.balance == whole.record.balance.model_copy(update={"estimated": None})
    assert found.weights["correction.shift"] == pytest.approx(found.record.balance.analytic, abs=1e-6)


def test_a_training_that_ended_is_resumed_to_itself(start, whole, tmp_path):
    """It computes no round, and writes nothing to the ledger."""
    folder = tmp_path / "again"
    shutil.copytree(whole[1], folder)
    before = (folder / "ledger.jsonl").read_bytes()
    _assert_same(start(folder, resume=True), whole[0], folder, whole[1])
    assert (folder / "ledger.jsonl").read_bytes() == before


@pytest.fixture
def interrupted(killed, tmp_path):
    """A run killed after it spent its twelfth round, with its last checkpoint some rounds before."""
    folder = tmp_path / "interrupted"
    assert killed(folder, "after-spend", 12)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_lr": 0.06}, r"training.server_lr of run 'interrupted' must stay 0\.05 to resume it, got 0\.06"),
        ({"server_options": {"betas": (0.9, 0.9)}}, r"training.server_options.betas of run .* got \[0\.9, 0\.9\]"),
        ({"seed": 1}, "seed of run 'interrupted' must stay 0 to resume it, got 1"),
        ({"epsilon": 4.0}, r"epsilon of run 'interrupted' must stay 8\.0 to resume it, got 4\.0"),
        ({"kind": "noiseless"}, "kind of run 'interrupted' must stay 'federated'"),
        ({"kind": "central"}, "kind of run 'interrupted' must stay 'federated'"),
        ({"about": {"fold": "2/5"}}, "fold of run 'interrupted' must stay None to resume it, got '2/5'"),
        ({"fleet": FLEET}, "fleet"),
        ({"about": {"registered": "x"}}, "the model's registered definition changed"),
    ],
)
def test_a_run_that_would_go_on_otherwise_is_refused(start, interrupted, changes, message):
    """The message names what differs, what it was and what it got; nothing is spent."""
    before = (interrupted / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        start(interrupted, resume=True, **changes)
    assert (interrupted / "ledger.jsonl").read_bytes() == before


def test_other_rows_or_another_declaration_are_refused(tiny_model, people, interrupted, tiny_examples):
    """One label of one row is enough; so are other held-out rows, and the mean of one feature."""
    one = tiny_examples(300)
    one.labels[0] = 1 - one.labels[0]
    common = {"run_dir": interrupted, "settings": QUICK, "resume": True}
    with pytest.raises(ConfigError, match="the rows to learn from changed since run 'interrupted' was started"):
        train(tiny_model(), one, people[1], **common)
    with pytest.raises(ConfigError, match="the held-out rows changed"):
        train(tiny_model(), people[0], one, **common)
    with pytest.raises(ConfigError, match="the model's declaration changed"):
        train(tiny_model(device={"age": Numeric(mean=31, std=10)}), *people, **common)


def test_an_interrupted_training_is_not_overwritten(start, interrupted):
    """Neither by itself started anew, nor by a reference: its checkpoint would be lost, its spend not."""
    for kind in ("federated", "central"):
        with pytest.raises(ConfigError, match="holds an interrupted training: resume it, or choose another run"):
            start(interrupted, kind=kind)


def test_a_reference_on_pooled_data_is_not_resumed(start, tmp_path):
    """It takes seconds: started anew."""
    start(tmp_path, kind="server-only")
    with pytest.raises(ConfigError, match="must be a training by rounds, got kind 'server-only'"):
        start(tmp_path, kind="server-only", resume=True)


def test_the_checkpoint_of_another_training_in_the_run_is_not_taken(start, killed, whole, tmp_path):
    """Noiseless rounds ended in it; the private training, killed before its first checkpoint, begins at the start."""
    folder = tmp_path / "run"
    start(folder, kind="noiseless")
    assert killed(folder, "before-the-checkpoints-rename", 1)
    resumed = start(folder, resume=True)
    for name, value in whole[0].weights.items():
        np.testing.assert_array_equal(resumed.weights[name], value)
    assert _entries(folder) == _entries(whole[1])


def test_a_damaged_checkpoint_is_refused(start, interrupted):
    """Half of it is not taken for anything; what was spent stays."""
    file = interrupted / checkpoint.FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match="the checkpoint of run 'interrupted' is damaged"):
        start(interrupted, resume=True)
    assert len(_entries(interrupted)) == 12


def test_a_ledger_that_shows_less_than_the_checkpoint_is_refused(start, killed, tmp_path):
    """Of a run killed right after a checkpoint, the ledger of a fresh run is put in its place."""
    folder = tmp_path / "run"
    assert killed(folder, "after-the-checkpoints-rename", 4)
    spent = Checkpoint.read(folder).step
    assert spent > 0
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(
        ConfigError, match=f"must hold at least the {spent} releases that its checkpoint knows of, got 0"
    ):
        start(folder, resume=True)


def test_on_another_machine_no_round_is_repeated_with_the_same_noise(start, interrupted):
    """Of twelve paid rounds some lie after the checkpoint: they would need entries anew, and nothing of 8 is left."""
    assert Checkpoint.read(interrupted).step < 12
    with ELSEWHERE, pytest.raises(BudgetExceeded):
        start(interrupted, resume=True)
    assert len(_entries(interrupted)) == 12


def test_on_another_machine_a_step_of_a_matrix_mechanism_is_not_drawn_again(start, killed, tmp_path):
    """It would be charged for the whole horizon anew, of which a budget of one has nothing left."""
    folder = tmp_path / "run"
    assert killed(folder, "after-spend", 12, **WAYS["banded"])
    assert Checkpoint.read(folder).step < 12
    with ELSEWHERE, pytest.raises(BudgetExceeded):
        start(folder, resume=True, **WAYS["banded"])
    assert [entry.step for entry in _entries(folder)] == list(range(1, 13))


def test_on_another_machine_with_budget_left_a_repeated_round_is_a_new_attempt(start, killed, tmp_path):
    """Each entry after the checkpoint gets a second attempt; one who is killed there repeats those, and only those."""
    folder = tmp_path / "run"
    assert killed(folder, "after-spend", 12, share=0.02, noisier=True)
    done = Checkpoint.read(folder).step
    assert killed(folder, "after-spend", 3, share=0.02, elsewhere=True, resume=True)
    with ELSEWHERE:
        start(folder, resume=True)
    attempts = {(entry.round, entry.attempt) for entry in _entries(folder)}
    assert attempts == {(number, 1) for number in range(1, ROUNDS + 1)} | {(n, 2) for n in range(done + 1, 13)}
    assert len(_entries(folder)) == len(attempts)


def test_a_run_that_moved_right_after_a_checkpoint_needs_no_second_entry(start, killed, tmp_path):
    """Nothing was spent after it: every round has one entry, of attempt 1."""
    folder = tmp_path / "run"
    assert killed(folder, "after-the-checkpoints-rename", 4)
    with ELSEWHERE:
        start(folder, resume=True)
    assert [(entry.round, entry.attempt) for entry in _entries(folder)] == [(n, 1) for n in range(1, ROUNDS + 1)]


def test_a_run_whose_ledger_is_damaged_does_not_move(start, interrupted):
    """A line that cannot be read may be of a round after the checkpoint: its noise may have been seen."""
    file = interrupted / "ledger.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:-1], lines[-1][:40]]))
    with ELSEWHERE, pytest.raises(ConfigError, match="lines that cannot be read"):
        start(interrupted, resume=True)


@pytest.fixture
def repeated(tmp_path):
    """(settings, repeats) -> (number, total) -> what a mechanism releases; all share one ledger, at which it looks."""
    settings = Round(sampling=1.0, clip=1.0, noise_multiplier=1.0, minimum=0)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(tmp_path, budget_epsilon=1e9, delta=1e-3))

        def build(repeats=(), **changes):
            changed = Round(**vars(settings) | changes)
            mechanism = PaidMechanism(changed, ledger, seed=0, size=3, repeats=repeats)
            total = ClippedSum(np.arange(3.0), 1, 1, 0)
            return lambda number: mechanism.release(number, mechanism.next_attempt(number), lambda clip: total).sum

        yield build, ledger


def test_a_repeated_release_is_the_same_number_and_is_paid_once(repeated):
    """By the process after; asked once more, that one draws other noise and pays for it, as ever."""
    build, ledger = repeated
    first = build()(1)
    again = build(list(ledger.entries))
    np.testing.assert_array_equal(again(1), first)
    assert len(ledger.entries) == 1
    assert (again(1) != first).all()
    assert [entry.attempt for entry in ledger.entries] == [1, 2]


@pytest.mark.parametrize("changes", [{"clip": 2.0}, {"noise_multiplier": 2.0}, {"sampling": 0.5}])
def test_an_entry_made_otherwise_is_not_repeated(repeated, changes):
    """Another clip, noise or sampling is another release: a new attempt with an entry and noise of its own."""
    build, ledger = repeated
    first = build()(1)
    other = build(list(ledger.entries), **changes)(1)
    assert (other != first).all()
    assert [entry.attempt for entry in ledger.entries] == [1, 2]


def test_each_federation_of_a_run_has_a_folder_of_its_own_and_goes_on_in_it(tmp_path):
    """The second is not where the first was; what a checkpoint holds is where it was chosen to be."""
    first = resume.Place.new(tmp_path)
    assert not first.folder.exists()
    first.folder.mkdir()
    second = resume.Place.new(tmp_path)
    assert second.folder != first.folder
    second.restore(first.state())
    assert second == first
