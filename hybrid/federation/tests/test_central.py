from dataclasses import replace

import numpy as np
import pytest

from hybrid.errors import ConfigError
from hybrid.federation.central import Fitting, fit_everything, fit_server_side
from hybrid.federation.engine import predict
from hybrid.federation.metrics import auc, log_loss
from hybrid.network import Network


def test_the_server_side_learns_nothing_from_devices(tiny_model, tiny_examples):
    """Other device features, to the point of noise, give the same weights; the device tower stays as built."""
    examples = tiny_examples(60)
    other = replace(examples, device=np.random.default_rng(9).normal(size=examples.device.shape).astype(np.float32))
    fitted = []
    for rows in (examples, other):
        network = Network.build(tiny_model())
        fit_server_side(network, rows, seed=1, fitting=Fitting(epochs=5))
        fitted.append(network.weights())
    built = Network.build(tiny_model()).weights()
    for name, value in ((n, v) for n, v in built.items() if not n.startswith(("missing.", "correction."))):
        np.testing.assert_array_equal(fitted[0][name], fitted[1][name])
        assert (name.startswith("device_tower.")) == np.array_equal(fitted[0][name], value), name


def test_fitting_everything_finds_what_the_two_sides_know_together(tiny_model, tiny_examples):
    """The label hangs on age times hour more than on the rate: the server alone ranks far worse."""
    train, test = tiny_examples(400), tiny_examples(200, seed=1)
    scores = {}
    for fit in (fit_server_side, fit_everything):
        network = Network.build(tiny_model())
        fit(network, train, seed=1, fitting=Fitting(lr=0.03))
        scores[fit] = auc(test.labels, predict(network, test))
    assert scores[fit_everything] > scores[fit_server_side] + 0.1


def test_what_is_fitted_is_the_probability_after_the_correction(tiny_model, tiny_examples):
    """With a shift of -3 the head's logits are some 3 higher, so that the mean prediction is still the label's."""
    examples, network = tiny_examples(400), Network.build(tiny_model())
    network.correction.set_shift(-3.0)
    fit_server_side(network, examples, seed=1, fitting=Fitting(lr=0.03))
    mean = float(predict(network, examples, without="device").mean())
    assert mean == pytest.approx(examples.labels.mean(), abs=0.05)


def test_it_stops_early_and_keeps_the_best_weights(tiny_model, tiny_examples):
    """Fifteen users are soon learnt by heart: it ends `patience` after its best epoch, whose weights it keeps."""
    examples, seen = tiny_examples(15), []
    network = Network.build(tiny_model())
    fitting = Fitting(lr=0.1, patience=4, batch=8)

    def on_epoch(number):
        seen.append((number, log_loss(examples.labels, predict(network, examples))))

    best = fit_everything(network, examples, seed=1, fitting=fitting, on_epoch=on_epoch)
    assert len(seen) == best + 4 < fitting.epochs
    assert log_loss(examples.labels, predict(network, examples)) == pytest.approx(seen[best - 1][1])


def test_a_single_user_cannot_be_split(tiny_model, tiny_examples):
    """Somebody must be set aside to stop by."""
    with pytest.raises(ConfigError, match="enough users to set some aside"):
        fit_everything(Network.build(tiny_model()), tiny_examples(1), seed=0)
