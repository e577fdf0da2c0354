"""What is special about the SQLite file: who may read it, who may use it, and what leaves it."""

import fcntl
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rbee_processes import until
from rbee_records import accepted, at, ended, narrated, whole_job

from rbee_queen.store import StoreFailed
from rbee_queen.store.sql import SqlStore

SECRET = "kept between the two of us"


@contextmanager
def opened(path: Path, *, store_payloads: bool = False) -> Iterator[SqlStore]:
    store = SqlStore(f"sqlite:///{path}", store_payloads=store_payloads)
    store.open()
    try:
        yield store
    finally:
        store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    with opened(folder / "queen.db") as store:
        store.write(whole_job(1))
        found = {path.name: mode(path) for path in folder.iterdir()}

    assert found == dict.fromkeys(("queen.db", "queen.db-wal", "queen.db-shm", "queen.db.lock"), 0o600)
    assert mode(folder) == 0o700


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "queen.db"
    path.touch(0o644)

    with opened(path) as store:
        store.write([accepted(1)])
        assert [mode(each) for each in tmp_path.iterdir()] == [0o600] * 4


@pytest.mark.parametrize("text", [SECRET, SECRET * 1000])
def test_no_byte_of_an_erased_prompt_stays_in_the_files(tmp_path: Path, text: str) -> None:
    job = accepted(1, operation={"operation": "infer", "model": "m", "prompt": text})
    with opened(tmp_path / "queen.db") as store:
        store.write([job, narrated(1, 1)])
        assert SECRET.encode() in bytes_of(tmp_path)

        store.write([ended(1)])
        store.forget(finished_before=at(0), keep=10)

        assert store.get(job.job_id) is not None
        assert SECRET.encode() not in bytes_of(tmp_path)


def test_no_byte_of_a_forgotten_job_stays_in_the_files(tmp_path: Path) -> None:
    with opened(tmp_path / "queen.db") as store:
        store.write([accepted(1), narrated(1, 1, body=SECRET.encode()), ended(1)])
        store.forget(finished_before=at(0), keep=0)

        assert SECRET.encode() not in bytes_of(tmp_path)


def test_payloads_kept_before_are_erased_once_they_are_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "queen.db"
    operation = {"operation": "infer", "model": "m", "prompt": SECRET}
    with opened(path, store_payloads=True) as store:
        store.write([accepted(1, operation=operation), ended(1), accepted(2)])
    assert SECRET.encode() in bytes_of(tmp_path)

    with opened(path) as store:
        assert b"prompt 2" in store.unfinished()[0].accepted.operation
    assert SECRET.encode() not in bytes_of(tmp_path)


def test_a_second_queen_is_refused_and_told_which_is_the_first(tmp_path: Path) -> None:
    path = tmp_path / "queen.db"
    (tmp_path / "alias.db").symlink_to(path)

    with opened(path) as first:
        for name in ("queen.db", "alias.db"):
            with (
                pytest.raises(StoreFailed, match=f"another queen uses it \\(process {os.getpid()}\\)"),
                opened(tmp_path / name),
            ):
                pass
        first.write([accepted(1)])

    with opened(path) as second:
        assert len(second.unfinished()) == 1


def test_the_lock_is_not_handed_to_children(tmp_path: Path) -> None:
    with opened(tmp_path / "queen.db"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with opened(tmp_path / "queen.db"):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_failed_open_lets_go_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "queen.db"
    path.write_bytes(b"this is no database, and it is long enough to be read as one" * 100)
    with pytest.raises(StoreFailed, match="not a SQLite database"), opened(path):
        pass

    with (tmp_path / "queen.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path.unlink()
    with opened(path):
        pass


def test_a_damaged_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "queen.db"
    with opened(path) as store:
        store.write([record for seq in range(1, 200) for record in whole_job(seq)])
    damaged = bytearray(path.read_bytes())
    damaged[8192:] = random.Random(1).randbytes(len(damaged) - 8192)
    path.write_bytes(damaged)

    with pytest.raises(StoreFailed, match=r"queen\.db: the file is damaged .*backup"), opened(path) as store:
        store.finished_since("")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's rights to every file for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with a database that may be looked at and not written."""
    with opened(tmp_path / "queen.db"):
        pass
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    yield tmp_path
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("name", ["queen.db", "new.db", "folder/new.db"])
def test_a_folder_that_cannot_be_written_is_named_with_a_remedy(read_only: Path, name: str) -> None:
    with (
        as_nobody(),
        pytest.raises(StoreFailed, match=rf"{name}: Permission denied; check owner"),
        opened(read_only / name),
    ):
        pass


def for_ever(work: Callable[[], object]) -> None:
    while True:
        work()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    umount = ["umount", str(folder)]
    # Whoever looks at all disks of the machine at this moment holds it for that long.
    until(lambda: subprocess.run(umount, check=False).returncode == 0, "the small disk is gone")


def test_a_full_disk_is_named_and_costs_nothing_that_was_written(small_disk: Path) -> None:
    path = small_disk / "queen.db"
    written = 0

    def write() -> None:
        nonlocal written
        store.write([accepted(written + 1), narrated(written + 1, 1, body=b"x" * 50_000)])
        written += 1

    with opened(path) as store:
        with pytest.raises(StoreFailed, match=r"the disk is full .*; free some space"):
            for_ever(write)

        assert [job.accepted.seq for job in store.unfinished()] == list(range(1, written + 1))
        assert written > 5

    with opened(path) as store:
        assert len(store.unfinished()) == written


def test_a_disk_that_is_full_from_the_start_is_named(small_disk: Path) -> None:
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
        for_ever(lambda: filler.write(b"x" * 512))

    with pytest.raises(StoreFailed, match=r"full|No space"), opened(small_disk / "queen.db"):
        pass
