"""What the hive does for each operation."""

from typing import Any

import structlog

from rbee_contracts.errors import NotFound, Unavailable
from rbee_contracts.events import InferResult, Placement
from rbee_contracts.nodes import DeviceListResult
from rbee_contracts.operations import (
    DeviceList,
    Infer,
    ModelDownload,
    ModelLoad,
    OpenAI,
    Operation,
    WorkerSpawn,
)
from rbee_hive.supervisor.workers import Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_server import Handlers, JobContext

log = structlog.get_logger(__name__)

NEW_WORK = (Infer, OpenAI, WorkerSpawn, ModelLoad, ModelDownload)
"""What a draining hive refuses."""


class HiveHandlers:
    """Executes the hive's operations on what the hive owns."""

    def __init__(self, hive_id: str, workers: Workers, telemetry: Telemetry) -> None:
        self._hive_id = hive_id
        self._workers = workers
        self._telemetry = telemetry

    def admit(self, operation: Operation) -> None:
        """Refuse what is meant for another hive, and new work while this one drains.

        Raises:
            NotFound: it names another hive.
            Unavailable: the hive drains.
        """
        named = getattr(operation, "hive_id", None)
        if named not in (None, self._hive_id):
            raise NotFound(
                f"This is hive {self._hive_id!r}, not {named!r}. Send it to that hive, or to the queen.",
                code="hive_not_found",
                title="Hive not found",
            )
        if self._workers.draining and isinstance(operation, NEW_WORK):
            raise Unavailable(
                f"Hive {self._hive_id} is draining: it finishes what it has and takes nothing new. "
                f"To take that back: rbee hive drain {self._hive_id} --undo",
                code="draining",
                title="Draining",
            )

    def table(self) -> Handlers:
        return {Infer: self.infer, OpenAI: self.infer, DeviceList: self.device_list}

    async def infer(self, op: Infer | OpenAI, context: JobContext) -> InferResult | Any:
        """Hand an inference to the pinned worker, or to the least busy ready one of its model."""
        context.narrate("infer_start", f"Inference on {op.model} has started.")
        step = context.job.find_step("infer", 0)
        if step is not None:  # taken up again: it goes on where it runs
            worker = self._workers.get(step.where)
        elif op.worker_id is None:
            worker = self._workers.least_busy(op.model or "")
        else:
            worker = self._workers.serving(op.worker_id)
        structlog.contextvars.bind_contextvars(worker_id=worker.id)
        log.info("infer_placed")
        context.narrate(
            "infer_worker",
            f"Running on {worker.id}.",
            Placement(hive_id=self._hive_id, worker_id=worker.id, port=worker.port),
        )
        return await self._workers.line_to(worker.id).perform(context, op, step="infer")

    async def device_list(self, _: DeviceList, __: JobContext) -> DeviceListResult:
        return DeviceListResult(devices=self._telemetry.devices())
