import json

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError

CSV = "person,offer_id,clicked\nada,o1,1\nbob,o2,0\nada,o2,0\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(*words) -> what `hybrid population ...` prints, in a workspace of its own."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clicks.csv").write_text(CSV)

    def invoke(*words):
        return CliRunner().invoke(app, ["population", *words], catch_exceptions=False).stdout

    return invoke


def test_an_import_says_what_it_brought(run):
    """Two users, three rows; no user is named."""
    printed = run("import", "clicks.csv", "--user", "person", "--name", "clicks")
    assert printed == "population clicks: 2 users, 3 rows\n"


def test_a_script_can_read_what_there_is(run):
    """`list --json` gives one object a population."""
    run("import", "clicks.csv", "--user", "person", "--name", "clicks")
    assert json.loads(run("list", "--json")) == [{"name": "clicks", "users": 2, "rows": 3, "time": None}]


def test_an_import_under_a_taken_name_needs_replace(run):
    """Without it the command fails; with it the population is the new one."""
    words = ("import", "clicks.csv", "--user", "person", "--name", "clicks")
    run(*words)
    with pytest.raises(ConfigError, match="--replace"):
        run(*words)
    assert "3 rows" in run(*words, "--replace")
