import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybrid.errors import ConfigError
from hybrid.federation.engine import AnyTrainer, DeviceSide, Engine, LayerTrainer, predict
from hybrid.local_training import LocalTraining
from hybrid.network import Network
from hybrid.privacy.mechanisms import clip_and_sum, clip_rows
from hybrid.update import decode, encode


def _one_user_at_a_time(engine, network, flat, place, weight, absent, steps):
    """The reference: what the device itself would do, with torch's SGD on its own rows, one after another.

    `place` and `weight` say which of its rows it takes in each step, and `absent` which side each lacks.
    """
    examples, local = engine.examples, engine.local
    side = copy.deepcopy(engine.side)
    side.load_flat(flat)
    start = [p.detach().clone() for p in side.parameters()]
    optimizer = torch.optim.SGD(side.parameters(), lr=local.lr)
    for step in range(steps):
        which = min(step, len(place) - 1)
        rows = place[which][weight[which] > 0]
        server = torch.tensor(examples.server[rows])
        if engine.server_tower is not None:
            server = network.server_tower(server).detach()
        gone = None if absent is None else torch.tensor(absent[step][weight[which] > 0])
        optimizer.zero_grad()
        logits = side(server, torch.tensor(examples.device[rows]), gone)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(examples.labels[rows]))
        drift = sum(((p - s) ** 2).sum() for p, s in zip(side.parameters(), start, strict=True))
        (loss + local.proximal / 2 * drift).backward()
        optimizer.step()
    return side.flat() - flat


def _both(engine, network, users, flat):
    """(updates of the engine, updates of the plain loop), the rows in the engine's order."""
    found, expected = [], []
    captured = []
    real = type(engine)._batches
    try:
        type(engine)._batches = lambda self, *rest: captured.append(real(self, *rest)) or captured[-1]
        found = [chunk.copy() for chunk in engine.updates(flat, users, stream=(5, 1))]
    finally:
        type(engine)._batches = real
    for batches in captured:
        for user in range(batches.users):
            absent = None if batches.absent is None else batches.absent[user].numpy()
            rows, weight = batches.rows[user].numpy(), batches.weight[user].numpy()
            expected.append(_one_user_at_a_time(engine, network, flat, rows, weight, absent, int(batches.steps[user])))
    return np.concatenate(found), np.stack(expected)


LOCALS = {
    "one step": LocalTraining(steps=1, lr=0.5),
    "four steps": LocalTraining(steps=4, lr=0.5),
    "batches of 3": LocalTraining(steps=4, lr=0.5, batch=3),
    "two epochs of batches of 3": LocalTraining(steps=None, epochs=2, lr=0.5, batch=3),
    "epochs of all rows": LocalTraining(steps=None, epochs=3, lr=0.5),
    "proximal": LocalTraining(steps=5, lr=0.5, proximal=0.7),
    "proximal, ragged epochs": LocalTraining(steps=None, epochs=2, lr=0.5, batch=2, proximal=0.7),
}


def _wide():
    """A tower whose first layer stays factored: 2 x 60 weights are more than 8 rows x 62."""
    return nn.Sequential(nn.LazyLinear(60), nn.Tanh(), nn.Linear(60, 40, bias=False), nn.Tanh(), nn.Linear(40, 3))


def _narrow():
    """A tower with a layer of one output and no bias, which multiplies by elements from its second step on."""
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1, bias=False), nn.Tanh(), nn.Linear(1, 3))


