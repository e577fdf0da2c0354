"""A database as the store needs it; `sqlite.py` and `postgres.py` hold what differs."""

from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Dialect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from rbee_queen.store.base import StoreFailed

USE = "use sqlite:////folder/queen.db or postgresql://user@host/database"


class Database(Protocol):
    """One database, for one queen at a time."""

    @property
    def dialect(self) -> Dialect: ...

    @property
    def kind(self) -> str:
        """What people call it."""

    @property
    def folder(self) -> Path | None:
        """Where its file lies; None where a server has it."""

    @property
    def patience_s(self) -> float:
        """For how long a lost connection is worth another attempt."""

    def connect(self) -> Connection:
        """Make the one connection, and keep every other queen out.

        Raises:
            StoreFailed: it cannot be reached, or another queen is in.
        """

    def wipe(self, connection: Connection) -> None:
        """Let what was erased leave the files too."""

    def explain(self, exc: Exception) -> StoreFailed:
        """Say what went wrong, and what to do."""

    def close(self) -> None:
        """Let other queens in."""


def choose(url: str) -> Database:
    """Give the database that a URL names.

    Raises:
        StoreFailed: it names none, or its driver is not installed.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):
        # The text may hold a password.
        raise StoreFailed(f"the database URL cannot be read; {USE}.") from None
    if parsed.drivername in {"sqlite", "sqlite+pysqlite"}:
        from rbee_queen.store.sqlite import SqliteDatabase

        return SqliteDatabase(parsed)
    if parsed.drivername in {"postgresql", "postgresql+psycopg", "postgres"}:
        from rbee_queen.store.postgres import PostgresDatabase

        return PostgresDatabase(parsed)
    raise StoreFailed(f"a database of the kind {backend!r} cannot be used; {USE}.")
