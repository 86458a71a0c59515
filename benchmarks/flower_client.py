"""The baseline's ClientApp for Flower's own engine: one resident model a process, no optimiser objects."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.workload import EXAMPLES, Contest

app = ClientApp()


def flat_record(flat: np.ndarray) -> ArrayRecord:
    """One flat array: many small ones cost Flower many calls."""
    return ArrayRecord({"flat": Array(np.ascontiguousarray(flat))})


@lru_cache(maxsize=1)
def resident() -> Contest:
    """Model and data of an actor, built once: the same 100 users' examples serve all."""
    torch.set_num_threads(1)
    return Contest.of("6.3k", 100)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Four steps of eight rows."""
    contest = resident()
    user = int(context.node_config["partition-id"]) % contest.users
    contest.side.load_flat(message.content["arrays"]["flat"].numpy())
    contest.local_steps(user)
    metrics = MetricRecord({"num-examples": EXAMPLES})
    return Message(RecordDict({"arrays": flat_record(contest.side.flat()), "metrics": metrics}), reply_to=message)
