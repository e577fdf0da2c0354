"""Keeping the workers' records on disk in step with the workers, one write of each at a time."""

import anyio.to_thread
import structlog

from rbee_hive.supervisor.machine import Life
from rbee_hive.supervisor.records import Records, WorkerRecord
from rbee_hive.supervisor.worker import Running, Worker

log = structlog.get_logger(__name__)


def written(life: Life) -> tuple[object, ...]:
    """Give what of a life its record tells: only a change of this is written."""
    return life.has_been_ready, life.phase == "stopping", life.is_draining


class Keeping:
    """Writes records off the event loop. Of several writes of one worker the last has the newest state.

    Args:
        boot_id: of the machine, now.
    """

    def __init__(self, records: Records, boot_id: str) -> None:
        self._records = records
        self._boot_id = boot_id

    async def announce(self, worker: Worker, *, port: int, token: str, nonce: str, log_offset: int) -> None:
        """Write a record before there is a process: however this hive ends, the next finds it by the nonce.

        Raises:
            OSError: it cannot be written.
        """
        record = self._record(worker, port=port, token=token, nonce=nonce, log_offset=log_offset)
        async with worker.record_lock:
            await anyio.to_thread.run_sync(self._records.write, record)

    async def write(self, worker: Worker) -> None:
        """Bring a worker's record up to date, or take it away."""
        async with worker.record_lock:
            running = worker.running
            try:
                if worker.is_forgotten or (running is None and worker.life.is_over):
                    await anyio.to_thread.run_sync(self._records.forget, worker.id)
                elif running is not None:
                    record = self._record(
                        worker,
                        port=running.port,
                        token=running.token,
                        nonce=running.nonce,
                        log_offset=running.log_offset,
                        running=running,
                    )
                    await anyio.to_thread.run_sync(self._records.write, record)
            except OSError as exc:
                log.error("worker_record_not_written", worker_id=worker.id, reason=str(exc))

    def _record(
        self,
        worker: Worker,
        *,
        port: int,
        token: str,
        nonce: str,
        log_offset: int,
        running: Running | None = None,
    ) -> WorkerRecord:
        life = worker.life
        return WorkerRecord(
            worker_id=worker.id,
            model=worker.model,
            kind=worker.spec.kind,
            devices=list(worker.spec.devices),
            args=list(worker.spec.args),
            port=port,
            token=token,
            nonce=nonce,
            boot_id=self._boot_id,
            started_at=worker.started_at,
            pid=None if running is None else running.process.pid,
            pgid=None if running is None else running.process.pid,
            start_ticks=None if running is None else running.process.start_ticks,
            spawn_job_id=worker.spawn_job_id,
            restarts=life.restarts,
            log_offset=log_offset,
            has_been_ready=life.has_been_ready,
            is_stopping=life.phase == "stopping",
            is_draining=life.is_draining,
            reserved_bytes=worker.memory_reserved,
        )
