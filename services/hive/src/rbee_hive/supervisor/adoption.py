"""Taking up what the hive before has left: its living workers, and the remains of those that died."""

import anyio
import anyio.to_thread
import msgspec
import structlog

from rbee_hive.supervisor.launch import DeviceKind
from rbee_hive.supervisor.logs import LogFolder
from rbee_hive.supervisor.machine import Life, Policy, adopted
from rbee_hive.supervisor.process import WorkerProcess
from rbee_hive.supervisor.processes import Family, LinuxSystem
from rbee_hive.supervisor.records import Records, WorkerRecord
from rbee_hive.supervisor.worker import Running, Spec, Worker

log = structlog.get_logger(__name__)

REAP_LIMIT_S = 10.0
REAP_EVERY_S = 0.05

GONE = "has ended while its hive was away"


async def adopt(records: Records, boot_id: str, folder: LogFolder, policy: Policy) -> list[Worker]:
    """Give the workers that the records tell of: those that live, and as failed those that had served.

    What a dead worker has left is ended. What is not proven ours is left alone.

    Args:
        boot_id: of the machine, now: the pids of an earlier boot mean nothing.
        folder: where the workers' logs are.
    """
    found: list[Worker] = []
    for record in list(records.read()):
        if record.boot_id != boot_id:
            log.info("worker_record_of_an_earlier_boot", worker_id=record.worker_id)
            records.forget(record.worker_id)
            continue
        process = await anyio.to_thread.run_sync(find, record)
        if process is not None:
            found.append(_living(record, process, folder, policy))
            continue
        reaped = await reap(record.nonce)
        records.forget(record.worker_id)
        log.warning("worker_gone", worker_id=record.worker_id, pid=record.pid, reaped=reaped)
        if record.has_been_ready and not record.is_stopping:
            found.append(_gone(record, folder))
    return found


def find(record: WorkerRecord) -> WorkerProcess | None:
    """Find a recorded worker's process; by its nonce where the hive ended before it knew the pid."""
    if record.pid is not None and record.start_ticks is not None:
        return WorkerProcess.adopt(record.pid, record.start_ticks, record.nonce)
    system = LinuxSystem()
    for pid in system.pids():
        stat = system.stat(pid)
        if stat is not None and stat.session == pid and system.nonce(pid) == record.nonce:
            return WorkerProcess.adopt(pid, stat.start_ticks, record.nonce)
    return None


async def reap(nonce: str) -> list[int]:
    """End the processes that a worker without a process of its own has left; gives their pids."""
    family = Family(LinuxSystem(), nonce)
    reaped: list[int] = []
    with anyio.move_on_after(REAP_LIMIT_S):
        while await anyio.to_thread.run_sync(family.kill):
            reaped = reaped or family.pids()
            await anyio.sleep(REAP_EVERY_S)
    family.close()
    return reaped


def _living(record: WorkerRecord, process: WorkerProcess, folder: LogFolder, policy: Policy) -> Worker:
    life = adopted(
        anyio.current_time(),
        was_ready=record.has_been_ready,
        is_stopping=record.is_stopping,
        is_draining=record.is_draining,
        policy=policy,
    )
    worker = _known(record, life, folder)
    worker.running = Running(
        worker.id,
        process=process,
        port=record.port,
        token=record.token,
        nonce=record.nonce,
        log_offset=record.log_offset,
    )
    worker.pid = process.pid
    worker.memory_reserved = record.reserved_bytes
    worker.launched.set()
    if record.has_been_ready:
        worker.settled.set()
    log.info("worker_adopted", worker_id=worker.id, pid=worker.pid, port=worker.port, state=life.state)
    return worker


def _gone(record: WorkerRecord, folder: LogFolder) -> Worker:
    worker = _known(record, Life(phase="failed", has_been_ready=True, cause=GONE), folder)
    worker.log_tail = worker.last_lines()
    for event in (worker.launched, worker.settled, worker.gone):
        event.set()
    return worker


def _known(record: WorkerRecord, life: Life, folder: LogFolder) -> Worker:
    kind: DeviceKind = "cuda" if record.kind == "cuda" else "cpu"
    worker = Worker(
        record.worker_id,
        Spec(record.model, kind, tuple(record.devices), tuple(record.args)),
        msgspec.structs.replace(life, restarts=record.restarts),
        folder.path(record.worker_id),
        started_at=record.started_at,
        adopted=True,
    )
    worker.spawn_job_id = record.spawn_job_id
    worker.pid, worker.port = record.pid or 0, record.port
    return worker
