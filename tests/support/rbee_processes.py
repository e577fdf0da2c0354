"""Real rbee services as child processes, for tests that cross them."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil
from rbee_ports import HeldPort

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = REPOSITORY / "models"
BIN = Path(sys.executable).parent
MARKER = "RBEE_TEST_MARKER"

PATIENT = ("--hive-unreachable-after-s", "15", "--hive-lost-after-s", "60")
"""A queen that takes no hive for silent which a busy machine merely holds up."""

T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, timeout_s: float = 60.0) -> T:
    """Poll until `condition` gives something true; fail the test when it does not in time.

    It is asked once more after the deadline, so that a test which was itself held up does not fail for that.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        is_last = time.monotonic() > deadline
        value = condition()
        if value:
            return value
        if is_last:
            raise AssertionError(f"after {timeout_s:g} s still not: {what}")
        time.sleep(0.02)


def quickest(took_s: float, limit_s: float, again: Callable[[], float]) -> float:
    """Give the shortest of up to six times, measured again only while none is below `limit_s`.

    Others on a busy machine delay one of them; what is slow by itself is slow each time.
    """
    for _ in range(5):
        if took_s < limit_s:
            break
        took_s = min(took_s, again())
    return took_s


class Service:
    """One service's process, started in a group of its own; its log is JSON lines in a file."""

    def __init__(
        self, program: str, args: Sequence[str], log_path: Path, marker: str, token: str | None = None
    ) -> None:
        self.log_path = log_path
        environment = os.environ | {MARKER: marker, "PYTHONWARNINGS": "default"}
        environment.pop("RBEE_TOKEN", None)
        if token is not None:
            environment["RBEE_TOKEN"] = token
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / program, *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            port = until(self._port, f"{program} listens; its log: {log_path}", 120)
        except BaseException:
            self.kill()
            raise
        self.url = f"http://127.0.0.1:{port}"

    def _port(self) -> int | None:
        if self.process.poll() is not None:
            raise AssertionError(f"exit {self.process.returncode}: {self.log_path.read_text()}")
        listening = [line for line in self.log() if line.get("event") == "listening"]
        return int(listening[-1]["port"]) if listening else None

    def log(self) -> list[dict[str, Any]]:
        return read_log(self.log_path)

    def terminate(self, signum: signal.Signals = signal.SIGTERM, timeout_s: float = 120.0) -> int:
        """Signal it and give its exit status. A hive may drain for 30 s, and then end its workers."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Give the JSON lines of a log; others (vLLM's own) are passed over."""
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


