"""What a worker tells its hive, and what its hive may ask of it, over a real port."""

import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
from rbee_inprocess import eventually, running
from starlette.applications import Starlette

from rbee_contracts.errors import Unavailable
from rbee_contracts.operations import Infer
from rbee_job_server import Handlers, JobServer
from rbee_worker.app import build_worker_app
from rbee_worker.config import WorkerConfig, parse
from rbee_worker.engine.sim import SimEngine, SimParameters
from rbee_worker.infer import InferHandler
from rbee_worker.state import WorkerState

NONCE = "a-nonce"


def config(*args: str) -> WorkerConfig:
    argv = ["--model", "m", "--port", "0", "--engine", "sim", "--worker-id", "w1", *args]
    return parse(argv, {"RBEE_WORKER_NONCE": NONCE})


class Worker:
    def __init__(self, state: WorkerState, client: httpx.AsyncClient) -> None:
        self.state = state
        self.client = client

    async def status(self) -> dict[str, Any]:
        got: dict[str, Any] = (await self.client.get("/v1/worker")).json()
        return got

    async def ask(self, what: str) -> tuple[int, str]:
        """Post to a route of the worker; give the status, and the error's code where it is one."""
        answer = await self.client.post(f"/v1/worker/{what}", json={})
        return answer.status_code, answer.json().get("code", "")


@asynccontextmanager
async def worker(*, now: Callable[[], float] = time.monotonic, **parameters: Any) -> AsyncIterator[Worker]:
    """A ready worker with the sim engine."""
    engine = SimEngine("m", SimParameters(**parameters))
    state = WorkerState(config(), engine, now)

    def extend(server: JobServer, app: Starlette) -> None:
        app.router.routes.extend(build_worker_app(config(), server, state, engine).routes)

    handlers: Handlers = {Infer: state.running(InferHandler(engine, "m"))}
    async with running(handlers, extend=extend) as service, anyio.create_task_group() as tasks:
        tasks.start_soon(state.run_engine, service.server)
        async with httpx.AsyncClient(base_url=service.url, timeout=45) as client:
            made = Worker(state, client)
            await eventually(lambda: state.not_ready() is None, "the engine is ready")
            yield made
        tasks.cancel_scope.cancel()
    await engine.stop()


async def submit(made: Worker, **fields: Any) -> None:
    body = {"operation": "infer", "model": "m", "prompt": "a b", "ignore_eos": True} | fields
    answer = await made.client.post("/v1/jobs", json=body, headers={"Prefer": "respond-async"})
    assert answer.status_code == 202


async def test_a_worker_proves_itself_by_its_nonce() -> None:
    async with worker() as made:
        status = await made.status()

    assert (status["worker_id"], status["nonce"], status["state"]) == ("w1", NONCE, "ready")
    assert status["load"]["tokens_per_second"] == 0


async def test_a_probe_is_one_token() -> None:
    async with worker() as made:
        assert await made.ask("probe") == (200, "")
        assert (await made.status())["load"]["step_age_s"] is not None


async def test_a_probe_of_a_stuck_engine_fails_and_there_is_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[int, str]] = []
    goes_on = anyio.Event()
    async with worker(stall_after_tokens=1) as made:
        assert await made.ask("probe") == (200, ""), "its first token comes"
        with monkeypatch.context() as patch:
            patch.setattr("rbee_worker.state.PROBE_LIMIT_S", 0.1)
            assert await made.ask("probe") == (503, "engine_silent")

        async def ask() -> None:
            answers.append(await made.ask("probe"))

        monkeypatch.setattr(made.state._engine, "probe", goes_on.wait)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await eventually(lambda: made.state._is_probing, "it is probed")
            assert await made.ask("probe") == (503, "probe_under_way")
            goes_on.set()

    assert answers == [(200, "")]


