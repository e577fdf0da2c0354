"""The tables: migrations make what the code uses, and leave a newer version's database alone."""

import re

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from rbee_queen.store import StoreFailed
from rbee_queen.store.database import choose
from rbee_queen.store.migrate import configuration
from rbee_queen.store.schema import REVISION, metadata
from rbee_queen.store.sql import SqlStore


def connect(url: str) -> Connection:
    return create_engine(url.replace("postgresql:", "postgresql+psycopg:"), poolclass=NullPool).connect()


def migrated(url: str) -> None:
    store = SqlStore(url)
    store.open()
    store.close()


def declared(connection: Connection) -> list[str]:
    """Give what SQLite has been told to make, less what does not matter."""
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'alembic%'"
    found = [re.sub(r"\s+", " ", sql) for sql in connection.execute(text(query)).scalars()]
    # The order in which a table names its constraints.
    return sorted(" ".join(sorted(re.split(r", (?=CONSTRAINT|[a-z_]+ [A-Z])", sql))) for sql in found)


def test_the_migrations_end_at_the_revision_that_the_code_names() -> None:
    assert ScriptDirectory.from_config(configuration()).get_heads() == [REVISION]


def test_the_migrated_tables_are_the_declared_ones(database_url: str) -> None:
    migrated(database_url)

    with connect(database_url) as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert context.get_current_heads() == (REVISION,)
        assert compare_metadata(context, metadata) == []


def test_the_migrated_tables_are_the_declared_ones_to_the_letter(sqlite_url: str) -> None:
    migrated(sqlite_url)

    with connect(sqlite_url) as connection, connect("sqlite://") as fresh:
        metadata.create_all(fresh)
        assert declared(connection) == declared(fresh)


def test_a_database_of_the_first_version_keeps_its_jobs(database_url: str) -> None:
    database = choose(database_url)
    database.connect().close()
    database.close()
    columns = (
        "seq, job_id, state, name, correlation_id, created_at, has_spoken, digest, starts_at_once, operation"
    )
    values = "7, 'job-7', 'running', 'status', 'c', '2026', false, 'x', true, '{}'"
    with connect(database_url) as connection:
        command.upgrade(configuration(connection), "0001")
        connection.execute(text(f"INSERT INTO jobs ({columns}) VALUES ({values})"))
        connection.commit()

    store = SqlStore(database_url)
    store.open()
    (job,) = store.unfinished()
    store.close()

    assert (job.accepted.job_id, job.accepted.traceparent) == ("job-7", None)


def test_a_database_of_a_newer_version_is_left_alone(database_url: str) -> None:
    migrated(database_url)
    with connect(database_url) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9876'"))
        connection.commit()

    with pytest.raises(StoreFailed, match=r"'9876'.*newer rbee"):
        migrated(database_url)

    with connect(database_url) as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["9876"]


def test_a_migration_that_fails_leaves_nothing_behind(database_url: str) -> None:
    database = choose(database_url)
    database.connect().close()
    database.close()
    with connect(database_url) as connection:
        connection.execute(text("CREATE TABLE hives (mine integer)"))
        connection.commit()

    with pytest.raises(StoreFailed):
        migrated(database_url)

    with connect(database_url) as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_heads() == ()
        connection.execute(text("DROP TABLE hives"))
        connection.commit()
    migrated(database_url)
