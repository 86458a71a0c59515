"""ClientApps for Flower's own engine: as lean as we could make one, and one as Flower's documentation writes it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workload import BATCH, EXAMPLES, LR, Contest, network
from hybrid.federation.engine import DeviceSide

lean, documented = ClientApp(), ClientApp()


def flat_record(flat: np.ndarray) -> ArrayRecord:
    """One flat array: many small ones cost Flower many calls."""
    return ArrayRecord({"flat": Array(np.ascontiguousarray(flat))})


@lru_cache(maxsize=1)
def resident() -> Contest:
    """Model and data of an actor, built once: the same 100 users' examples serve all."""
    torch.set_num_threads(1)
    return Contest.of("6.3k", 100)


@lean.train()
def train_lean(message: Message, context: Context) -> Message:
    """Four steps of eight rows on the resident model, without an optimiser object."""
    contest = resident()
    user = int(context.node_config["partition-id"]) % contest.users
    contest.side.load_flat(message.content["arrays"]["flat"].numpy())
    contest.local_steps(user)
    metrics = MetricRecord({"num-examples": EXAMPLES})
    return Message(RecordDict({"arrays": flat_record(contest.side.flat()), "metrics": metrics}), reply_to=message)


@documented.train()
def train_documented(message: Message, context: Context) -> Message:
    """The same as the quickstart for PyTorch has it: a model, a loader and an optimiser each time, and a state_dict."""
    contest = resident()
    user = int(context.node_config["partition-id"]) % contest.users
    model = DeviceSide(network("6.3k"))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data = TensorDataset(contest.server[user], contest.device[user], contest.labels[user])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for server, device, labels in DataLoader(data, batch_size=BATCH, shuffle=True):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(server, device), labels).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": EXAMPLES})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)