def _normed():
    return nn.Sequential(nn.LazyLinear(5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
@pytest.mark.parametrize("tower", [None, _wide, _narrow, _normed], ids=["small", "wide", "narrow", "layer norm"])
@pytest.mark.parametrize("federated", [False, True], ids=["server frozen", "server federated"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["whole", "tower dropout"])
def test_the_batched_cohort_does_what_each_user_would_do_alone(
    tiny_model, tiny_examples, local, tower, federated, dropout
):
    """For 20 ragged users, some without rows, every update is within 1e-5 of a plain loop's, with every option."""
    network, examples = Network.build(tiny_model(**{"device_tower": tower} if tower else {})), tiny_examples(20)
    for vector in network.missing.values():
        nn.init.normal_(vector.weight)
    engine = Engine.build(
        network, examples, local, federate_server_tower=federated, tower_dropout=dropout, chunk_bytes=20_000
    )
    users = np.random.default_rng(0).permutation(20)
    found, expected = _both(engine, network, users, engine.side.flat())
    assert isinstance(engine.trainer, AnyTrainer if tower is _normed else LayerTrainer)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01
    assert len(found) == len(engine.order(users, stream=(5, 1))) <= np.count_nonzero(np.diff(examples.offsets))


@pytest.mark.parametrize("chunk_bytes", [1, 4000, 1 << 26])
def test_chunks_change_nothing(tiny_model, tiny_examples, chunk_bytes):
    """One user at a time or all at once: each update is the same to 1e-6."""
    network, examples = Network.build(tiny_model()), tiny_examples(30)
    local = LocalTraining(steps=3, lr=0.5)
    flat = DeviceSide(network).flat()
    chunked = Engine.build(network, examples, local, chunk_bytes=chunk_bytes)
    found = np.concatenate([chunk.copy() for chunk in chunked.updates(flat, np.arange(30))])
    (whole,) = Engine.build(network, examples, local, chunk_bytes=1 << 30).updates(flat, np.arange(30))
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_chunks_stay_within_their_bytes(tiny_model, tiny_examples):
    """A user has up to 8 rows of 6 + 2 + 2 numbers of 4 bytes, and p of 12: a chunk is as many as fit in 8 kB."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(50), LocalTraining(1, 0.1), chunk_bytes=8000)
    sizes = [len(chunk) for chunk in engine.updates(engine.side.flat(), np.arange(50))]
    assert sum(sizes) == np.count_nonzero(np.diff(engine.examples.offsets))
    assert 1 < max(sizes) <= 8000 // (12 * engine.side.size)
    assert min(sizes[:-1]) >= 8000 // (4 * 8 * 10 + 12 * engine.side.size)


@pytest.mark.parametrize("clip", [1e-3, 0.05, 10.0])
def test_the_clipped_sum_is_the_mechanisms_own(tiny_model, tiny_examples, clip):
    """Clipped and summed in torch or by the NumPy reference, row by row: the same to 1e-12, and the same counts."""
    examples = tiny_examples(200)
    engine = Engine.build(Network.build(tiny_model()), examples, LocalTraining(3, 0.5), chunk_bytes=30_000)
    users, flat = np.arange(200), engine.side.flat()
    found = engine.clipped_sum(flat, users, clip)
    rows = np.concatenate([chunk.copy() for chunk in engine.updates(flat, users)])
    nothing = np.zeros((np.count_nonzero(np.diff(examples.offsets) == 0), engine.side.size))
    expected = clip_and_sum([rows, nothing], engine.side.size, clip)
    np.testing.assert_allclose(found.total, expected.total, atol=1e-12)
    assert (found.received, found.below, found.above) == (200, expected.below, expected.above)


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
@pytest.mark.parametrize("tower", [None, _wide, _normed], ids=["small", "wide", "layer norm"])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 1 << 26], ids=["users alone", "some together", "all together"])
def test_configurations_trained_together_are_each_as_if_alone(tiny_model, tiny_examples, local, tower, chunk_bytes):
    """Five starts with rates and clips of their own: each clipped sum is within 1e-5 of its own, the counts its own."""
    network = Network.build(tiny_model(**{"device_tower": tower} if tower else {}))
    engine = Engine.build(network, tiny_examples(30), local, tower_dropout=0.2, chunk_bytes=chunk_bytes)
    rng, users = np.random.default_rng(0), np.random.default_rng(1).permutation(30)[:25]
    flats = engine.side.flat() + rng.normal(0, 0.1, (5, engine.side.size)).astype(np.float32)
    clips, lrs = [1e-3, 0.05, 0.2, 0.5, 10.0], [0.1, 0.5, 0.01, 1.0, 0.3]
    together = engine.clipped_sums(flats, users, clips, lrs, stream=(7, 2))
    for one, flat, clip, lr in zip(together, flats, clips, lrs, strict=True):
        alone = replace(engine, local=replace(local, lr=lr)).clipped_sum(flat, users, clip, stream=(7, 2))
        np.testing.assert_allclose(one.total, alone.total, atol=1e-5)
        assert (one.received, one.below, one.above) == (alone.received, alone.below, alone.above)
        assert np.abs(alone.total).max() > 1e-4


@settings(max_examples=40, deadline=None)
@given(
    starts=st.integers(1, 6),
    users=st.integers(0, 12),
    steps=st.integers(1, 4),
    batch=st.none() | st.integers(1, 4),
    chunk_bytes=st.integers(1, 60_000),
    federated=st.booleans(),
)
def test_any_number_of_configurations_is_as_many_alone(
    tiny_model, tiny_examples, starts, users, steps, batch, chunk_bytes, federated
):
    """However cohorts and chunks fall: each clipped sum is within 1e-5 of that of its start alone."""
    engine = Engine.build(
        Network.build(tiny_model()),
        tiny_examples(12),
        LocalTraining(steps=steps, lr=0.5, batch=batch),
        federate_server_tower=federated,
        chunk_bytes=chunk_bytes,
    )
    flats = engine.side.flat() * np.linspace(0.5, 1.5, starts, dtype=np.float32)[:, None]
    together = engine.clipped_sums(flats, np.arange(users), [0.1] * starts, [0.5] * starts)
    for one, flat in zip(together, flats, strict=True):
        np.testing.assert_allclose(one.total, engine.clipped_sum(flat, np.arange(users), 0.1).total, atol=1e-5)


def test_one_configuration_that_overflows_leaves_the_others_alone(tiny_model, tiny_examples):
    """Infinite weights in one start: nobody's update there is usable, and the next start's sum is its own."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(20), LocalTraining(2, 0.5))
    flat, users = engine.side.flat(), np.arange(20)
    wild, tame = engine.clipped_sums(np.stack([np.full_like(flat, np.inf), flat]), users, [1.0, 1.0], [0.5, 0.5])
    assert (wild.below, wild.above, np.abs(wild.total).max()) == (0, 0, 0.0)
    np.testing.assert_allclose(tame.total, engine.clipped_sum(flat, users, 1.0).total, atol=1e-5)


def test_a_seed_repeats_a_cohort_to_the_last_bit(tiny_model, tiny_examples):
    """The order of rows and the tower dropout are drawn from the round's stream, and nothing else is random."""
    local = LocalTraining(steps=4, lr=0.5, batch=2)
    sums = []
    for stream in ((1, 2), (1, 2), (1, 3)):
        engine = Engine.build(Network.build(tiny_model()), tiny_examples(40), local, tower_dropout=0.2)
        sums.append(engine.clipped_sum(engine.side.flat(), np.arange(40), 0.1, stream=stream).total)
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).any()


def test_weights_are_taken_from_the_flat_vector_and_left_alone(tiny_model, tiny_examples):
    """Training from zeros gives other updates than from the module's own weights, which do not change."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(5), LocalTraining(1, 0.1))
    own = engine.side.flat()
    zeros = next(engine.updates(np.zeros_like(own), np.arange(5))).copy()
    there = next(engine.updates(own, np.arange(5))).copy()
    assert not np.allclose(zeros, there)
    np.testing.assert_array_equal(engine.side.flat(), own)


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
@pytest.mark.parametrize("tower", [None, _wide, _normed], ids=["small", "wide", "layer norm"])
@pytest.mark.parametrize("federated", [False, True], ids=["server frozen", "server federated"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["whole", "tower dropout"])
def test_on_another_device_nothing_stays_on_the_cpu(tiny_model, tiny_examples, local, tower, federated, dropout):
    """torch's device "meta" has shapes without numbers, and like a GPU refuses what mixes it with the CPU."""
    network, examples = Network.build(tiny_model(**{"device_tower": tower} if tower else {})), tiny_examples(20)
    engine = Engine.build(
        network, examples, local, federate_server_tower=federated, tower_dropout=dropout, device="meta"
    )
    here = Engine.build(network, examples, local, federate_server_tower=federated, tower_dropout=dropout)
    assert type(engine.trainer) is type(here.trainer)
    flats = np.zeros((1, engine.size), np.float32)
    for _, shape, moves in engine._moves(flats, np.arange(20), [0.1], (0,)):
        moved = engine._in_float64(shape, moves)
        assert moved.device.type == "meta"
        assert moved.shape == (*shape, engine.size)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_a_device_that_torch_does_not_have_is_refused(tiny_model, tiny_examples, device):
    with pytest.raises(ConfigError, match="device must be one that torch has here, cpu"):
        Engine.build(Network.build(tiny_model()), tiny_examples(2), LocalTraining(steps=1, lr=0.1), device=device)


def test_embeddings_that_do_not_fit_in_memory_are_computed_as_they_are_needed(tiny_model, tiny_examples):
    """With or without the cache of the server's embeddings, the updates are the same to 1e-6."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(20), LocalTraining(2, 0.5))
    flat = engine.side.flat()
    cached = next(engine.updates(flat, np.arange(20))).copy()
    (fresh,) = replace(engine, embeddings=None).updates(flat, np.arange(20))
    np.testing.assert_allclose(fresh, cached, atol=1e-6)


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.LazyLinear(4), nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, rows):
        return self.last(self.again(torch.tanh(self.again(torch.tanh(self.first(rows))))))


class _Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.LazyLinear(4), nn.Linear(4, 3)

    def forward(self, rows):
        return self.last(torch.tanh(self.first(rows))) * self.last.weight.mean()


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unused = nn.LazyLinear(3), nn.Linear(3, 3)

    def forward(self, rows):
        return self.first(rows)


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.other = self.first
        self.last = nn.Linear(2, 3)

    def forward(self, rows):
        return self.last(torch.tanh(self.other(rows)))


@pytest.mark.parametrize("tower", [_Twice, _Reads, _Unused, _Named])
def test_a_tower_whose_layers_do_not_each_run_once_is_trained_the_general_way(tiny_model, tiny_examples, tower):
    """A layer used twice, read, left out or under two names: the engine still does what each user would do alone."""
    network = Network.build(tiny_model(device_tower=tower))
    engine = Engine.build(network, tiny_examples(10), LocalTraining(3, 0.5))
    assert isinstance(engine.trainer, AnyTrainer)
    found, expected = _both(engine, network, np.arange(10), engine.side.flat())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_tower_dropout_out_of_range_is_refused(tiny_model, tiny_examples):
    """Half of the rows cannot lack the one side and half the other and none be whole."""
    with pytest.raises(ConfigError, match=r"tower_dropout must be in \[0, 0.5\), got 0.5"):
        Engine.build(Network.build(tiny_model()), tiny_examples(5), LocalTraining(1, 0.1), tower_dropout=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "one of steps and epochs must be given"),
        ({"steps": 1, "epochs": 1}, "one of steps and epochs must be given"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": 1, "lr": 0.0}, "lr must be finite and > 0"),
        ({"steps": 1, "proximal": -1.0}, "proximal must be finite and >= 0"),
        ({"steps": 1, "proximal": 11.0}, "lr x proximal must be at most 1"),
        ({"steps": 1, "keep": (0.0, 1.0)}, r"keep must be two probabilities in \(0, 1\], got \(0.0, 1.0\)"),
    ],
)
def test_local_training_out_of_range_is_refused(changes, message):
    """The message names the setting, its range and what it got."""
    with pytest.raises(ConfigError, match=message):
        LocalTraining(**{"lr": 0.1} | changes)


def test_an_epoch_takes_every_row_once():
    """5 rows in batches of 2 are 2 + 2 + 1: three steps, whose places together are 0 to 4."""
    schedule = LocalTraining(steps=None, epochs=1, lr=0.1, batch=2).schedule(np.array([5, 3]), np.random.default_rng(0))
    assert schedule.steps.tolist() == [3, 2]
    assert sorted(schedule.place[0][schedule.weight[0] > 0].tolist()) == [0, 1, 2, 3, 4]
    assert schedule.weight[0].sum(axis=1).tolist() == [1, 1, 1]
    assert schedule.weight[1].sum(axis=1).tolist() == [1, 1, 0]


def test_examples_are_kept_by_their_label_anew_in_each_round(tiny_model, tiny_examples):
    """Of 0 a fifth and of 1 all: over 50 rounds each row comes as often, within 5 standard deviations."""
    examples, rounds = tiny_examples(300), 50
    local = LocalTraining(steps=1, lr=0.5, keep=(0.2, 1.0))
    engine = Engine.build(Network.build(tiny_model()), examples, local)
    came = np.zeros(len(examples))
    for number in range(rounds):
        taken = engine._taken(np.arange(300), np.random.default_rng((1, number)))
        rows = np.concatenate([taken.rows[b : b + n] for b, n in zip(taken.begin, taken.counts, strict=True)])
        np.add.at(came, rows, 1)
        assert (np.repeat(taken.users, taken.counts) == examples.user_of_row[rows]).all()
    negative = examples.labels == 0
    assert (came[~negative] == rounds).all()
    assert abs(came[negative].mean() / rounds - 0.2) < 5 * np.sqrt(0.2 * 0.8 / (rounds * negative.sum()))
    assert 0 < came[negative].std() < 2 * np.sqrt(rounds * 0.2 * 0.8)


def test_a_cohort_trains_on_what_is_kept_as_if_it_had_nothing_else(tiny_model, tiny_examples):
    """Every update is that of the same users with the kept rows alone; who keeps none is left out of the sum."""
    examples, network = tiny_examples(40), Network.build(tiny_model())
    local = LocalTraining(steps=3, lr=0.5, keep=(0.3, 0.8))
    engine = Engine.build(network, examples, local, chunk_bytes=20_000)
    flat, users = engine.side.flat(), np.arange(40)
    kept = local.kept(examples.labels, np.random.default_rng((3, 1)))
    alone = Engine.build(network, examples.with_labels(kept), replace(local, keep=None), chunk_bytes=20_000)
    found, expected = (one.clipped_sum(flat, users, 0.1, stream=(3, 1)) for one in (engine, alone))
    np.testing.assert_allclose(found.total, expected.total, atol=1e-6)
    assert (found.received, found.below, found.above) == (40, expected.below, expected.above)
    assert found.below + found.above == np.count_nonzero(np.bincount(examples.user_of_row[kept], minlength=40))


def test_flat_weights_of_another_length_are_refused(tiny_model):
    """The message says what shape they must have."""
    side = DeviceSide(Network.build(tiny_model()))
    with pytest.raises(ConfigError, match=rf"must have shape \({side.size},\), got \(1,\)"):
        side.load_flat(np.zeros(1, np.float32))


def test_predictions_are_the_networks_own(tiny_model, tiny_examples):
    """The probability of each row is the sigmoid of head(server tower, device tower), less the 2 of its correction."""
    network, examples = Network.build(tiny_model()), tiny_examples(6)
    network.correction.set_shift(-2.0)
    with torch.no_grad():
        towers = (
            network.server_tower(torch.tensor(examples.server)),
            network.device_tower(torch.tensor(examples.device)),
        )
        expected = torch.sigmoid(network.head(*towers) - 2).numpy()
    np.testing.assert_allclose(predict(network, examples), expected, atol=1e-6)


@pytest.mark.parametrize("tower", [None, _wide, _normed], ids=["small", "wide", "layer norm"])
@pytest.mark.parametrize("clip", [1e-3, 0.05, 10.0])
def test_quantised_updates_are_those_of_the_wire(tiny_model, tiny_examples, tower, clip):
    """The engine's sum over 200 users is that of updates clipped, encoded, decoded and clipped again, one by one, but
    for rounding by chance: within 6 standard errors of the whole sum, each weight's being half a scale at most."""
    network = Network.build(tiny_model(**{"device_tower": tower} if tower else {}))
    engine = Engine.build(network, tiny_examples(200), LocalTraining(3, 0.5), upload="int8", chunk_bytes=30_000)
    users, flat = np.arange(200), engine.side.flat()
    found = engine.clipped_sum(flat, users, clip)
    plain = replace(engine, upload="float32").clipped_sum(flat, users, clip)
    rows = np.concatenate([chunk.copy() for chunk in engine.updates(flat, users)])
    sent = clip_rows(rows, clip).astype(np.float32)
    arrived = [decode(encode(row, "int8", np.random.default_rng(n)), engine.size) for n, row in enumerate(sent)]
    expected = clip_and_sum([np.stack(arrived)], engine.size, clip)
    largest = np.abs(sent).max(axis=1)  # at least each block's
    error = np.sqrt(((largest / 127) ** 2).sum()) / 2
    np.testing.assert_allclose(found.total, expected.total, atol=6 * np.sqrt(2) * error + 0.01 * clip)
    assert (found.total != plain.total).any()
    assert (found.received, found.below, found.above) == (plain.received, plain.below, plain.above)


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 12),
    clip=st.sampled_from([1e-4, 0.01, 0.1, 1.0, 100.0]),
    scale=st.sampled_from([0.0, 1.0, 30.0, np.inf]),
    seed=st.integers(0, 1000),
)
def test_one_person_moves_a_quantised_sum_by_at_most_the_clip(tiny_model, tiny_examples, users, clip, scale, seed):
    """With the last person of a cohort or without, the others' rounding being the same: the sums are at most the clip
    apart, whatever the update was, one that is not finite included."""
    engine = Engine.build(
        Network.build(tiny_model()), tiny_examples(12), LocalTraining(2, 0.5), upload="int8", chunk_bytes=1
    )
    flat = engine.side.flat() * np.float32(scale)
    cohort = engine.order(np.arange(users))
    whole, without = (engine.clipped_sum(flat, some, clip, stream=(seed,)) for some in (cohort, cohort[:-1]))
    assert np.linalg.norm(whole.total - without.total) <= clip * (1 + 1e-9)
    assert np.isfinite(whole.total).all()


