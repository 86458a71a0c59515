"""Flower's ServerApp: runs our strategy for the rounds that are left."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from hybrid.features import Float32
from hybrid.federation.strategy import NoisedSum, flat_array, flat_record

TIMEOUT_S = 3600.0  # of a round, after which who has not answered has failed; Flower's own


def server_app(
    strategy: NoisedSum,
    initial: Float32,
    rounds: int,
    on_round: Callable[[int, Float32], None],
    *,
    done: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> ServerApp:
    """Builds the app.

    Its loop is that of Flower's `Strategy.start`, which always begins at round
    1: a training that is resumed must not, since a round's number tells its
    cohort, its noise and its ledger entry apart from others'.

    Args:
        strategy: how a round is configured and aggregated.
        initial: (p,) the weights to start from.
        rounds: how many, those that are done included.
        on_round: called with the round's number and the weights after it, (p,); first with `done` and `initial`.
        done: rounds of an earlier process.
        timeout_s: after which a round goes on without the nodes that did not answer.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        arrays = flat_record(initial)
        on_round(done, initial)
        for number in range(done + 1, rounds + 1):
            messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
            for message in messages:
                message.metadata.ttl = timeout_s  # so that nodes give up when the round does
            replies = grid.send_and_receive(messages, timeout=timeout_s)
            aggregated, _ = strategy.aggregate_train(number, replies)
            arrays = arrays if aggregated is None else aggregated
            on_round(number, flat_array(arrays).astype(np.float32))

    return app
