"""The table of workers with real processes of the sim engine, where the machine does not do its part."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import anyio
import httpx
import pytest
from rbee_inprocess import Running, eventually, running

from rbee_contracts.access import NONCE_VARIABLE
from rbee_contracts.errors import NotFound
from rbee_contracts.nodes import Device
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Reservations
from rbee_hive.supervisor.machine import Policy
from rbee_hive.supervisor.workers import Workers

pytestmark = pytest.mark.timeout(180)

CPU = Device(kind="cpu", index=0, name="c", memory_total=64 << 30, memory_used=0)


FindModel: TypeAlias = Callable[[str], Awaitable[str]]


class Machine:
    """Devices that can be read, or not."""

    working_gpus: list[int] = []  # noqa: RUF012 (a property of the real one)

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def read(self) -> list[Device]:
        if self.failure is not None:
            raise self.failure
        return [CPU]


class Hive:
    def __init__(self, workers: Workers, machine: Machine, service: Running) -> None:
        self.workers = workers
        self.machine = machine
        self.service = service

    async def spawn(self, *args: str) -> dict[str, Any]:
        """Spawn a worker; give the last event but one where it fails, else the result."""
        body = {"operation": "worker_spawn", "model": "m", "worker_args": list(args)}
        async with httpx.AsyncClient(base_url=self.service.url, timeout=60) as client:
            job_id = (await client.post("/v1/jobs", json=body)).json()["job_id"]
            await client.get(f"/v1/jobs/{job_id}/stream")
            record: dict[str, Any] = (await client.get(f"/v1/jobs/{job_id}")).json()
        return record


@asynccontextmanager
async def hive(
    folder: Path, find_model: FindModel | None = None, *, engine: Literal["vllm", "sim"] = "sim"
) -> AsyncIterator[Hive]:
    config = HiveConfig(
        hive_id="box1",
        host="127.0.0.1",
        port=0,
        queen_url=None,
        models_dir=folder / "models",
        state_dir=folder / "state",
        drain_timeout_s=5,
        log_level="info",
        worker_engine=engine,
        supervision=Policy(backoff_first_s=0.01),
    )
    machine = Machine()

    async def found(model: str) -> str:
        return model

    workers = Workers(config, machine, find_model or found, Reservations(), {})
    await workers.adopt()
    async with running({WorkerSpawn: workers.spawn}) as service, anyio.create_task_group() as tasks:
        tasks.start_soon(workers.run)
        yield Hive(workers, machine, service)
        await workers.stop_all()
        tasks.cancel_scope.cancel()


async def test_a_start_that_crashes_ends_one_spawn_and_not_the_hive(tmp_path: Path) -> None:
    async with hive(tmp_path) as made:
        made.machine.failure = OSError("the driver is gone")
        failed = await made.spawn()
        assert (failed["state"], failed["error"]["code"]) == ("failed", "internal_error")
        assert "the driver is gone" in failed["error"]["message"]
        assert made.workers.infos() == []

        made.machine.failure = None
        assert (await made.spawn())["state"] == "completed"


async def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    async with hive(tmp_path) as made:
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "workers").write_text("a file where a folder belongs")
        failed = await made.spawn()

    assert failed["error"]["code"] == "worker_spawn_failed"
    assert str(tmp_path / "state") in failed["error"]["message"]


async def test_memory_that_is_not_there_refuses_a_spawn(tmp_path: Path) -> None:
    async with hive(tmp_path) as made:
        made.workers._allotter._reservations._kept_free[("cpu", 0)] = 64 << 30
        failed = await made.spawn()

    assert (failed["error"]["code"], failed["error"]["retryable"]) == ("no_device_memory", True)
    assert list((tmp_path / "state").glob("workers/*.json")) == []


async def test_what_is_reserved_is_given_back(tmp_path: Path) -> None:
    async with hive(tmp_path) as made:
        reservations = made.workers._allotter._reservations
        await made.spawn("--sim-fail-start")
        assert reservations.holders(("cpu", 0)) == {}
        worker_id = (await made.spawn())["result"]["worker_id"]
        assert list(reservations.holders(("cpu", 0))) == [worker_id]
        await made.workers.stop(worker_id, 0)
        assert reservations.holders(("cpu", 0)) == {}


async def test_a_model_that_is_deleted_under_its_spawn_fails_the_spawn(tmp_path: Path) -> None:
    """It is looked for again once the worker is in the table, from when on it is refused to delete it."""
    made: Hive
    in_use_by: list[list[str]] = []

    async def find_model(model: str) -> str:
        in_use_by.append([worker.model for worker in made.workers.infos()])
        if len(in_use_by) > 1:
            raise NotFound(f"No model {model!r}.", code="model_not_found")
        return str(tmp_path / model)

    async with hive(tmp_path, find_model, engine="vllm") as made:
        failed = await made.spawn()
        assert made.workers.infos() == []

    assert failed["error"]["code"] == "model_not_found"
    assert in_use_by == [[], ["m"]]


async def test_unloaded_twice_at_once_a_worker_is_not_left_draining(tmp_path: Path) -> None:
    async with hive(tmp_path) as made:
        worker_id = (await made.spawn("--sim-sleep-mode"))["result"]["worker_id"]
        slept: list[bool] = []

        async def sleep() -> None:
            slept.append(await made.workers.sleep(worker_id, 60))

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(sleep)

        assert slept == [True, True]
        assert made.workers.get(worker_id).life.is_draining is False
        assert (await made.workers.wake(worker_id, 60)).state == "ready"


async def test_what_a_loading_worker_has_started_is_known_as_ours_before_memory_is_promised(
    tmp_path: Path,
) -> None:
    """Its engine's memory would count twice: as promised to it, and as somebody else's."""
    async with hive(tmp_path) as made, anyio.create_task_group() as tasks:
        tasks.start_soon(made.spawn, "--sim-start-s", "600")
        await eventually(lambda: any(one.running for one in made.workers.all()), "its process runs")
        (worker,) = made.workers.all()
        assert worker.running is not None
        env = {NONCE_VARIABLE: worker.running.nonce}
        command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"]
        async with await anyio.open_process(command, env=env) as started:
            assert started.stdout is not None
            await started.stdout.receive()  # a process that has begun only just has no environment yet
            await made.workers._allotter.reserve("another", worker.spec, "m")
            owners = made.workers.owners()
            started.kill()
        await made.workers.stop(worker.id, 0)
        tasks.cancel_scope.cancel()

    assert owners.get(started.pid) == worker.id
