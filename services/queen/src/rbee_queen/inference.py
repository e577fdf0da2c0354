"""One inference: placed, run on a hive, and tried elsewhere once where its place is lost before it spoke."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import structlog
from msgspec.structs import replace

from rbee_contracts.errors import NoCapacity, RbeeError
from rbee_contracts.events import Candidate, Decision, InferRetry, InferSchedule
from rbee_contracts.nodes import HiveInfo
from rbee_contracts.operations import Infer, OpenAI, ScheduleExplain
from rbee_job_server import JobContext, LowerJobFailed
from rbee_queen.fleet import Fleet, Hive
from rbee_queen.metrics.measures import SchedulingMeasures
from rbee_queen.retry import (
    HIVE_FAILURES,
    MAX_ATTEMPTS,
    Budget,
    deposited,
    left,
    may_go_elsewhere,
    withdrawn,
)
from rbee_queen.scheduler import NoPlacement, Request, Tried, schedule

log = structlog.get_logger(__name__)

SETTLE_S = 3.0
"""How long a request that has no place waits for hives that were only just met."""

Inferring: TypeAlias = Infer | OpenAI
"""What a worker's engine answers."""


class NotElsewhere(RbeeError):
    """Its place failed, and it is not tried at another; code and title are that failure's."""


class Inference:
    """Places inferences and runs them. Owns the budget of retries of the whole queen.

    Args:
        now: the queen's monotonic clock, in seconds.
    """

    def __init__(self, fleet: Fleet, now: Callable[[], float]) -> None:
        self._fleet = fleet
        self._now = now
        self._budget = Budget(at=now())
        self.measures = SchedulingMeasures()

    @property
    def retries_left(self) -> float:
        """How many retries there may be now."""
        return left(self._budget, self._now())

    async def run(self, op: Inferring, context: JobContext) -> Any:
        """Run an inference on the least busy worker of its model; before it has spoken, on two at most.

        Raises:
            NoCapacity: no worker can take it.
            RbeeError: it failed below.
        """
        context.narrate("infer_start", f"Inference on {op.model} has started.")
        job = context.job
        if not job.steps:
            self._budget = deposited(self._budget, self._now())
        tried: tuple[Tried, ...] = ()
        earlier = job.earlier(InferSchedule)
        if earlier is None:
            begun = self._now()
            decision = await self._first(op)
            self.measures.waited(self._now() - begun)
        else:
            decision = earlier.data
        while True:
            context.narrate(
                "infer_schedule",
                f"Runs on {decision.worker_id} of hive {decision.hive_id}: {decision.reason}.",
                decision,
            )
            # A retry that was told before a restart: that attempt is over, and the next one is gone on with.
            told = job.earlier(InferRetry)
            if told is not None:
                tried = (*tried, _blamed(decision, told.data.get("cause", "lost"), is_hive=False))
                again = job.earlier(InferSchedule)
                context.narrate("infer_retry", told.message, **told.data)
                decision = self.decide(op, tried) if again is None else again.data
                continue
            try:
                return await self._run_on(op, context, decision, attempt=len(tried))
            except RbeeError as exc:
                tried = (*tried, _blamed(decision, exc.code, is_hive=_is_the_hives(exc)))
                before, decision = decision, self._elsewhere(op, context, tried, exc)
                self._tell_retry(context, before, decision, exc)

    async def _first(self, op: Inferring) -> Decision:
        """Decide where a new request runs; a queen that has just started hears her hives first."""
        if isinstance(schedule(self._fleet.snapshot(), _request(op, ())), NoPlacement):
            await self._fleet.settled(SETTLE_S)
        return self.decide(op)

    def decide(self, op: Inferring | ScheduleExplain, tried: tuple[Tried, ...] = ()) -> Decision:
        """Choose where a request runs.

        Raises:
            NoCapacity: no worker can take it; the message says why, and what would help.
        """
        request = _request(op, tried)
        decision = schedule(self._fleet.snapshot(), request)
        self.measures.decided(is_placed=not isinstance(decision, NoPlacement))
        if isinstance(decision, NoPlacement):
            raise NoCapacity(_no_worker(request, decision.candidates, self._fleet.infos()), code="no_worker")
        return decision

    async def _run_on(self, op: Inferring, context: JobContext, decision: Decision, attempt: int) -> Any:
        hive = self._fleet.get(decision.hive_id)
        structlog.contextvars.bind_contextvars(hive_id=hive.id, worker_id=decision.worker_id)
        log.info(
            "infer_scheduled",
            model=decision.model,
            attempt=attempt,
            reason=decision.reason,
            candidates=len(decision.candidates),
        )
        placed = replace(op, hive_id=hive.id, worker_id=decision.worker_id)
        with _assigned(hive, decision.worker_id):
            return await hive.relay.perform(context, placed, step=op.name, attempt=attempt)

    def _elsewhere(
        self, op: Inferring, context: JobContext, tried: tuple[Tried, ...], failure: RbeeError
    ) -> Decision:
        """Decide where a request that has failed runs next.

        Raises:
            RbeeError: the failure, where it is final.
        """
        job = context.job
        if job.is_finished or not may_go_elsewhere(failure.code):
            raise failure
        if job.has_spoken:
            self.measures.refused("spoken")
            raise _final(failure, retryable=False)  # what was said would be said again
        if len(tried) >= MAX_ATTEMPTS:
            self.measures.refused("attempts")
            raise _final(failure, f"It had failed on {tried[0].worker_id} of hive {tried[0].hive_id} before.")
        decision = schedule(self._fleet.snapshot(), _request(op, tried))
        self.measures.decided(is_placed=not isinstance(decision, NoPlacement))
        if isinstance(decision, NoPlacement):
            self.measures.refused("no_worker")
            others = "; ".join(
                f"{c.worker_id} on {c.hive_id} {c.reason}"
                for c in decision.candidates
                if c.model == op.model
                and (c.hive_id, c.worker_id) != (tried[-1].hive_id, tried[-1].worker_id)
            )
            raise _final(failure, f"No other worker can take it{': ' + others if others else ''}.")
        budget = withdrawn(self._budget, self._now())
        if budget is None:
            self.measures.refused("budget")
            raise _final(failure, "Too many requests are being tried again just now; submit it again later.")
        self._budget = budget
        self.measures.retried(failure.code)
        return decision

    def _tell_retry(self, context: JobContext, before: Decision, after: Decision, failure: RbeeError) -> None:
        log.warning("infer_retried", code=failure.code, to_hive=after.hive_id, to_worker=after.worker_id)
        facts: dict[str, Any] = {
            "from": {"hive_id": before.hive_id, "worker_id": before.worker_id},
            "to": {"hive_id": after.hive_id, "worker_id": after.worker_id},
            "cause": failure.code,
        }
        context.narrate(
            "infer_retry",
            f"{before.worker_id} of hive {before.hive_id} failed before it said anything ({failure.code}); "
            f"trying {after.worker_id} of hive {after.hive_id}.",
            **facts,
        )


