from itertools import pairwise

import typer
from typer.testing import CliRunner

from hybrid.cli import app


def said(*words, status=0):
    """What a command line prints, both streams."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == status, result.output
    return result.output


def test_help_has_the_brackets_that_were_written():
    """`[grid]`, a table's name in TOML, is no markup: it stands where the option and where the example name it."""
    printed = said("sweep", "--help")
    assert printed.count("[grid]") == 2
    assert "[fixed]" in printed


def test_what_is_meant_is_asked_once():
    """A slip of the hand is answered with the command that is near it, once."""
    assert said("trian", status=2).count("Did you mean 'train'?") == 1


def test_short_help_and_the_version_are_where_people_look_for_them():
    """`-h` is `--help`, of the groups' commands too; `--version` is one line that a bug report can have."""
    assert said("-h") == said("--help")
    assert "MODEL ENTITY..." in said("features", "read", "-h")
    name, number = said("--version").split()
    assert name == "hybrid-towers"
    assert number[0].isdigit()


def test_commands_without_an_argument_show_help():
    """`hybrid` alone is no error without a word: it says what there is."""
    assert "register" in said(status=2)


def test_an_empty_folder_is_named(tmp_path, monkeypatch):
    """Whoever stands in another folder than their project's sees where was looked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRID_HOME", raising=False)
    for words, status in ((["models"], 0), (["status"], 1)):
        assert str(tmp_path / ".hybrid") in said(*words, status=status)


def test_every_command_says_what_it_does():
    """Each command and each option of the tree has a help text."""

    def walk(command, path):
        assert command.help, path
        for parameter in command.params:
            assert getattr(parameter, "help", None), (*path, parameter.name)
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())


def test_help_is_wrapped_at_the_width_of_the_terminal(monkeypatch):
    """A line is as long as it can be with 58 columns for text, however its source is wrapped; code keeps its lines."""
    monkeypatch.setenv("COLUMNS", "60")
    prose = said("evaluate", "--help").partition("Arguments")[0]
    for line, following in pairwise(line.strip() for line in prose.splitlines()):
        if line and following and "╭" not in following:
            assert len(f"{line} {following.split()[0]}") > 58
    assert "\n     server_lr = [0.003, 0.01] " in said("sweep", "--help")
