"""Ending the workers that a hive has left and that no other will take up."""

from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from rbee_hive.supervisor.adoption import find, reap
from rbee_hive.supervisor.processes import boot_id
from rbee_hive.supervisor.records import Records, WorkerRecord

log = structlog.get_logger(__name__)

GRACE_S = 10.0
"""What a worker gets between SIGTERM and SIGKILL: whoever read from it has no hive to read through."""


async def end_left(state_dir: Path, grace_s: float = GRACE_S) -> bool:
    """End every worker that the records in a hive's state folder tell of, all at once.

    The caller holds the folder's lock, so that no hive has them.

    Returns:
        Whether nothing is left. What could not be ended keeps its record, for the next hive.
    """
    records, boot = Records(state_dir / "workers"), boot_id()
    left: list[str] = []

    async def end(record: WorkerRecord) -> None:
        if record.boot_id == boot and not await _end(record, grace_s):
            left.append(record.worker_id)
            return
        try:
            records.forget(record.worker_id)
        except OSError as exc:  # it names nobody any more, and the others are still to be ended
            log.error("worker_record_not_removed", worker_id=record.worker_id, reason=exc.strerror)

    async with anyio.create_task_group() as tasks:
        for record in list(records.read()):
            tasks.start_soon(end, record)
    return not left


async def _end(record: WorkerRecord, grace_s: float) -> bool:
    """End one worker with all that is its; tell whether nothing is left."""
    process = await anyio.to_thread.run_sync(find, record)
    if process is None:
        reaped = await reap(record.nonce)
        log.info("worker_gone", worker_id=record.worker_id, pid=record.pid, reaped=reaped)
        return True
    process.terminate()
    with anyio.move_on_after(grace_s) as grace:
        await process.wait()
    await process.clear()
    left = [stat.pid for stat in process.held()]
    process.close()
    log.info(
        "worker_ended",
        worker_id=record.worker_id,
        pid=record.pid,
        was_killed=grace.cancelled_caught,
        left=left,
    )
    return not left
