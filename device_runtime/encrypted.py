"""One SQLite file that is encrypted at rest with a key that the host app keeps: SQLCipher's format 4, AES-256, raw key.

Pages are encrypted before they are written, those of the rollback journal too; what SQLite would put into temporary
files stays in memory. Without the key the file is random bytes. What is deleted is overwritten before its pages
are used again or given back.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hybrid.errors import ConfigError, StoreError

KEY_BYTES = 32
PAGE = 4096  # SQLCipher 4's
RESERVE = 128 << 10  # enough to delete one row, whatever of its pages changes
WAIT_S = 10.0  # for another process's transaction
FORMAT = 1
_INCREMENTAL = 2  # of auto_vacuum
_SETTINGS = (
    "temp_store=MEMORY",
    "secure_delete=ON",
    "journal_mode=TRUNCATE",  # unlike a WAL it takes nothing of a full disk to open and to read
    "synchronous=FULL",
    "trusted_schema=OFF",
)
_NO_SPACE = {"SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN"}
_PLAIN = b"SQLite format 3\0"


class Full(StoreError):
    """The disk, or what the store may take of it, is full. Nothing was changed."""


class Database:
    """A connection to one encrypted file, for one thread; other processes may have theirs.

    Beside the file lies another, `NAME-reserve`, of 128 kB of random bytes: space that is given back when a
    full disk would keep a person from deleting.

    Args:
        file: of this database.
        key: of 32 bytes; the same ever after.
        create: whether to make a file that does not exist.

    Raises:
        ConfigError: no such file, or no key of that length.
        StoreError: another key's, damaged, or no database of this kind. Nothing is changed.
    """

    def __init__(self, file: Path, key: bytes, *, create: bool) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"the store's key must have {KEY_BYTES} bytes, got {len(key)}")
        self._file, self._reserve = file, file.with_name(f"{file.name}-reserve")
        self._deep = False
        _private_file(file, create=create)
        self._connection = self._connect(key)
        self._refill()

    def _connect(self, key: bytes) -> Any:
        import sqlcipher3

        self._error = sqlcipher3.Error
        with self._explained():
            uri = f"{self._file.resolve().as_uri()}?mode=rw"
            connection = sqlcipher3.connect(uri, uri=True, timeout=WAIT_S, isolation_level=None)
        try:
            with self._explained():
                connection.execute("PRAGMA cipher_log_level=NONE")  # it writes to standard error
                connection.execute(f"PRAGMA key=\"x'{key.hex()}'\"")
                self._check_key(connection)
                if connection.execute("PRAGMA auto_vacuum").fetchone() != (_INCREMENTAL,):
                    # Before the first table; later it would be a write, and a full disk could not be opened.
                    connection.execute(f"PRAGMA auto_vacuum={_INCREMENTAL}")
                for setting in _SETTINGS:
                    connection.execute(f"PRAGMA {setting}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_key(self, connection: Any) -> None:
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except self._error as error:
            if _code(error) != "SQLITE_NOTADB":
                raise
            with self._file.open("rb") as handle:
                plain = handle.read(len(_PLAIN)) == _PLAIN
            why = (
                "it is a plain SQLite file, of an earlier release; delete it, and let the app write its rows again"
                if plain
                else "the key is not the one it was made with, or the file is damaged; nothing was changed"
            )
            raise StoreError(f"store {self._file.name!r} cannot be opened: {why}") from None
        if version not in (0, FORMAT):
            raise StoreError(f"store {self._file.name!r} has format {version}, this runtime knows {FORMAT}; update it")

    def close(self) -> None:
        """Ends the connection; a transaction that was not committed has not happened."""
        self._connection.close()

    @property
    def in_transaction(self) -> bool:
        """Whether what is done now is part of a transaction that others began."""
        return self._deep

    @property
    def used(self) -> int:
        """Pages of the file, each of `PAGE` bytes, that hold something."""
        pages: int = self.one("PRAGMA page_count")[0] - self.one("PRAGMA freelist_count")[0]
        return pages

    def all(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a statement gives, read to its end: a cursor that is left open would keep writers out."""
        with self._explained():
            found: list[tuple[Any, ...]] = self._connection.execute(sql, values).fetchall()
            return found

    def one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The only row that a statement gives."""
        (row,) = self.all(sql, values)
        return row

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Executes a statement that changes rows, and returns how many it changed."""
        with self._explained():
            changed: int = self._connection.execute(sql, values).rowcount
            return changed

    def insert(self, sql: str, values: Sequence[Any]) -> int:
        """Inserts one row and returns its id."""
        with self._explained():
            row: int = self._connection.execute(sql, values).lastrowid
            return row

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """The same for many rows of values."""
        with self._explained():
            changed: int = self._connection.executemany(sql, rows).rowcount
            return changed

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within happens, or nothing of it; one within another is part of it.

        Raises:
            Full: there is no space for it.
            StoreError: another process holds the file for longer than can be waited, or the disk fails.
        """
        if self._deep:
            yield
            return
        self.all("BEGIN IMMEDIATE")
        self._deep = True
        try:
            yield
            self.all("COMMIT")
        finally:
            self._deep = False
            if self._connection.in_transaction:
                with suppress(self._error):
                    self._connection.execute("ROLLBACK")

    def shrink(self) -> None:
        """Gives free pages back to the file system."""
        self.all("PRAGMA incremental_vacuum")

    def rewrite(self) -> None:
        """Writes every page anew: a split of a page leaves copies of rows that deleting does not overwrite."""
        self.all("VACUUM")

    @contextmanager
    def reserve(self) -> Iterator[None]:
        """Within, the space that was kept for a full disk is the file system's."""
        with suppress(OSError):
            os.truncate(self._reserve, 0)
        try:
            yield
        finally:
            self._refill()

    def _refill(self) -> None:
        """Takes the reserve, where there is space for it."""
        with suppress(OSError):
            if self._reserve.stat().st_size == RESERVE:
                return
        try:
            # Random: a file system that compresses would give no space to zeros.
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(os.urandom(RESERVE))
        except OSError:
            with suppress(OSError):
                os.truncate(self._reserve, 0)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as ours. Its texts name columns, and never hold a value."""
        try:
            yield
        except self._error as error:
            code, name = _code(error), self._file.name
            if code in _NO_SPACE:
                raise Full(f"store {name!r} cannot be written: no space is left, or the disk fails ({code})") from None
            if code == "SQLITE_CONSTRAINT":
                raise ConfigError(f"store {name!r} refuses a row: {error}") from None
            if code == "SQLITE_BUSY":
                raise StoreError(f"store {name!r} was held by another process for more than {WAIT_S:g} s") from None
            raise StoreError(f"store {name!r} cannot be used: {error} ({code})") from None


def _code(error: Exception) -> str:
    """SQLite's name of an error, without what is behind the primary one: SQLITE_IOERR of SQLITE_IOERR_WRITE."""
    return "_".join(str(getattr(error, "sqlite_errorname", "SQLITE_ERROR")).split("_")[:2])


def _private_file(file: Path, *, create: bool) -> None:
    """Makes an empty file that its owner alone may use, or makes sure that an existing one is so."""
    try:
        if create:
            with suppress(FileExistsError):
                os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not file.is_file():
            raise ConfigError(f"store {str(file)!r} does not exist")
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"store {str(file)!r} cannot be opened: {type(error).__name__}") from None
