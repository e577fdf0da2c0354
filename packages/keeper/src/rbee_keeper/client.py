"""Jobs from the caller's side: submit one, follow it to its verdict, cancel it when left early."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import AnyEvent, Error, ExecuteComplete
from rbee_contracts.operations import Operation
from rbee_contracts.results import RESULTS
from rbee_contracts.sse import START, Position
from rbee_job_client import JobClient, ProtocolError

CANCEL_TIMEOUT_S = 15.0
"""For the cancellation of a job that is left; a busy machine takes seconds. Ctrl-C again ends the wait."""

OnEvent = Callable[[AnyEvent], None]
OnLeft = Callable[[str, bool], None]
"""Told of a job that was left before its end: its id, and whether it was cancelled."""


class JobFailed(RbeeError):
    """The job ended without success: its own code and words."""

    title = "Job failed"


def ignore(_: AnyEvent) -> None:
    """Take no notice of an event."""


async def perform(
    client: JobClient,
    operation: Operation,
    on_event: OnEvent = ignore,
    *,
    is_ours: bool = False,
    on_left: OnLeft | None = None,
) -> Any:
    """Run an operation to its end and give its result, as the struct that the contracts name.

    Args:
        is_ours: cancel the job when this is left before its end, however that comes.
        on_left: told what came of that.

    Raises:
        JobFailed: the job's verdict was not success.
    """
    accepted = await client.submit(operation)
    has_ended = False
    try:
        data = await follow(client, accepted.job_id, START, on_event)
        has_ended = True
    except JobFailed:
        has_ended = True
        raise
    finally:
        if is_ours and not has_ended:
            was_cancelled = await _cancel(client, accepted.job_id)
            if on_left is not None:
                on_left(accepted.job_id, was_cancelled)
    try:
        # JSON has only text for the keys of an object.
        return msgspec.convert(data, RESULTS[type(operation)], str_keys=True)
    except msgspec.ValidationError as exc:
        raise ProtocolError(f"The result of {operation.name} is not what this rbee knows: {exc}") from exc


async def _cancel(client: JobClient, job_id: str) -> bool:
    """Cancel a job if that can be done soon."""
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT_S):
            return await client.cancel(job_id)
    except (RbeeError, TimeoutError):
        return False


async def follow(client: JobClient, job_id: str, position: Position, on_event: OnEvent) -> Any:
    """Give each event of a job to `on_event` and then its result.

    Raises:
        JobFailed: the verdict was not success.
    """
    cause: Error | None = None
    async with aclosing(client.stream(job_id, position)) as events:
        async for event in events:
            on_event(event)
            if isinstance(event, Error):
                cause = event
            elif isinstance(event, ExecuteComplete):
                return event.data
            elif event.kind == "terminal":
                raise JobFailed(
                    cause.message if cause is not None else event.message,
                    code=cause.code if cause is not None else getattr(event, "code", None),
                    retryable=cause is not None and cause.retryable,
                )
    return await _verdict(client, job_id)


async def _verdict(client: JobClient, job_id: str) -> Any:
    """Read how a job ended from its record: a stream begun behind its end brings no event."""
    record = await client.get(job_id)
    if record.state == "completed":
        return record.result
    if record.error is not None:
        raise JobFailed(record.error.message, code=record.error.code, retryable=record.error.retryable)
    raise JobFailed(f"{job_id} is {record.state}.", code=record.state)
