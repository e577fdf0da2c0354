"""Identifiers on the wire: one pattern for each kind of id, and how hop job ids are derived."""

import re
import uuid
from typing import Annotated

from msgspec import Meta

# `\Z`, not `$`: `$` would let a trailing newline through.
MODEL_ID_PATTERN = (
    r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?"
    r"(@[A-Za-z0-9][A-Za-z0-9._-]{0,95})?\Z"
)
WORKER_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
HIVE_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
JOB_ID_PATTERN = r"^job-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z"
CORRELATION_ID_PATTERN = r"^[A-Za-z0-9._-]{1,64}\Z"
IDEMPOTENCY_KEY_PATTERN = r"^[A-Za-z0-9._:/-]{1,128}\Z"

ModelId = Annotated[
    str,
    Meta(
        pattern=MODEL_ID_PATTERN,
        max_length=290,
        description="A directory in the models folder, or `org/name[@revision]`.",
    ),
]
WorkerId = Annotated[str, Meta(pattern=WORKER_ID_PATTERN, description="Id of a worker, unique in its hive.")]
HiveId = Annotated[str, Meta(pattern=HIVE_ID_PATTERN, description="Name of a hive, unique in the cluster.")]
JobId = Annotated[str, Meta(pattern=JOB_ID_PATTERN, description="`job-<uuid>`.")]
CorrelationId = Annotated[str, Meta(pattern=CORRELATION_ID_PATTERN)]

_is_correlation_id = re.compile(CORRELATION_ID_PATTERN).match
_is_idempotency_key = re.compile(IDEMPOTENCY_KEY_PATTERN).match
_is_step_key = re.compile(r"^job-[0-9a-f-]{36}/[A-Za-z0-9._-]{1,64}/[0-9]{1,4}\Z").match

# Any fixed UUID will do as the name space of uuid5; this one is made from rbee's name alone.
_HOP_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "hop.rbee")


def new_job_id() -> str:
    return f"job-{uuid.uuid4()}"


def new_correlation_id() -> str:
    return f"corr-{uuid.uuid4().hex}"


def is_correlation_id(text: str) -> bool:
    """Whether a correlation id from outside may be used as it stands (logs, headers, file names)."""
    return _is_correlation_id(text) is not None


def is_idempotency_key(text: str) -> bool:
    return _is_idempotency_key(text) is not None


def step_key(root_job_id: str, step: str, attempt: int = 0) -> str:
    """Name one step of a job at the hop below; sent as its Idempotency-Key."""
    return f"{root_job_id}/{step}/{attempt}"


def is_step_key(key: str) -> bool:
    """Whether an Idempotency-Key was made by a hop (`step_key`) and not by a user."""
    return _is_step_key(key) is not None


def parse_step_key(key: str) -> tuple[str, str, int] | None:
    """Give the root job, the step and the attempt that a key names; None where no hop has made it."""
    if not is_step_key(key):
        return None
    root, step, attempt = key.split("/")
    return root, step, int(attempt)


def is_hop_job_id(job_id: str) -> bool:
    """Whether a job id was derived by a hop (`hop_job_id`): its UUID is of version 5, others are of 4."""
    return job_id[18:19] == "5"


def hop_job_id(service: str, key: str) -> str:
    """Give the id that the job of `key` has at a `service` (`hive` or `worker`).

    The hop above knows it before it submits, and again after any crash.
    """
    return f"job-{uuid.uuid5(_HOP_NAMESPACE, f'{service}:{key}')}"
