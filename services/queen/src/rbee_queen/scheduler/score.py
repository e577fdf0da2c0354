"""Score: how busy a worker is. Lower is better."""

from rbee_queen.scheduler.snapshot import WorkerView


def busyness(worker: WorkerView) -> float:
    """Give the requests on a worker.

    A heartbeat is up to a second old and counts other queens' requests; our own count is exact and
    counts only ours. The larger of the two is nearest the truth.
    """
    return float(max(worker.reported, worker.assigned))
