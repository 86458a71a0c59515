import copy

import numpy as np
import pytest
import torch

from hybrid.errors import ConfigError
from hybrid.federation.engine import DeviceSide, Engine, LocalTraining, predict
from hybrid.network import Network


def _one_user_at_a_time(network, examples, user, steps, lr):
    """What the device itself would do: torch's SGD on its own rows."""
    side = copy.deepcopy(DeviceSide(network))
    start = side.flat()
    rows = slice(examples.offsets[user], examples.offsets[user + 1])
    server, device, labels = (torch.tensor(part[rows]) for part in (examples.server, examples.device, examples.labels))
    optimizer = torch.optim.SGD(side.parameters(), lr=lr)
    for _ in range(steps if len(labels) else 0):
        optimizer.zero_grad()
        logits = side(network.server_tower(server).detach(), device)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
    return side.flat() - start


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("chunk_bytes", [1, 4000, 1 << 26])
def test_the_batched_cohort_does_what_each_user_would_do_alone(tiny_model, tiny_examples, steps, chunk_bytes):
    """For 20 ragged users, some without rows, every update is within 1e-5 of a plain loop's, whatever the chunks."""
    network, examples = Network.build(tiny_model()), tiny_examples(20)
    engine = Engine.build(network, examples, LocalTraining(steps=steps, lr=0.5), chunk_bytes=chunk_bytes)
    users = np.random.default_rng(0).permutation(20)
    found = np.concatenate(list(engine.updates(engine.module.flat(), users)))
    by_size = users[np.argsort(np.diff(examples.offsets)[users], kind="stable")]
    expected = np.stack([_one_user_at_a_time(network, examples, user, steps, 0.5) for user in by_size])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01


def test_chunks_stay_within_their_bytes(tiny_model, tiny_examples):
    """A user has at most 8 rows of 3 + 2 + 2 numbers and an update of p: 4 kB hold at least 10 of them."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(50), LocalTraining(1, 0.1), chunk_bytes=4000)
    sizes = [len(chunk) for chunk in engine.updates(engine.module.flat(), np.arange(50))]
    assert sum(sizes) == 50
    assert 1 < max(sizes) <= 4000 // (4 * engine.module.size)
    assert min(sizes[:-1]) >= 4000 // (4 * (8 * 7 + engine.module.size))


def test_weights_are_taken_from_the_flat_vector_and_left_alone(tiny_model, tiny_examples):
    """Training from zeros gives other updates than from the module's own weights, which do not change."""
    engine = Engine.build(Network.build(tiny_model()), tiny_examples(5), LocalTraining(1, 0.1))
    own = engine.module.flat()
    (zeros,) = engine.updates(np.zeros_like(own), np.arange(5))
    (there,) = engine.updates(own, np.arange(5))
    assert not np.allclose(zeros, there)
    np.testing.assert_array_equal(engine.module.flat(), own)


def test_flat_weights_of_another_length_are_refused(tiny_model):
    """The message says what shape they must have."""
    side = DeviceSide(Network.build(tiny_model()))
    with pytest.raises(ConfigError, match=rf"must have shape \({side.size},\), got \(1,\)"):
        side.load_flat(np.zeros(1, np.float32))


def test_predictions_are_the_networks_own(tiny_model, tiny_examples):
    """The probability of each row is the sigmoid of head(server tower, device tower)."""
    network, examples = Network.build(tiny_model()), tiny_examples(6)
    with torch.no_grad():
        towers = (
            network.server_tower(torch.tensor(examples.server)),
            network.device_tower(torch.tensor(examples.device)),
        )
        expected = torch.sigmoid(network.head(*towers)).numpy()
    np.testing.assert_allclose(predict(network, examples), expected, atol=1e-6)
