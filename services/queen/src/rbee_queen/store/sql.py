"""The store on SQLAlchemy Core: one connection, used by one thread at a time.

With SQLite what `write` returned for survives a SIGKILL of the queen; a power loss may cost the last
commits, see `sqlite.py`. With PostgreSQL the server decides; by default a power loss costs nothing.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import TypeVar

from sqlalchemy import Connection, and_, tuple_
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from rbee_contracts.jobs import JobPage, JobRecord, JobState
from rbee_queen.store import queries, upkeep
from rbee_queen.store.base import FORGET_AT_ONCE, RESTORED_BYTES, StoreFailed, StoreState
from rbee_queen.store.database import choose
from rbee_queen.store.records import Record, StoredHive, StoredJob
from rbee_queen.store.schema import is_finished, is_unfinished, jobs
from rbee_queen.store.statements import Writer

T = TypeVar("T")

RETRY_EVERY_S = 0.25


class SqlStore:
    """A `JobStore` in the database of a URL: `sqlite:////folder/file` or `postgresql://user@host/name`.

    Args:
        url: which database.
        store_payloads: keep prompts and messages of ended jobs too. Without it, `open` erases those that
            were kept before.

    Raises:
        StoreFailed: the URL names no database that can be used.
    """

    def __init__(self, url: str, *, store_payloads: bool = False) -> None:
        self._database = choose(url)
        self._store_payloads = store_payloads
        self._writer = Writer(self._database.dialect, store_payloads=store_payloads)
        self._driver_errors = (self._database.dialect.loaded_dbapi.Error,)
        self._connection: Connection | None = None

    def open(self) -> None:
        self._connection = self._database.connect()
        try:
            self._run(upkeep.prepare)
            if not self._store_payloads:
                self._run(upkeep.erase_payloads)
        except BaseException:
            self.close()
            raise

    def write(self, records: Sequence[Record]) -> None:
        if not records:
            return
        statements = self._writer.statements(records)

        def execute(connection: Connection) -> None:
            # The driver's own cursor: half the time of SQLAlchemy's, and every request waits for this.
            with closing(connection.connection.cursor()) as cursor:
                for sql, rows in statements:
                    cursor.executemany(sql, rows)

        self._run(execute)

    def hives(self) -> list[StoredHive]:
        return self._run(queries.hives_by_id)

    def unfinished(self) -> list[StoredJob]:
        return self._run(lambda connection: queries.stored_jobs(connection, is_unfinished))

    def finished_since(self, finished_at: str, *, max_bytes: int = RESTORED_BYTES) -> list[StoredJob]:
        def read(connection: Connection) -> list[StoredJob]:
            oldest = queries.oldest_within(connection, finished_at, max_bytes)
            if oldest is None:
                return []
            by_end = tuple_(jobs.c.finished_at, jobs.c.seq)
            return queries.stored_jobs(connection, and_(is_finished, by_end >= tuple_(*oldest)))

        return self._run(read)

    def last_seq(self) -> int:
        return self._run(queries.highest_seq)

    def get(self, job_id: str) -> JobRecord | None:
        return self._run(lambda connection: queries.record(connection, job_id))

    def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        return self._run(
            lambda connection: queries.page(
                connection, state=state, operation=operation, limit=limit, before_seq=before_seq
            )
        )

    def forget(self, *, finished_before: str, keep: int) -> int:
        forgotten = self._run(
            lambda connection: upkeep.forget(connection, finished_before=finished_before, keep=keep)
        )
        if forgotten < FORGET_AT_ONCE and self._connection is not None:
            self._database.wipe(self._connection)
        return forgotten

    def check(self) -> StoreState:
        kind, folder = self._database.kind, self._database.folder
        return self._run(lambda connection: upkeep.state(connection, kind, folder))

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Everything is committed already: what fails now loses nothing.
            with suppress(SQLAlchemyError, *self._driver_errors):
                connection.close()
        self._database.close()

    def _run(self, work: Callable[[Connection], T]) -> T:
        """Do work in one transaction. A lost connection is made anew, and the work is done again."""
        if self._connection is None:
            raise StoreFailed("the database is not open.")
        deadline: float | None = None
        while True:
            try:
                if self._connection.closed:
                    self._connection = self._database.connect()
            except StoreFailed as exc:
                failure = exc
            else:
                try:
                    with self._connection.begin():
                        return work(self._connection)
                except (SQLAlchemyError, *self._driver_errors) as exc:
                    failure = self._database.explain(exc)
                    if not self._is_lost(exc):
                        raise failure from None
                    self._connection.invalidate()
                    self._connection.close()
            now = time.monotonic()
            deadline = deadline or now + self._database.patience_s
            if now >= deadline:
                raise failure from None
            time.sleep(RETRY_EVERY_S)

    def _is_lost(self, exc: Exception) -> bool:
        """Whether an error broke the connection."""
        connection = self._connection
        if connection is None or connection.closed or connection.invalidated:
            return True
        if isinstance(exc, DBAPIError):
            return exc.connection_invalidated
        is_lost: Callable[..., bool] = self._database.dialect.is_disconnect
        return is_lost(exc, connection.connection.driver_connection, None)
