"""`make bench-relay`: what a hop costs. The sim worker's streams direct, behind queen and hive, behind peers.

All paths lead to the same worker and are measured in one run, one after the other and several times over, so
that what else happens on the machine falls on all of them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from benchmarks import peers, processes
from benchmarks.load import Load, LoadResult
from benchmarks.measure import machine
from benchmarks.relay_report import CASCADE, DIRECT, Cell, RelayResults, Shape, publish_results

ROUNDS = 3
SETTLE_S = 0.3

SHAPES = (
    Shape(streams=1, rate=50, tokens=100, probes=20),
    Shape(streams=64, rate=50, tokens=200),
    Shape(streams=256, rate=50, tokens=200),
    Shape(streams=1000, rate=10, tokens=60, stagger_ms=2.0),
)

ENGINE = [
    "--sim-step-ms-per-seq=0",
    "--sim-prefill-tokens-per-s=1e9",
    "--sim-max-num-seqs=2048",
    "--sim-max-num-batched-tokens=1000000",
    "--sim-kv-blocks=1000000",
]
"""Each stream gets exactly one token a step, whatever the batch."""


class Way(Struct, frozen=True, kw_only=True):
    """One way to the worker: where it begins, how it is asked, and whose CPU time it takes."""

    name: str
    port: int
    protocol: Literal["openai", "jobs"]
    services: dict[str, list[int]]


class Bench(Struct, kw_only=True):
    """What is known so far."""

    cells: list[Cell] = []
    absent: dict[str, str] = {}
    versions: dict[str, str] = {}


@contextmanager
def ways(bench: Bench, folder: Path, step_ms: float) -> Iterator[list[Way]]:
    """Start the cluster and the peers; a peer that is missing is noted and left out."""
    with ExitStack() as stack:
        engine = [*ENGINE, f"--sim-step-ms={step_ms:g}"]
        cluster = stack.enter_context(processes.cluster(folder, engine))
        worker = processes.LoneWorker(folder, engine)
        stack.callback(worker.stop)
        own = {"worker": [worker.pid]}
        found = [Way(name=DIRECT, port=worker.port, protocol="openai", services=own)]
        for name, start in (("sglang-router", peers.start_router), ("nginx", peers.start_nginx)):
            try:
                peer = start(folder, worker.port)
            except processes.CannotMeasure as exc:
                bench.absent[name] = str(exc)
                continue
            stack.callback(peer.close)
            bench.versions[name] = peer.version
            services = {name: peer.pids, **own}
            found.append(Way(name=name, port=peer.port, protocol="openai", services=services))
        found.append(Way(name="worker's jobs", port=worker.port, protocol="jobs", services=own))
        found.append(Way(name=CASCADE, port=cluster.port, protocol="jobs", services=cluster.pids))
        yield found


def run_load(way: Way, shape: Shape) -> LoadResult:
    """Put one load on one way, from a process of its own."""
    load = Load(
        port=way.port,
        protocol=way.protocol,
        model=processes.MODEL,
        streams=shape.streams,
        tokens=shape.tokens,
        stagger_ms=shape.stagger_ms,
        probes=shape.probes,
        services=way.services,
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=msgspec.json.encode(load),
        stdout=subprocess.PIPE,
        cwd=processes.ROOT,
        check=True,
    )
    result = msgspec.json.decode(done.stdout, type=LoadResult)
    if len(result.failed) == shape.streams:
        raise processes.CannotMeasure(f"all streams failed, {way.name}: {result.failed[0]}")
    return result


def measure(bench: Bench, folder: Path, shapes: Sequence[Shape], rounds: int) -> None:
    """Fill the bench's cells, round by round and interleaved."""
    for rate, group in groupby(shapes, key=lambda shape: shape.rate):
        same_rate = list(group)
        with ways(bench, folder / f"rate-{rate}", 1000 / rate) as found:
            for number in range(1, rounds + 1):
                for shape in same_rate:
                    for way in found:
                        _say(f"round {number} of {rounds}: {shape.name}, {way.name}")
                        cell = Cell(
                            shape=shape,
                            way=way.name,
                            round=number,
                            date=datetime.now(UTC).isoformat(timespec="seconds"),
                            load_average=[round(value, 2) for value in os.getloadavg()],
                            result=run_load(way, shape),
                        )
                        bench.cells.append(cell)


def main() -> int:
    """Run it all; 1 where tokens were lost or doubled."""
    parser = argparse.ArgumentParser(prog="make bench-relay", description="Measure what a hop costs.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", help="only the loads of so many streams")
    parser.add_argument("--keep", action="store_true", help="keep the results under their date too")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args()
    processes.stop_when_terminated()
    shapes = [shape for shape in SHAPES if args.streams is None or shape.streams in args.streams]
    here = machine({})
    bench = Bench()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder:
        measure(bench, Path(folder), shapes, args.rounds)
    here = msgspec.structs.replace(here, versions=here.versions | processes.versions() | bench.versions)
    results = RelayResults(machine=here, rounds=args.rounds, absent=bench.absent, cells=bench.cells)
    publish_results(results, keep=args.keep, dry=args.dry)
    return 1 if any(c.result.lost or c.result.doubled or c.result.disordered for c in bench.cells) else 0


def _say(text: str) -> None:
    print(f"bench-relay: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except processes.CannotMeasure as exc:
        sys.exit(f"bench-relay: {exc}")
