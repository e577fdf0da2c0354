"""Filter: which workers can take a request at all, and why the others cannot."""

from rbee_queen.scheduler.snapshot import Request, WorkerView


def rejection(worker: WorkerView, request: Request) -> str | None:
    """Say why `worker` cannot take `request`; None when it can."""
    if worker.model != request.model:
        return f"serves {worker.model}"
    if request.hive_id is not None and worker.hive_id != request.hive_id:
        return f"not on hive {request.hive_id}, to which the request is pinned"
    if request.worker_id is not None and worker.worker_id != request.worker_id:
        return f"not worker {request.worker_id}, to which the request is pinned"
    if not worker.is_hive_online:
        return f"hive {worker.hive_id} cannot be reached"
    if worker.state != "ready":
        return f"is {worker.state}"
    return None
