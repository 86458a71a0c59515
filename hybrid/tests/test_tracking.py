"""Where versions are kept, what is said where that does not answer, and the upgrade of MLflow's tables."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hybrid.errors import ConfigError, RegistryError
from hybrid.local.process import free_ports
from hybrid.registry import Registry
from hybrid.tracking import revisions, upgrade
from hybrid.workspace import Workspace


@contextmanager
def answering(status: int) -> Iterator[str]:
    """The URL of a server that has one answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def older(file: Path) -> str:
    """Makes MLflow's tables as of the migration before its last; returns that one's name."""
    import sqlalchemy
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    file.parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(str(engine.url))
    revision = ScriptDirectory.from_config(config).get_revision("head").down_revision
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    return str(revision)


def test_a_server_that_is_away_is_one_sentence_within_seconds(tmp_path: Path):
    """Nothing listens on the port: MLflow's own client would try for minutes."""
    import mlflow  # noqa: F401, which alone takes seconds

    (port,) = free_ports(1)
    began = time.monotonic()
    with pytest.raises(RegistryError, match=rf"^the registry http://127.0.0.1:{port} does not answer .* is it up, and"):
        Registry(Workspace(tmp_path), f"http://127.0.0.1:{port}").check()
    assert time.monotonic() - began < 3, "for MLflow itself minutes"


def test_a_database_that_is_away_is_one_sentence_without_its_password(tmp_path: Path):
    """Before its client is asked for, which would try for minutes."""
    (port,) = free_ports(1)
    uri = f"postgresql://mlflow:hunter2@127.0.0.1:{port}/mlflow?sslmode=require"
    with pytest.raises(RegistryError) as raised:
        Registry(Workspace(tmp_path), uri).check()
    assert str(raised.value) == (
        f"the registry postgresql://127.0.0.1:{port}/mlflow does not answer (ConnectionRefusedError): is it up, and is "
        "MLFLOW_TRACKING_URI right?"
    )


def test_a_server_that_refuses_names_the_credentials(tmp_path: Path):
    """With MLflow's variables for them."""
    with answering(401) as url, pytest.raises(RegistryError, match=r"refuses: MLFLOW_TRACKING_USERNAME and MLFLOW_"):
        Registry(Workspace(tmp_path), url).check()


def test_what_is_neither_server_nor_database_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Databricks and plain folders, which keep no registry or are no MLflow of a team's own."""
    for uri, got in (("databricks", "a path"), ("./mlruns", "a path"), ("file:///srv/mlruns", "file")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(ConfigError, match=rf"^MLFLOW_TRACKING_URI must be of a server .*, got {got}; where it is"):
            Registry(Workspace(tmp_path))


def test_without_the_variable_versions_are_kept_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where it is there and empty; credentials in it are not shown."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert Registry(Workspace(tmp_path)).where == str(tmp_path / "mlflow/mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://team:hunter2@mlflow.internal:5000")
    assert Registry(Workspace(tmp_path)).where == "https://mlflow.internal:5000"
    assert not Registry(Workspace(tmp_path)).is_own_file


@pytest.mark.parametrize(
    ("uri", "plaintext"),
    [
        ("http://mlflow:5000", True),
        ("https://mlflow:5000", False),
        ("http://127.0.0.1:5000", False),
        ("postgresql://mlflow@db/mlflow", False),  # what its `sslmode` says
        (None, False),
    ],
)
def test_a_server_of_another_machine_that_is_spoken_to_without_tls_is_known(
    tmp_path: Path, uri: str | None, plaintext: bool
):
    """A mesh may encrypt all the same, which cannot be seen from here."""
    assert Registry(Workspace(tmp_path), uri).is_plaintext == plaintext


def test_tables_of_an_older_mlflow_are_brought_up_to_date_and_kept_as_they_were(tmp_path: Path):
    """One upgrade is enough; the copy has the older tables."""
    file = tmp_path / "mlflow/mlflow.db"
    revision = older(file)
    found, expected = revisions(file)
    assert (found, found != expected) == (revision, True)
    copy = upgrade(file)
    assert (revisions(file)[0], revisions(copy)[0]) == (expected, revision)
    Registry(Workspace(tmp_path)).check()


def test_tables_of_another_mlflow_are_told_with_what_mends_them(tmp_path: Path):
    """All tables are there, under the name of another migration: MLflow does not upgrade those by itself."""
    file = tmp_path / "mlflow/mlflow.db"
    older(file)
    upgrade(file)
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
    with pytest.raises(RegistryError, match=f"^the tables in {file} are of another MLflow: `hybrid migrate` mends"):
        Registry(Workspace(tmp_path)).check()


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path):
    """Its tables are of an MLflow that this one does not know."""
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE alembic_version (version_num)")
        database.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
        database.commit()
    with pytest.raises(RegistryError, match=r"cannot upgrade .*; it is as it was$"):
        upgrade(file)
    assert revisions(file)[0] == "ffffffffffff"


def test_a_file_that_is_no_database_is_told(tmp_path: Path):
    """By a sentence, not SQLite's error."""
    (tmp_path / "mlflow.db").write_bytes(b"not a database, but as long as its header is" * 10)
    with pytest.raises(RegistryError, match=r"mlflow.db cannot be read: DatabaseError$"):
        revisions(tmp_path / "mlflow.db")
