"""What Flower runs on a SuperLink and its SuperNodes: the apps of `server_app` and `client_app`, told where things are.

A SuperLink starts the ServerApp in a process of its own, which reads a `Job`
from the folder that the run's config names, and leaves the weights after each
round there, and where it stands: killed, and run again on the same folder, it
goes on (docs/decisions/0026). A SuperNode starts a process for each message, so a ClientApp
imports nothing heavy; where its aggregator is, is in the node's own config, which
the SuperLink does not see: `aggregator`, a URL, `token`, a file, and, where
the certificate is not of a public authority, `authority`, a PEM file.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from pydantic import Field

from hybrid.bearer import read_token
from hybrid.errors import ConfigError, FederationError, NotFound
from hybrid.features import Float32
from hybrid.federation.client_app import client_app
from hybrid.federation.remote import RemoteAggregator
from hybrid.federation.strategy import ATTEMPT, PLAN, RUN, NoisedSum
from hybrid.files import write_whole
from hybrid.spec import Declared, Training

if TYPE_CHECKING:  # it imports torch
    from hybrid.federation.checkpoint import Checkpoint

APP = Path(__file__).with_name("app")
"""The folder that `flwr run` takes."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DONE = "done.json"  # in the job's folder, once all rounds are over
STRATEGY = "strategy"  # in what is kept, beside RUN
_POLL_S = 1.0

server = ServerApp()  # one assignment each: so `flwr run` looks for them
client = ClientApp()


class Job(Declared):
    """What a ServerApp is to do. Its folder, where `job.json` is, holds `initial.npy`, (p,) float32.

    Attributes:
        rounds: how many.
        planned_cohort: expected number of participants of a round, over all nodes.
        training: whose server optimiser, its learning rate and options.
        nodes: SuperNodes to wait for before the first round; >= 1. After a restart it goes on with any.
        start_timeout_s: how long to wait for them.
        round_timeout_s: after which a round goes on without the nodes that did not answer.
    """

    rounds: Annotated[int, Field(ge=1)]
    planned_cohort: Positive
    training: Training
    nodes: Annotated[int, Field(ge=1)]
    start_timeout_s: Positive = 120.0
    round_timeout_s: Positive = 600.0


class After(NamedTuple):
    """The weights, (p,), after a round; those of round 0 are the initial ones."""

    number: int
    flat: Float32


class Progress:
    """How a ServerApp tells, through files in its job's folder, how far it is; each is whole when it can be seen.

    Attributes:
        folder: of the job.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The ServerApp's: one process at a time is at the job; this waits for the one before to end."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def keep(self, number: int, run: str, strategy: NoisedSum) -> None:
        """The ServerApp's: where it stands after a round; what its next process goes on from."""
        from hybrid.federation.checkpoint import Checkpoint

        Checkpoint(number, {}, {RUN: run, STRATEGY: strategy.state()}).write(self.folder)

    def kept(self) -> Checkpoint | None:
        """What was kept last; None where nobody was asked for anything yet.

        Raises:
            ConfigError: it is damaged.
        """
        from hybrid.federation.checkpoint import Checkpoint

        try:
            return Checkpoint.read(self.folder)
        except NotFound:
            return None

    def begin(self) -> None:
        """The ServerApp's: says which process it is."""
        import psutil

        identity = {"pid": os.getpid(), "started": psutil.Process().create_time()}
        self._write("process.json", json.dumps(identity).encode())

    def put(self, number: int, flat: Float32) -> None:
        """The ServerApp's: leaves the weights after a round."""
        self._write(f"after-{number:06d}.f32", flat.astype("<f4").tobytes())

    def end(self, failed_rounds: int) -> None:
        """The ServerApp's: all rounds are over."""
        self._write(DONE, json.dumps({"failed_rounds": failed_rounds}).encode())

    def process(self) -> tuple[int, float] | None:
        """Its id and start, in Unix seconds, once it has begun."""
        file = self.folder / "process.json"
        if not file.exists():
            return None
        told = json.loads(file.read_text())
        return told["pid"], told["started"]

    def expect(self) -> None:
        """A process that has not begun yet is the next to tell."""
        (self.folder / "process.json").unlink(missing_ok=True)

    def take(self, done: int) -> Iterator[After]:
        """Every round that is over and later than `done`, in order; each is removed when the next is asked for."""
        for file in sorted(self.folder.glob("after-*.f32")):
            number = int(file.stem.removeprefix("after-"))
            if number > done:  # else it was taken, and told again by a process that went on
                yield After(number, np.frombuffer(file.read_bytes(), dtype="<f4").astype(np.float32))
            file.unlink()

    def last(self) -> After | None:
        """The last round that is over and was not taken."""
        files = sorted(self.folder.glob("after-*.f32"))
        if not files:
            return None
        flat = np.frombuffer(files[-1].read_bytes(), dtype="<f4").astype(np.float32)
        return After(int(files[-1].stem.removeprefix("after-")), flat)

    def failed_rounds(self) -> int | None:
        """In how many rounds no node answered; None before the end."""
        file = self.folder / DONE
        return int(json.loads(file.read_text())["failed_rounds"]) if file.exists() else None

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.folder / name, content)  # before the next round is kept


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Runs the job's rounds, from where a process before left them."""
    _end_with_parent()
    file = Path(str(context.run_config["job"]))
    job, progress = Job.read(file), Progress(file.parent)
    with progress.alone():
        progress.begin()
        _run(grid, context, job, progress)


