"""A search of the whole cluster's logs: each hive answers for itself, and none is waited for too long."""

from collections import Counter
from typing import Any

import anyio
import msgspec
import pytest
from rbee_inprocess import running

from rbee_contracts.errors import NotImplementedHere
from rbee_contracts.nodes import HiveHeartbeat, LogLine, LogSearchResult
from rbee_contracts.operations import LogSearch
from rbee_job_server import JobContext
from rbee_job_server.log_search import MAX_RESULT_BYTES, LogRing
from rbee_queen import log_search
from rbee_queen.fleet import Fleet
from rbee_queen.log_search import ClusterLogs
from rbee_queen.store import StoredHive


class Line:
    """Stands in for the line to one hive; its name says how it answers."""

    def __init__(self, hive_id: str) -> None:
        self.hive_id = hive_id

    async def perform(self, _: JobContext, op: LogSearch, *, step: str, attempt: int) -> Any:
        assert (op.hive_id, step) == (self.hive_id, "log_search")
        match self.hive_id:
            case "old":
                raise NotImplementedHere("log_search is not known.")
            case "slow":
                await anyio.sleep_forever()
            case "odd":
                return {"lines": 7}
            case "much" | "more":
                full = [
                    LogLine(
                        timestamp=f"{n:04}", service=f"hive/{self.hive_id}", level="info", event="e" * 3000
                    )
                    for n in range(1000)
                ]
                return msgspec.to_builtins(LogSearchResult(correlation_id=op.correlation_id, lines=full))
        line = LogLine(timestamp="2026", service=f"hive/{self.hive_id}", level="info", event="job_accepted")
        result = LogSearchResult(correlation_id=op.correlation_id, lines=[line], notes=[self.hive_id])
        return msgspec.to_builtins(result)


async def search(*hive_ids: str, **fields: Any) -> dict[str, Any]:
    fleet = Fleet(lambda: 0.0)
    for hive_id in hive_ids:
        fleet.restore(StoredHive(hive_id=hive_id, url="http://127.0.0.1:1", boot="b"))
        hive = fleet.get(hive_id)
        hive.relay = Line(hive_id)  # type: ignore[assignment]
        empty: dict[str, Any] = {"devices": [], "workers": [], "models": []}
        fleet._take(hive, HiveHeartbeat(hive_id=hive_id, boot="b", version="1", timestamp="t", **empty))
    ring = LogRing()
    ring.keep('{"correlation_id":"c","service":"queen","timestamp":"2027","level":"info","event":"mine"}')
    async with running({LogSearch: ClusterLogs(ring, fleet)}, service="queen", actor="queen") as queen:
        operation = {"operation": "log_search", "correlation_id": "c"} | fields
        frames = await queen.read(await queen.submit(operation))
        data: dict[str, Any] = frames[-2].json["data"]
        return data


def services(found: dict[str, Any]) -> list[str]:
    return [line["service"] for line in found["lines"]]


async def test_the_queens_lines_come_first_and_then_each_hives() -> None:
    found = await search("b", "a")

    assert services(found) == ["queen", "hive/a", "hive/b"]
    assert found["silent"] == {}
    assert found["notes"][1:] == ["a", "b"]


async def test_a_hive_that_is_old_or_slow_or_odd_is_named_and_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_search, "HIVE_LIMIT_S", 0.05)
    found = await search("old", "slow", "good", "odd")

    assert services(found) == ["queen", "hive/good"]
    assert found["silent"]["old"] == "log_search is not known."
    assert found["silent"]["slow"] == "It did not answer within 0.05 s."
    assert found["silent"]["odd"].startswith("It answered what this queen does not understand")


async def test_what_all_hives_tell_together_is_bounded_and_each_is_heard() -> None:
    found = await search("much", "more", "good")
    told = Counter(services(found))

    assert len(msgspec.json.encode(found["lines"])) < MAX_RESULT_BYTES
    assert told["queen"] == told["hive/good"] == 1
    assert 300 < told["hive/much"] == told["hive/more"] < 400
    assert [line["timestamp"] for line in found["lines"] if line["service"] == "hive/much"][-1] == "0999"
    assert [
        note for note in found["notes"] if f"Of much's lines the {1000 - told['hive/much']} oldest" in note
    ]


async def test_only_the_hive_that_is_named_is_asked() -> None:
    assert services(await search("a", "b", hive_id="b")) == ["queen", "hive/b"]