class Cluster:
    """A queen and a hive on ports of their own; workers are spawned through the queen."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: str = "vllm",
        models: Path = MODELS,
        hive_id: str = "box1",
        queen_args: Sequence[str] = (),
        hive_args: Sequence[str] = (),
        token: str | None = None,
    ) -> None:
        self.token = token
        self.auth = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.folder = folder
        self.marker = f"{os.getpid()}-{folder.name}-{time.monotonic_ns()}"
        self.hive_id = hive_id
        self.state_dir = folder / "state"
        self._queen_starts = 0
        ports = HeldPort(), HeldPort()
        for held in ports:
            weakref.finalize(self, held.release)
        queen_port, hive_port = map(str, ports)
        # Without a folder of its own she has the one of her port, which an earlier test's queen may have had.
        self._queen_args = ["--port", queen_port, "--state-dir", str(folder / "q"), *PATIENT, *queen_args]
        self._hive_args = [
            *("--hive-id", hive_id, "--models-dir", str(models)),
            *("--state-dir", str(self.state_dir), "--worker-engine", engine),
            *hive_args,
        ]
        try:
            self.start_queen()
            self._hive_args += ["--queen-url", self.queen.url]
            hive_log = folder / "hive.log"
            hive_args = ["--port", hive_port, *self._hive_args]
            self.hive = Service("rbee-hive", hive_args, hive_log, self.marker, token)
            until(self._is_online, "the hive is online at the queen")
        except BaseException:
            kill_marked(self.marker)
            for name in ("queen", "hive"):
                if name in vars(self):
                    vars(self)[name].process.wait(60)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop everything; fail if anything is left."""
        try:
            for service in (self.hive, self.queen):
                service.terminate()
            until(lambda: not self.processes(), f"no process is left, but {self.processes()}")
        finally:
            kill_marked(self.marker)

    def start_queen(self) -> None:
        """Start the queen, or again with the port and the state that she had."""
        self._queen_starts += 1
        log = self.folder / f"queen{self._queen_starts if self._queen_starts > 1 else ''}.log"
        self.queen = Service("rbee-queen", self._queen_args, log, self.marker, self.token)

    def restart_hive(self, port: str) -> None:
        self.hive = Service(
            "rbee-hive",
            ["--port", port, *self._hive_args],
            self.folder / "hive2.log",
            self.marker,
            self.token,
        )

    def _is_online(self) -> bool:
        hives = self.run({"operation": "hive_list"})["hives"]
        return any(hive["hive_id"] == self.hive_id and hive["state"] == "online" for hive in hives)

    def processes(self) -> list[psutil.Process]:
        """Give every living process of this cluster, orphans too."""
        return marked_processes(self.marker)

    def submit(self, operation: dict[str, Any], url: str | None = None, **headers: str) -> str:
        answer = httpx.post(f"{url or self.queen.url}/v1/jobs", json=operation, headers=self.auth | headers)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["job_id"])

    def events(
        self, operation: dict[str, Any], url: str | None = None, **headers: str
    ) -> list[dict[str, Any]]:
        """Run an operation and give all events of its stream."""
        job_id = self.submit(operation, url, **headers)
        with stream(url or self.queen.url, job_id, **self.auth) as frames:
            return [event for _, event in frames]

    def run(self, operation: dict[str, Any], url: str | None = None) -> Any:
        """Run an operation that must complete; give its result."""
        last = self.events(operation, url)[-1]
        assert last["action"] == "execute_complete", last
        return last["data"]

    def spawn(self, model: str = "rbee-tiny", *args: str, hive_id: str | None = None) -> dict[str, Any]:
        """Start a worker; it serves, and the queen knows it."""
        spawned: dict[str, Any] = self.run(
            {
                "operation": "worker_spawn",
                "model": model,
                "worker_args": list(args),
                "hive_id": hive_id or self.hive_id,
            }
        )
        # The queen's answer waits for the hive's next heartbeat, but not for long.
        self.until_seen(spawned["worker_id"], "ready", "busy")
        return spawned

    def seen(self, worker_id: str) -> str | None:
        """Give the state of a worker as the queen has heard it; None where she has heard of none."""
        for hive in self.run({"operation": "hive_list"})["hives"]:
            for worker in hive.get("workers", []):
                if worker["worker_id"] == worker_id:
                    return str(worker["state"])
        return None

    def until_seen(self, worker_id: str, *states: str | None) -> None:
        """Wait until the queen has heard that a worker is in one of these states; None: that it is gone."""
        until(lambda: self.seen(worker_id) in states, f"the queen knows that {worker_id} is {states}")

    def worker_log(self, worker_id: str) -> Path:
        return self.state_dir / "logs" / f"{worker_id}.log"


def is_alive(process: psutil.Process | int) -> bool:
    """Say whether a process runs; false for a zombie, and for one that ends while it is being looked at."""
    try:
        if isinstance(process, int):
            process = psutil.Process(process)
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def title_of(process: psutil.Process) -> str:
    """Give a process's command line as one text, empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def kill_marked(marker: str) -> None:
    """End what is left of a test by force."""
    for process in marked_processes(marker):
        with suppress(psutil.NoSuchProcess):  # it has ended by itself meanwhile
            process.kill()


def marked_processes(marker: str) -> list[psutil.Process]:
    """Give the living processes that have a marker in their environment; children inherit it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARKER) == marker:
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def stream(
    url: str, job_id: str, last_event_id: str | None = None, **headers: str
) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    """Open a job's stream; iterates (event id, event) and fails unless it ends with `[DONE]`."""
    if last_event_id is not None:
        headers["Last-Event-ID"] = last_event_id
    with httpx.stream("GET", f"{url}/v1/jobs/{job_id}/stream", headers=headers, timeout=90) as response:
        assert response.status_code == 200, response.read()
        yield _frames(response.iter_lines())


def _frames(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    event_id = ""
    for line in lines:
        if line.startswith("id: "):
            event_id = line[4:]
        elif line == "data: [DONE]":
            return
        elif line.startswith("data: "):
            yield event_id, json.loads(line[6:])
    raise AssertionError("the stream ended without [DONE]")


def text_of(events: Sequence[dict[str, Any]]) -> str:
    return "".join(event["message"] for event in events if event["action"] == "token")
