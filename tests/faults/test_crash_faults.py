"""F07: a background loop that crashes ends its service within a second, and nothing is left of it."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_processes import (
    MARKER,
    Service,
    is_alive,
    kill_marked,
    marked_processes,
    quickest,
    read_log,
    title_of,
    until,
)

pytestmark = pytest.mark.timeout(400)

# The service itself, but for one of its loops, which raises once a file is there.
_CRASHING = """
import importlib, os, sys, anyio
_, flag, module, name, program, *argv = sys.argv
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
original = getattr(owner, last)

async def crashing(*args, **kwargs):
    async def crash():
        while not os.path.exists(flag):
            await anyio.sleep(0.01)
        raise RuntimeError("THE-CAUSE")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crash)
        await original(*args, **kwargs)

setattr(owner, last, crashing)
sys.argv = [program, *argv]
importlib.import_module(program + ".__main__").main()
"""

EXIT_WITHIN_S = 1.0

HIVE = ["--port", "0", "--hive-id", "box1", "--queen-url", "none", "--worker-engine", "sim"]
WORKER = ["--port", "0", "--model", "m", "--engine", "sim"]

LOOPS = [
    ("rbee_queen", "rbee_queen.fleet", "Fleet.run", ["--port", "0"]),
    ("rbee_queen", "rbee_job_server.server", "JobServer.run", ["--port", "0"]),
    ("rbee_hive", "rbee_hive.presence", "Presence.beat", HIVE),
    ("rbee_hive", "rbee_hive.presence", "Presence.announce", HIVE),
    ("rbee_hive", "rbee_hive.supervisor.workers", "Workers.run", HIVE),
    ("rbee_hive", "rbee_job_server.server", "JobServer.run", HIVE),
    ("rbee_worker", "rbee_worker.state", "WorkerState.run_engine", WORKER),
    ("rbee_worker", "rbee_job_server.server", "JobServer.run", WORKER),
]


class Crashing:
    """A service one of whose loops crashes on `crash`."""

    def __init__(self, folder: Path, program: str, module: str, loop: str, args: list[str]) -> None:
        self.made_of = (program, module, loop, args)
        self.flag = folder / "crash"
        self.log = folder / "service.log"
        self.marker = f"{folder}-{time.monotonic_ns()}"
        environ = {name: value for name, value in os.environ.items() if name != "RBEE_TOKEN"}
        state = [] if program == "rbee_worker" else ["--state-dir", str(folder)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CRASHING, self.flag, module, loop, program, *args, *state],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ | {MARKER: self.marker},
                start_new_session=True,
            )
        listening = until(lambda: self.logged("listening"), f"it listens; its log: {self.log}")
        self.url = f"http://127.0.0.1:{listening[0]['port']}"

    def logged(self, event: str) -> list[dict[str, object]]:
        return [line for line in read_log(self.log) if line.get("event") == event]

    def crash(self) -> float:
        """Have the loop crash; give the seconds from the crash to the end of the process."""
        end = os.pidfd_open(self.process.pid)
        try:
            self.flag.touch()
            until(lambda: self.process.poll() is not None or self.logged("loop_crashed"), "it crashed")
            begun = time.monotonic()
            select.select([end], [], [], 60)  # told at once, where `Popen.wait` looks now and then
            took_s = time.monotonic() - begun
        finally:
            os.close(end)
        self.process.wait(10)
        return took_s

    def crash_another(self) -> float:
        """Have another one crash, of the same kind."""
        folder = self.log.parent / f"another-{time.monotonic_ns()}"
        folder.mkdir()
        another = Crashing(folder, *self.made_of)
        try:
            return another.crash()
        finally:
            another.close()

    def close(self) -> None:
        kill_marked(self.marker)
        self.process.wait(60)


@pytest.fixture
def crashing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Crashing]:
    program, module, loop, args = request.param
    made = Crashing(tmp_path, program, module, loop, args)
    yield made
    made.close()


@pytest.mark.parametrize("crashing", LOOPS, indirect=True, ids=[f"{p} {loop}" for p, _, loop, _ in LOOPS])
def test_a_crashed_loop_ends_the_service_within_a_second(crashing: Crashing) -> None:
    followed = threading.Event()

    def follow() -> None:
        try:
            with httpx.stream("GET", f"{crashing.url}/v1/events", timeout=90) as answer:
                for _ in answer.iter_raw():
                    followed.set()
        except httpx.HTTPError:
            pass

    follower = threading.Thread(target=follow)
    follower.start()
    assert followed.wait(60)
    took_s = crashing.crash()
    follower.join(60)

    assert crashing.process.returncode == 1
    assert quickest(took_s, EXIT_WITHIN_S, crashing.crash_another) < EXIT_WITHIN_S
    assert "THE-CAUSE" in json.dumps(crashing.logged("loop_crashed"))
    assert not follower.is_alive()


@pytest.mark.parametrize("crashing", [LOOPS[4]], indirect=True)
def test_a_hive_whose_loop_crashes_leaves_its_workers_to_the_next(crashing: Crashing) -> None:
    """They serve on, and the hive that is started again takes them up; stopped in order, it stops them."""
    spawn = {"operation": "worker_spawn", "model": "m"}
    job_id = httpx.post(f"{crashing.url}/v1/jobs", json=spawn).json()["job_id"]
    text = httpx.get(f"{crashing.url}/v1/jobs/{job_id}/stream", timeout=90).text
    assert "execute_complete" in text
    workers = [p for p in marked_processes(crashing.marker) if "rbee_worker" in title_of(p).split()]
    assert len(workers) == 1
    took_s = crashing.crash()

    assert crashing.process.returncode == 1
    assert quickest(took_s, EXIT_WITHIN_S, crashing.crash_another) < EXIT_WITHIN_S
    args = [*HIVE, "--state-dir", str(crashing.log.parent)]
    hive = Service("rbee-hive", args, crashing.log.with_name("next.log"), crashing.marker)
    try:
        assert is_alive(workers[0]), "the worker did not outlive its hive"
        adopted = until(lambda: ready_worker(hive.url), "the worker is adopted, and ready")
        assert (adopted["pid"], adopted["adopted"]) == (workers[0].pid, True)
        tokens = run(hive.url, {"operation": "infer", "model": "m", "prompt": "Hi", "max_tokens": 3})
        assert [line.count('"action":"token"') for line in tokens].count(1) == 3
    finally:
        assert hive.terminate() == 0
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


def run(url: str, operation: dict[str, object]) -> list[str]:
    """Run an operation; give the lines of its stream."""
    job_id = httpx.post(f"{url}/v1/jobs", json=operation).json()["job_id"]
    return httpx.get(f"{url}/v1/jobs/{job_id}/stream", timeout=90).text.splitlines()


def ready_worker(url: str) -> dict[str, Any] | None:
    """Give the hive's one worker, once it is ready."""
    complete = next(line for line in run(url, {"operation": "worker_list"}) if "execute_complete" in line)
    (worker,) = json.loads(complete.removeprefix("data: "))["data"]["workers"]
    return worker if worker["state"] == "ready" else None


