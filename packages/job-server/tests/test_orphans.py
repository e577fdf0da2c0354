"""An inference that a hop above sent is cancelled when nobody follows for too long; other work goes on."""

import anyio
import pytest
from rbee_inprocess import LoopClock, run_counted

from rbee_contracts.ids import step_key
from rbee_contracts.operations import Infer, Operation, WorkerSpawn
from rbee_contracts.sse import START
from rbee_job_server import JobContext, JobServer, JobServerConfig, Submission

OWNER = "job-00000000-0000-4000-8000-000000000000"


async def endless(_: Operation, __: JobContext) -> None:
    await anyio.sleep_forever()


def hop(operation: Operation) -> Submission:
    return Submission(
        operation=operation,
        correlation_id="c",
        respond_async=True,
        idempotency_key=step_key(OWNER, operation.name),
    )


@pytest.mark.parametrize(
    ("operation", "state"),
    [(Infer(model="m", prompt="p"), "cancelled"), (WorkerSpawn(model="m", timeout_s=10_000), "running")],
)
def test_a_hop_job_whose_owner_stays_away(operation: Operation, state: str) -> None:
    async def main() -> None:
        server = JobServer(
            service="hive", actor="hive/h", handlers={Infer: endless, WorkerSpawn: endless}, clock=LoopClock()
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            follower = server.firehose.follow(None, output=True)
            job = server.submit(hop(operation))
            await anyio.sleep(300)
            assert job.record().state == "running", "it was cancelled while its owner followed"

            follower.close()
            await anyio.sleep(59)
            assert job.record().state == "running"
            await anyio.sleep(5)
            assert job.record().state == state
            if state == "cancelled":
                assert job.log is not None
                assert b'"code":"owner_gone"' in job.reader(START).take()
            tasks.cancel_scope.cancel()

    run_counted(main)


def test_an_owner_that_comes_back_in_time_keeps_its_job() -> None:
    async def main() -> None:
        server = JobServer(service="hive", actor="hive/h", handlers={Infer: endless}, clock=LoopClock())
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            job = server.submit(hop(Infer(model="m", prompt="p")))
            await anyio.sleep(50)
            follower = server.firehose.follow(None, output=True)
            await anyio.sleep(300)
            assert job.record().state == "running"
            follower.close()
            tasks.cancel_scope.cancel()

    run_counted(main)


def test_a_users_job_is_no_orphan() -> None:
    async def main() -> None:
        server = JobServer(
            service="hive",
            actor="hive/h",
            handlers={Infer: endless},
            clock=LoopClock(),
            config=JobServerConfig(orphan_timeout_s=1),
        )
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            submission = Submission(
                operation=Infer(model="m", prompt="p"), correlation_id="c", respond_async=True
            )
            job = server.submit(submission)
            await anyio.sleep(100)
            assert job.record().state == "running"
            tasks.cancel_scope.cancel()

    run_counted(main)
