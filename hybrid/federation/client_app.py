"""Flower's ClientApp: on each node it opens a round at the node's aggregator and returns one noised sum."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hybrid.features import Float32
from hybrid.federation.strategy import PLAN, ROUND, SUM, WEIGHTS, flat_array, flat_record
from hybrid.privacy.mechanisms import Release


class Aggregator(Protocol):
    """The trusted place where updates of people are clipped, summed and noised."""

    def run_round(self, number: int, flat: Float32) -> Release:
        """Lets a cohort train from `flat`, (p,), and releases one noised sum.

        Args:
            number: of the round, from 1; never one that was released before.
            flat: (p,) the weights to start from.

        Raises:
            CohortTooSmall: too few took part; nothing is spent.
            BudgetExceeded: the round would spend more than is allowed; nothing is spent.
        """
        ...


def client_app(aggregator: Aggregator) -> ClientApp:
    """Builds the app of one node. An error of the aggregator becomes Flower's error reply."""
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        weights = flat_array(message.content[WEIGHTS]).astype(np.float32)
        release = aggregator.run_round(int(message.content[PLAN][ROUND]), weights)
        # Not how many took part: beside a sum that Poisson sampling amplifies, the exact count would give away more
        # than is charged (docs/decisions/0009).
        return Message(RecordDict({SUM: flat_record(release.sum)}), reply_to=message)

    return app