def test_a_seed_repeats_a_quantised_cohort_to_the_last_bit(tiny_model, tiny_examples):
    """Rounding is drawn from the round's stream too, by another generator than the order of rows."""
    sums = []
    for stream, upload in (((1, 2), "int8"), ((1, 2), "int8"), ((1, 3), "int8"), ((1, 2), "float32")):
        engine = Engine.build(
            Network.build(tiny_model()), tiny_examples(40), LocalTraining(4, 0.5, batch=2), upload=upload
        )
        sums.append(engine.clipped_sum(engine.side.flat(), np.arange(40), 0.1, stream=stream).total)
    np.testing.assert_array_equal(sums[0], sums[1])
    assert (sums[0] != sums[2]).any()
    np.testing.assert_allclose(sums[0], sums[3], atol=40 * 0.1 / 127)


@pytest.mark.parametrize("chunk_bytes", [20_000, 1 << 26], ids=["some together", "all together"])
def test_quantised_configurations_trained_together_round_as_if_alone(tiny_model, tiny_examples, chunk_bytes):
    """Three starts: at least 98 % of the weights of each sum are within 1e-5 of its own alone; the rest are those
    where the last bit of an update decided which way it was rounded. With other draws, most differ."""
    local = LocalTraining(2, 0.5)
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(30), local, upload="int8", chunk_bytes=chunk_bytes)
    flats = engine.side.flat() * np.array([[0.5], [1.0], [1.5]], np.float32)
    together = engine.clipped_sums(flats, np.arange(30), [0.1, 0.2, 0.3], [0.5] * 3, stream=(7, 2))
    for one, flat, clip in zip(together, flats, [0.1, 0.2, 0.3], strict=True):
        alone = engine.clipped_sum(flat, np.arange(30), clip, stream=(7, 2))
        assert np.mean(np.abs(one.total - alone.total) > 1e-5) <= 0.02
        other = engine.clipped_sum(flat, np.arange(30), clip, stream=(7, 3))
        assert np.mean(np.abs(other.total - alone.total) > 1e-5) > 0.5
