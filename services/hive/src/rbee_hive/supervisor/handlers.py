"""What the hive does for the operations on workers, their processes and their logs."""

from collections.abc import Callable
from signal import SIGKILL

import anyio
import anyio.to_thread

from rbee_contracts.errors import Conflict, NotFound
from rbee_contracts.events import SpawnedWorker
from rbee_contracts.nodes import (
    Device,
    HiveDrained,
    ModelUnloaded,
    WorkerInfo,
    WorkerListResult,
    WorkerLogResult,
    WorkerProcessInfo,
    WorkerProcessListResult,
)
from rbee_contracts.operations import (
    HiveDrain,
    ModelLoad,
    ModelUnload,
    WorkerDrain,
    WorkerGet,
    WorkerList,
    WorkerLog,
    WorkerProcessDelete,
    WorkerProcessGet,
    WorkerProcessList,
    WorkerSpawn,
    WorkerStop,
)
from rbee_hive.supervisor.logs import LogReader
from rbee_hive.supervisor.process_view import find_owned, view
from rbee_hive.supervisor.processes import LinuxSystem
from rbee_hive.supervisor.worker import Worker
from rbee_hive.supervisor.workers import Workers
from rbee_job_server import Handlers, JobContext

LOG_BATCH_LINES = 200
"""Lines in one `worker_log` event at most."""

LOG_BATCH_CHARS = 64_000
LOG_POLL_S = 0.25

UNLOAD_GRACE_S = 30.0
"""For what runs on a worker before it is stopped."""

SLEEP_LIMIT_S = 120.0
"""For what runs on a worker before it sleeps, and again for its weights to be copied out."""

WAKE_LIMIT_S = 300.0
DELETE_WAIT_S = 5.0


