"""Where the queen sends a hive's operations, when she refuses, and what she waits to see."""

from typing import Any

import pytest
from msgspec.structs import replace
from rbee_inprocess import Running, running

from rbee_contracts.nodes import CheckResult, HiveHeartbeat, WorkerInfo
from rbee_contracts.operations import OPERATIONS, HiveOperation, Operation
from rbee_contracts.results import RESULTS
from rbee_job_server import JobContext
from rbee_queen import handlers as handlers_module
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.handlers import QueenHandlers
from rbee_queen.store import StoredHive


def worker(worker_id: str, state: str = "ready") -> WorkerInfo:
    return WorkerInfo(
        worker_id=worker_id,
        model="m",
        state=state,  # type: ignore[arg-type]
        pid=1,
        port=9300,
        worker="cpu",
        devices=[0],
        running=0,
        waiting=0,
        kv_cache_usage=0.0,
        started_at="t",
    )


class Line:
    """Stands in for the line to one hive: gives a result, and then shows what its heartbeats say."""

    def __init__(self, fleet: Fleet, hive: Hive) -> None:
        self.fleet = fleet
        self.hive = hive
        self.asked: list[tuple[str, str | None]] = []
        self.result: Any = {}
        self.shows: dict[str, Any] = {}

    async def perform(self, _: JobContext, operation: Operation, *, step: str) -> Any:
        self.asked.append((step, getattr(operation, "hive_id", None)))
        if self.shows:
            tell(self.fleet, self.hive, **self.shows)
        return self.result


def tell(fleet: Fleet, hive: Hive, *workers: WorkerInfo, **changes: Any) -> None:
    """Have a hive's heartbeat come in."""
    values: dict[str, Any] = {
        "hive_id": hive.id,
        "boot": "b",
        "version": "1",
        "timestamp": "t",
        "devices": [],
        "workers": list(workers),
        "models": [],
    }
    fleet._take(hive, HiveHeartbeat(**(values | changes)))


class Cluster:
    def __init__(self, *hive_ids: str) -> None:
        self.fleet = Fleet(lambda: 0.0)
        self.lines: dict[str, Line] = {}
        for hive_id in hive_ids:
            self.fleet.restore(StoredHive(hive_id=hive_id, url="http://127.0.0.1:1", boot="b"))
            hive = self.fleet.get(hive_id)
            self.lines[hive_id] = Line(self.fleet, hive)
            hive.relay = self.lines[hive_id]  # type: ignore[assignment]
            tell(self.fleet, hive)

    def tell(self, hive_id: str, *workers: WorkerInfo, **changes: Any) -> None:
        tell(self.fleet, self.fleet.get(hive_id), *workers, **changes)

    async def run(self, **operation: Any) -> dict[str, Any]:
        """Run an operation; give its result, or the error event."""

        async def check(_: JobContext) -> CheckResult:
            return CheckResult(ok=True, findings=[])

        table = QueenHandlers(self.fleet, check).table()
        async with running(table, service="queen", actor="queen") as queen:
            return await _outcome(queen, operation)


async def _outcome(queen: Running, operation: dict[str, Any]) -> dict[str, Any]:
    frames = await queen.read(await queen.submit(operation))
    if frames[-2].action == "execute_complete":
        data: dict[str, Any] = frames[-2].json.get("data")
        return data
    failed: dict[str, Any] = frames[-3].json
    return failed


def test_the_queen_executes_every_operation_that_has_a_result() -> None:
    async def check(_: JobContext) -> CheckResult:
        raise NotImplementedError

    table = QueenHandlers(Fleet(lambda: 0.0), check).table()

    assert set(table) == set(RESULTS)
    assert {op for op in OPERATIONS.values() if issubclass(op, HiveOperation)} <= set(table)


async def test_an_operation_goes_to_the_hive_it_names_and_its_result_comes_back() -> None:
    cluster = Cluster("a", "b")
    cluster.lines["b"].result = {"devices": []}

    assert await cluster.run(operation="device_list", hive_id="b") == {"devices": []}
    assert cluster.lines["b"].asked == [("device_list", "b")]
    assert cluster.lines["a"].asked == []


async def test_a_download_goes_to_the_only_hive_and_with_several_one_must_be_named() -> None:
    one = Cluster("a")
    await one.run(operation="model_download", model="org/m")
    several = await Cluster("a", "b").run(operation="model_download", model="org/m")

    assert one.lines["a"].asked == [("model_download", "a")]
    assert (several["code"], "a, b" in several["message"]) == ("hive_id_needed", True)


