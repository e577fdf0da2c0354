"""Databases for the tests of the store: memory, a SQLite file, and a PostgreSQL server of our own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import pytest
from rbee_postgres import new_database, postgres_server

from rbee_queen.store import JobStore
from rbee_queen.store.sql import SqlStore
from rbee_queen.store.testing import MemoryStore

MakeStore: TypeAlias = Callable[..., JobStore]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a server that listens on a Unix socket alone; give the URL of its first database."""
    with postgres_server() as url:
        yield url


@pytest.fixture
def new_postgres_url(postgres: str) -> Callable[[], str]:
    """Make empty databases on the server."""

    return lambda: new_database(postgres)


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

    def make(**options: bool) -> JobStore:
        store: JobStore
        if request.param == "memory":
            store = MemoryStore(**options)
        elif request.param == "sqlite":
            store = SqlStore(f"sqlite:///{tmp_path / uuid4().hex / 'queen.db'}", **options)
        else:
            store = SqlStore(request.getfixturevalue("new_postgres_url")(), **options)
        store.open()
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()
