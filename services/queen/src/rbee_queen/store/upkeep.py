"""What is done to the tables as a whole: made, brought up to date, emptied of what is past its time."""

from pathlib import Path

from sqlalchemy import Connection, Text, func, inspect, literal_column, select, table, tuple_

from rbee_queen.store.base import FORGET_AT_ONCE, StoreState
from rbee_queen.store.queries import LAST_SEQ
from rbee_queen.store.schema import REVISION, counters, is_finished, jobs, payloads

_VERSIONS = "alembic_version"
_CHECK = "check"


def prepare(connection: Connection) -> None:
    """Make the tables, or bring them to this version.

    Raises:
        StoreFailed: a newer version has been here.
    """
    if inspect(connection).has_table(_VERSIONS):
        query = select(literal_column("version_num", Text())).select_from(table(_VERSIONS))
        if connection.execute(query).scalars().all() == [REVISION]:
            return
    # Alembic takes a while to import, and a restart after a crash is to be short.
    from rbee_queen.store.migrate import migrate

    migrate(connection)


def erase_payloads(connection: Connection) -> None:
    """Erase the text of requests that were kept after their end."""
    has_ended = select(jobs.c.seq).where(jobs.c.seq == payloads.c.seq, is_finished).exists()
    connection.execute(payloads.delete().where(has_ended))


def forget(connection: Connection, *, finished_before: str, keep: int) -> int:
    """Delete the jobs that ended first, as far as they are past either bound; say how many."""
    by_end = (jobs.c.finished_at, jobs.c.seq)
    ended = select(*by_end).where(is_finished)
    newest = [column.desc() for column in by_end]
    one_too_many = connection.execute(ended.order_by(*newest).offset(keep).limit(1)).one_or_none()
    is_past = jobs.c.finished_at < finished_before
    if one_too_many is not None and one_too_many.finished_at >= finished_before:
        is_past = tuple_(*by_end) <= tuple_(*one_too_many)
    query = ended.with_only_columns(jobs.c.seq).where(is_past).order_by(*by_end).limit(FORGET_AT_ONCE)
    past = connection.execute(query).scalars().all()
    if past:
        _remember_seq(connection, max(past))
        connection.execute(jobs.delete().where(jobs.c.seq.in_(past)))
    return len(past)


def state(connection: Connection, kind: str, folder: Path | None) -> StoreState:
    """Write something that changes nothing, and say what the database is."""
    connection.execute(counters.delete().where(counters.c.name == _CHECK))
    connection.execute(counters.insert().values(name=_CHECK, value=0))
    connection.execute(counters.delete().where(counters.c.name == _CHECK))
    query = select(literal_column("version_num", Text())).select_from(table(_VERSIONS))
    version = connection.dialect.server_version_info or ()
    return StoreState(
        kind=kind,
        version=".".join(map(str, version)),
        revision=connection.execute(query).scalars().one_or_none(),
        newest=REVISION,
        folder=folder,
    )


def _remember_seq(connection: Connection, seq: int) -> None:
    if connection.execute(select(func.max(jobs.c.seq))).scalar_one() > seq:
        return
    connection.execute(counters.delete().where(counters.c.name == LAST_SEQ))
    connection.execute(counters.insert().values(name=LAST_SEQ, value=seq))
