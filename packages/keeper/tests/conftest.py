"""Real processes for the keeper's tests: a queen, a hive with simulated workers, and `rbee` itself."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec
import psutil
import pytest

from rbee_contracts.nodes import SERVING, HiveHeartbeat, HiveInfo, QueenHeartbeat

BIN = Path(sys.executable).parent
MARK = "RBEE_TEST_MARK"

T = TypeVar("T")

HANGS_S = 100.0
"""What takes longer hangs: nothing here takes more than a few seconds where nobody stops a process."""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = HANGS_S) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def listening_at(log: Path, process: "subprocess.Popen[bytes]") -> str:
    """Wait until a service that was started with port 0 tells in its log where it listens; give the URL."""
    found: list[int] = []

    def has_told() -> bool:
        status = process.poll()
        lines = log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("{") and '"event": "listening"' in line]
        assert told or status is None, f"exit {status}: {lines}"
        found[:] = [int(msgspec.json.decode(told[0])["port"])] if told else []
        return bool(told)

    wait_until(has_told, f"a line of {log} tells the port")
    return f"http://127.0.0.1:{found[0]}"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


class Sandbox:
    """An environment of its own; everything started in it can be found by its mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        self.environ: dict[str, str] = inherited | {
            MARK: self.mark,
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_DATA_HOME": str(folder / "data"),
            "COLUMNS": "160",
            "NO_COLOR": "1",
        }

    def processes(self) -> list[psutil.Process]:
        """Give what runs in this sandbox, zombies left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def find(self, module: str) -> psutil.Process:
        """Give the one process that runs a module. For a moment there are two, while it starts another."""
        found: list[psutil.Process] = []

        def is_one() -> bool:
            found.clear()
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if module in process.cmdline():
                        found.append(process)
            return len(found) == 1

        wait_until(is_one, f"one process runs {module}")
        return found[0]

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=self.environ,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / command[0]), *command[1:]],
            env=self.environ,
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=HANGS_S,
            check=False,
        )

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


class Terminal:
    """What a command showed at a terminal, escape sequences and all, and how it ended."""

    escapes = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

    def __init__(self, command: list[str], environ: dict[str, str], columns: int) -> None:
        self.raw = ""
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            env=environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def until(self, text: str) -> None:
        """Read on until a text has been shown."""
        while text not in self.raw:
            assert self._read(), f"{text!r} was never shown: {self.raw}"

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """Read to the end; give the exit status."""
        while self._read():
            pass
        os.close(self._ours)
        return self.process.wait(HANGS_S)

    def _read(self) -> bool:
        assert select.select([self._ours], [], [], HANGS_S)[0], f"nothing more was shown: {self.raw}"
        try:
            read = os.read(self._ours, 65536)
        except OSError:
            return False
        self.raw += read.decode(errors="replace")
        return bool(read)

    @property
    def text(self) -> str:
        """What was shown, without what moves and colours it."""
        return self.escapes.sub("", self.raw).replace("\r\n", "\n")


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path)
    yield made
    made.close()


def _beats(url: str, type_: type[T]) -> Iterator[T]:
    """Follow a service's heartbeats."""
    with httpx.stream("GET", f"{url}/v1/heartbeats/stream?follower=keeper", timeout=HANGS_S) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield msgspec.json.decode(line[6:], type=type_)
    raise AssertionError(f"{url} ended its heartbeats")


