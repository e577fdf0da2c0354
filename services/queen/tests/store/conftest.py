"""Databases for the tests of the store: memory, a SQLite file, and a PostgreSQL server of our own."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import psycopg
import pytest

from rbee_queen.store import JobStore
from rbee_queen.store.sql import SqlStore
from rbee_queen.store.testing import MemoryStore

MakeStore: TypeAlias = Callable[..., JobStore]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run a server that listens on a Unix socket alone; give the URL of its first database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("postgres")
    if not programs and found is None:
        pytest.skip("no PostgreSQL server on this machine (Debian: apt install postgresql)")
    program = programs[-1] if programs else Path(str(found)).parent
    as_root = os.geteuid() == 0
    user = "postgres" if as_root else pwd.getpwuid(os.geteuid()).pw_name
    try:
        owner = pwd.getpwnam(user)
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and this machine has no user postgres")
    switch: dict[str, Any] = {}
    if as_root:
        switch = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    # Not pytest's folder: another user could not enter it, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="rbee-pg-"))
    try:
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        data = folder / "data"
        subprocess.run(
            [program / "initdb", "-D", data, "-U", "rbee", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **switch,
        )
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [program / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"],
                stdout=log,
                stderr=log,
                cwd=folder,
                **switch,
            )
        try:
            url = f"postgresql://rbee@/postgres?host={folder}"
            _wait_for(url, server, folder / "log")
            yield url
        finally:
            server.terminate()
            server.wait(30)
    finally:
        shutil.rmtree(folder)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def new_postgres_url(postgres: str) -> Callable[[], str]:
    """Make empty databases on the server."""

    def make() -> str:
        name = f"rbee_{uuid4().hex}"
        with psycopg.connect(postgres, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return postgres.replace("/postgres?", f"/{name}?")

    return make


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
