import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hybrid.errors import ConfigError, NotFound
from hybrid.federation.checkpoint import FILE, Checkpoint, Checkpoints, digest, machine
from hybrid.federation.optimizers import ServerOptimizer, TailAverage
from hybrid.federation.records import values_of, with_values

OPTIMIZERS = ["Yogi", *sorted(set(dir(torch.optim)) - {"LBFGS", "Muon", "Optimizer", "SparseAdam"})]
OPTIMIZERS = [
    name
    for name in OPTIMIZERS
    if name == "Yogi"
    or (isinstance(getattr(torch.optim, name), type) and issubclass(getattr(torch.optim, name), torch.optim.Optimizer))
]
ARRAYS = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]), arrays.array_shapes(min_dims=0, min_side=0)
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | ARRAYS
    | ARRAYS.map(torch.from_numpy)
    | st.floats().map(np.float64)
)
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def _same(one, other):
    """Of the same types, and the same to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            _same(mine, theirs)
    elif isinstance(one, (np.ndarray, np.generic, torch.Tensor)):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif isinstance(one, float):
        assert (math.isnan(one) and math.isnan(other)) or (one, math.copysign(1, one)) == (
            other,
            math.copysign(1, other),
        )
    else:
        assert one == other


@given(STATES)
@settings(deadline=None, max_examples=100)
def test_a_checkpoint_gives_back_what_was_put_in(tmp_path_factory, state):
    """Whatever it is: numbers to the last bit, arrays, tensors, and what holds them."""
    folder = tmp_path_factory.mktemp("run")
    weights = {"head.weight": np.array([[1.5, np.nan]], np.float32), "head.bias": np.float32(2)}
    Checkpoint(7, weights, state).write(folder)
    read = Checkpoint.read(folder)
    assert read.step == 7
    _same(dict(read.weights), {name: np.asarray(value) for name, value in weights.items()})
    _same(read.state, state)
    assert [file.name for file in folder.iterdir()] == [FILE]


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_damaged_checkpoint_is_never_taken_for_another_state(tmp_path_factory, data):
    """Cut short anywhere, or with any byte changed, it is refused before anything of it is read."""
    folder = tmp_path_factory.mktemp("run")
    weights, state = {"head.weight": np.arange(6, dtype=np.float32)}, {"mean": np.arange(3.0), "rounds": 5}
    Checkpoint(7, weights, state).write(folder)
    content = bytearray((folder / FILE).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    (folder / FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged, or of another release"):
        Checkpoint.read(folder)


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    """Not found, which is not damaged."""
    with pytest.raises(NotFound, match="has no checkpoint"):
        Checkpoint.read(tmp_path)


def test_what_a_checkpoint_cannot_hold_is_refused_and_the_one_before_stays(tmp_path):
    """A set is not among what it holds."""
    Checkpoint(1, {}, 1).write(tmp_path)
    with pytest.raises(TypeError, match="not set"):
        Checkpoint(2, {}, {1, 2}).write(tmp_path)
    assert Checkpoint.read(tmp_path).step == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimiser_steps_to_the_same_bits(tmp_path, name):
    """Three steps, a checkpoint, three more: as without the checkpoint, by every optimiser of torch that can be had."""
    rng = np.random.default_rng(0)
    start, updates = rng.normal(size=50).astype(np.float32), rng.normal(size=(6, 50))
    options = {"momentum": 0.9} if name in {"SGD", "RMSprop"} else {}
    whole, first, second = (ServerOptimizer(name, 0.1, start, options) for _ in range(3))
    expected = [whole.step(update) for update in updates]
    for update in updates[:3]:
        first.step(update)
    Checkpoint(3, {}, first.state()).write(tmp_path)
    second.restore(Checkpoint.read(tmp_path).state)
    np.testing.assert_array_equal(second.weights, expected[2])
    for update, weights in zip(updates[3:], expected[3:], strict=True):
        np.testing.assert_array_equal(second.step(update), weights)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_restored_average_goes_on_to_the_same_bits(tmp_path, share):
    """As without the checkpoint between its third and fourth round."""
    weights = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    whole, first, second = (TailAverage(share) for _ in range(3))
    expected = [whole(flat) for flat in weights]
    for flat in weights[:3]:
        first(flat)
    Checkpoint(3, {}, first.state()).write(tmp_path)
    second.restore(Checkpoint.read(tmp_path).state)
    for flat, mean in zip(weights[3:], expected[3:], strict=True):
        np.testing.assert_array_equal(second(flat), mean)


class _Buffers(NamedTuple):
    rows: np.ndarray
    decay: float


@dataclass(frozen=True)
class _Mechanism:
    round: int
    buffers: _Buffers


def test_any_mechanisms_state_is_taken_apart_and_put_together(tmp_path):
    """A dataclass of a number and a NamedTuple of an array and a number: the same types, the same bits."""
    fresh = _Mechanism(0, _Buffers(np.zeros((2, 3)), 0.0))
    state = _Mechanism(4, _Buffers(np.random.default_rng(0).normal(size=(2, 3)), 0.1 + 0.2))
    Checkpoint(4, {}, values_of(state)).write(tmp_path)
    read = with_values(fresh, Checkpoint.read(tmp_path).state)
    assert (type(read), type(read.buffers), read.round) == (_Mechanism, _Buffers, 4)
    assert read.buffers.decay == 0.1 + 0.2
    np.testing.assert_array_equal(read.buffers.rows, state.buffers.rows)


class _Clock:
    """Each checkpoint takes 10 ms of it, in reading the part's state."""

    def __init__(self):
        self.now, self.written = 0.0, []

    def __call__(self):
        return self.now

    def state(self):
        self.now += 0.01
        self.written.append(self.now)

    def restore(self, state):
        pass


def test_checkpoints_take_a_fiftieth_of_the_time(tmp_path):
    """They take 10 ms, so one is written every 0.51 s: over 1,000 rounds of 5 ms, 11, the last round's in any case."""
    clock = _Clock()
    checkpoints = Checkpoints(tmp_path, dict, {"part": clock}, clock=clock)
    for number in range(1, 1001):
        clock.now += 0.005
        checkpoints.after(number, now=number == 1000)
    assert len(clock.written) == 11
    assert Checkpoint.read(tmp_path).step == 1000


def test_a_digest_tells_values_shapes_and_types_apart():
    """Four arrays with the same bytes or the same values have four digests; copies have one."""
    one = np.arange(4, dtype=np.int64)
    others = [one.reshape(2, 2), one.view(np.float64), one.astype(np.int32), one[::-1]]
    assert len({digest([array]) for array in (one, *others)}) == 5
    assert digest([one[::2]]) == digest([np.array([0, 2])])


def test_a_machine_is_itself():
    """Nothing in it changes from call to call, and the number of threads is part of it."""
    assert machine() == machine()
    assert machine()["threads"] == str(torch.get_num_threads())
