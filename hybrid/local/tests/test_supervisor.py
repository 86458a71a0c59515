import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid.local import stack
from hybrid.local.process import is_running
from hybrid.local.supervisor import State
from hybrid.workspace import Workspace

# A supervisor over fake servers: [[[name, code], ...], ...], each ready when it prints so.
SUPERVISE = """
import json, sys
from pathlib import Path
from hybrid.errors import StackError
from hybrid.local.process import Service, log_has
from hybrid.local.supervisor import Supervisor
stages = [
    [Service(name=name, command=[sys.executable, "-c", code], ready=log_has("ready")) for name, code in stage]
    for stage in json.loads(sys.argv[2])
]
try:
    sys.exit(Supervisor(Path(sys.argv[1]), stages).run())
except StackError as error:
    sys.exit(str(error))
"""
WAIT = "import time; print('ready', flush=True); time.sleep(60)"
NEVER_READY = "import time; time.sleep(60)"
DIES = """
import sys, time
print("ready", flush=True)
time.sleep(0.3)
print("out of memory")
sys.exit(7)
"""


class Stack:
    """A supervisor process over one workspace."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *stages: list[tuple[str, str]]) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SUPERVISE, str(self.workspace.stack), json.dumps(stages)]
        self.processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True))
        return self.processes[-1]

    def wait(self, condition: Callable[[State | None], bool]) -> State | None:
        """The first state that meets the condition."""
        deadline = time.monotonic() + 20
        while not condition(state := State.read(self.workspace.stack)):
            assert time.monotonic() < deadline, state
            time.sleep(0.02)
        return state

    def ready(self) -> State:
        state = self.wait(lambda state: state is not None and state.phase == "ready")
        assert state is not None
        return state


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Stack]:
    each = Stack(tmp_path)
    yield each
    for process in each.processes:
        process.kill()
        process.wait()
        process.stderr.close()


def test_servers_start_in_order_and_stop_when_told(fake: Stack):
    """Kafka's stage is ready before the gateway begins; after SIGTERM all are gone and so is the state."""
    supervisor = fake.start([("kafka", WAIT), ("triton", WAIT)], [("gateway", WAIT)])
    state = fake.ready()
    assert [(server.name, server.phase) for server in state.servers] == [
        ("kafka", "ready"),
        ("triton", "ready"),
        ("gateway", "ready"),
    ]
    assert state.servers[2].started > max(state.servers[0].started, state.servers[1].started)
    assert stack.status(fake.workspace) == state
    assert stack.down(fake.workspace)
    assert supervisor.wait(5) == 0
    assert not any(is_running(server.pid, server.started) for server in state.servers)
    assert stack.status(fake.workspace) is None
    assert not stack.down(fake.workspace)


def test_a_dead_server_stops_the_others_and_is_named(fake: Stack):
    """The state says which died, of what, and the end of its log; the others were stopped."""
    supervisor = fake.start([("kafka", WAIT), ("triton", DIES)])
    assert supervisor.wait(20) == 1
    state = stack.status(fake.workspace)
    assert state is not None
    assert state.phase == "failed"
    assert state.message.startswith("triton ended with exit status 7; the last lines of")
    assert state.message.endswith("out of memory")
    assert [server.phase for server in state.servers] == ["stopped", "died"]
    assert not any(is_running(server.pid, server.started) for server in state.servers)


def test_a_server_killed_by_a_signal_is_named_with_it(fake: Stack):
    """SIGKILL from outside, as the kernel does when memory runs out."""
    supervisor = fake.start([("kafka", WAIT)], [("gateway", WAIT)])
    os.kill(fake.ready().servers[0].pid, signal.SIGKILL)
    assert supervisor.wait(20) == 1
    state = State.read(fake.workspace.stack)
    assert state is not None
    assert state.message.startswith("kafka was killed by SIGKILL")


def test_it_can_be_stopped_while_servers_start(fake: Stack):
    """A server that is never ready does not keep the supervisor from stopping."""
    supervisor = fake.start([("kafka", WAIT)], [("gateway", NEVER_READY)])
    state = fake.wait(lambda state: state is not None and state.servers[1].pid is not None)
    assert state is not None
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert not any(is_running(server.pid, server.started) for server in state.servers)


def test_a_killed_supervisor_leaves_nothing(fake: Stack):
    """After SIGKILL the state tells of it; its servers are ended by the kernel on Linux, elsewhere by `down`."""
    supervisor = fake.start([("kafka", WAIT)], [("gateway", WAIT)])
    state = fake.ready()
    supervisor.kill()
    supervisor.wait()
    while sys.platform == "linux" and any(is_running(server.pid, server.started) for server in state.servers):
        time.sleep(0.02)
    found = stack.status(fake.workspace)
    assert found is not None
    assert found.phase == "failed"
    assert "was killed" in found.message
    assert stack.down(fake.workspace)
    assert not any(is_running(server.pid, server.started) for server in state.servers)
    assert stack.status(fake.workspace) is None


def test_a_folder_has_one_supervisor(fake: Stack):
    """A second one says so and leaves the first alone."""
    fake.start([("kafka", WAIT)])
    state = fake.ready()
    second = fake.start([("kafka", WAIT)])
    assert second.stderr is not None
    assert "another `hybrid up` is running" in second.stderr.read()
    assert second.wait(20) == 1
    assert stack.status(fake.workspace) == state
