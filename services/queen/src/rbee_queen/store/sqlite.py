"""SQLite: one file for one queen, readable by its owner alone.

A commit goes to the write-ahead log without waiting for the disk (`synchronous=NORMAL`): it survives the
death of the process, however it dies. A power loss or a crash of the kernel may undo the last commits,
never a part of one, and leaves the file whole.
"""

import contextlib
import fcntl
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from rbee_queen.store.base import StoreFailed
from rbee_queen.store.failures import explain_sqlite, explain_system

BUSY_TIMEOUT_S = 5.0
"""How long a write waits for another program that has the file open, such as a backup."""

PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON")


class SqliteDatabase:
    """A SQLite file. A lock on the file `NAME.lock` beside it keeps a second queen out."""

    kind = "SQLite"
    patience_s = 0.0

    def __init__(self, url: URL) -> None:
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise StoreFailed(
                "the SQLite URL names no file, and the queen's jobs must last; use sqlite:////folder/queen.db."
            )
        if url.query or url.host:
            raise StoreFailed(
                "a SQLite URL has no host and no parameters; an absolute path begins with four slashes: "
                "sqlite:////folder/queen.db."
            )
        self.path = Path(url.database).absolute()
        self._where = f"database {self.path}"
        self._lock: int | None = None
        self._engine: Engine = create_engine(
            "sqlite://", creator=self._open_file, poolclass=NullPool, paramstyle="named", hide_parameters=True
        )
        event.listen(self._engine, "begin", _begin)

    @property
    def dialect(self) -> Dialect:
        return self._engine.dialect

    @property
    def folder(self) -> Path | None:
        return self.path.parent

    def connect(self) -> Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path = self.path.resolve()
            self._take_lock()
            for name in ("", "-wal", "-shm"):
                _make_private(self.path.with_name(self.path.name + name), create=not name)
            connection = self._engine.connect()
        except OSError as exc:
            self.close()
            raise explain_system(self._where, exc) from None
        except (SQLAlchemyError, sqlite3.Error) as exc:
            self.close()
            raise self.explain(exc) from None
        return connection

    def wipe(self, connection: Connection) -> None:
        """Empty the write-ahead log, which may still hold erased text; the file itself is zeroed there."""
        driver: Any = connection.connection.driver_connection
        # The log may be read by a backup just now, or the disk be full; then the next call does it.
        with contextlib.suppress(sqlite3.Error):
            driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def explain(self, exc: Exception) -> StoreFailed:
        return explain_sqlite(self._where, exc)

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_file(self) -> sqlite3.Connection:
        # Without Python's own transactions: they would leave changes of the schema outside.
        connection = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection

    def _take_lock(self) -> None:
        path = self.path.with_name(self.path.name + ".lock")
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 20).decode("ascii", "replace").strip()
            os.close(lock)
            raise StoreFailed(
                f"{self._where}: another queen uses it (process {owner or 'unknown'}); "
                "stop that one, or give this one its own --database."
            ) from None
        self._lock = lock
        os.truncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())


def _begin(connection: Connection) -> None:
    driver: Any = connection.connection.driver_connection
    driver.execute("BEGIN IMMEDIATE")


def _make_private(path: Path, *, create: bool) -> None:
    """Let nobody but the owner read a file. SQLite gives `-wal` and `-shm` the mode of the database."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        if create:
            raise
        return
    try:
        if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:
            os.fchmod(file, 0o600)
    finally:
        os.close(file)