class WorkerHandlers:
    """Executes operations on the hive's workers.

    Args:
        devices: gives the devices as of the newest reading, with the processes on them.
    """

    def __init__(self, workers: Workers, devices: Callable[[], list[Device]]) -> None:
        self._workers = workers
        self._devices = devices

    def table(self) -> Handlers:
        return {
            WorkerSpawn: self.spawn,
            WorkerList: self.all,
            WorkerGet: self.get,
            WorkerStop: self.stop,
            WorkerDrain: self.drain,
            WorkerLog: self.log,
            WorkerProcessList: self.process_list,
            WorkerProcessGet: self.process_get,
            WorkerProcessDelete: self.process_delete,
            ModelLoad: self.load,
            ModelUnload: self.unload,
            HiveDrain: self.drain_hive,
        }

    async def spawn(self, op: WorkerSpawn, context: JobContext) -> SpawnedWorker:
        return await self._workers.spawn(op, context)

    async def all(self, _: WorkerList, __: JobContext) -> WorkerListResult:
        return WorkerListResult(workers=self._workers.infos())

    async def get(self, op: WorkerGet, _: JobContext) -> WorkerInfo:
        return self._workers.info(op.worker_id)

    async def stop(self, op: WorkerStop, context: JobContext) -> WorkerInfo:
        context.narrate(
            "worker_stop_start", f"Stopping {op.worker_id}, {op.grace_s:g} s for what runs on it."
        )
        stopped = await self._workers.stop(op.worker_id, op.grace_s)
        context.narrate("worker_stop_complete", f"{op.worker_id} has stopped.")
        return stopped

    async def drain(self, op: WorkerDrain, context: JobContext) -> WorkerInfo:
        info = self._workers.drain(op.worker_id, op.draining)
        text = "finishes what it has and takes nothing new" if op.draining else "takes work again"
        context.narrate("worker_drain", f"{op.worker_id} {text}.")
        return info

    async def drain_hive(self, op: HiveDrain, context: JobContext) -> HiveDrained:
        self._workers.set_draining(op.draining)
        text = "finishes what it has and takes nothing new" if op.draining else "takes work again"
        context.narrate("hive_drain", f"The hive {text}.")
        running = sum(worker.steps for worker in self._workers.all())
        return HiveDrained(draining=self._workers.draining, running=running)

    # --- logs ------------------------------------------------------------------------------------------

    async def log(self, op: WorkerLog, context: JobContext) -> WorkerLogResult:
        """Give the last lines of a worker's log, and with `follow` what comes, until it has ended.

        The log of a worker that is gone is kept for a while, and can be read as long.
        """
        worker, path = self._workers.log_of(op.worker_id)
        reader = LogReader(path)
        told = _tell(context, await anyio.to_thread.run_sync(reader.last, op.lines))
        while op.follow and worker is not None:
            has_ended = worker.gone.is_set()
            lines = await anyio.to_thread.run_sync(reader.more)
            told += _tell(context, lines)
            if lines:
                continue
            if has_ended:
                break
            with anyio.move_on_after(LOG_POLL_S):
                await worker.gone.wait()
        return WorkerLogResult(worker_id=op.worker_id, lines=told)

    # --- processes -------------------------------------------------------------------------------------

    async def process_list(self, _: WorkerProcessList, __: JobContext) -> WorkerProcessListResult:
        return WorkerProcessListResult(processes=await self._processes())

    async def process_get(self, op: WorkerProcessGet, _: JobContext) -> WorkerProcessInfo:
        for info in await self._processes():
            if info.pid == op.pid:
                return info
        raise self._no_process(op.pid)

    async def process_delete(self, op: WorkerProcessDelete, context: JobContext) -> WorkerProcessInfo:
        """End one process of ours by force. A worker that loses one ends and is started again."""
        info = next((info for info in await self._processes() if info.pid == op.pid), None)
        if info is None or info.kind == "foreign":
            if LinuxSystem().stat(op.pid) is None:
                raise self._no_process(op.pid)
            raise Conflict(
                f"Process {op.pid} is not proven to be this hive's, so it is not signalled. "
                "Whoever has started it may end it.",
                code="not_ours",
                title="Not ours",
            )
        worker = self._workers.get(info.worker_id or "")
        if worker.running is None or not await worker.running.process.signal(op.pid, SIGKILL):
            raise self._no_process(op.pid)
        context.narrate(
            "worker_process_delete",
            f"Process {op.pid} ({info.kind} of {worker.id}) was ended. "
            f"To stop the worker for good: rbee worker stop {worker.id}",
        )
        return info

    async def _processes(self) -> list[WorkerProcessInfo]:
        leaders = {
            worker.running.nonce: (worker.id, worker.running.process.pid)
            for worker in self._workers.all()
            if worker.running is not None
        }
        devices = self._devices()
        return await anyio.to_thread.run_sync(lambda: view(find_owned(LinuxSystem(), leaders), devices))

    @staticmethod
    def _no_process(pid: int) -> NotFound:
        return NotFound(
            f"No process {pid} of this hive's workers or on its devices. See: rbee worker processes",
            code="process_not_found",
            title="Process not found",
        )

    # --- models ----------------------------------------------------------------------------------------

    async def load(self, op: ModelLoad, context: JobContext) -> WorkerInfo:
        """Have a worker of the model ready: one that is, or one that sleeps and wakes, or a new one."""
        workers = self._workers.of_model(op.model)
        for worker in workers:
            if worker.life.is_serving:
                context.narrate("model_load", f"{op.model} is loaded: {worker.id} serves it.")
                return self._workers.info(worker.id)
        for worker in workers:
            if worker.life.is_asleep:
                context.narrate("model_load", f"Waking {worker.id}, which has {op.model}.")
                return await self._workers.wake(worker.id, WAKE_LIMIT_S)
        spawned = await self._workers.spawn(WorkerSpawn(model=op.model), context)
        return self._workers.info(spawned.worker_id)

    async def unload(self, op: ModelUnload, context: JobContext) -> ModelUnloaded:
        """Take the model out of device memory, on all its workers at once."""
        ended: dict[str, WorkerInfo] = {}
        workers = self._workers.of_model(op.model)
        async with anyio.create_task_group() as tasks:
            for worker in workers:
                tasks.start_soon(self._unload, worker, context, ended)
        if not workers:
            context.narrate("model_unload", f"No worker has {op.model} loaded.")
        return ModelUnloaded(model=op.model, workers=[ended[worker.id] for worker in workers])

    async def _unload(self, worker: Worker, context: JobContext, ended: dict[str, WorkerInfo]) -> None:
        if worker.life.is_asleep or await self._workers.sleep(worker.id, SLEEP_LIMIT_S):
            context.narrate("model_unload", f"{worker.id} sleeps; its device memory is free.")
            ended[worker.id] = self._workers.info(worker.id)
            return
        context.narrate("model_unload", f"{worker.id} cannot sleep and is stopped.")
        ended[worker.id] = await self._workers.stop(worker.id, UNLOAD_GRACE_S)


def _tell(context: JobContext, lines: list[str]) -> int:
    """Narrate lines in batches; gives how many."""
    batch: list[str] = []
    size = 0
    for line in lines:
        cut = line[:LOG_BATCH_CHARS]
        if batch and (len(batch) == LOG_BATCH_LINES or size + len(cut) > LOG_BATCH_CHARS):
            context.narrate("worker_log", "\n".join(batch), lines=len(batch))
            batch, size = [], 0
        batch.append(cut)
        size += len(cut)
    if batch:
        context.narrate("worker_log", "\n".join(batch), lines=len(batch))
    return len(lines)