def _run(grid: Grid, context: Context, job: Job, progress: Progress) -> None:
    """Each round is kept before the next is asked for, under the name that the first process gave the training.

    So a round that a process died in is asked for again as the same one, from the same weights, and an aggregator
    that had released its sum gives that sum.
    """
    from hybrid.federation.server_app import server_app
    from hybrid.federation.training import optimizer_for

    initial: Float32 = np.load(progress.folder / "initial.npy")
    strategy = NoisedSum(job.planned_cohort, optimizer_for(job.training, initial))
    kept, run, done = progress.kept(), str(context.run_id), 0
    if kept is None:
        progress.keep(0, run, strategy)
    else:
        strategy.restore(kept.state[STRATEGY])
        run, done = kept.state[RUN], kept.step
    _wait_for_nodes(grid, 1 if done else job.nodes, job.start_timeout_s)

    def after(number: int, flat: Float32) -> None:
        if number > done:
            progress.keep(number, run, strategy)
        progress.put(number, flat)

    weights = strategy.optimizer.weights
    server_app(strategy, weights, job.rounds, after, done=done, timeout_s=job.round_timeout_s, run=run)(grid, context)
    progress.end(strategy.failed_rounds)


def _wait_for_nodes(grid: Grid, nodes: int, timeout_s: float) -> None:
    """Returns when enough SuperNodes are connected.

    Raises:
        FederationError: they did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    while (here := len(list(grid.get_node_ids()))) < nodes:
        if time.monotonic() > deadline:
            raise FederationError(f"{nodes} SuperNodes must connect within {timeout_s:g} s, {here} did")
        time.sleep(_POLL_S)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: Flower's own way waits for a SuperLink to answer."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@client.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Opens the round at the node's aggregator.

    Raises:
        ConfigError: the node's config does not say where that is.
    """
    _end_with_parent()
    node = context.node_config
    if not {"aggregator", "token"} <= set(node):
        raise ConfigError(f"--node-config must give aggregator (a URL) and token (a file), got {sorted(node)}")
    aggregator = RemoteAggregator(
        url=str(node["aggregator"]),
        token=read_token(Path(str(node["token"]))),
        run=str(message.content[PLAN][RUN]),
        attempt=int(message.content[PLAN].get(ATTEMPT, 1)),
        authority=Path(str(node["authority"])) if "authority" in node else None,
        timeout_s=message.metadata.ttl,
    )
    reply: Message = client_app(aggregator)(message, context)
    return reply
