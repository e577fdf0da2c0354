"""What becomes of the hive's workers while `rbee up` runs, told as it happens."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path

from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import SERVING, HiveHeartbeat, WorkerInfo
from rbee_job_client import JobClient
from rbee_keeper.up.voice import Voice

RECONNECT_S = 1.0


async def watch_workers(hive: JobClient, voice: Voice, logs: Path, ready: Collection[str]) -> None:
    """Tell of workers that come, fail and go, for ever.

    Args:
        logs: the folder of the workers' logs.
        ready: workers that have been told of already.
    """
    known = {worker_id: Seen(is_serving=True) for worker_id in ready}
    while True:
        try:
            async with aclosing(hive.heartbeats("follower=keeper", HiveHeartbeat)) as beats:
                async for beat in beats:
                    known = compare(known, beat.workers, voice, logs)
        except RbeeError:
            # The hive has died, which is told elsewhere, or will answer again.
            await asyncio.sleep(RECONNECT_S)


class Seen(Struct, frozen=True, kw_only=True):
    """What has been told of a worker."""

    is_serving: bool = False
    has_failed: bool = False
    restarts: int = 0


def compare(
    known: Mapping[str, Seen], workers: Sequence[WorkerInfo], voice: Voice, logs: Path
) -> dict[str, Seen]:
    """Tell what is different from what has been told; give what has been told now.

    Between two heartbeats a worker may have died and be ready again; it is told all the same.
    """
    now: dict[str, Seen] = {}
    for worker in workers:
        was = known.get(worker.worker_id, Seen(restarts=worker.restarts))
        log = f"its log: {logs / worker.worker_id}.log"
        cause = worker.cause or f"ended with status {worker.exit_code}"
        has_failed = worker.state == "failed"
        is_serving = was.is_serving
        if has_failed and not was.has_failed:
            text = f"{worker.worker_id} failed: {cause}; {log}; "
            text += f"start another: rbee worker spawn --model {worker.model}"
            voice.tell("worker_failed", text, who="worker", style="red")
        elif worker.restarts > was.restarts:
            text = f"{worker.worker_id} died: {cause}; it is started again; {log}"
            voice.tell("worker_restart", text, who="worker", style="yellow")
            is_serving = False
        if worker.state in SERVING and not is_serving:
            voice.tell("worker_ready", f"{worker.worker_id} serves {worker.model}", who="worker")
        now[worker.worker_id] = Seen(
            # One that drains or sleeps has not gone; that it serves again is no news.
            is_serving=worker.state in SERVING or (is_serving and worker.state in ("draining", "sleeping")),
            has_failed=has_failed,
            restarts=worker.restarts,
        )
    for gone in known.keys() - now.keys():
        if not known[gone].has_failed:
            voice.tell("worker_stopped", f"{gone} has stopped", who="worker")
    return now
