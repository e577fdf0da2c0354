"""Records of made-up jobs, for tests of the queen's store."""

import uuid
from typing import Any

import msgspec

from rbee_contracts.jobs import JobState
from rbee_queen.store import FirstOutput, JobAccepted, JobEnded, JobStarted, Narrated, Record, StepTaken

USAGE = b'{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}'
ERROR = b'{"code":"worker_lost","message":"It died.","retryable":true}'


def job_id(seq: int) -> str:
    return f"job-{uuid.UUID(int=seq)}"


def at(second: int) -> str:
    """Give a time of one day, as `Clock.timestamp` writes it."""
    return f"2026-11-22T{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}.000000Z"


def accepted(seq: int, *, operation: dict[str, Any] | None = None, key: str | None = None) -> JobAccepted:
    fields = operation or {"operation": "infer", "model": "rbee-tiny", "prompt": f"prompt {seq}"}
    return JobAccepted(
        job_id=job_id(seq),
        seq=seq,
        name=fields["operation"],
        operation=msgspec.json.encode(fields),
        digest=b"\x00digest\xff",
        model=fields.get("model"),
        correlation_id=f"corr-{seq}",
        idempotency_key=key,
        starts_at_once=key is not None,
        resume_window_s=None if key else 2.5,
        timeout_s=0.1,
        created_at=at(seq),
        traceparent=f"00-{seq:032x}-{seq:016x}-01" if key else None,
    )


def started(seq: int) -> JobStarted:
    return JobStarted(job_id=job_id(seq), started_at=at(seq + 1))


def narrated(seq: int, n: int, *, i: int = 0, lower_n: int | None = None, body: bytes = b"{}") -> Narrated:
    return Narrated(job_id=job_id(seq), n=n, i=i, body=body, lower_n=lower_n)


def step(seq: int, attempt: int = 0, *, name: str = "infer") -> StepTaken:
    return StepTaken(
        job_id=job_id(seq),
        step=name,
        attempt=attempt,
        hive_id=f"hive-{attempt}",
        lower_job_id=job_id(1_000_000 + 1000 * seq + attempt),
    )


def spoke(seq: int) -> FirstOutput:
    return FirstOutput(job_id=job_id(seq))


def ended(seq: int, *, second: int | None = None, n: int = 9, state: JobState = "completed") -> JobEnded:
    failed = state == "failed"
    return JobEnded(
        job_id=job_id(seq),
        state=state,
        finished_at=at(seq + 2 if second is None else second),
        n=n,
        i=4,
        body=b'{"action":"execute_complete"}',
        error=ERROR if failed else None,
        usage=None if failed else USAGE,
        result=None if failed else b'{"finish_reason":"stop"}',
    )


def whole_job(seq: int) -> list[Record]:
    """Everything one job writes in its life."""
    return [
        accepted(seq),
        started(seq),
        narrated(seq, 1),
        step(seq),
        narrated(seq, 2, lower_n=5),
        spoke(seq),
        ended(seq, n=3),
    ]
