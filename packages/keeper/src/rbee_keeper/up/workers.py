"""What becomes of the hive's workers while `rbee up` runs, told as it happens."""

import asyncio
from collections.abc import Collection
from contextlib import aclosing
from pathlib import Path

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import HiveHeartbeat, WorkerInfo
from rbee_job_client import JobClient
from rbee_keeper.up.voice import Voice

RECONNECT_S = 1.0


async def watch_workers(hive: JobClient, voice: Voice, logs: Path, ready: Collection[str]) -> None:
    """Tell of workers that come, fail and go, for ever.

    Args:
        logs: the folder of the workers' logs.
        ready: workers that have been told of already.
    """
    known: dict[str, str] = dict.fromkeys(ready, "ready")
    while True:
        try:
            async with aclosing(hive.heartbeats("follower=keeper", HiveHeartbeat)) as beats:
                async for beat in beats:
                    _compare(known, beat.workers, voice, logs)
        except RbeeError:
            # The hive has died, which is told elsewhere, or will answer again.
            await asyncio.sleep(RECONNECT_S)


def _compare(known: dict[str, str], workers: list[WorkerInfo], voice: Voice, logs: Path) -> None:
    """Tell what is different from `known`, and bring that up to date."""
    for worker in workers:
        was, known[worker.worker_id] = known.get(worker.worker_id), worker.state
        if worker.state == was:
            continue
        if worker.state == "ready":
            voice.tell("worker_ready", f"{worker.worker_id} serves {worker.model}", who="worker")
        elif worker.state == "failed":
            text = (
                f"{worker.worker_id} died (status {worker.exit_code}); "
                f"its log: {logs / worker.worker_id}.log; "
                f"start another: rbee worker spawn --model {worker.model}"
            )
            voice.tell("worker_failed", text, who="worker", style="red")
    for gone in known.keys() - {worker.worker_id for worker in workers}:
        if known.pop(gone) != "failed":
            voice.tell("worker_stopped", f"{gone} has stopped", who="worker")
