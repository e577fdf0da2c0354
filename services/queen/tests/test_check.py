"""What `queen_check` finds, and what it says to do about it."""

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
import pytest
from rbee_inprocess import actions, running

from rbee_contracts.nodes import Finding, HiveInfo
from rbee_contracts.operations import Operation, QueenCheck, Status
from rbee_job_server import JobContext
from rbee_queen import VERSION, check
from rbee_queen.check import HiveFacts, of_access, of_disk, of_hives, of_jobs, of_store
from rbee_queen.config import parse
from rbee_queen.fleet import Fleet
from rbee_queen.journal import StoreJournal
from rbee_queen.store import StoredHive, StoreFailed, StoreState
from rbee_queen.store.testing import MemoryStore

GIB = 2**30


def state(**changes: Any) -> StoreState:
    values: dict[str, Any] = {
        "kind": "SQLite",
        "version": "3.40.1",
        "revision": "0001",
        "newest": "0001",
        "folder": Path("/state"),
    }
    return StoreState(**(values | changes))


def facts(*, ahead_s: float | None = 0.1, trouble: str | None = None, **changes: Any) -> HiveFacts:
    values = {"hive_id": "box1", "url": "http://10.0.0.9:7835", "state": "online", "version": "1"}
    return HiveFacts(info=HiveInfo(**(values | changes)), clock_ahead_s=ahead_s, trouble=trouble)


