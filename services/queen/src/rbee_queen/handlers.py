"""What the queen does for each operation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import msgspec
import structlog

from rbee_contracts.errors import NoCapacity, RbeeError, Unavailable
from rbee_contracts.events import AnyEvent, Candidate, Decision, InferSchedule
from rbee_contracts.nodes import HiveInfo, HiveListResult, StatusResult
from rbee_contracts.operations import (
    HiveGet,
    HiveList,
    HiveOperation,
    Infer,
    OnHive,
    ScheduleExplain,
    Status,
    WorkerSpawn,
    WorkerStop,
)
from rbee_contracts.results import RESULTS
from rbee_job_server import Handlers, JobContext
from rbee_job_server.jobs import Job
from rbee_queen import VERSION
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.scheduler import NoPlacement, Request, schedule


class QueenHandlers:
    """Executes the queen's operations on its fleet, and forwards a hive's to the hive."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._started = time.monotonic()

    def table(self) -> Handlers:
        forwarded = {operation: self.forward for operation in get_args(OnHive) if operation in RESULTS}
        return forwarded | {
            Infer: self.infer,
            Status: self.status,
            HiveList: self.hive_list,
            HiveGet: self.hive_get,
            ScheduleExplain: self.schedule_explain,
        }

    async def infer(self, op: Infer, context: JobContext) -> Any:
        """Run an inference on the least busy ready worker of its model."""
        context.narrate("infer_start", f"Inference on {op.model} has started.")
        earlier = context.job.earlier(InferSchedule)
        decision = earlier.data if earlier is not None else self._decide(op)
        context.narrate(
            "infer_schedule",
            f"Runs on {decision.worker_id} of hive {decision.hive_id}: {decision.reason}.",
            decision,
        )
        hive = self._fleet.get(decision.hive_id)
        structlog.contextvars.bind_contextvars(hive_id=hive.id, worker_id=decision.worker_id)
        placed = msgspec.structs.replace(op, hive_id=hive.id, worker_id=decision.worker_id)
        with _assigned(hive, decision.worker_id):
            return await hive.relay.perform(context, placed, step="infer")

    async def forward(self, op: HiveOperation, context: JobContext) -> Any:
        """Have a hive execute one of its operations."""
        step = context.job.find_step(op.name, 0)
        hive = self._fleet.reachable(op.hive_id) if step is None else self._fleet.get(step.where)
        result = await hive.relay.perform(context, msgspec.structs.replace(op, hive_id=hive.id), step=op.name)
        if isinstance(op, WorkerSpawn | WorkerStop):
            await self._fleet.until_seen(hive, result["worker_id"], is_ready=isinstance(op, WorkerSpawn))
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
        hive_id = self._fleet.get(op.hive_id).id
        return next(info for info in self._fleet.infos() if info.hive_id == hive_id)

    async def schedule_explain(self, op: ScheduleExplain, _: JobContext) -> Decision:
        return self._decide(op)

    def _decide(self, op: Infer | ScheduleExplain) -> Decision:
        request = Request(model=op.model, hive_id=op.hive_id, worker_id=op.worker_id)
        decision = schedule(self._fleet.snapshot(), request)
        if isinstance(decision, NoPlacement):
            raise NoCapacity(_no_worker(request, decision.candidates, self._fleet.infos()), code="no_worker")
        return decision


@contextmanager
def _assigned(hive: Hive, worker_id: str) -> Iterator[None]:
    """Count a request on a worker for as long as it is ours."""
    hive.assigned[worker_id] = hive.assigned.get(worker_id, 0) + 1
    try:
        yield
    finally:
        hive.assigned[worker_id] -= 1
        if not hive.assigned[worker_id]:
            del hive.assigned[worker_id]


def _no_worker(request: Request, candidates: list[Candidate], hives: list[HiveInfo]) -> str:
    """Say what runs, and what would make this request run."""
    here = [c for c in candidates if c.model == request.model]
    why = "; ".join(f"{c.worker_id} on {c.hive_id} {c.reason}" for c in here)
    running = ", ".join(f"{c.model} ({c.worker_id} on {c.hive_id})" for c in candidates) or "nothing"
    text = f"No worker can run {request.model!r} now"
    text += f": {why}." if why else f". Running: {running}."
    if not hives:
        return f"{text} No hive has announced itself; start one: rbee-hive --queen-url URL-OF-THIS-QUEEN"
    having = [hive.hive_id for hive in hives if any(model.model == request.model for model in hive.models)]
    hive_id = request.hive_id or (having or [hive.hive_id for hive in hives])[0]
    if not having:
        models = sorted({model.model for hive in hives for model in hive.models})
        text += (
            f" It lies on no hive; models that do: {', '.join(models) or 'none'}. "
            f"Put it into the models folder of {hive_id} first."
        )
    return f"{text} To start one: rbee worker spawn --model {request.model} --hive-id {hive_id}"
