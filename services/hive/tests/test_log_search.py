"""A search of one machine's logs: its hive's, and its workers', living and gone."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rbee_inprocess import running

from rbee_contracts.operations import LogSearch
from rbee_hive import log_search
from rbee_hive.log_search import HiveLogs, search_file
from rbee_job_server.log_search import LogRing


def line(service: str, event: str, at: int) -> str:
    facts = {"correlation_id": "c", "service": service, "timestamp": f"2999-01-01T00:00:{at:02}Z"}
    return json.dumps(facts | {"event": event, "level": "info"})


def write(folder: Path, name: str, *lines: str, age_s: float = 0) -> None:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    os.utime(path, (time.time() - age_s,) * 2)


async def search(folder: Path, *own: str, **fields: Any) -> dict[str, Any]:
    ring = LogRing()
    for each in own:
        ring.keep(each)
    handlers = HiveLogs(ring, "hive/box1", folder).table()
    async with running(handlers, service="hive", actor="hive/box1") as hive:
        operation = {"operation": "log_search", "correlation_id": "c"} | fields
        frames = await hive.read(await hive.submit(operation))
        data: dict[str, Any] = frames[-2].json["data"]
        return data


def events(found: dict[str, Any]) -> list[str]:
    return [line["event"] for line in found["lines"]]


async def test_all_of_a_machines_lines_are_in_the_order_of_their_time(tmp_path: Path) -> None:
    write(tmp_path, "w1.log", line("worker/w1", "third", 3), "no json", line("worker/w1", "fifth", 5))
    write(tmp_path, "w1.log.1", line("worker/w1", "first", 1))
    write(tmp_path, "gone.log", line("worker/gone", "fourth", 4))
    write(tmp_path, "other.txt", line("worker/x", "not a log", 4))
    found = await search(tmp_path, line("hive/box1", "second", 2), line("hive/box1", "sixth", 6))

    assert events(found) == ["first", "second", "third", "fourth", "fifth", "sixth"]
    assert [note.split(" has")[0] for note in found["notes"]] == ["hive/box1"]


async def test_a_log_that_was_not_written_to_since_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "old.log", line("worker/old", "old", 1), age_s=100)
    write(tmp_path, "new.log", line("worker/new", "new", 1))

    assert events(await search(tmp_path, since_s=50)) == ["new"]
    assert events(await search(tmp_path)) == ["new", "old"]


async def test_what_is_read_for_one_search_is_bounded_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_search, "SEARCHED_BYTES", 2 << 20)
    write(tmp_path, "old.log", line("worker/old", "old", 1), age_s=100)
    write(tmp_path, "large.log", "x" * (3 << 20), age_s=50)
    write(tmp_path, "new.log", line("worker/new", "new", 1))
    found = await search(tmp_path)

    assert events(found) == ["new"]
    assert (
        found["notes"][1]
        == "hive/box1 has searched the newest 2 MiB of its workers' logs, and not what is older."
    )


async def test_too_many_lines_are_cut_and_that_is_told(tmp_path: Path) -> None:
    write(tmp_path, "w.log", *(line("worker/w", str(n), n) for n in range(9)))
    found = await search(tmp_path, limit=2)

    assert events(found) == ["7", "8"]
    assert found["notes"][1] == "hive/box1 has left out the 7 oldest lines; see `limit`."


async def test_without_a_folder_there_are_the_hives_own_lines(tmp_path: Path) -> None:
    assert events(await search(tmp_path / "none", line("hive/box1", "mine", 1))) == ["mine"]


def test_a_log_that_goes_away_meanwhile_has_no_lines(tmp_path: Path) -> None:
    assert search_file(tmp_path / "w.log", LogSearch(correlation_id="c"), datetime.now(UTC)) == []
