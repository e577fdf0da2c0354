"""The processes under measurement: a queen, a hive and a sim worker, with their options as they come."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]

MODEL = "sim"
HIVE_ID = "bench"
START_TIMEOUT_S = 60.0

T = TypeVar("T")


class CannotMeasure(Exception):
    """A process is missing or did not start; the message says which and what to do."""


class Process:
    """One child process in a group of its own; its output goes to a file."""

    def __init__(self, name: str, command: Sequence[str | Path], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        state_home = {"XDG_STATE_HOME": str(log_path.parent), "XDG_DATA_HOME": str(log_path.parent)}
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | state_home,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fail_if_gone(self) -> None:
        if self._process.poll() is not None:
            tail = self.log_path.read_text(errors="replace")[-2000:]
            raise CannotMeasure(f"{self.name} exited with {self._process.returncode}:\n{tail}")

    def listening_port(self) -> int | None:
        """Give the port that one of rbee's services says it listens on."""
        self.fail_if_gone()
        for line in self.log_path.read_text().splitlines():
            if line.startswith("{") and (said := json.loads(line)).get("event") == "listening":
                return int(said["port"])
        return None

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


class Cluster:
    """A queen, a hive and its one sim worker, with their options as they come."""

    def __init__(self, folder: Path, worker_args: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._processes: list[Process] = []
        try:
            queen_port = self._start(folder, "rbee-queen", *_store_options(folder))
            queen_url = f"http://127.0.0.1:{queen_port}"
            self._start(
                folder,
                "rbee-hive",
                *("--hive-id", HIVE_ID, "--queen-url", queen_url, "--worker-engine", "sim"),
                *("--state-dir", folder / "hive", "--models-dir", folder),
            )
            worker = until(lambda: self._spawn(queen_url, worker_args), "a worker could be spawned")
        except BaseException:
            self.close()
            raise
        queen, hive = self._processes
        self.port = queen_port
        self.pids = {"queen": [queen.pid], "hive": [hive.pid], "worker": [int(worker["pid"])]}

    def _start(self, folder: Path, program: str, *args: str | Path) -> int:
        process = Process(program, [BIN / program, "--port", "0", *args], folder / f"{program}.log")
        self._processes.append(process)
        return until(process.listening_port, f"{program} listens")

    def _spawn(self, queen_url: str, worker_args: Sequence[str]) -> dict[str, Any] | None:
        """Spawn the worker; None while the queen has not seen the hive yet."""
        for process in self._processes:
            process.fail_if_gone()
        spawn = {"operation": "worker_spawn", "model": MODEL, "worker": "cpu", "worker_args": [*worker_args]}
        accepted = json.loads(fetch(f"{queen_url}/v1/jobs", json.dumps(spawn).encode()))
        frames = fetch(queen_url + accepted["sse_url"]).decode().split("\n\n")
        events = [json.loads(f.partition("data: ")[2]) for f in frames if "data: {" in f]
        last: dict[str, Any] = events[-1]
        if last["action"] == "execute_complete":
            return dict(last["data"])
        if last.get("code") in ("no_hive", "unreachable", "hive_unreachable"):
            return None
        raise CannotMeasure(f"the worker did not start: {events[-2]['message']}")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.stop()


class LoneWorker(Process):
    """A sim worker without a hive, and so without a token, which only its hive would know."""

    def __init__(self, folder: Path, worker_args: Sequence[str]) -> None:
        command: list[str | Path] = [
            BIN / "rbee-worker",
            "--engine",
            "sim",
            "--model",
            MODEL,
            "--port",
            "0",
            *worker_args,
        ]
        super().__init__("rbee-worker", command, folder / "rbee-worker.log")
        try:
            self.port = until(self.listening_port, "the worker listens")
            until(self._is_ready, "the worker is ready")
        except BaseException:
            self.stop()
            raise

    def _is_ready(self) -> bool:
        try:
            return bool(fetch(f"http://127.0.0.1:{self.port}/ready"))
        except OSError:
            return False


@contextmanager
def cluster(folder: Path, worker_args: Sequence[str]) -> Iterator[Cluster]:
    """Run a cluster for as long as the block runs."""
    running = Cluster(folder, worker_args)
    try:
        yield running
    finally:
        running.close()


def fetch(url: str, body: bytes | None = None, timeout_s: float = 60.0) -> bytes:
    """Give the body of an answer; an error answer is an `OSError`."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return bytes(response.read())


def stop_when_terminated() -> None:
    """Make SIGTERM end this process as Ctrl-C does, so that it stops what it started."""

    def terminate(signum: int, _: object) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, terminate)


def until(condition: Callable[[], T | None], what: str) -> T:
    """Poll until `condition` gives something true.

    Raises:
        CannotMeasure: it does not within `START_TIMEOUT_S`.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise CannotMeasure(f"after {START_TIMEOUT_S:g} s still not: {what}")
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _store_options(folder: Path) -> list[str | Path]:
    """Keep the queen's store in `folder`, where this version of the queen has one."""
    return ["--state-dir", folder / "queen"] if has_store() else []


def has_store() -> bool:
    """Whether this version of the queen keeps jobs in a store; then it is on, as it is by default."""
    shown = subprocess.run([BIN / "rbee-queen", "--help"], capture_output=True, text=True, check=False)
    return "--state-dir" in shown.stdout or "--store" in shown.stdout


def versions() -> dict[str, str]:
    """Give the versions of what rbee's own path consists of."""
    names = ("uvicorn", "starlette", "uvloop", "msgspec")
    store = "on (SQLite)" if has_store() else "none in this version"
    return {name: version(name) for name in names} | {"queen's store": store}
