"""The tables. A change here needs a new file in `migrations/versions` and its number in `REVISION`."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)
from sqlalchemy.dialects import postgresql

REVISION = "0002"

# SQLite makes only an INTEGER the row's own key.
Seq = BigInteger().with_variant(Integer(), "sqlite")
# RFC 3339 in UTC with microseconds: byte order is the order in time, whatever the server's locale.
Time = Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("seq", Seq, primary_key=True, autoincrement=False),
    Column("job_id", Text, nullable=False, unique=True),
    Column("state", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("model", Text),
    Column("correlation_id", Text, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("started_at", Time),
    Column("finished_at", Time),
    Column("has_spoken", Boolean, nullable=False),
    Column("idempotency_key", Text),
    Column("digest", LargeBinary, nullable=False),
    Column("starts_at_once", Boolean, nullable=False),
    Column("resume_window_s", Float(53)),
    Column("timeout_s", Float(53)),
    Column("operation", LargeBinary, nullable=False),
    Column("error", LargeBinary),
    Column("usage", LargeBinary),
    Column("result", LargeBinary),
    Column("traceparent", Text),
)
is_unfinished = jobs.c.finished_at.is_(None)
is_finished = jobs.c.finished_at.is_not(None)
Index("jobs_unfinished", jobs.c.seq, sqlite_where=is_unfinished, postgresql_where=is_unfinished)
Index("jobs_finished", jobs.c.finished_at, jobs.c.seq, sqlite_where=is_finished, postgresql_where=is_finished)


def _job() -> Column[int]:
    return Column("seq", Seq, ForeignKey("jobs.seq", ondelete="CASCADE"), primary_key=True)


# The text of a request, apart from its job: large, never changed, and soon deleted.
payloads = Table("payloads", metadata, _job(), Column("body", LargeBinary, nullable=False))

events = Table(
    "events",
    metadata,
    _job(),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("i", Integer, nullable=False),
    Column("lower_n", Integer),
    Column("body", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

steps = Table(
    "steps",
    metadata,
    _job(),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Text, primary_key=True),
    Column("hive_id", Text, nullable=False),
    Column("lower_job_id", Text, nullable=False),
    sqlite_with_rowid=False,
)

hives = Table(
    "hives",
    metadata,
    Column("hive_id", Text, primary_key=True),
    Column("url", Text, nullable=False),
    Column("boot", Text, nullable=False),
)

# `last_seq`: the highest seq that was ever forgotten.
counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
