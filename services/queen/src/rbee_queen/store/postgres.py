"""PostgreSQL, through psycopg: a commit is as durable as the server is set up to make it."""

import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Dialect, create_engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from rbee_queen.store.base import StoreFailed
from rbee_queen.store.failures import explain_connecting, explain_postgres

PATIENCE_S = 10.0
RETRY_EVERY_S = 0.25

# A peer that is gone without a word is noticed within 25 s, by either side.
_CLIENT = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "25000",
    "application_name": "rbee-queen",
}
_SERVER = (
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
    "SET lock_timeout = '10s'",
)
# One queen for one schema of one database; the first number is any, the same for all queens.
_LOCK = "SELECT pg_try_advisory_lock(1919051109, hashtext(current_schema()))"


class PostgresDatabase:
    """A database on a server. The session holds an advisory lock that keeps a second queen out."""

    kind = "PostgreSQL"
    folder: Path | None = None

    def __init__(self, url: URL) -> None:
        self.patience_s = PATIENCE_S
        self._where = f"database {url.set(query={}, drivername='postgresql').render_as_string()}"
        options = {name: value for name, value in _CLIENT.items() if name not in url.query}
        try:
            self._engine = create_engine(
                url.set(drivername="postgresql+psycopg"),
                connect_args=options,
                poolclass=NullPool,
                hide_parameters=True,
            )
        except ImportError as exc:
            raise StoreFailed(
                f"{self._where}: PostgreSQL needs the package psycopg ({exc}); "
                "install it with: pip install 'rbee-queen[postgres]'."
            ) from None
        except (ArgumentError, ValueError, TypeError):
            raise StoreFailed(f"{self._where}: the URL has a parameter that cannot be used.") from None

    @property
    def dialect(self) -> Dialect:
        return self._engine.dialect

    def connect(self) -> Connection:
        """Connect. A queen that was killed a moment ago may still be in, so this asks for a while."""
        try:
            connection = self._engine.connect()
        except SQLAlchemyError as exc:
            raise explain_connecting(self._where, exc) from None
        try:
            self._enter(connection)
        except SQLAlchemyError as exc:
            connection.close()
            raise self.explain(exc) from None
        except StoreFailed:
            connection.close()
            raise
        return connection

    def wipe(self, connection: Connection) -> None:
        """Nothing to do: the server's own vacuum does it."""

    def explain(self, exc: Exception) -> StoreFailed:
        return explain_postgres(self._where, exc)

    def close(self) -> None:
        """Nothing to do: the lock ends with the connection."""

    def _enter(self, connection: Connection) -> None:
        for statement in _SERVER:
            connection.exec_driver_sql(statement)
        connection.commit()
        deadline = time.monotonic() + self.patience_s
        while not self._has_lock(connection):
            if time.monotonic() >= deadline:
                raise StoreFailed(
                    f"{self._where}: another queen uses it; stop that one, or give this one its own database."
                )
            time.sleep(RETRY_EVERY_S)

    def _has_lock(self, connection: Connection) -> bool:
        answer: Any = connection.exec_driver_sql(_LOCK).scalar_one()
        connection.commit()
        return answer is True
