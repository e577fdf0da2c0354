"""Real processes for the keeper's tests: a queen, a hive with simulated workers, and `rbee` itself."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

BIN = Path(sys.executable).parent
MARK = "RBEE_TEST_MARK"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


class Sandbox:
    """An environment of its own; everything started in it can be found by its mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        self.environ = inherited | {
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
        """Give the one process that runs a module."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    found.append(process)
        assert len(found) == 1, found
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
            timeout=50,
            check=False,
        )

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    made = Sandbox(tmp_path)
    yield made
    made.close()


class ClusterUnderTest:
    """A queen and a hive on free ports, with a quick worker and a slow one; `rbee` speaks to them."""

    hive_id = "box"
    quick = "quick-model"
    slow = "org/slow"

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.queen_url = f"http://127.0.0.1:{free_port()}"
        self.hive_url = f"http://127.0.0.1:{free_port()}"
        self._services: list[subprocess.Popen[bytes]] = []
        sandbox.environ["RBEE_QUEEN_URL"] = self.queen_url

    def start(self) -> None:
        models = self.sandbox.folder / "models" / self.quick
        models.mkdir(parents=True)
        (models / "config.json").write_text('{"architectures":["LlamaForCausalLM"]}')
        self._start("rbee-queen", "--port", self.queen_url.rpartition(":")[2])
        wait_until(lambda: answers(f"{self.queen_url}/ready"), "queen ready")
        self._start(
            "rbee-hive",
            *("--port", self.hive_url.rpartition(":")[2], "--queen-url", self.queen_url),
            *("--hive-id", self.hive_id, "--worker-engine", "sim"),
            *("--models-dir", str(models.parent), "--state-dir", str(self.sandbox.folder / "hive")),
        )
        wait_until(lambda: answers(f"{self.hive_url}/ready"), "hive ready")
        wait_until(lambda: self.hive_id in self.rbee("hive", "list").stdout, "hive known")
        for model, step_ms in ((self.quick, "2"), (self.slow, "300")):
            spawned = self.rbee("worker", "spawn", "--model", model, "--", "--sim-step-ms", step_ms)
            assert spawned.returncode == 0, spawned.stderr

    def _start(self, *command: str) -> None:
        with (self.sandbox.folder / f"{command[0]}.log").open("wb") as log:
            self._services.append(
                subprocess.Popen(
                    [str(BIN / command[0]), *command[1:]],
                    env=self.sandbox.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def stop(self) -> None:
        for service in reversed(self._services):
            service.send_signal(signal.SIGTERM)
            service.wait(40)

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