class ClusterUnderTest:
    """A queen and a hive on free ports, with a quick worker and a slow one; `rbee` speaks to them."""

    hive_id = "box"
    quick = "quick-model"
    slow = "org/slow"

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.queen_url = ""
        self.hive_url = ""
        self._services: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        models = self.sandbox.folder / "models" / self.quick
        models.mkdir(parents=True)
        (models / "config.json").write_text('{"architectures":["LlamaForCausalLM"]}')
        # A hive that this machine does not let speak for a while is not given up.
        patience = ("--hive-unreachable-after-s", "100", "--hive-lost-after-s", "200")
        self.queen_url = self._start("rbee-queen", "--port", "0", *patience)
        self.sandbox.environ["RBEE_QUEEN_URL"] = self.queen_url
        wait_until(lambda: answers(f"{self.queen_url}/ready"), "queen ready")
        self.hive_url = self._start(
            "rbee-hive",
            *("--port", "0", "--queen-url", self.queen_url),
            *("--hive-id", self.hive_id, "--worker-engine", "sim"),
            *("--models-dir", str(models.parent), "--state-dir", str(self.sandbox.folder / "hive")),
        )
        wait_until(lambda: answers(f"{self.hive_url}/ready"), "hive ready")
        wait_until(lambda: self.hive_id in self.rbee("hive", "list").stdout, "hive known")
        for model, step_ms in ((self.quick, "2"), (self.slow, "300")):
            spawned = self.rbee("worker", "spawn", "--model", model, "--", "--sim-step-ms", step_ms)
            assert spawned.returncode == 0, spawned.stderr
        self.settle()

    def settle(self) -> None:
        """Wait until the hive has its two workers and no other, takes work, and the queen has heard so.

        A hive that is spoken to directly has changed before the queen hears of it, and what a job that was
        cancelled had started ends later than the job.
        """

        as_ever = sorted([(self.quick, True), (self.slow, True)])

        def is_as_ever(told: HiveHeartbeat | HiveInfo) -> bool:
            workers = [(worker.model, worker.state in SERVING) for worker in told.workers]
            return sorted(workers) == as_ever and not told.draining

        for beat in _beats(self.hive_url, HiveHeartbeat):
            if is_as_ever(beat):
                break
        seen = 0  # twice: the first may be of before
        for overview in _beats(self.queen_url, QueenHeartbeat):
            seen = seen + 1 if overview.hives and all(map(is_as_ever, overview.hives)) else 0
            if seen == 2:
                break

    def _start(self, *command: str) -> str:
        path = self.sandbox.folder / f"{command[0]}.log"
        with path.open("wb") as log:
            service = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                env=self.sandbox.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._services.append(service)
        return listening_at(path, service)

    def stop(self) -> None:
        for service in reversed(self._services):
            service.send_signal(signal.SIGTERM)
            service.wait(HANGS_S)

    def rbee(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.sandbox.run("rbee", *arguments, stdin=stdin)

    def json(self, *arguments: str) -> dict[str, object]:
        done = self.rbee(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return msgspec.json.decode(done.stdout, type=dict[str, object])

    def jobs(self, *filters: str) -> list[dict[str, object]]:
        return msgspec.convert(self.json("job", "list", *filters)["jobs"], list[dict[str, object]])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterUnderTest]:
    sandbox = Sandbox(tmp_path_factory.mktemp("cluster"))
    under_test = ClusterUnderTest(sandbox)
    try:
        under_test.start()
        yield under_test
        under_test.stop()
    finally:
        sandbox.close()


class ScriptedService:
    """A process that plays a queen with two hives; `rbee` speaks to it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        path = sandbox.folder / "scripted.log"
        with path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("scripted_service.py")), "0"],
                env=sandbox.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.url = listening_at(path, self.process)
        sandbox.environ["RBEE_QUEEN_URL"] = self.url
        wait_until(lambda: answers(f"{self.url}/ready"), "the scripted service answers")

    def rbee(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / "rbee"), *arguments],
            env=self.sandbox.environ | environ,
            input="",
            capture_output=True,
            text=True,
            timeout=HANGS_S,
            check=False,
        )

    def json(self, *arguments: str) -> dict[str, object]:
        done = self.rbee(*arguments, "--json")
        return msgspec.json.decode(done.stdout, type=dict[str, object])

    def terminal(self, *arguments: str, columns: int = 80, **environ: str) -> Terminal:
        """Start a command at a terminal."""
        own = {k: v for k, v in self.sandbox.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        own["TERM"] = "xterm-256color"
        return Terminal([str(BIN / "rbee"), *arguments], own | environ, columns)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(HANGS_S)


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedService]:
    sandbox = Sandbox(tmp_path_factory.mktemp("scripted"))
    try:
        service = ScriptedService(sandbox)
        yield service
        service.stop()
    finally:
        sandbox.close()
