"""What is special about PostgreSQL: one queen at a time, and a connection that may break."""

import sys

import psycopg
import pytest
from rbee_records import accepted, job_id, narrated

from rbee_queen.store import StoreFailed, postgres
from rbee_queen.store.sql import SqlStore


def impatient(url: str) -> SqlStore:
    """A queen that soon gives up waiting for another one to leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postgres, "PATIENCE_S", 1.0)
        return SqlStore(url)


def cut_connections(url: str) -> None:
    """End every session of rbee, as a restarted server does."""
    query = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'rbee-queen'"
    )
    with psycopg.connect(url) as connection:
        assert connection.execute(query).fetchall()


def test_a_second_queen_is_refused(postgres_url: str) -> None:
    first, second = SqlStore(postgres_url), SqlStore(postgres_url)
    first.open()

    with pytest.raises(StoreFailed, match="another queen uses it"):
        impatient(postgres_url).open()

    first.close()
    second.open()
    second.close()


def test_a_cut_connection_is_made_again(postgres_url: str) -> None:
    store = SqlStore(postgres_url)
    store.open()
    store.write([accepted(1)])

    cut_connections(postgres_url)
    store.write([accepted(2), narrated(1, 1)])
    cut_connections(postgres_url)

    assert [len(job.events) for job in store.unfinished()] == [1, 0]
    store.close()


def test_a_queen_that_was_replaced_while_it_was_cut_off_writes_no_more(postgres_url: str) -> None:
    first, second = impatient(postgres_url), SqlStore(postgres_url)
    first.open()
    cut_connections(postgres_url)
    second.open()

    with pytest.raises(StoreFailed, match="another queen uses it"):
        first.write([accepted(1)])

    assert second.get(job_id(1)) is None
    first.close()
    second.close()


def test_no_request_text_is_in_what_the_server_refuses(postgres_url: str) -> None:
    store = SqlStore(postgres_url)
    store.open()
    with psycopg.connect(postgres_url) as connection:
        connection.execute("ALTER TABLE payloads ADD CHECK (length(body) < 5)")

    with pytest.raises(StoreFailed, match="23514") as failed:
        store.write([accepted(1)])

    assert "prompt" not in str(failed.value)
    assert failed.value.__suppress_context__
    store.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("/rbee_", "/no_"), "this database does not exist .*createdb"),
        (("//rbee@", "//nobody:secret@"), "the login is refused .*check user"),
        (("?host=/", "?host=/nowhere/"), "the server cannot be reached"),
    ],
)
def test_a_server_that_refuses_is_explained_in_one_line(
    postgres_url: str, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(StoreFailed, match=message) as failed:
        SqlStore(postgres_url.replace(*change)).open()

    assert "\n" not in str(failed.value)
    assert "secret" not in str(failed.value)


def test_an_unreachable_server_is_named() -> None:
    with pytest.raises(StoreFailed, match=r"localhost:1/rbee: the server cannot be reached .*check address"):
        SqlStore("postgresql://rbee:secret@localhost:1/rbee").open()


def test_a_missing_driver_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(StoreFailed, match=r"pip install 'rbee-queen\[postgres\]'"):
        SqlStore("postgresql://rbee@localhost/rbee")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "cannot be read"),
        ("queen.db", "cannot be read"),
        ("postgresql://u:secret@host:port/name", "cannot be read"),
        ("mysql://u:secret@host/name", "'mysql' cannot be used"),
        ("postgresql+asyncpg://u:secret@host/name", "cannot be used"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///queen.db?mode=ro", "four slashes"),
        ("sqlite://folder/queen.db", "four slashes"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained_without_its_password(url: str, message: str) -> None:
    with pytest.raises(StoreFailed, match=message) as failed:
        SqlStore(url)

    assert "secret" not in str(failed.value)