_HANGING = """
import anyio, sys
from rbee_job_server import JobServer, ServeConfig, bind, build_app, configure_logging, serve
from rbee_contracts.operations import Status

async def main():
    configure_logging(service="worker/w1")
    server = JobServer(service="worker", actor="worker/w1", handlers={})
    crash = anyio.Event()

    async def loop():
        await crash.wait()
        raise RuntimeError("THE-CAUSE")

    async def hang():
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()

    async def begin():
        if sys.argv[1] == "crash":
            crash.set()

    def on_crash():
        print("CLEANED", flush=True)
        raise ValueError("clean-up fails too")

    app = build_app(server, name="worker", service_id="w1", version="0")
    config = ServeConfig(host="127.0.0.1", port=0, drain_timeout_s=0)
    return await serve(
        app,
        server,
        bind("127.0.0.1", 0),
        config,
        loops=[loop],
        on_listening=begin,
        on_stop=hang,
        on_crash=on_crash,
    )

raise SystemExit(anyio.run(main))
"""


def test_a_clean_up_that_hangs_cannot_hold_a_crashed_service() -> None:
    def crash() -> float:
        begun = time.monotonic()
        command = [sys.executable, "-c", _HANGING, "crash"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        took_s = time.monotonic() - begun
        lines = [json.loads(line) for line in done.stderr.splitlines()]

        assert done.returncode == 1
        assert done.stdout == "CLEANED\n"
        errors = [line["event"] for line in lines if line["level"] == "error"]
        assert errors == ["loop_crashed", "clean_up_failed"]
        return took_s

    limit_s = 15  # with the start of the process
    assert quickest(crash(), limit_s, crash) < limit_s


def test_an_orderly_stop_waits_for_its_clean_up() -> None:
    """The watchdog is for crashes only."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGING, "stop"], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
    )
    assert process.stderr is not None
    for line in process.stderr:
        if '"listening"' in line:
            break
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill()
    process.communicate()
