"""MLflow, as the registry speaks to it: where it is, failures as sentences, and the tables of its SQLite file."""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from hybrid.errors import ConfigError, RegistryError
from hybrid.protocol import is_loopback

TRACKING_URI = "MLFLOW_TRACKING_URI"
SERVERS = {"http": 80, "https": 443}
DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433, "sqlite": None}
REACH_S = 3.0  # for a port to answer
# Of MLflow's client, where the team has not set them: with its own a server that is away is waited for for minutes.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
REFUSED = re.compile(r"\b(401|403)\b|UNAUTHENTICATED|PERMISSION_DENIED")
DISTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED|SSLError")
AWAY = re.compile(r"failed with (timeout )?exception|TEMPORARILY_UNAVAILABLE|OperationalError|\b50[0-9]\b")


def check_uri(uri: str) -> None:
    """Raises: ConfigError: no registry could be kept there."""
    scheme = _scheme(uri)
    if scheme not in (*SERVERS, *DATABASES):
        raise ConfigError(
            f"{TRACKING_URI} must be of a server (http://, https://) or a database ({', '.join(DATABASES)}), "
            f"got {scheme or 'a path'}; where it is not set, versions are kept in the workspace"
        )


def is_server(uri: str) -> bool:
    """Whether an MLflow server is meant, which knows where its artifacts go, and not a database."""
    return _scheme(uri) in SERVERS


def is_plaintext(uri: str) -> bool:
    """Whether what is sent to a server, a password too, can be read and changed on the way to another machine."""
    return urlsplit(uri).scheme == "http" and not is_loopback(urlsplit(uri).hostname or "")


def without_credentials(uri: str) -> str:
    """What may be shown of it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def connect(uri: str, where: str) -> Any:
    """MLflow's client, whose failures are RegistryErrors. Takes seconds the first time, to import MLflow.

    Args:
        uri: of a server or a database.
        where: the same, as messages show it.

    Raises:
        RegistryError: it does not answer.
        ConfigError: the database's client is not installed.
    """
    for setting, value in PATIENCE.items():
        os.environ.setdefault(setting, value)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports that it makes its tables
    # Each failure is told by us, in a sentence; theirs hold the database's address, and its password.
    for told_here in ("mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(told_here).setLevel(logging.CRITICAL)
    _check_reached(uri, where)
    return _Told(_told(where, MlflowClient)(tracking_uri=uri, registry_uri=uri), where)


class _Told:
    """MLflow's client, each of whose methods raises RegistryError."""

    def __init__(self, client: Any, where: str) -> None:
        self._client, self._where = client, where

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _told(self._where, getattr(self._client, name))


def _told(where: str, ask: Callable[..., Any]) -> Callable[..., Any]:
    """The same call; whatever MLflow, its HTTP client or its database raise is one sentence."""

    @wraps(ask)
    def asked(*args: Any, **settings: Any) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return ask(*args, **settings)
        except MlflowException as error:
            raise RegistryError(_sentence(where, error.error_code, str(error)), error.error_code) from None
        except ImportError as error:
            raise ConfigError(f"{TRACKING_URI} names {where}, whose client is not installed: {error}") from None
        except OSError as error:  # requests' errors are, too
            status = getattr(getattr(error, "response", None), "status_code", None)
            raise RegistryError(_sentence(where, str(status or type(error).__name__), str(error))) from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "sqlalchemy":
                raise RegistryError(_sentence(where, type(error).__name__, "")) from None
            raise

    return asked


def _sentence(where: str, code: str, text: str) -> str:
    """What went wrong and what to do; of MLflow's text not a word, as it can hold anything."""
    if "out-of-date database schema" in text:
        return f"the tables in {where} are of another MLflow: `hybrid migrate` mends a workspace's own file"
    if REFUSED.search(f"{code} {text[:200]}"):
        return (
            f"the MLflow server {where} refuses: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, must be of someone who may read and write there"
        )
    if DISTRUSTED.search(text):
        return (
            f"the certificate of the MLflow server {where} is of nobody trusted here: MLFLOW_TRACKING_SERVER_CERT_PATH "
            "must name a PEM file of who signed it"
        )
    if AWAY.search(f"{code} {text}"):
        return f"the registry {where} does not answer ({code}): is it up, and is {TRACKING_URI} right?"
    return f"the registry {where} cannot do what it was asked: {code}"


def _check_reached(uri: str, where: str) -> None:
    """Raises: RegistryError: nothing answers at its port. MLflow may try for minutes."""
    parts = urlsplit(uri)
    port = parts.port or (SERVERS | DATABASES).get(_scheme(uri))
    behind_proxy = is_server(uri) and getproxies() and not proxy_bypass(parts.hostname or "")
    if port is None or not parts.hostname or behind_proxy:
        return
    try:
        socket.create_connection((parts.hostname, port), REACH_S).close()
    except OSError as error:
        raise RegistryError(_sentence(where, type(error).__name__, "OperationalError")) from None


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]


def revisions(file: Path) -> tuple[str | None, str]:
    """Of MLflow's tables in an SQLite file: which they are, None where there are none; and which they must be.

    Raises:
        RegistryError: the file is no SQLite database.
    """
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            named = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
            found = named and database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise RegistryError(f"the registry {file} cannot be read: {type(error).__name__}") from None
    return found[0] if found else None, str(_get_latest_schema_revision())


def upgrade(file: Path) -> Path:
    """Brings MLflow's tables in an SQLite file up to date, and keeps a copy of them as they were.

    Returns:
        The copy, `<file>.<revision>`, beside it.

    Raises:
        RegistryError: the file is no SQLite database, or MLflow cannot upgrade it. It is then as it was.
    """
    import sqlalchemy
    from mlflow.store.db.utils import _upgrade_db

    copy = file.with_name(f"{file.name}.{revisions(file)[0]}")
    with closing(sqlite3.connect(file)) as database, closing(sqlite3.connect(copy)) as kept:
        database.backup(kept)
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    try:
        _upgrade_db(engine)
    except Exception as error:
        engine.dispose()
        copy.replace(file)
        raise RegistryError(f"MLflow cannot upgrade {file}: {type(error).__name__}; it is as it was") from None
    engine.dispose()
    return copy
