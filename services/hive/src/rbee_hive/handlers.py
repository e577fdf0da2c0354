"""What the hive does for each operation."""

from typing import Any

import anyio.to_thread
import structlog

from rbee_contracts.errors import NotFound
from rbee_contracts.events import InferResult, Placement, SpawnedWorker
from rbee_contracts.nodes import DeviceListResult, ModelInfo, ModelListResult, WorkerInfo, WorkerListResult
from rbee_contracts.operations import (
    DeviceList,
    Infer,
    ModelGet,
    ModelList,
    Operation,
    WorkerGet,
    WorkerList,
    WorkerSpawn,
    WorkerStop,
)
from rbee_hive.devices import Devices
from rbee_hive.models import Models
from rbee_hive.workers import Workers
from rbee_job_server import Handlers, JobContext


class HiveHandlers:
    """Executes the hive's operations on what the hive owns."""

    def __init__(self, hive_id: str, workers: Workers, devices: Devices, models: Models) -> None:
        self._hive_id = hive_id
        self._workers = workers
        self._devices = devices
        self._models = models

    def admit(self, operation: Operation) -> None:
        """Refuse what is meant for another hive.

        Raises:
            NotFound: it names another hive.
        """
        named = getattr(operation, "hive_id", None)
        if named not in (None, self._hive_id):
            raise NotFound(
                f"This is hive {self._hive_id!r}, not {named!r}. Send it to that hive, or to the queen.",
                code="hive_not_found",
                title="Hive not found",
            )

    def table(self) -> Handlers:
        return {
            Infer: self.infer,
            WorkerSpawn: self.worker_spawn,
            WorkerList: self.worker_list,
            WorkerGet: self.worker_get,
            WorkerStop: self.worker_stop,
            DeviceList: self.device_list,
            ModelList: self.model_list,
            ModelGet: self.model_get,
        }

    async def infer(self, op: Infer, context: JobContext) -> InferResult | Any:
        """Hand an inference to the pinned worker, or to the least busy ready one of its model."""
        context.narrate("infer_start", f"Inference on {op.model} has started.")
        worker = (
            self._workers.least_busy(op.model) if op.worker_id is None else self._workers.get(op.worker_id)
        )
        structlog.contextvars.bind_contextvars(worker_id=worker.id)
        context.narrate(
            "infer_worker",
            f"Running on {worker.id}.",
            Placement(hive_id=self._hive_id, worker_id=worker.id, port=worker.port),
        )
        return await worker.relay.perform(context, op, step="infer")

    async def worker_spawn(self, op: WorkerSpawn, context: JobContext) -> SpawnedWorker:
        return await self._workers.spawn(op, context)

    async def worker_list(self, _: WorkerList, __: JobContext) -> WorkerListResult:
        return WorkerListResult(workers=self._workers.infos())

    async def worker_get(self, op: WorkerGet, _: JobContext) -> WorkerInfo:
        return self._workers.get(op.worker_id).info()

    async def worker_stop(self, op: WorkerStop, context: JobContext) -> WorkerInfo:
        context.narrate(
            "worker_stop_start", f"Stopping {op.worker_id}, {op.grace_s:g} s for what runs on it."
        )
        stopped = await self._workers.stop(op.worker_id, op.grace_s)
        context.narrate("worker_stop_complete", f"{op.worker_id} has stopped.")
        return stopped

    async def device_list(self, _: DeviceList, __: JobContext) -> DeviceListResult:
        return DeviceListResult(devices=await anyio.to_thread.run_sync(self._devices.read))

    async def model_list(self, _: ModelList, __: JobContext) -> ModelListResult:
        return ModelListResult(models=await anyio.to_thread.run_sync(self._models.find))

    async def model_get(self, op: ModelGet, _: JobContext) -> ModelInfo:
        return await anyio.to_thread.run_sync(self._models.get, op.model)
