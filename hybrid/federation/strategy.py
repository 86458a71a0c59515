"""The strategy: noised sums in, a step of any `torch.optim` optimiser out. It adds no noise and needs no trust."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from hybrid.features import Float32

if TYPE_CHECKING:  # it imports torch, and a ClientApp, which imports this, is a new process in each round
    from hybrid.federation.optimizers import ServerOptimizer

# Names of the records and of what is in them, on both sides of the wire.
WEIGHTS, SUM, PLAN = "weights", "sum", "plan"
FLAT, RUN, ROUND, ATTEMPT = "flat", "run", "round", "attempt"


def flat_record(flat: NDArray[np.floating]) -> ArrayRecord:
    """One flat array as the one array of a record: many small arrays cost Flower many calls."""
    return ArrayRecord({FLAT: Array(np.ascontiguousarray(flat))})


def flat_array(record: ArrayRecord) -> NDArray[np.floating]:
    """What `flat_record` packed."""
    array: NDArray[np.floating] = record[FLAT].numpy()
    return array


@dataclass
class NoisedSum(Strategy):  # type: ignore[misc]  # flwr ships no types
    """Federated optimisation on noised sums, divided by the cohort that was planned.

    Each node is an aggregator with people of its own and a whole mechanism of
    its own: it clips, sums and noises before anything leaves it. Sums of
    several nodes add up; their noise does too, so that each person is protected
    even if every other aggregator is not honest. A node that fails contributes
    zero: the denominator does not follow the replies.

    Attributes:
        planned_cohort: expected number of participants of a round, over all nodes; > 0.
        optimizer: takes the mean update as a pseudo-gradient.
        failed_rounds: how many rounds no node answered.

    Source:
        Reddi et al., ICLR 2021, Algorithm 1 (server optimisers). https://arxiv.org/abs/2003.00295
    """

    planned_cohort: float
    optimizer: ServerOptimizer
    failed_rounds: int = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same weights and plan to every node."""
        plan = ConfigRecord({**config, ROUND: server_round})
        content = RecordDict({WEIGHTS: arrays, PLAN: plan})
        return [
            Message(content, dst_node_id=node, message_type="train", group_id=str(server_round))
            for node in sorted(grid.get_node_ids())
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One step of the optimiser; None where no node answered, and the weights stay."""
        answered = [reply.content for reply in replies if not reply.has_error()]
        if not answered:
            self.failed_rounds += 1
            return None, None
        total = np.sum([flat_array(content[SUM]) for content in answered], axis=0)
        return flat_record(self.step(total)), MetricRecord()

    def step(self, total: NDArray[np.floating]) -> Float32:
        """The weights after a round whose noised sum is `total`, (p,)."""
        return self.optimizer.step(total / self.planned_cohort)

    def state(self) -> dict[str, Any]:
        """See `hybrid.federation.checkpoint.Stateful`."""
        return {"optimizer": self.optimizer.state(), "failed_rounds": self.failed_rounds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `hybrid.federation.checkpoint.Stateful`."""
        self.optimizer.restore(state["optimizer"])
        self.failed_rounds = state["failed_rounds"]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: what devices measure would have to be noised and paid for."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def summary(self) -> None:
        """Nothing: the run directory says it."""
