import stat

import pytest
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import ConfigError


@pytest.fixture
def hybrid(tmp_path, monkeypatch):
    """(*words) -> what a command prints, in a workspace of its own."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path / ".hybrid"))
    monkeypatch.delenv("HYBRID_KAFKA", raising=False)
    return lambda *words: CliRunner().invoke(app, ["dead-letters", *words], catch_exceptions=False).stdout


def test_keygen_writes_both_halves_and_never_over_one(hybrid, tmp_path):
    """Into the workspace, the private one its owner's; a second time is refused."""
    said = hybrid("keygen")
    private, public = tmp_path / ".hybrid/keys/dead-letters.pem", tmp_path / ".hybrid/keys/dead-letters.pub"
    assert str(private) in said
    assert str(public) in said
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        hybrid("keygen")
    assert private.read_bytes() == before


def test_what_is_missing_is_named(hybrid):
    """A broker, a topic that serving has, a private key."""
    with pytest.raises(ConfigError, match="--kafka must name the broker as HOST:PORT"):
        hybrid("list")
    with pytest.raises(ConfigError, match=r"--topic must be one of \['hybrid.device-embeddings.v1'"):
        hybrid("list", "--kafka", "127.0.0.1:1", "--topic", "other")
    with pytest.raises(ConfigError, match=r"dead-letters\.pem does not exist; `hybrid dead-letters keygen`"):
        hybrid("replay", "--kafka", "127.0.0.1:1")
