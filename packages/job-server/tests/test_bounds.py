"""What one job may say: a log past its bound ends the job, and what was said can still be read."""

import anyio.lowlevel
import pytest
from rbee_inprocess import Running, actions, eventually, running

from rbee_contracts.operations import Infer, Status
from rbee_job_server import JobContext
from rbee_job_server.event_log import MAX_LOG_BYTES

pytestmark = pytest.mark.anyio

MIB = 2**20


async def infer(operation: Infer, context: JobContext) -> None:
    while True:
        context.emit_token("x" * MIB)
        await anyio.lowlevel.checkpoint()


async def talk(operation: Infer, context: JobContext) -> None:
    for _ in range(MAX_LOG_BYTES // 1000):
        context.narrate("said", "x" * 1000)


async def status(_: Status, __: JobContext) -> str:
    return "x" * MAX_LOG_BYTES


async def say(service: Running, operation: str) -> tuple[list[str], dict[str, object]]:
    fields = {"model": "m", "prompt": "p"} if operation == "infer" else {}
    job_id = await service.submit({"operation": operation} | fields)
    frames = await service.read(job_id)
    record = (await service.http.get(f"/v1/jobs/{job_id}")).json()
    log = service.server.registry.get(job_id).log
    assert log is not None
    assert log.size < MAX_LOG_BYTES + 4096
    assert frames == await service.read(job_id)
    assert [frame.json["code"] for frame in frames[-3:-1]] == ["output_too_large"] * 2
    return actions(frames), record


async def test_output_past_the_bound_ends_the_job() -> None:
    async with running({Infer: infer}) as service:
        said, record = await say(service, "infer")
        await eventually(lambda: not service.server._running, "its handler is stopped")

    assert said == ["execute", *["token"] * 15, "error", "execute_error", "[DONE]"]
    assert record["state"] == "failed"


async def test_narration_past_the_bound_ends_the_job() -> None:
    async with running({Infer: talk}) as service:
        said, _ = await say(service, "infer")

    assert said[-3:] == ["error", "execute_error", "[DONE]"]
    assert said.count("said") > MAX_LOG_BYTES // 3000


async def test_a_result_past_the_bound_is_not_one() -> None:
    async with running({Status: status}) as service:
        said, record = await say(service, "status")

    assert said == ["execute", "error", "execute_error", "[DONE]"]
    assert record["state"] == "failed"
    assert record.get("result") is None
