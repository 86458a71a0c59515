"""Flower's ServerApp: runs our strategy for the rounds that are left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from hybrid.features import Float32
from hybrid.federation.strategy import RUN, NoisedSum, flat_array, flat_record

TIMEOUT_S = 3600.0  # of a round, after which who has not answered has failed; Flower's own
SOONEST_S, LATEST_S = 0.1, 3.0  # from one look to the next; Flower's own looks each 3 s
SHARE = 0.05  # of the time that was waited already, between those
LOST = (3, 4)  # flwr.common.constant.ErrorCode.MESSAGE_UNAVAILABLE, REPLY_MESSAGE_UNAVAILABLE
TIMES = 3  # that a node is asked in a round, at most


def server_app(
    strategy: NoisedSum,
    initial: Float32,
    rounds: int,
    on_round: Callable[[int, Float32], None],
    *,
    done: int = 0,
    timeout_s: float = TIMEOUT_S,
    run: str = "",
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
        run: names the training to aggregators, in each process the same: asked for a round again, one that keeps
            the round's sum gives that.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        arrays = flat_record(initial)
        on_round(done, initial)
        for number in range(done + 1, rounds + 1):
            _wait_for_a_node(grid, timeout_s)
            messages = list(strategy.configure_train(number, arrays, ConfigRecord({RUN: run}), grid))
            for message in messages:
                message.metadata.ttl = timeout_s  # so that nodes give up when the round does
            aggregated, _ = strategy.aggregate_train(number, _replies(grid, messages, timeout_s))
            arrays = arrays if aggregated is None else aggregated
            on_round(number, flat_array(arrays).astype(np.float32))

    return app


def _wait_for_a_node(grid: Grid, timeout_s: float) -> None:
    """Returns when there is one, or in time: without any, one round after another would be over at once, and lost."""
    began = time.monotonic()
    while not list(grid.get_node_ids()) and (waited_s := time.monotonic() - began) < timeout_s:
        _sleep(waited_s)


def _sleep(waited_s: float) -> None:
    time.sleep(min(max(SOONEST_S, SHARE * waited_s), LATEST_S))


def _replies(grid: Grid, messages: Iterable[Message], timeout_s: float) -> list[Message]:
    """One of each node that answered in time: `Grid.send_and_receive`, but for replies that were lost.

    A reply that was lost on its way, with a SuperLink that was killed, is asked for again: the aggregator gives the
    sum that it had released.
    """
    began, replies, waiting = time.monotonic(), list[Message](), dict[str, Message]()
    due, times = list(messages), Counter[int]()
    while due or waiting:
        times.update(message.metadata.dst_node_id for message in due)
        waiting |= {name: message for name, message in zip(_push(grid, due), due, strict=False) if name is not None}
        due = []
        for reply in grid.pull_messages(list(waiting)):
            asked = waiting.pop(reply.metadata.reply_to_message_id)
            lost = reply.has_error() and reply.error.code in LOST
            if lost and times[asked.metadata.dst_node_id] < TIMES:
                due.append(_again(asked))
            else:
                replies.append(reply)
        waited_s = time.monotonic() - began
        if waited_s >= timeout_s:
            break
        if waiting:
            _sleep(waited_s)
    return replies


def _push(grid: Grid, messages: list[Message]) -> Iterable[str | None]:
    """Their names, in order; None of one that cannot be sent, to a node that is gone."""
    return grid.push_messages(messages) if messages else []


def _again(message: Message) -> Message:
    """The same to the same node, under another name."""
    about = message.metadata
    return Message(
        message.content, dst_node_id=about.dst_node_id, message_type=about.message_type, group_id=about.group_id
    )
