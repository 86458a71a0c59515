"""Flower's apps in this process: a Grid that hands each message to its node's ClientApp at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from hybrid.errors import CohortTooSmall

APP_RAISED = 2  # flwr.common.constant.ErrorCode.CLIENT_APP_RAISED_EXCEPTION
SERVER_NODE = 1
RUN_ID = 1


class InProcessGrid(Grid):  # type: ignore[misc]  # flwr ships no types
    """A Grid without a SuperLink.

    A cohort too small is what a node on a SuperLink would report: an error
    reply. Any other error is the simulation's own, and is raised.

    Args:
        nodes: node id -> its app.
    """

    def __init__(self, nodes: Mapping[int, ClientApp]) -> None:
        self._nodes = nodes
        self._contexts = {node: _context(node) for node in nodes}
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """There is one run only."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Runs each message's app; the reply waits to be pulled."""
        sent = []
        for message in messages:
            self._sent += 1
            sent.append(str(self._sent))
            message.metadata.__dict__["_message_id"] = sent[-1]  # as Flower's own do: its reply names it
            self._replies[sent[-1]] = self._handle(message)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Each reply once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        return self.pull_messages(self.push_messages(messages))

    def _handle(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            return self._nodes[node](message, self._contexts[node])
        except CohortTooSmall as error:
            return Message(Error(code=APP_RAISED, reason=str(error)), reply_to=message)


def simulate(app: ServerApp, nodes: Mapping[int, ClientApp]) -> None:
    """Runs a ServerApp over nodes of this process until it is done.

    One at a time in a process: Flower's task identity is the process's.
    """
    with _task_identity(), _quiet():
        app(InProcessGrid(nodes), _context(SERVER_NODE))


def _context(node: int) -> Context:
    return Context(run_id=RUN_ID, node_id=node, node_config={}, state=RecordDict(), run_config={})


@contextmanager
def _task_identity() -> Iterator[None]:
    """A Message can only be built where Flower knows whose task this is."""
    before = TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1
    try:
        yield
    finally:
        TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Flower logs several lines a round; errors still show."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