def _request(op: Inferring | ScheduleExplain, tried: tuple[Tried, ...]) -> Request:
    return Request(model=op.model or "", hive_id=op.hive_id, worker_id=op.worker_id, tried=tried)


def _blamed(decision: Decision, cause: str, *, is_hive: bool) -> Tried:
    return Tried(hive_id=decision.hive_id, worker_id=None if is_hive else decision.worker_id, cause=cause)


def _is_the_hives(failure: RbeeError) -> bool:
    """Whether the hive failed, and not one worker of it."""
    if isinstance(failure, LowerJobFailed):
        # The hive took it, and told what became of it: only its own stopping is not about that one worker.
        is_workers = failure.actor is not None and failure.actor.startswith("worker/")
        return failure.code == "shutting_down" and not is_workers
    return failure.code in HIVE_FAILURES


def _final(failure: RbeeError, why: str = "", *, retryable: bool = True) -> NotElsewhere:
    """Make one job's own error of a failure that it may share with others: a lost hive fails all its jobs."""
    final = NotElsewhere(
        f"{failure.details} {why}".rstrip(), code=failure.code, title=failure.error, retryable=retryable
    )
    final.actor = failure.actor
    final.__cause__ = failure
    return final


@contextmanager
def _assigned(hive: Hive, worker_id: str) -> Iterator[None]:
    """Count a request on a worker for as long as it is ours."""
    hive.assigned[worker_id] = hive.assigned.get(worker_id, 0) + 1
    try:
        yield
    finally:
        hive.assigned[worker_id] -= 1
        if not hive.assigned[worker_id]:
            del hive.assigned[worker_id]


def _no_worker(request: Request, candidates: list[Candidate], hives: list[HiveInfo]) -> str:
    """Say what runs, and what would make this request run."""
    here = [c for c in candidates if c.model == request.model]
    why = "; ".join(f"{c.worker_id} on {c.hive_id} {c.reason}" for c in here)
    running = ", ".join(f"{c.model} ({c.worker_id} on {c.hive_id})" for c in candidates) or "nothing"
    text = f"No worker can run {request.model!r} now"
    text += f": {why}." if why else f". Running: {running}."
    if not hives:
        return f"{text} No hive has announced itself; start one: rbee-hive --queen-url URL-OF-THIS-QUEEN"
    open_hives = [hive for hive in hives if hive.state == "online" and not hive.draining] or hives
    having = [h.hive_id for h in open_hives if any(model.model == request.model for model in h.models)]
    hive_id = request.hive_id or (having or [hive.hive_id for hive in open_hives])[0]
    if not having:
        models = sorted({model.model for hive in hives for model in hive.models})
        text += (
            f" It lies on no hive; models that do: {', '.join(models) or 'none'}. "
            f"Put it into the models folder of {hive_id}, or fetch it: "
            f"rbee model download {request.model} --hive-id {hive_id}."
        )
    return f"{text} To start one: rbee worker spawn --model {request.model} --hive-id {hive_id}"
