"""`make bench-openai`, second part: real vLLM straight, and through rbee, with vLLM's own load client.

Engine, services and client share one machine; each way has an engine of its own, of which one is idle.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import processes
from benchmarks.measure import machine, usages, with_descendants
from benchmarks.openai_report import STRAIGHT, THROUGH, Run, VllmResults, publish_vllm
from benchmarks.processes import BIN, ROOT, CannotMeasure, Process, fetch, until

ROUNDS = 3
STREAMS = (1, 8, 32)
PROMPTS = {1: 8, 8: 48, 32: 128}
"""Requests of each run: enough that starts and ends weigh little, few enough for minutes."""

OUTPUT_TOKENS = 128
MODEL = "rbee-tiny"
START_S = 180.0

_CLIENT = """
import argparse, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""


class Served(msgspec.Struct, frozen=True):
    """One way: its address, and its processes by name."""

    name: str
    url: str
    services: dict[str, list[int]]


@contextmanager
def served(folder: Path) -> Iterator[list[Served]]:
    """Run a lone worker, and a queen with a hive and a worker, all with rbee-tiny in real vLLM."""
    found: list[Process] = []

    def start(program: str, *args: str | Path) -> tuple[Process, str]:
        process = Process(program, [BIN / program, "--port", "0", *args], folder / f"{program}.log")
        found.append(process)
        port = until(process.listening_port, f"{program} listens")
        return process, f"http://127.0.0.1:{port}"

    try:
        lone, lone_url = start("rbee-worker", "--model", ROOT / "models/rbee-tiny")
        queen, queen_url = start("rbee-queen", "--state-dir", folder / "queen")
        hive, _ = start(
            *("rbee-hive", "--hive-id", "bench", "--queen-url", queen_url),
            *("--state-dir", folder / "hive", "--models-dir", ROOT / "models"),
        )
        worker = until(lambda: _spawn(queen_url), "a worker could be spawned")
        until(lambda: _answers(lone_url), "the lone worker answers")
        yield [
            Served(STRAIGHT, lone_url, _worker_parts(lone.pid)),
            Served(
                THROUGH,
                queen_url,
                {"queen": [queen.pid], "hive": [hive.pid], **_worker_parts(int(worker["pid"]))},
            ),
        ]
    finally:
        for process in reversed(found):
            process.stop()


def _worker_parts(pid: int) -> dict[str, list[int]]:
    return {"worker": [pid], "engine": [other for other in with_descendants(pid) if other != pid]}


def _spawn(queen_url: str) -> dict[str, Any] | None:
    operation = {"operation": "worker_spawn", "model": MODEL}
    accepted = json.loads(fetch(f"{queen_url}/v1/jobs", json.dumps(operation).encode()))
    frames = fetch(queen_url + accepted["sse_url"], timeout_s=START_S).decode().split("\n\n")
    events = [json.loads(frame.partition("data: ")[2]) for frame in frames if "data: {" in frame]
    if events[-1]["action"] == "execute_complete":
        return dict(events[-1]["data"])
    if events[-1].get("code") in ("no_hive", "unreachable", "hive_unreachable"):
        return None
    raise CannotMeasure(f"the worker did not start: {events[-2]['message']}")


def _answers(url: str) -> bool:
    try:
        return bool(fetch(f"{url}/ready"))
    except OSError:
        return False


def run_client(way: Served, streams: int, number: int, folder: Path) -> Run:
    """Run vLLM's client on one way."""
    result = folder / f"{way.name}-{streams}-{number}.json".replace(" ", "-")
    before = usages(way.services)
    done = subprocess.run(
        [
            *(sys.executable, "-c", _CLIENT, "--backend", "openai", "--base-url", way.url),
            *(
                "--endpoint",
                "/v1/completions",
                "--model",
                MODEL,
                "--tokenizer",
                str(ROOT / "models/rbee-tiny"),
            ),
            *("--dataset-name", "random", "--random-input-len", "32"),
            *("--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(PROMPTS[streams])),
            *("--max-concurrency", str(streams), "--ignore-eos", "--seed", str(number), "--disable-tqdm"),
            *("--percentile-metrics", "ttft,itl", "--save-result"),
            *("--result-dir", str(folder), "--result-filename", result.name),
        ],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = usages(way.services)
    if done.returncode:
        raise CannotMeasure(f"vLLM's client failed: {done.stderr.strip()[-1500:]}")
    told = json.loads(result.read_text())
    return Run(
        way=way.name,
        streams=streams,
        round=number,
        tokens_per_s=told["output_throughput"],
        ttft_p50_ms=told["median_ttft_ms"],
        itl_p50_ms=told["median_itl_ms"],
        completed=told["completed"],
        failed=told.get("failed", PROMPTS[streams] - told["completed"]),
        cpu_s={name: after[name].cpu_s - before[name].cpu_s for name in way.services},
    )


def main() -> int:
    """Run it all; 1 where a request failed."""
    parser = argparse.ArgumentParser(prog="make bench-openai", description="Measure real vLLM behind rbee.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, choices=STREAMS)
    parser.add_argument("--keep", action="store_true", help="keep the results under their date too")
    parser.add_argument("--dry", action="store_true", help="print the tables and write nothing")
    args = parser.parse_args()
    processes.stop_when_terminated()
    here = machine(processes.versions())
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder, served(Path(folder)) as found:
        for number in range(1, args.rounds + 1):
            for streams in args.streams:
                for way in found:
                    print(f"bench-openai: round {number}: {streams} streams, {way.name}", file=sys.stderr)
                    runs.append(run_client(way, streams, number, Path(folder)))
    results = VllmResults(machine=here, rounds=args.rounds, runs=runs)
    publish_vllm(results, keep=args.keep, dry=args.dry)
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotMeasure as exc:
        sys.exit(f"bench-openai: {exc}")
