"""A worker's record: written whole, for this user only; one that cannot be read is no obstacle."""

import os
from pathlib import Path

import msgspec
import pytest

from rbee_hive.supervisor.records import Records, WorkerRecord


def record(worker_id: str = "w1", **fields: object) -> WorkerRecord:
    values: dict[str, object] = {
        "worker_id": worker_id,
        "model": "org/m",
        "kind": "cpu",
        "devices": [0],
        "args": ["--dtype", "half"],
        "port": 9300,
        "token": "a-secret",
        "nonce": "n",
        "boot_id": "b",
        "started_at": "2026-11-22T00:00:00Z",
    }
    return msgspec.convert(values | fields, WorkerRecord)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = Records(tmp_path / "state" / "workers")
    assert list(records.read()) == []
    records.write(record("w2"))
    records.write(record("w1"))
    records.write(record("w1", pid=7, start_ticks=9, has_been_ready=True))

    assert list(records.read()) == [record("w1", pid=7, start_ticks=9, has_been_ready=True), record("w2")]


def test_a_record_is_for_its_user_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Records(tmp_path / "workers").write(record())
    finally:
        os.umask(before)

    (path,) = (tmp_path / "workers").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_write_that_was_cut_off_leaves_the_record_before(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(record())
    (tmp_path / "w1.tmp").write_bytes(b'{"worker_id":')

    assert list(records.read()) == [record()]
    records.write(record(pid=8))
    assert list(records.read()) == [record(pid=8)]


def test_a_forgotten_record_is_gone_and_forgetting_again_is_no_error(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.write(record())
    records.forget("w1")
    records.forget("w1")

    assert list(records.read()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"worker_id":"w1"}'])
def test_a_record_that_cannot_be_read_is_set_aside(tmp_path: Path, content: bytes) -> None:
    records = Records(tmp_path)
    records.write(record("w2"))
    (tmp_path / "w1.json").write_bytes(content)

    assert [found.worker_id for found in records.read()] == ["w2"]
    assert (tmp_path / "w1.unreadable").read_bytes() == content


def test_a_newer_hives_fields_are_ignored(tmp_path: Path) -> None:
    newer = msgspec.to_builtins(record()) | {"shoe_size": 42}
    (tmp_path / "w1.json").write_bytes(msgspec.json.encode(newer))

    assert list(Records(tmp_path).read()) == [record()]