async def test_requests_make_it_busy_also_before_the_engines_first_step() -> None:
    async with worker(stall_after_tokens=1, now=lambda: 1000.0) as made:
        await made.ask("probe")
        await submit(made, max_tokens=50)
        await eventually(lambda: made.state.activity.count == 1, "it is taken")
        status = await made.status()

        assert status["state"] == "busy"
        assert status["load"]["running"] + status["load"]["waiting"] == 1
        assert status["load"]["step_age_s"] == 0, "no engine owes a step to a request that came this moment"


async def test_asleep_it_takes_nothing_until_it_is_woken() -> None:
    async with worker(sleep_mode=True) as made:
        assert await made.ask("sleep") == (200, "")
        assert await made.ask("sleep") == (200, ""), "asleep already"
        assert (await made.status())["state"] == "sleeping"
        assert await made.ask("probe") == (503, "worker_not_ready")
        with pytest.raises(Unavailable):
            made.state.admit(Infer(model="m", prompt="x"))
        assert await made.ask("wake") == (200, "")
        assert await made.ask("wake") == (200, ""), "awake already"
        assert await made.ask("probe") == (200, "")


async def test_a_worker_that_is_busy_or_cannot_does_not_sleep() -> None:
    async with worker() as made:
        assert await made.ask("sleep") == (501, "sleep_not_supported")
    async with worker(sleep_mode=True, step_ms=20.0) as made:
        await submit(made, max_tokens=500)
        await eventually(lambda: made.state.activity.count == 1, "it runs")
        assert await made.ask("sleep") == (409, "worker_busy")
        assert (await made.status())["state"] == "busy"


async def test_it_does_not_sleep_under_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = anyio.Event()
    async with worker(sleep_mode=True) as made:
        monkeypatch.setattr(made.state._engine, "probe", goes_on.wait)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(made.ask, "probe")
            await eventually(lambda: made.state._is_probing, "it is probed")
            assert await made.ask("sleep") == (409, "worker_busy")
            goes_on.set()
        assert await made.ask("sleep") == (200, "")


async def test_a_job_that_was_taken_before_it_slept_is_refused_at_its_start() -> None:
    async with worker(sleep_mode=True) as made:
        body = {"operation": "infer", "model": "m", "prompt": "a b"}
        job_id = (await made.client.post("/v1/jobs", json=body)).json()["job_id"]
        assert await made.ask("sleep") == (200, "")
        await made.client.get(f"/v1/jobs/{job_id}/stream")  # its first reader starts it
        record = (await made.client.get(f"/v1/jobs/{job_id}")).json()

    assert (record["state"], record["error"]["code"]) == ("failed", "worker_not_ready")
    assert record["error"]["retryable"] is True


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    """The SIGTERMs that this process has had."""
    had: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: had.append(signum))
    yield had
    signal.signal(signal.SIGTERM, before)


async def test_a_worker_whose_hive_is_silent_stops_itself(terminated: list[int]) -> None:
    now = 1000.0
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return now

    async def looked() -> None:
        seen = looks
        await eventually(lambda: looks > seen + 1, "it looks for its hive")

    state = WorkerState(config("--hive-absence-s", "0.5"), SimEngine("m", SimParameters()), clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(state.watch_hive)
        now += 0.4
        await looked()
        state.heard()
        now += 0.4
        await looked()
        assert terminated == [], "its hive has spoken"
        now += 0.2
        await eventually(lambda: terminated, "it stops")
        tasks.cancel_scope.cancel()

    assert terminated == [signal.SIGTERM]


async def test_a_worker_without_a_hive_waits_for_none(terminated: list[int]) -> None:
    state = WorkerState(config(), SimEngine("m", SimParameters()))
    with anyio.move_on_after(0.2) as limit:
        await state.watch_hive()

    assert limit.cancelled_caught
    assert terminated == []


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_an_absence_that_is_none_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        config("--hive-absence-s", value)

    assert exit_.value.code == 2
    assert "--hive-absence-s" in capsys.readouterr().err
