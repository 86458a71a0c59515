import numpy as np
import pytest
from flwr.app import Error, Message

from hybrid.federation import server_app as module
from hybrid.federation import simulation
from hybrid.federation.client_app import client_app
from hybrid.federation.optimizers import ServerOptimizer
from hybrid.federation.server_app import LOST, TIMES, server_app
from hybrid.federation.simulation import InProcessGrid, simulate
from hybrid.federation.strategy import NoisedSum
from hybrid.privacy.mechanisms import Release


class Node:
    """Counts how often it is asked, and answers 10 for each weight."""

    def __init__(self):
        self.asked = []

    def run_round(self, number, flat):
        self.asked.append((number, flat.tolist()))
        return Release(sum=np.full(flat.shape, 10.0), received=10, clip=1.0)


@pytest.fixture
def run(monkeypatch):
    """(grid, rounds=1, nodes=2, **options) -> the nodes and the weight after each round, over a Grid of that class."""

    def start(grid, rounds=1, nodes=2, **options):
        monkeypatch.setattr(simulation, "InProcessGrid", grid)
        nodes, seen = [Node() for _ in range(nodes)], []
        strategy = NoisedSum(20, ServerOptimizer("SGD", 1.0, np.zeros(2, np.float32)))
        app = server_app(strategy, np.zeros(2, np.float32), rounds, lambda _, flat: seen.append(flat[0]), **options)
        simulate(app, {number: client_app(node) for number, node in enumerate(nodes, start=1)})
        return nodes, seen

    return start


def losing(times, code):
    """A Grid that loses the first so many replies of node 2, and says so."""
    left = [times]

    class Losing(InProcessGrid):
        def pull_messages(self, message_ids):
            for reply in super().pull_messages(message_ids):
                if reply.metadata.src_node_id == 2 and left[0]:
                    left[0] -= 1
                    name = reply.metadata.reply_to_message_id
                    reply = Message(Error(code=code, reason="lost, for the test"), reply_to=reply)  # noqa: PLW2901
                    reply.metadata.__dict__["_reply_to_message_id"] = name
                yield reply

    return Losing


@pytest.mark.parametrize("code", LOST)
@pytest.mark.parametrize("times", range(1, TIMES))
def test_a_reply_that_was_lost_is_asked_for_again_and_counts_once(run, code, times):
    """The node is asked for the same round, from the same weights; 10 + 10 of 20 planned move each weight by 1."""
    nodes, seen = run(losing(times, code))
    assert seen == [0, 1]
    assert [len(node.asked) for node in nodes] == [1, 1 + times]
    assert len(set(map(str, nodes[1].asked))) == 1


def test_a_node_whose_replies_are_lost_again_and_again_is_left_out(run):
    """It is asked three times in a round; the next round is another."""
    nodes, seen = run(losing(TIMES, LOST[0]), rounds=2)
    assert seen == [0, 0.5, 1.5]
    assert [number for number, _ in nodes[1].asked] == [1, 1, 1, 2]


def test_a_node_that_is_gone_or_refused_is_not_asked_again(run):
    """Flower's codes 5, the node is unavailable, and 2, its app raised."""
    for code in (5, 2):
        nodes, seen = run(losing(1, code))
        assert seen == [0, 0.5]
        assert len(nodes[1].asked) == 1


def test_a_node_that_cannot_be_sent_to_is_not_waited_for(run):
    """Flower gives no name for its message."""

    class Refusing(InProcessGrid):
        def push_messages(self, messages):
            return [
                None if m.metadata.dst_node_id == 2 else super(Refusing, self).push_messages([m])[0] for m in messages
            ]

    _, seen = run(Refusing)
    assert seen == [0, 0.5]


def test_a_round_goes_on_without_a_node_that_does_not_answer_in_time(run, monkeypatch):
    """Looks are rarer the longer it waits, at a twentieth of that, from 0.1 s to 3 s."""
    now, looks = [0.0], []

    class Silent(InProcessGrid):
        def pull_messages(self, message_ids):
            looks.append(now[0])
            return [reply for reply in super().pull_messages(message_ids) if reply.metadata.src_node_id == 1]

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    _, seen = run(Silent, timeout_s=600)
    assert seen == [0, 0.5]
    gaps = np.diff(looks)
    assert gaps[0] == pytest.approx(0.1)
    assert gaps.max() == pytest.approx(3)
    assert 600 <= looks[-1] < 603
    assert len(looks) < 300


def test_a_round_waits_for_a_node(run, monkeypatch):
    """All are away for a while: both rounds have both nodes, and none was over at once. In vain, it waits in time."""
    now = [0.0]

    class Away(InProcessGrid):
        until = 40.0

        def get_node_ids(self):
            return super().get_node_ids() if now[0] >= self.until else []

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    _, seen = run(Away, rounds=2, timeout_s=60)
    assert seen == [0, 1, 2]
    assert 40 <= now[0] < 43
    Away.until = 1e9
    now[0] = 0.0
    _, seen = run(Away, rounds=2, timeout_s=60)
    assert seen == [0, 0, 0]
    assert 120 <= now[0] < 126
