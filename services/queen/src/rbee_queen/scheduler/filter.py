"""Filter: which workers can take a request at all, and why the others cannot."""

from rbee_contracts.nodes import SERVING, HiveState, WorkerState
from rbee_queen.scheduler.snapshot import Request, WorkerView

_WORKER_REASONS: dict[WorkerState, str] = {
    "starting": "is starting: its model is still loading",
    "sleeping": "sleeps: its model has left the device; rbee model load wakes it",
    "draining": "is draining: it finishes what it has and takes nothing new",
    "stopping": "is stopping",
    "stopped": "has stopped",
    "failed": "has failed",
}

_HIVE_REASONS: dict[HiveState, str] = {
    "connecting": "has not been heard yet",
    "unreachable": "is silent and gets nothing new until it answers",
    "lost": "has been silent for too long and was given up",
}


def rejection(worker: WorkerView, request: Request) -> str | None:
    """Say why `worker` cannot take `request`; None when it can."""
    if worker.model != request.model:
        return f"serves {worker.model}"
    if request.hive_id is not None and worker.hive_id != request.hive_id:
        return f"not on hive {request.hive_id}, to which the request is pinned"
    if request.worker_id is not None and worker.worker_id != request.worker_id:
        return f"not worker {request.worker_id}, to which the request is pinned"
    for tried in request.tried:
        if tried.hive_id == worker.hive_id and tried.worker_id in (None, worker.worker_id):
            return f"was tried for this request and failed ({tried.cause})"
    if worker.hive_state != "online":
        return f"hive {worker.hive_id} {_HIVE_REASONS[worker.hive_state]}"
    if worker.is_hive_draining:
        return f"hive {worker.hive_id} is draining: it finishes what it has and takes nothing new"
    if worker.state not in SERVING:
        return _WORKER_REASONS[worker.state]
    return None
