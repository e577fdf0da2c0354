"""What is written to the store and what is read back, as plain values."""

from typing import TypeAlias

from msgspec import Struct

from rbee_contracts.jobs import JobState

# --- written, in this order for one job -----------------------------------------------------------------


class JobAccepted(Struct, frozen=True, kw_only=True):
    """A job was accepted. `operation` is its JSON, with prompt and messages.

    `digest` is the SHA-256 of that JSON: it tells the same operation under the same Idempotency-Key
    when prompt and messages are erased.
    """

    job_id: str
    seq: int
    name: str
    operation: bytes
    digest: bytes
    model: str | None
    correlation_id: str
    idempotency_key: str | None
    starts_at_once: bool
    resume_window_s: float | None
    timeout_s: float | None
    created_at: str
    traceparent: str | None = None


class JobStarted(Struct, frozen=True, kw_only=True):
    job_id: str
    started_at: str


class Narrated(Struct, frozen=True, kw_only=True):
    """One narration event: its place in the job's stream and its JSON.

    `lower_n` is the place it had in the stream of the job below, where it came from there.
    """

    job_id: str
    n: int
    i: int
    body: bytes
    lower_n: int | None


class StepTaken(Struct, frozen=True, kw_only=True):
    """A step is about to be submitted to a hive, under `lower_job_id`."""

    job_id: str
    step: str
    attempt: int
    hive_id: str
    lower_job_id: str


class FirstOutput(Struct, frozen=True, kw_only=True):
    """The job is about to speak; it must never be run again from the start."""

    job_id: str


class JobEnded(Struct, frozen=True, kw_only=True):
    """The terminal event, at its place; `outputs` items came before it.

    Written together with the erasure of prompt and messages. `error`, `usage` and `result` are JSON.
    """

    job_id: str
    state: JobState
    finished_at: str
    n: int
    i: int
    body: bytes
    error: bytes | None
    usage: bytes | None
    result: bytes | None


class HiveSeen(Struct, frozen=True, kw_only=True):
    """A hive announced itself, or was seen at another URL or boot."""

    hive_id: str
    url: str
    boot: str


class HiveForgotten(Struct, frozen=True, kw_only=True):
    """A hive was taken off the list. Where it is seen again in the same write, it is there after it."""

    hive_id: str


Record: TypeAlias = (
    JobAccepted | JobStarted | Narrated | StepTaken | FirstOutput | JobEnded | HiveForgotten | HiveSeen
)


# --- read back ------------------------------------------------------------------------------------------


class StoredEvent(Struct, frozen=True, kw_only=True):
    n: int
    i: int
    body: bytes
    lower_n: int | None


class StoredStep(Struct, frozen=True, kw_only=True):
    step: str
    attempt: int
    hive_id: str
    lower_job_id: str


class StoredJob(Struct, frozen=True, kw_only=True):
    """One job as it was last written; events by n, steps by attempt."""

    accepted: JobAccepted
    state: JobState
    started_at: str | None
    has_spoken: bool
    finished_at: str | None
    error: bytes | None
    usage: bytes | None
    result: bytes | None
    events: list[StoredEvent]
    steps: list[StoredStep]


class StoredHive(Struct, frozen=True, kw_only=True):
    hive_id: str
    url: str
    boot: str