async def test_an_operation_on_a_worker_finds_its_hive() -> None:
    cluster = Cluster("a", "b")
    cluster.tell("b", worker("w1"))
    await cluster.run(operation="worker_get", worker_id="w1")

    assert cluster.lines["b"].asked == [("worker_get", "b")]


@pytest.mark.parametrize(
    "operation",
    [
        {"operation": "worker_spawn", "model": "m"},
        {"operation": "model_load", "model": "m"},
        {"operation": "model_download", "model": "org/m"},
    ],
    ids=lambda operation: operation["operation"],
)
async def test_a_draining_hive_gets_nothing_new(operation: dict[str, Any]) -> None:
    cluster = Cluster("a")
    cluster.tell("a", draining=True)
    refused = await cluster.run(**operation)

    assert (refused["code"], refused["retryable"]) == ("draining", True)
    assert "rbee hive drain a --undo" in refused["message"]
    assert cluster.lines["a"].asked == []


async def test_a_draining_hive_does_everything_else() -> None:
    cluster = Cluster("a")
    cluster.tell("a", worker("w1"), draining=True)
    await cluster.run(operation="worker_get", worker_id="w1")
    cluster.lines["a"].shows = {"draining": False}
    await cluster.run(operation="hive_drain", draining=False)

    assert [name for name, _ in cluster.lines["a"].asked] == ["worker_get", "hive_drain"]


SHOWN = [
    ({"operation": "worker_spawn", "model": "m"}, {"worker_id": "w1"}, [], [worker("w1")]),
    (
        {"operation": "model_load", "model": "m"},
        {"worker_id": "w1"},
        [worker("w1", "sleeping")],
        [worker("w1")],
    ),
    ({"operation": "worker_stop", "worker_id": "w1"}, {"worker_id": "w1"}, [worker("w1")], []),
    ({"operation": "worker_drain", "worker_id": "w1"}, {}, [worker("w1")], [worker("w1", "draining")]),
    (
        {"operation": "worker_drain", "worker_id": "w1", "draining": False},
        {},
        [worker("w1", "draining")],
        [worker("w1", "busy")],
    ),
    (
        {"operation": "model_unload", "model": "m"},
        {"workers": [{"worker_id": "w1"}]},
        [worker("w1")],
        [worker("w1", "sleeping")],
    ),
]


@pytest.mark.parametrize(("operation", "result", "before", "after"), SHOWN, ids=lambda value: "")
async def test_what_was_done_shows_in_the_fleet_when_the_job_has_ended(
    operation: dict[str, Any],
    result: dict[str, Any],
    before: list[WorkerInfo],
    after: list[WorkerInfo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next request finds it: the job ends once the heartbeats show it, and not before."""
    waited: list[float] = []
    until = Hive.until

    async def counting(self: Hive, is_seen: Any, timeout_s: float) -> None:
        assert not is_seen(self)
        waited.append(timeout_s)
        assert self.heartbeat is not None
        self.take(replace(self.heartbeat, workers=after))
        await until(self, is_seen, timeout_s)
        assert is_seen(self)

    monkeypatch.setattr(Hive, "until", counting)
    cluster = Cluster("a")
    cluster.tell("a", *before)
    cluster.lines["a"].result = result
    await cluster.run(**operation)

    assert waited == [handlers_module.SEEN_TIMEOUT_S]


async def test_what_is_never_seen_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers_module, "SEEN_TIMEOUT_S", 0.01)
    cluster = Cluster("a")
    cluster.lines["a"].result = {"worker_id": "w1"}

    assert await cluster.run(operation="worker_spawn", model="m") == {"worker_id": "w1"}


async def test_the_queens_own_lists() -> None:
    cluster = Cluster("a", "b")

    assert [hive["hive_id"] for hive in (await cluster.run(operation="hive_list"))["hives"]] == ["a", "b"]
    assert (await cluster.run(operation="hive_get", hive_id="b"))["state"] == "online"
    assert (await cluster.run(operation="hive_get", hive_id="c"))["code"] == "hive_not_found"
    assert (await cluster.run(operation="status"))["version"]
    assert (await cluster.run(operation="queen_check"))["ok"] is True
    assert (await cluster.run(operation="schedule_explain", model="m"))["code"] == "no_worker"
