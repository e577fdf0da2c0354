"""Jobs from the caller's side: submit one, follow it to its verdict, cancel it when left early."""

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import msgspec

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import AnyEvent, Error, ExecuteComplete
from rbee_contracts.nodes import HiveListResult, ServiceInfo
from rbee_contracts.operations import HiveList, HiveOperation, Operation
from rbee_contracts.results import RESULTS
from rbee_contracts.sse import START, Position
from rbee_job_client import JobClient, ProtocolError, Timeouts
from rbee_keeper.settings import Settings

SUBMIT_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 5.0

OnEvent = Callable[[AnyEvent], None]


class JobFailed(RbeeError):
    """The job ended without success: its own code and words."""

    title = "Job failed"


def connect(settings: Settings) -> JobClient:
    """Make a client of the service that was asked for."""
    return JobClient(settings.url, token=settings.token, timeouts=Timeouts(request=SUBMIT_TIMEOUT_S))


def ignore(_: AnyEvent) -> None:
    """Take no notice of an event."""


async def perform(
    client: JobClient, operation: Operation, on_event: OnEvent = ignore, *, is_ours: bool = False
) -> Any:
    """Run an operation to its end and give its result, as the struct that the contracts name.

    Args:
        is_ours: cancel the job when this is left before its end, however that comes.

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
            with contextlib.suppress(RbeeError, TimeoutError):
                async with asyncio.timeout(CANCEL_TIMEOUT_S):
                    await client.cancel(accepted.job_id)
    try:
        return msgspec.convert(data, RESULTS[type(operation)])
    except msgspec.ValidationError as exc:
        raise ProtocolError(f"The result of {operation.name} is not what this rbee knows: {exc}") from exc


async def hive_ids(client: JobClient, settings: Settings) -> tuple[list[str], list[str]]:
    """Give the hives that can be asked now, and those that cannot; a hive asked directly is the one."""
    if settings.is_hive:
        info: ServiceInfo = await client.get_json("/v1/info", ServiceInfo)
        return [info.id], []
    known: HiveListResult = await perform(client, HiveList())
    online = [hive.hive_id for hive in known.hives if hive.state != "unreachable"]
    return online, [hive.hive_id for hive in known.hives if hive.state == "unreachable"]


async def ask_hives(
    client: JobClient, settings: Settings, operation: HiveOperation
) -> tuple[dict[str, Any], list[str]]:
    """Have each hive execute an operation, or the one it names; give results by hive, and who is silent."""
    if operation.hive_id is not None:
        return {operation.hive_id: await perform(client, operation)}, []
    online, silent = await hive_ids(client, settings)
    operations = [msgspec.structs.replace(operation, hive_id=hive_id) for hive_id in online]
    results = await asyncio.gather(*(perform(client, asked) for asked in operations))
    return dict(zip(online, results, strict=True)), silent


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
                    code=getattr(event, "code", None),
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
