"""What the queen does for each operation."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, get_args

from msgspec.structs import replace

from rbee_contracts.errors import RbeeError, Unavailable
from rbee_contracts.events import AnyEvent, Decision
from rbee_contracts.nodes import SERVING, CheckResult, HiveInfo, HiveListResult, StatusResult
from rbee_contracts.operations import (
    HiveDrain,
    HiveForget,
    HiveGet,
    HiveList,
    HiveOperation,
    Infer,
    ModelDownload,
    ModelLoad,
    ModelUnload,
    OnHive,
    OpenAI,
    QueenCheck,
    ScheduleExplain,
    Status,
    WorkerDrain,
    WorkerSpawn,
    WorkerStop,
)
from rbee_contracts.results import RESULTS
from rbee_job_server import Handlers, JobContext
from rbee_job_server.jobs import Job
from rbee_queen import VERSION
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.inference import Inference

SEEN_TIMEOUT_S = 10.0
"""How long an operation waits until what it has done shows in the hive's heartbeats."""

NEW_WORK = (WorkerSpawn, ModelLoad, ModelDownload)
"""What a draining hive is not asked to do; inferences do not come this way."""


class QueenHandlers:
    """Executes the queen's operations on its fleet, and forwards a hive's to the hive."""

    def __init__(self, fleet: Fleet, check: Callable[[JobContext], Awaitable[CheckResult]]) -> None:
        self._fleet = fleet
        self._check = check
        self.inference = Inference(fleet, time.monotonic)
        self._started = time.monotonic()

    def table(self) -> Handlers:
        forwarded = {operation: self.forward for operation in get_args(OnHive) if operation in RESULTS}
        return forwarded | {
            Infer: self.infer,
            OpenAI: self.infer,
            Status: self.status,
            HiveList: self.hive_list,
            HiveGet: self.hive_get,
            HiveForget: self.hive_forget,
            ScheduleExplain: self.schedule_explain,
            QueenCheck: self.queen_check,
        }

    async def infer(self, op: Infer | OpenAI, context: JobContext) -> Any:
        """Run an inference; see `Inference.run`."""
        return await self.inference.run(op, context)

    async def forward(self, op: HiveOperation, context: JobContext) -> Any:
        """Have a hive execute one of its operations; what it has done then shows in the fleet."""
        step = context.job.find_step(op.name, 0)
        if step is not None:
            hive = self._fleet.get(step.where)
        else:
            hive = self._fleet.reachable(op.hive_id, worker_id=getattr(op, "worker_id", None))
            if hive.is_draining and isinstance(op, NEW_WORK):
                raise Unavailable(
                    f"Hive {hive.id} is draining: it finishes what it has and takes nothing new. "
                    f"To take that back: rbee hive drain {hive.id} --undo",
                    code="draining",
                    title="Draining",
                )
        result = await hive.relay.perform(context, replace(op, hive_id=hive.id), step=op.name)
        await hive.until(_outcome(op, result), SEEN_TIMEOUT_S)
        return result

    async def read_output(self, job: Job) -> list[AnyEvent]:
        """Read the output of a finished job again, where it ran."""
        step = job.steps[-1]
        try:
            return await self._fleet.get(step.where).relay.read_output(step.lower_job_id)
        except RbeeError as exc:
            if exc.retryable:
                raise Unavailable(f"The output of {job.id} lies on hive {step.where}: {exc.details}") from exc
            return []

    async def status(self, _: Status, __: JobContext) -> StatusResult:
        uptime_s = round(time.monotonic() - self._started, 1)
        return StatusResult(version=VERSION, uptime_s=uptime_s, hives=self._fleet.infos())

    async def hive_list(self, _: HiveList, __: JobContext) -> HiveListResult:
        return HiveListResult(hives=self._fleet.infos())

    async def hive_get(self, op: HiveGet, _: JobContext) -> HiveInfo:
        return self._fleet.info(op.hive_id)

    async def hive_forget(self, op: HiveForget, _: JobContext) -> HiveInfo:
        """Take a hive off the list; the result is what was known of it."""
        return self._fleet.forget(op.hive_id)

    async def schedule_explain(self, op: ScheduleExplain, _: JobContext) -> Decision:
        return self.inference.decide(op)

    async def queen_check(self, _: QueenCheck, context: JobContext) -> CheckResult:
        return await self._check(context)


def _outcome(op: HiveOperation, result: Any) -> Callable[[Hive], bool]:
    """Give what the hive's heartbeats show once they are of after `op`, so that the next request finds it.

    Where another has changed it meanwhile, that is never seen; nobody waits for it long.
    """
    match op:
        case WorkerSpawn() | ModelLoad():
            return lambda hive: _state(hive, result["worker_id"]) in SERVING
        case WorkerStop():
            return lambda hive: _state(hive, op.worker_id) is None
        case WorkerDrain():
            return lambda hive: op.draining is not (_state(hive, op.worker_id) in SERVING)
        case ModelUnload():
            left = [worker["worker_id"] for worker in result["workers"]]
            return lambda hive: not any(_state(hive, worker_id) in SERVING for worker_id in left)
        case HiveDrain():
            return lambda hive: hive.is_draining is op.draining
        case _:
            return lambda hive: True


def _state(hive: Hive, worker_id: str) -> str | None:
    worker = hive.worker(worker_id)
    return None if worker is None else worker.state
