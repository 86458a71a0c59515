import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from hybrid.bundle import trusted_key
from hybrid.cli import app
from hybrid.deployment import Window
from hybrid.errors import ConfigError, NotFound
from hybrid.rollout import Rollout
from hybrid.workspace import Workspace
from serving.testing import deployment


def run(*words: str) -> str:
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def served(workspace: Workspace) -> Window:
    return Window.read(workspace.deployments / "shop.json")


def tried_out(workspace: Workspace) -> None:
    from hybrid.deployment import change

    change(
        workspace.deployments,
        "shop",
        lambda window: window.try_out(deployment(3), 0.05),
        action="canary",
        version=3,
        share=0.05,
    )


def test_a_rollback_takes_the_canary_back_and_devices_believe_it(workspace: Workspace, aliases: dict[str, int]):
    """By the workspace's own key; its alias goes, and the default stays as it was."""
    tried_out(workspace)
    assert "shop:3 was taken back (recall fell); devices fetch 2" in run("rollback", "shop", "--reason", "recall fell")
    window = served(workspace)
    assert (window.default.version, window.canary, [one.version for one in window.halted]) == (2, None, [3])
    assert Rollout.of(window).halts(trusted_key(workspace.keys / "bundle-signing.pub")) == {3: "recall fell"}
    assert aliases == {"production": 2}


def test_a_shadow_is_taken_back_before_the_default(workspace: Workspace, aliases: dict[str, int]):
    """Its alias goes; the history says what it was, and a file without one is as before there were shadows."""
    from hybrid.deployment import change

    aliases["shadow"] = 3
    shade = {"action": "shadow", "version": 3, "share": 0.1}
    change(workspace.deployments, "shop", lambda window: window.shade(deployment(3), 0.1), **shade)
    assert "shop:3 was taken back (rolled back); devices fetch 2" in run("rollback", "shop")
    assert aliases == {"production": 2, "canary": 3}
    found = [(one["action"], one.get("shadow")) for one in json.loads(run("history", "shop", "--json"))]
    assert found[-2:] == [("shadow", 3), ("halt", None)]
    assert "shadow" not in json.loads((workspace.deployments / "shop.json").read_text())


def test_without_a_canary_it_is_the_default_that_is_taken_back(workspace: Workspace, aliases: dict[str, int]):
    """What came before it is in production again; of it there is nothing to go back to."""
    shown = json.loads(run("rollback", "shop", "--json"))
    assert shown == {"model": "shop", "halted": 2, "reason": "rolled back", "default": 1}
    assert aliases == {"production": 1, "canary": 3}
    with pytest.raises(ConfigError, match="shop:1 is the only version that is served"):
        run("rollback", "shop")
    assert served(workspace).default.version == 1


def test_the_history_says_what_was_done_when_and_why(workspace: Workspace, aliases: dict[str, int]):
    """In the order in which it was done."""
    tried_out(workspace)
    run("rollback", "shop", "--reason", "p99 [rose]")
    changes = json.loads(run("history", "shop", "--json"))
    assert [(one["action"], one["version"], one["default"]) for one in changes] == [
        ("promote", 1, 1),
        ("promote", 2, 2),
        ("canary", 3, 2),
        ("halt", 3, 2),
    ]
    assert changes[2]["share"] == 0.05
    assert changes[3]["reason"] == "p99 [rose]"
    printed = run("history", "shop")
    assert "p99 [rose]" in printed
    assert "5%" in printed


@pytest.mark.parametrize(("version", "left"), [(3, {"production": 3}), (4, {"production": 4, "canary": 3})])
def test_a_promoted_canary_is_the_canary_no_longer(
    workspace: Workspace, aliases: dict[str, int], monkeypatch, version, left
):
    """Also where it is exported anew, as `hybrid promote` does; another version leaves the canary where it is."""
    from hybrid.cli import promote

    tried_out(workspace)
    exported = SimpleNamespace(deployment=deployment(version))
    found = SimpleNamespace(number=version, aliases=("canary",) if version == 3 else ())
    monkeypatch.setattr(promote, "version_of", lambda *_, **__: found)
    monkeypatch.setattr("hybrid.export.promote.export_version", lambda *_: exported)
    assert promote.export_to(workspace, SimpleNamespace(name="shop"), version, "production")[0] is exported
    assert aliases == left


@pytest.mark.parametrize("share", ["0", "0%", "101%", "1.01", "-5%", "five", "nan", ""])
def test_a_share_is_above_0_and_at_most_1(share: str):
    """Before anything is read."""
    with pytest.raises(ConfigError, match=f"--canary must be a share above 0%, .* got '{share}'"):
        run("rollout", "shop", "3", f"--canary={share}")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("rollout", "shop", "3"), ConfigError, "--canary or --shadow must be given, and not both"),
        (("rollout", "shop", "3", "--shadow", "2"), ConfigError, "--shadow must be a share above 0%, .* got '2'"),
        (("rollout", "shop", "3", "--canary", "5%", "--on-devices"), ConfigError, "--on-devices needs --shadow"),
        (("rollback", "shop", "--version", "7"), NotFound, "shop:7 is not served; served are: 2, 1"),
        (("rollback", "other"), NotFound, "nothing is served of other yet: `hybrid promote other VERSION production`"),
        (("rollback", "shop", "--reason", ""), ConfigError, "--reason must have 1 to 500 characters, got 0"),
        (("history", "other"), NotFound, "other has no history: `hybrid promote other VERSION production` begins it"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(workspace: Workspace, words, error, message):
    """In a sentence that says what to do."""
    before = {file: file.read_bytes() for file in workspace.deployments.iterdir()}
    with pytest.raises(error, match=message):
        run(*words)
    assert {file: file.read_bytes() for file in workspace.deployments.iterdir()} == before
