import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.console import _place, perform
from hybrid.cli.tests.test_privacy import FILE, NETWORK
from hybrid.console.steps import Changed, Seen, Step
from hybrid.deployment import Window, change, history
from hybrid.errors import ConfigError, NotFound
from hybrid.registry import Registry
from hybrid.spec import load_model
from hybrid.workspace import Workspace
from serving.testing import deployment


@pytest.fixture
def workspace(workspace: Workspace) -> Workspace:
    """Version 3 is the canary besides."""
    options = {"action": "canary", "version": 3, "share": 0.05}
    change(workspace.deployments, "shop", lambda window: window.try_out(deployment(3), 0.05), **options)
    return workspace


def served(workspace: Workspace) -> Seen:
    return Seen.of(Window.read(workspace.deployments / "shop.json"))


def test_the_page_does_what_the_commands_do(workspace: Workspace, aliases: dict[str, int]):
    """A canary is taken back and the default with it; then what is left is all, and the history has both reasons."""
    said = perform(workspace, Step("halt", "shop", 3, reason="recall fell"), served(workspace))
    assert said == "shop:3 was taken back (recall fell); devices fetch 2"
    assert aliases == {"production": 2}
    said = perform(workspace, Step("halt", "shop", 2, reason="it too"), served(workspace))
    assert said == "shop:2 was taken back (it too); devices fetch 1"
    assert aliases == {"production": 1}
    assert served(workspace).served == (1,)
    assert [one.reason for one in history(workspace.deployments, "shop")][-2:] == ["recall fell", "it too"]
    with pytest.raises(NotFound, match="shop:3 is not served; served are: 1"):
        perform(workspace, Step("halt", "shop", 3, reason="again"), served(workspace))


def test_a_version_that_is_served_is_promoted_without_an_export(workspace: Workspace, aliases: dict[str, int]):
    """The canary becomes the default, and is the canary no more."""
    said = perform(workspace, Step("promote", "shop", 3), served(workspace))
    assert said == "shop:3 is the default: all devices fetch it"
    assert (served(workspace).default, served(workspace).canary) == (3, None)
    assert aliases == {"production": 3}


@pytest.mark.parametrize("step", [Step("halt", "shop", 3, reason="r"), Step("promote", "shop", 3)])
def test_a_step_is_done_to_the_rollout_that_was_seen_and_to_no_other(
    workspace: Workspace, aliases: dict[str, int], step: Step
):
    """It changed after the second yes was looked at: under the lock of the change nothing is done."""
    seen = served(workspace)
    options = {"action": "canary", "version": 3, "share": 0.5}
    change(workspace.deployments, "shop", lambda window: window.try_out(deployment(3), 0.5), **options)
    before = {file: file.read_bytes() for file in workspace.deployments.iterdir()}
    with pytest.raises(Changed, match=r"canary 3 on 5 % .* now: default 2, canary 3 on 50 %"):
        perform(workspace, step, seen)
    assert {file: file.read_bytes() for file in workspace.deployments.iterdir()} == before
    assert aliases == {"production": 2, "canary": 3}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host", "0.0.0.0"), "--certificate and --key must be given where others reach --host, got '0.0.0.0'"),
        (("--certificate", "c.pem"), "--certificate and --key go together"),
        (("--host", "0.0.0.0", "--certificate", "c.pem", "--key", "k.pem"), "--name must say what browsers call"),
        (("--password-file", "none"), "password file 'none' cannot be read: FileNotFoundError"),
        (("--password-file", "short"), "must have at least 12 characters, got 5"),
    ],
)
def test_what_would_not_be_safe_is_refused_before_anything_listens(workspace: Workspace, words, said):
    """In a sentence that names the option."""
    Path("short").write_text("short\n")
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(app, ["console", "--port", "0", *words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("host", "names", "called"),
    [
        ("127.0.0.1", [], {"127.0.0.1", "localhost", "[::1]"}),
        ("::1", [], {"127.0.0.1", "localhost", "[::1]"}),
        ("10.0.0.7", [], {"10.0.0.7"}),
        ("10.0.0.7", ["Console.Internal"], {"console.internal"}),
    ],
)
def test_the_console_is_known_by_its_names_alone(host, names, called):
    """Those that are given, else what its address says."""
    assert _place(host, names, tls=True)[0].names == called


def test_the_command_keeps_its_password_in_a_file_and_out_of_what_it_prints(workspace: Workspace):
    """It says where it listens and where the password is; SIGTERM ends it."""
    Path("model.py").write_text(FILE)
    Registry(workspace).register(load_model(Path("model.py")), NETWORK, Path("model.py"))
    command = [sys.executable, "-m", "hybrid", "console", "--port", "0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=dict(os.environ), **streams)
    first, second = process.stdout.readline(), process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert first.startswith("The console: http://127.0.0.1:")
    file = workspace.keys / "console-password"
    assert second == f"Its password is in {file}.\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().strip() not in first + second + said
    assert process.returncode == 0
