"""`make bench-jobs`: what a job costs at the queen: to submit, to connect to, to wait for, and to keep."""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import msgspec
import uvloop

from benchmarks import processes
from benchmarks.http1 import Connection
from benchmarks.jobs_report import JobsResults, Latency, Memory, Rate, Times, publish_results
from benchmarks.measure import machine, usage

PROBES = 300
CALLERS = 32
RATE_S = 4.0
FINISHED = 10_000
LIVE = 1_000
SETTLE_S = 2.0

Operation: TypeAlias = Mapping[str, object]

SEATS = ["--sim-max-num-seqs=2048", "--sim-kv-blocks=1000000"]
FAST = [*SEATS, "--sim-step-ms=1", "--sim-step-ms-per-seq=0", "--sim-prefill-tokens-per-s=1e9"]
SLOW = [*SEATS, "--sim-step-ms=3600000"]

STATUS: Operation = {"operation": "status"}
INFER: Operation = {
    "operation": "infer",
    "model": processes.MODEL,
    "prompt": "hello " * 20,
    "max_tokens": 4,
    "ignore_eos": True,
    "resume_window_s": 0,
}


class Queen:
    """The queen under measurement, as its callers see it."""

    def __init__(self, cluster: processes.Cluster) -> None:
        self.port = cluster.port
        self._pids = cluster.pids["queen"]

    def rss_bytes(self) -> int:
        return usage(self._pids).rss_bytes

    def cpu_s(self) -> float:
        return usage(self._pids).cpu_s

    async def submit(self, connection: Connection, operation: Operation) -> str:
        """Submit; give the path of the job's stream."""
        answer = await connection.request("POST", "/v1/jobs", msgspec.json.encode(operation))
        return str(msgspec.json.decode(answer)["sse_url"])

    async def run(self, connection: Connection, operation: Operation) -> None:
        """Submit, and read the stream to its end."""
        stream = await connection.request("GET", await self.submit(connection, operation))
        if b'"action":"execute_complete"' not in stream:
            raise processes.CannotMeasure(f"a job did not complete: {stream[-500:]!r}")


async def latency(queen: Queen, operation: Operation) -> Latency:
    """Run jobs one after the other, each stream on a new connection as a client opens it."""
    submit, connect, first = [], [], []
    async with Connection(queen.port) as callers:
        for number in range(PROBES + 20):
            path = await queen.submit(callers, operation)
            submitted_s = callers.answered - callers.sent
            begun = time.perf_counter()
            async with Connection(queen.port) as reader:
                await reader.request("GET", path)
                if number >= 20:  # the first ones warm things up
                    submit.append(submitted_s * 1e3)
                    connect.append((reader.head_at - begun) * 1e3)
                    first.append((submitted_s + reader.first_event_at - begun) * 1e3)
    return Latency(
        operation=str(operation["operation"]),
        submit=Times.of(submit),
        connect=Times.of(connect),
        first_event=Times.of(first),
    )


async def rate(queen: Queen, name: str, step: Callable[[Connection], Awaitable[object]]) -> Rate:
    """Count how often `CALLERS` callers, each waiting for its answer, get through `step` in a while."""
    count = 0
    until = time.perf_counter() + RATE_S

    async def call() -> None:
        nonlocal count
        async with Connection(queen.port) as connection:
            while time.perf_counter() < until:
                await step(connection)
                count += 1

    began, cpu_s = time.perf_counter(), queen.cpu_s()
    await asyncio.gather(*(call() for _ in range(CALLERS)))
    elapsed_s = time.perf_counter() - began
    return Rate(name=name, per_s=count / elapsed_s, cpu_ms=(queen.cpu_s() - cpu_s) / count * 1e3)


async def memory(queen: Queen, name: str, count: int, fill: Callable[[int], Awaitable[object]]) -> Memory:
    """Measure by how much the queen has grown when `count` more jobs are there."""
    before = queen.rss_bytes()
    await fill(count)
    await asyncio.sleep(SETTLE_S)
    return Memory(name=name, jobs=count, bytes_per_job=(queen.rss_bytes() - before) / count)


async def finish_jobs(queen: Queen, operation: Operation, count: int) -> None:
    """Run jobs to their end, several at a time."""
    left = iter(range(count))

    async def call() -> None:
        async with Connection(queen.port) as connection:
            for _ in left:
                await queen.run(connection, operation)

    await asyncio.gather(*(call() for _ in range(CALLERS)))


async def submit_jobs(queen: Queen, count: int) -> None:
    """Submit jobs that nobody reads."""
    async with Connection(queen.port) as connection:
        for _ in range(count):
            await queen.submit(connection, INFER)


async def measure_times(cluster: processes.Cluster) -> tuple[list[Latency], list[Rate]]:
    queen = Queen(cluster)
    latencies = [await latency(queen, INFER), await latency(queen, STATUS)]
    rates = [
        await rate(queen, "submit `status` and read it to its end", lambda c: queen.run(c, STATUS)),
        await rate(queen, "submit `infer` and read it to its end", lambda c: queen.run(c, INFER)),
        await rate(queen, "submit `infer`", lambda c: queen.submit(c, INFER)),
    ]
    return latencies, rates


async def measure_finished(cluster: processes.Cluster) -> list[Memory]:
    queen = Queen(cluster)
    # What comes once is there then. Few jobs only: memory that they leave behind would be used again.
    await finish_jobs(queen, INFER, 20)
    await submit_jobs(queen, 100)
    waiting = await memory(queen, "not read yet", LIVE, lambda count: submit_jobs(queen, count))
    await finish_jobs(queen, INFER, 500)
    finished = await memory(
        queen, "finished, with their log", FINISHED, lambda count: finish_jobs(queen, INFER, count)
    )
    return [waiting, finished]


async def measure_live(cluster: processes.Cluster) -> list[Memory]:
    """Have jobs run whose first token never comes, each with a reader."""
    queen = Queen(cluster)
    connections = [Connection(queen.port) for _ in range(2 * LIVE)]

    async def read(count: int) -> None:
        for _ in range(count):
            connection = connections.pop()
            await connection.open()
            readers.append(connection)
            connection.start("GET", await queen.submit(connection, INFER))
            await connection.until_first_event()

    readers: list[Connection] = []
    try:
        await read(100)
        return [await memory(queen, "live, each with a reader's connection", LIVE, read)]
    finally:
        for connection in readers:
            connection.close()
        await asyncio.sleep(SETTLE_S)  # the last reader's leaving cancels a job: nothing is left to drain


@contextmanager
def cluster(name: str, engine: list[str]) -> Iterator[processes.Cluster]:
    print(f"bench-jobs: {name}", file=sys.stderr, flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder,
        processes.cluster(Path(folder), engine) as running,
    ):
        yield running


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-jobs", description="Measure what a job costs.")
    parser.add_argument("--keep", action="store_true", help="keep the results under their date too")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args()
    processes.stop_when_terminated()
    here = machine(processes.versions())
    with cluster("times", FAST) as running:
        latencies, rates = uvloop.run(measure_times(running))
    with cluster("memory of jobs that ended", FAST) as running:
        memories = uvloop.run(measure_finished(running))
    with cluster("memory of jobs that run", SLOW) as running:
        memories += uvloop.run(measure_live(running))
    results = JobsResults(machine=here, latencies=latencies, rates=rates, memories=memories)
    publish_results(results, keep=args.keep, dry=args.dry)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except processes.CannotMeasure as exc:
        sys.exit(f"bench-jobs: {exc}")
