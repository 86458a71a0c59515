import json

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError


def test_the_online_store_is_chosen_shown_and_checked(tmp_path, monkeypatch):
    """SQLite unless told otherwise; a wrong setting is refused and leaves what was; the password stays in its file."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    (tmp_path / "password").write_text("secret\n")

    def store(*words):
        return CliRunner().invoke(app, ["features", "store", *words], catch_exceptions=False).stdout

    assert json.loads(store()) == {"kind": "sqlite"}, "what is Redis's is not shown"
    store("redis", "--address", "redis.internal:6380", "--tls", "--password-file", str(tmp_path / "password"))
    chosen = json.loads(store())
    assert (chosen["kind"], chosen["address"], chosen["tls"]) == ("redis", "redis.internal:6380", True)
    assert "secret" not in (tmp_path / ".hybrid/feast/online.json").read_text()
    for wrong in (["redis", "--address", "nowhere"], ["mysql"], ["redis", "--password-file", "none"]):
        with pytest.raises(ConfigError):
            store(*wrong)
    assert json.loads(store()) == chosen
    store("sqlite")
    assert json.loads(store())["kind"] == "sqlite"
