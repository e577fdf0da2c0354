"""The decision: filter, score, and take the best, with the reason kept for every worker."""

from msgspec import Struct

from rbee_contracts.events import Candidate, Decision
from rbee_queen.scheduler.filter import rejection
from rbee_queen.scheduler.score import busyness
from rbee_queen.scheduler.snapshot import Request, Snapshot, WorkerView


class NoPlacement(Struct, frozen=True, kw_only=True):
    """No worker can take the request; every one there is, with its reason."""

    candidates: list[Candidate]


def schedule(snapshot: Snapshot, request: Request) -> Decision | NoPlacement:
    """Choose the least busy worker that can take `request`; ties go by hive id, then worker id."""
    fit: list[tuple[float, str, str]] = []
    candidates = []
    for worker in snapshot.workers:
        reason = rejection(worker, request)
        score = busyness(worker) if reason is None else None
        if score is not None:
            fit.append((score, worker.hive_id, worker.worker_id))
        candidates.append(_candidate(worker, score, reason))
    if not fit:
        return NoPlacement(candidates=candidates)
    score, hive_id, worker_id = min(fit)
    others = len(fit) - 1
    reason = f"{score:.0f} request{'' if score == 1 else 's'} on it" + (
        f", fewest of {len(fit)} workers" if others else ", the only worker that can take it"
    )
    return Decision(
        model=request.model, hive_id=hive_id, worker_id=worker_id, reason=reason, candidates=candidates
    )


def _candidate(worker: WorkerView, score: float | None, reason: str | None) -> Candidate:
    return Candidate(
        hive_id=worker.hive_id,
        worker_id=worker.worker_id,
        model=worker.model,
        score=score,
        reason=reason or f"{worker.reported} requests reported, {worker.assigned} assigned here",
    )