def told(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    """Check, status and everything that is said; each that is not ok says what to do."""
    listed = list(findings)
    assert all((finding.status == "ok") == (finding.remedy is None) for finding in listed)
    return [(f.check, f.status, f"{f.message} {f.remedy or ''}".strip()) for f in listed]


def test_the_store() -> None:
    assert told(of_store(state(), None)) == [
        ("store", "ok", "SQLite 3.40.1 takes writes."),
        ("migrations", "ok", "The tables are at revision 0001, the newest."),
    ]
    assert told(of_store(state(revision="0000"), None))[1] == (
        "migrations",
        "failed",
        "The tables are at revision 0000; this version needs 0001. "
        "Restart the queen: she changes the tables when she starts.",
    )
    ((name, status, text),) = told(of_store(None, "database /state/queen.db: the disk is full"))
    assert (name, status) == ("store", "failed")
    assert "the disk is full" in text


@pytest.mark.parametrize(
    ("free", "status"), [(2 * GIB, "ok"), (GIB, "ok"), (GIB - 1, "warning"), (2**20, "failed")]
)
def test_the_disk(free: int, status: str) -> None:
    ((name, found, text),) = told(of_disk(Path("/state"), free, 100 * GIB))

    assert (name, found) == ("disk", status)
    assert "of 100.0 GiB are free at /state" in text


def test_the_disk_of_a_server_is_not_ours_to_see() -> None:
    assert told(of_disk(None, None, None)) == [("disk", "ok", "The database's disk is its server's.")]


@pytest.mark.parametrize(
    ("host", "has_token", "status"),
    [("127.0.0.1", False, "ok"), ("0.0.0.0", True, "ok"), ("0.0.0.0", False, "failed")],
)
def test_access(host: str, has_token: bool, status: str) -> None:
    ((_, found, text),) = told(of_access(host, has_token=has_token))

    assert found == status
    assert status == "ok" or "openssl rand" in text


def test_without_a_hive_nothing_runs_and_the_remedy_is_a_command() -> None:
    ((_, status, text),) = told(of_hives([], "1"))

    assert status == "failed"
    assert "rbee-hive --queen-url" in text


def test_a_hive_that_is_there() -> None:
    assert told(of_hives([facts(draining=True)], "1")) == [
        ("hive box1", "ok", "It is heard at http://10.0.0.9:7835. It is draining."),
        ("hive box1: version", "ok", "It runs 1."),
        ("hive box1: clock", "ok", "Its clock is 0.1 s ahead of the queen's. Nothing is decided by that."),
    ]


def test_another_version_and_a_clock_that_is_off() -> None:
    found = told(of_hives([facts(ahead_s=-3600.0)], "2"))

    assert [status for _, status, _ in found] == ["ok", "warning", "warning"]
    assert "It runs 1, the queen 2." in found[1][2]
    assert "3600.0 s behind the queen's" in found[2][2]


@pytest.mark.parametrize(
    ("state", "status"), [("connecting", "warning"), ("unreachable", "failed"), ("lost", "failed")]
)
def test_a_hive_that_is_not_there(state: str, status: str) -> None:
    ((name, found, text),) = told(of_hives([facts(state=state, last_seen_s=12.0)], "1"))

    assert (name, found) == ("hive box1", status)
    assert "10.0.0.9" in text
    assert ("rbee hive forget box1" in text) is (state == "lost")


def test_why_a_hive_is_not_heard_is_told() -> None:
    trouble = "At http://10.0.0.9:7835 hive 'box2' answers now, not 'box1'."
    ((_, _, text),) = told(of_hives([facts(state="lost", last_seen_s=40.0, trouble=trouble)], "1"))

    assert trouble in text


def test_a_hive_whose_time_cannot_be_read_has_no_clock_to_tell_of() -> None:
    assert len(told(of_hives([facts(ahead_s=None)], "1"))) == 2


def test_open_jobs() -> None:
    assert told(of_jobs(2, 1)) == [("jobs", "ok", "1 jobs run and 2 wait for a reader.")]


async def checked(store: MemoryStore, tmp_path: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """Run the operation on a queen with one hive that is not there; give actions, messages, result."""
    journal = StoreJournal(store, keep_s=1, keep_jobs=1)
    fleet = Fleet(lambda: 0.0)
    fleet.restore(StoredHive(hive_id="box1", url="http://127.0.0.1:1", boot="b"))
    config = parse(["--state-dir", str(tmp_path)], {})
    queen_check = check.QueenCheck(config, journal, fleet, lambda: queen.server.registry)

    async def run(_: Operation, context: JobContext) -> Any:
        return await queen_check.run(context)

    async def wait(_: Operation, __: JobContext) -> None:
        await anyio.sleep_forever()

    async with running({QueenCheck: run, Status: wait}, service="queen", actor="queen") as queen:
        await queen.submit({"operation": "status"})
        await queen.submit({"operation": "status"}, Prefer="respond-async")
        frames = await queen.read(await queen.submit({"operation": "queen_check"}))
    said = [frame.json["message"] for frame in frames if frame.action == "queen_check"]
    return actions(frames), said, frames[-2].json["data"]


async def test_the_whole_check_narrates_each_finding_and_gives_them_all(tmp_path: Path) -> None:
    store = MemoryStore()
    store.open()
    had, said, result = await checked(store, tmp_path)

    assert had == ["execute", *["queen_check"] * 6, "execute_complete", "[DONE]"]
    assert [finding["check"] for finding in result["findings"]] == [
        *("store", "migrations", "disk", "access", "hive box1", "jobs"),
    ]
    assert result["ok"] is True
    assert said[0] == "store: memory 1 takes writes."
    assert said[4].startswith("hive box1: It has not been heard yet")
    assert said[5] == "jobs: 1 jobs run and 1 wait for a reader."
    assert VERSION


async def test_a_store_that_fails_is_a_finding_and_not_the_end_of_the_check(tmp_path: Path) -> None:
    store = MemoryStore()
    store.open()
    store.failure = StoreFailed("database x: the disk is full; free some space.")
    _, said, result = await checked(store, tmp_path)

    assert result["ok"] is False
    assert said[0].startswith("store: The database cannot be used: database x: the disk is full")
    assert [finding["check"] for finding in result["findings"]] == ["store", "access", "hive box1", "jobs"]


async def test_a_disk_that_cannot_be_looked_at_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    store = MemoryStore()
    store.open()
    monkeypatch.setattr(
        store,
        "check",
        lambda: StoreState(kind="SQLite", version="3", revision="1", newest="1", folder=tmp_path),
    )
    _, said, result = await checked(store, tmp_path)

    assert said[2].startswith(f"disk: The disk of {tmp_path} cannot be looked at: Stale file handle.")
    assert result["findings"][2]["status"] == "failed"
    assert result["findings"][-1]["check"] == "jobs"
