"""`make bench-openai`: what the front door costs, beside other proxies in front of the same sim worker.

All ways lead to one kind of worker and are measured in one run, one after the other and several times over,
so that what else happens on the machine falls on all of them.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import msgspec

from benchmarks import peers, processes
from benchmarks.measure import machine
from benchmarks.openai_report import publish_proxies
from benchmarks.relay import ENGINE, Bench, Way, run_load
from benchmarks.relay_report import CASCADE, DIRECT, Cell, RelayResults, Shape

ROUNDS = 3

SHAPES = (
    Shape(streams=1, rate=50, tokens=100, probes=20),
    Shape(streams=64, rate=10, tokens=40),
    Shape(streams=512, rate=2, tokens=50, stagger_ms=4.0),
    Shape(streams=200, rate=50, tokens=2, stagger_ms=20.0),
)
"""The rates are those that the slowest of the proxies can follow on two cores; the last counts requests."""


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
        for name, start in (("sglang-router", peers.start_router), ("litellm", peers.start_litellm)):
            try:
                peer = start(folder, worker.port)
            except processes.CannotMeasure as exc:
                bench.absent[name] = str(exc)
                continue
            stack.callback(peer.close)
            bench.versions[name] = peer.version
            found.append(Way(name=name, port=peer.port, protocol="openai", services={name: peer.pids, **own}))
        found.append(Way(name=CASCADE, port=cluster.port, protocol="openai", services=cluster.pids))
        yield found


def measure(bench: Bench, folder: Path, shapes: Sequence[Shape], rounds: int) -> None:
    """Fill the bench's cells, round by round and interleaved."""
    for rate, group in groupby(shapes, key=lambda shape: shape.rate):
        same_rate = list(group)
        with ways(bench, folder / f"rate-{rate}-{same_rate[0].tokens}", 1000 / rate) as found:
            for number in range(1, rounds + 1):
                for shape in same_rate:
                    for way in found:
                        _say(f"round {number} of {rounds}: {shape.name}, {way.name}")
                        bench.cells.append(
                            Cell(
                                shape=shape,
                                way=way.name,
                                round=number,
                                date=datetime.now(UTC).isoformat(timespec="seconds"),
                                load_average=[round(value, 2) for value in os.getloadavg()],
                                result=run_load(way, shape),
                            )
                        )


def main() -> int:
    """Run it all; 1 where tokens were lost or doubled on rbee's way."""
    parser = argparse.ArgumentParser(prog="make bench-openai", description="Measure the front door.")
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
    publish_proxies(results, keep=args.keep, dry=args.dry)
    ours = [cell.result for cell in bench.cells if cell.way == CASCADE]
    return 1 if any(result.lost or result.doubled or result.disordered for result in ours) else 0


def _say(text: str) -> None:
    print(f"bench-openai: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except processes.CannotMeasure as exc:
        sys.exit(f"bench-openai: {exc}")
