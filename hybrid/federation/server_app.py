"""Flower's ServerApp: runs our strategy for so many rounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from hybrid.features import Float32
from hybrid.federation.strategy import NoisedSum, flat_array, flat_record


def server_app(
    strategy: NoisedSum,
    initial: Float32,
    rounds: int,
    on_round: Callable[[int, Float32], None],
    *,
    timeout_s: float = 3600.0,
) -> ServerApp:
    """Builds the app.

    Args:
        strategy: how a round is configured and aggregated.
        initial: (p,) the weights to start from.
        rounds: how many.
        on_round: called with the round's number and the weights after it, (p,); first with 0 and `initial`.
        timeout_s: after which a round goes on without the nodes that did not answer.
    """
    app = ServerApp()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        on_round(number, flat_array(arrays).astype(np.float32))
        return None

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        strategy.start(
            grid=grid, initial_arrays=flat_record(initial), num_rounds=rounds, timeout=timeout_s, evaluate_fn=evaluate
        )

    return app
