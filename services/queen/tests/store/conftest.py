"""Databases for the tests of the store: memory, a SQLite file, and a PostgreSQL server of our own."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import psycopg
import pytest
from rbee_postgres import new_database, postgres_server

from rbee_queen.store import JobStore
from rbee_queen.store import postgres as postgres_module
from rbee_queen.store.sql import SqlStore
from rbee_queen.store.testing import MemoryStore

MakeStore: TypeAlias = Callable[..., JobStore]


@pytest.fixture(autouse=True)
def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session of a queen that has ended may linger on a busy machine."""
    monkeypatch.setattr(postgres_module, "PATIENCE_S", 40.0)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a server that listens on a Unix socket alone; give the URL of its first database."""
    with postgres_server() as url:
        yield url


@pytest.fixture
def new_postgres_url(postgres: str) -> Iterator[Callable[[], str]]:
    """Make empty databases on the server. Each goes with its test: all together take long to delete."""
    made: list[str] = []

    def make() -> str:
        made.append(new_database(postgres))
        return f"{made[-1]}&connect_timeout=40"

    yield make
    with psycopg.connect(postgres, autocommit=True) as connection:
        for url in made:
            name = url.partition("?")[0].rpartition("/")[2]
            with suppress(psycopg.Error):  # it goes with the server then
                connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@pytest.fixture
def postgres_url(new_postgres_url: Callable[[], str]) -> str:
    """The URL of an empty database on the server."""
    return new_postgres_url()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a file that is not there yet, in a folder that is not there yet."""
    return f"sqlite:///{tmp_path / 'state' / 'queen.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """Make stores of each kind, open and empty; they are closed at the end."""
    made: list[JobStore] = []
    # Taken now, so that the stores are closed before their databases go.
    new_url = request.getfixturevalue("new_postgres_url") if request.param == "postgres" else None

    def make(**options: bool) -> JobStore:
        store: JobStore
        if request.param == "memory":
            store = MemoryStore(**options)
        elif request.param == "sqlite":
            store = SqlStore(f"sqlite:///{tmp_path / uuid4().hex / 'queen.db'}", **options)
        else:
            assert new_url is not None
            store = SqlStore(new_url(), **options)
        store.open()
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()
