import os
import socket
from pathlib import Path

import pytest

from hybrid.errors import StackError
from hybrid.local import stack
from hybrid.local.supervisor import State
from hybrid.workspace import Workspace


def test_a_taken_port_is_named_with_its_option_and_its_holder():
    """The holder is this very process."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=rf"port {port} .*pid {os.getpid()}, has it.*--triton-http-port"):
            stack.Ports(triton_http=port).check_free()


def test_two_servers_cannot_have_one_port():
    """Both options are named."""
    with pytest.raises(StackError, match="--gateway-port and --kafka-port must differ, both are 19092"):
        stack.Ports.choose({"gateway": 19092}, free=True).model_copy(update={"kafka": 19092}).check_free()


def test_free_ports_keep_what_was_asked_for():
    """The others are free ones, so the check passes."""
    (port,) = stack.free_ports(1)
    ports = stack.Ports.choose({"gateway": port, "kafka": None}, free=True)
    assert ports.gateway == port
    ports.check_free()


def test_nothing_promoted_is_refused(tmp_path: Path):
    """The message says what to run; nothing is started."""
    settings = stack.Settings(root=tmp_path, cache=tmp_path, ports=stack.Ports.choose({}, free=True))
    with pytest.raises(StackError, match="nothing is promoted yet: run `hybrid promote"):
        stack.up(settings)
    assert stack.status(Workspace(tmp_path)) is None


def test_a_state_that_cannot_be_read_is_none(tmp_path: Path):
    """Half a file, as a full disk leaves it."""
    workspace = Workspace(tmp_path)
    workspace.stack.mkdir()
    State.file(workspace.stack).write_text('{"phase": "rea')
    assert stack.status(workspace) is None


def test_serving_is_given_the_key_of_dead_letters_if_there_is_one(tmp_path: Path):
    """Made by `hybrid dead-letters keygen`; the public half only."""
    workspace = Workspace(tmp_path)
    assert "--dead-letter-key" not in stack._serving("worker", workspace, [], lambda _: True, {}).command
    workspace.keys.mkdir()
    (workspace.keys / "dead-letters.pub").touch()
    command = stack._serving("worker", workspace, [], lambda _: True, {}).command
    assert command[command.index("--dead-letter-key") + 1] == str(workspace.keys / "dead-letters.pub")
