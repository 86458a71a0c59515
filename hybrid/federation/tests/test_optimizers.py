import subprocess
import sys

import numpy as np
import pytest

from hybrid.errors import ConfigError
from hybrid.federation.optimizers import ServerOptimizer, TailAverage


def _steps(name, lr, updates, **options):
    optimizer = ServerOptimizer(name, lr, np.zeros(1, np.float32), options)
    return [float(optimizer.step(np.array([update]))[0]) for update in updates]


def test_fedavg_is_sgd_with_learning_rate_1():
    """The weights move by the mean update itself."""
    assert _steps("SGD", 1.0, [0.5, -0.25]) == [0.5, 0.25]


def test_momentum_is_an_option():
    """With momentum 0.5 the second step is 1 + 0.5: 0 -> 1 -> 2.5."""
    assert _steps("SGD", 1.0, [1.0, 1.0], momentum=0.5) == [1.0, 2.5]


def test_fedadam_steps_by_the_learning_rate_at_first():
    """Adam's first step is lr x sign, whatever the size of the update."""
    assert _steps("Adam", 0.1, [3.0]) == pytest.approx([0.1], rel=1e-6)


def test_fedyogi_is_algorithm_2():
    """By hand, betas (0.9, 0.99), tau 0.1, so v0 = 0.01, updates 1 and 1.

    m1 = 0.1; v1 = 0.01 - 0.01 x 1 x sign(0.01 - 1) = 0.02; step 1 = lr 0.1 / (sqrt(0.02) + 0.1).
    m2 = 0.19; v2 = 0.02 + 0.01 = 0.03; step 2 = lr 0.19 / (sqrt(0.03) + 0.1).
    """
    first = 0.5 * 0.1 / (0.02**0.5 + 0.1)
    second = first + 0.5 * 0.19 / (0.03**0.5 + 0.1)
    assert _steps("Yogi", 0.5, [1.0, 1.0], betas=(0.9, 0.99), tau=0.1) == pytest.approx([first, second], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Nope", {}, "must name a class of torch.optim, or Yogi, got 'Nope'"),
        ("Optimizer", {}, "must name a class of torch.optim"),
        ("LBFGS", {}, "does not"),
        ("Adam", {"momentum": 0.9}, "momentum"),
        ("Yogi", {"tau": 0.0}, "tau must be > 0"),
        ("Yogi", {"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\)"),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(name, options, message):
    """The message names the setting and what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        ServerOptimizer(name, 0.1, np.zeros(3, np.float32), options)


def test_the_average_of_share_0_is_the_last_weights():
    """Every round's weights are what the model is."""
    average = TailAverage(0.0)
    assert [float(average(np.array([weight]))[0]) for weight in (1.0, 3.0)] == [1.0, 3.0]


@pytest.mark.parametrize("share", [1 / 3, 0.5, 1.0])
def test_the_average_is_as_old_as_the_last_share_of_the_rounds(share):
    """Of weights that are the round's number, 1 to 1,000, the mean is 1,000 (1 - share / 2), to a round or two."""
    average = TailAverage(share)
    for number in range(1, 1001):
        mean = average(np.array([float(number)]))
    assert mean[0] == pytest.approx(1000 * (1 - share / 2), abs=2)


def test_the_average_is_as_smooth_as_the_last_share_of_the_rounds():
    """Of independent noise of variance 1, over 1,000 rounds and share 1/3: 1 / 333, within 20 % (16,000 draws)."""
    average, rng = TailAverage(1 / 3), np.random.default_rng(0)
    for _ in range(1000):
        mean = average(rng.normal(size=16_000))
    assert mean.var() == pytest.approx(1 / 333, rel=0.2)


def test_an_optimiser_steps_without_torchs_compiler():
    """Making one and stepping it imports no torch._dynamo, which takes seconds."""
    code = (
        "import sys, numpy as np; from hybrid.federation.optimizers import ServerOptimizer; "
        "ServerOptimizer('Adam', 0.1, np.zeros(3, np.float32)).step(np.ones(3)); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_share_out_of_range_is_refused():
    """The message names the setting."""
    with pytest.raises(ConfigError, match=r"average_last must be in \[0, 1\], got 1.5"):
        TailAverage(1.5)
