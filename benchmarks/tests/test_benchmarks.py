"""The benchmarks measure what they say: their workload, their loops, their clocks."""

import argparse
import asyncio
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks import accuracy, measure, normalisation, serving, serving_process, world
from benchmarks.workload import BATCH, CLIP, EXAMPLES, LR, Contest
from examples.study_coach.prepare import MODEL as STUDY_COACH
from hybrid import Numeric
from hybrid.federation import simulation
from hybrid.local_training import Schedule
from hybrid.spec import load_model


@pytest.mark.parametrize(("size", "weights"), [("0.4k", 357), ("6.3k", 6305), ("17k", 16_641), ("200k", 197_377)])
def test_each_size_is_what_its_name_says(size, weights):
    """Counted by hand, e.g. 6.3k: 32 x 64 + 64, 64 x 32 + 32, 64 x 32 + 32, 32 + 1."""
    assert Contest.of(size, 2).side.size == weights


def test_the_sequential_loop_and_the_engine_do_the_same(monkeypatch):
    """In the same order of rows, the clipped sums of 10 users agree to 1e-5."""
    contest = Contest.of("0.4k", 10)
    place = np.broadcast_to(np.arange(EXAMPLES).reshape(1, -1, BATCH), (10, EXAMPLES // BATCH, BATCH))
    weight = np.full(place.shape, 1 / BATCH, np.float32)
    in_order = Schedule(place, weight, np.full(10, EXAMPLES // BATCH))
    monkeypatch.setattr(type(contest.engine.local), "schedule", lambda *_: in_order)
    np.testing.assert_allclose(contest.ours(), contest.sequential(), atol=1e-5)


def test_one_step_is_the_clipped_gradient_of_each_users_mean_loss():
    """By autograd, one user at a time."""
    contest = Contest.of("0.4k", 5)
    total = 0
    for user in range(5):
        logits = contest.side(contest.server[user], contest.device[user])
        loss = binary_cross_entropy_with_logits(logits, contest.labels[user])
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(contest.side.parameters()))])
        update = -LR * slope.numpy()
        total = total + update * min(1, CLIP / np.linalg.norm(update))
    np.testing.assert_allclose(contest.ours_one_step(), total, atol=1e-6)


def test_a_round_imports_nothing_that_torch_compiles_with():
    """Neither torch._dynamo nor sympy, which take longer to import than the first hundred rounds to run."""
    code = (
        "import sys; from benchmarks.workload import Contest; Contest.of('0.4k', 3).ours(); "
        "assert not {'torch._dynamo', 'sympy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["lean", "documented"])
def test_both_of_flowers_clients_train(name, monkeypatch):
    """Four steps of eight rows end where the in-place loop over the same user ends, to 1e-6."""
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from torch.utils import data

    from benchmarks import flower_client

    in_order = lambda rows, batch_size, shuffle: data.DataLoader(rows, batch_size=batch_size)  # noqa: E731
    monkeypatch.setattr(flower_client, "DataLoader", in_order)
    contest = Contest.of("6.3k", 100)
    state = {key: value.clone() for key, value in contest.side.state_dict().items()}
    arrays = flower_client.flat_record(contest.side.flat()) if name == "lean" else ArrayRecord(state)
    with simulation._task_identity():
        message = Message(RecordDict({"arrays": arrays}), dst_node_id=1, message_type="train")
        context = Context(run_id=1, node_id=1, node_config={"partition-id": 7}, state=RecordDict(), run_config={})
        reply = getattr(flower_client, name)(message, context).content["arrays"]
    contest.local_steps(7)
    if name == "lean":
        np.testing.assert_allclose(reply["flat"].numpy(), contest.side.flat(), atol=1e-6)
    else:
        for key, value in reply.to_torch_state_dict().items():
            torch.testing.assert_close(value, contest.side.state_dict()[key], atol=1e-6, rtol=0)


def test_contestants_take_turns():
    """Each runs once uncounted, then in turn, at least three times."""
    order = []
    turns = measure.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0)
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in turns.taken.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_the_same_turn():
    """2/1, 6/3 and 9/9 have the median 2, though the medians 6 and 3 of a noisy machine could have been any."""
    assert measure.Turns({"ours": [2.0, 6.0, 9.0], "theirs": [1.0, 3.0, 9.0]}).ratio("ours", "theirs") == 2.0


def test_the_time_to_a_target_is_that_of_the_first_point_which_reaches_it():
    """0.5, 0.7, 0.6 after 1, 2, 3 s: 0.65 is reached after 2 s, 0.8 never."""
    curves = {"oracle_auc": [(1, 0.5), (2, 0.7), (3, 0.6)]}
    trained = SimpleNamespace(curves=curves, seconds=(1.0, 2.0, 3.0))
    assert accuracy._seconds_to(trained, 0.65) == 2.0
    assert accuracy._seconds_to(trained, 0.8) == math.inf


@pytest.mark.parametrize("name", ["training", "accuracy", "analytics", "process", "serving", "serving_process"])
def test_each_command_explains_itself(name):
    """`--help` ends well and says what is measured."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--help"], check=True, capture_output=True)
    assert len(done.stdout) > 300


def test_an_open_loop_counts_from_when_a_request_was_due():
    """20 requests/s of which the third stops everything for 0.4 s: those due meanwhile waited, and are told so."""
    import time

    async def ask(number):
        if number == 2:
            time.sleep(0.4)
        return number != 5

    arguments = argparse.Namespace(rate=20.0, seconds=0.5)
    found = asyncio.run(serving_process._open_loop(ask, arguments))
    assert (found["requests"], found["errors"]) == (10, 1)
    assert found["p99_ms"] > 350
    assert found["p50_ms"] > 50  # due at 150, 200, ..., 450 ms, asked at 500 ms: seven of ten are late


def test_a_closed_loop_counts_what_was_answered_well():
    """Four clients, of whose requests every other one fails."""
    asked = []

    async def ask(number):
        asked.append(number)
        good = len(asked) % 2 == 0
        await asyncio.sleep(0.001)
        return good

    found = asyncio.run(serving_process._closed_loop(ask, argparse.Namespace(seconds=0.1, clients=4)))
    assert found["requests"] + found["errors"] == len(asked)
    assert abs(found["requests"] - found["errors"]) <= 1


def test_the_rows_of_a_filled_topic_are_all_there_and_all_different():
    """1,100 rows in records of 512 are 512, 512 and 76, of offers that exist."""
    from hybrid.messages import DeviceEmbeddings

    found = [DeviceEmbeddings.from_bytes(value) for value in world.records(1100, 512, seed=0, event_ms=5)]
    assert [len(message) for message in found] == [512, 512, 76]
    assert len({each for message in found for each in message.request_id.tolist()}) == 1100
    assert {entity for message in found for entity in message.entity} <= {world.offer(n) for n in range(world.OFFERS)}


def test_every_part_of_the_serving_benchmark_can_be_quick():
    """Each length is shorter."""
    assert set(serving.PARTS) == {"drain", "clients", "latency", "soak"}
    assert all(vars(serving.QUICK)[name] < value for name, value in vars(serving.Lengths()).items())


def test_all_numeric_device_features_of_the_study_coach_are_learned():
    """The sixteen of them, and they alone; each keeps its clip and its scale."""
    model = load_model(STUDY_COACH)
    found = normalisation.learning(model)
    numeric = {name for name, each in model.device.items() if isinstance(each, Numeric)}
    assert {name for name, each in found.items() if each.pending} == numeric
    assert len(numeric) == 16
    assert all(
        type(found[name]) is type(each) and found[name].clip == each.clip
        for name, each in model.device.items()
        if name in numeric
    )
