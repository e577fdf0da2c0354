"""A PostgreSQL server of our own, for as long as tests need it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a server that listens on a Unix socket alone; give the URL of its first database.

    Skips the test where this machine has none.
    """
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
            server.send_signal(signal.SIGINT)  # it does not wait until its clients have left
            server.wait(60)
    finally:
        shutil.rmtree(folder)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 45
    while True:
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        else:
            return


def new_database(server: str) -> str:
    """Make an empty database on a server; give its URL."""
    name = f"rbee_{uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    return server.replace("/postgres?", f"/{name}?")
