import numpy as np
import pytest

from hybrid.errors import BudgetExceeded, CohortTooSmall, ConfigError
from hybrid.federation.client_app import client_app
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.federation.server_app import server_app
from hybrid.federation.simulation import simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.privacy.mechanisms import Release


class Ones:
    """An aggregator of a port we own: `answers` people who each want every weight one higher."""

    def __init__(self, answers, fails_in=(), error=CohortTooSmall):
        self.answers, self.fails_in, self.error, self.rounds = answers, fails_in, error, []

    def run_round(self, number, flat):
        self.rounds.append((number, flat.copy()))
        if number in self.fails_in:
            raise self.error("for the test")
        return Release(sum=np.full(flat.shape, float(self.answers)), received=self.answers, clip=1.0)


def _run(aggregators, *, planned, rounds, optimizer="SGD", lr=1.0):
    seen = []
    initial = np.zeros(3, np.float32)
    strategy = NoisedSum(planned, ServerOptimizer(optimizer, lr, initial))
    app = server_app(strategy, initial, rounds, lambda number, flat: seen.append((number, flat[0])))
    simulate(app, {node: client_app(aggregator) for node, aggregator in enumerate(aggregators, start=1)})
    return seen, strategy


def test_the_sum_is_divided_by_the_planned_cohort():
    """60 of 100 planned replies want +1: each of two SGD steps moves by 60 / 100, not by 1."""
    seen, _ = _run([Ones(answers=60)], planned=100, rounds=2)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert [value for _, value in seen] == pytest.approx([0, 0.6, 1.2])


def test_several_nodes_add_up():
    """Two nodes with 30 and 10 people of 80 planned move the weights by 40 / 80."""
    seen, _ = _run([Ones(answers=30), Ones(answers=10)], planned=80, rounds=1)
    assert seen[-1][1] == pytest.approx(0.5)


def test_a_round_that_fails_leaves_the_weights_and_training_goes_on():
    """Round 2 of 3 is too small: it changes nothing, and round 3 starts where round 1 ended."""
    aggregator = Ones(answers=10, fails_in=(2,))
    seen, strategy = _run([aggregator], planned=10, rounds=3)
    assert [value for _, value in seen] == pytest.approx([0, 1, 1, 2])
    assert strategy.failed_rounds == 1
    np.testing.assert_array_equal(aggregator.rounds[2][1], aggregator.rounds[1][1])


def test_a_node_that_fails_contributes_zero():
    """Of two nodes with 40 planned each one fails: the other's 40 are divided by 80 all the same."""
    seen, _ = _run([Ones(answers=40), Ones(answers=40, fails_in=(1,))], planned=80, rounds=1)
    assert seen[-1][1] == pytest.approx(0.5)


def test_an_exhausted_budget_ends_the_run():
    """It is raised to the caller: going on without noise to add would train on nothing."""
    with pytest.raises(BudgetExceeded):
        _run([Ones(answers=1, fails_in=(1,), error=BudgetExceeded)], planned=1, rounds=2)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adafactor"])
def test_any_optimiser_of_torch_moves_along_the_update(name):
    """People want +1, so the weights rise."""
    seen, _ = _run([Ones(answers=10)], planned=10, rounds=3, optimizer=name, lr=0.1)
    assert seen[-1][1] > 0


@pytest.mark.parametrize("name", ["Adamm", "Optimizer", "lr_scheduler", "LBFGS", "SparseAdam"])
def test_what_cannot_step_from_a_flat_gradient_is_refused(name):
    """A name that torch.optim lacks, or an optimiser that needs a closure or sparse gradients."""
    with pytest.raises(ConfigError, match="server_optimizer must"):
        ServerOptimizer(name, 0.1, np.zeros(3, np.float32))
