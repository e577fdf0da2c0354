"""`rbee up`: what it starts, what it says, and that it leaves nothing behind, however it ends."""

import io
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pytest
from rbee_processes import until

from rbee_contracts.nodes import WorkerInfo
from rbee_job_server import bind
from rbee_keeper.output import Output
from rbee_keeper.up.child import TAIL_LINE_CHARS
from rbee_keeper.up.plan import Wanted, make_plan, taken
from rbee_keeper.up.voice import Voice
from rbee_keeper.up.workers import Seen, compare

if TYPE_CHECKING:
    from packages.keeper.tests.conftest import Sandbox

pytestmark = pytest.mark.timeout(180)
"""The first test of a run starts the services too."""

MODEL = "sim-model"

HANGS_S = 150.0
"""What takes longer hangs."""


class Up:
    """A running `rbee up` with simulated workers; its events are read one by one."""

    def __init__(self, sandbox: "Sandbox", *arguments: str) -> None:
        self.sandbox = sandbox
        self.process = sandbox.start(
            *("rbee", "up", "--json", "--queen-port", "0", "--hive-port", "0", "--hive-id", "box"),
            *("--worker-engine", "sim", *arguments),
        )
        self.seen: list[dict[str, Any]] = []

    def until(self, action: str) -> dict[str, Any]:
        """Read on to an event of this action."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = msgspec.json.decode(line, type=dict[str, Any])
            self.seen.append(event)
            if event["action"] == action:
                return event
        raise AssertionError(f"ended before {action}: {self.seen} {self.process.communicate()}")

    def end(self) -> tuple[int, str]:
        """Wait for its end; give exit status and stderr."""
        assert self.process.stdout is not None
        # Not by `communicate`, which leaves out what `until` has read ahead.
        self.seen += [msgspec.json.decode(line, type=dict[str, Any]) for line in self.process.stdout]
        _, stderr = self.process.communicate(timeout=HANGS_S)
        return self.process.returncode, stderr

    def said(self) -> list[str]:
        return [str(event["action"]) for event in self.seen]


@pytest.fixture
def models(sandbox: "Sandbox") -> None:
    """Put one model into ./models."""
    folder = sandbox.folder / "models" / MODEL
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


@pytest.mark.usefixtures("models")
def test_up_serves_the_only_model_and_stops_in_order(sandbox: "Sandbox") -> None:
    up = Up(sandbox)
    event = up.until("up")
    queen = event["queen_url"]

    def ask() -> "subprocess.CompletedProcess[str] | None":
        """A hive that this machine does not let speak for some seconds gets no work meanwhile."""
        done = sandbox.run("rbee", "--queen", queen, "infer", "-m", MODEL, "--max-tokens", "3", "Hi")
        return done if done.returncode == 0 or "No worker can run" not in done.stderr else None

    answer = until(ask, "the worker is asked", HANGS_S)
    up.process.send_signal(signal.SIGINT)
    exit_code, stderr = up.end()

    assert (answer.returncode, len(answer.stdout.split())) == (0, 3)
    assert (exit_code, stderr) == (0, "")
    stopped = [event["who"] for event in up.seen if event["action"] == "stopped"]
    assert stopped == ["hive", "queen"]
    assert "worker_spawn_start" in up.said()
    assert sandbox.processes() == []


@pytest.mark.usefixtures("models")
def test_up_for_people_says_how_to_use_it(sandbox: "Sandbox") -> None:
    process = sandbox.start("rbee", "up", "--queen-port", "0", "--hive-port", "0", "--worker-engine", "sim")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Stop with Ctrl-C"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    _, stderr = process.communicate(timeout=HANGS_S)

    text = "".join(lines)
    assert (process.returncode, stderr) == (0, "")
    assert f"infer --model {MODEL} 'A job is an event stream:'" in text
    assert "curl -sS http://127.0.0.1:" in text
    assert "queen.log" in text
    assert "Everything has stopped." in rest


def test_up_without_a_model_gives_a_hint(sandbox: "Sandbox") -> None:
    up = Up(sandbox)
    hint = up.until("no_model")
    up.until("up")

    up.process.send_signal(signal.SIGINT)
    exit_code, _ = up.end()

    assert exit_code == 0
    assert "--models-dir" in hint["message"]
    assert sandbox.processes() == []


def test_ctrl_c_while_the_worker_loads_leaves_nothing(sandbox: "Sandbox") -> None:
    for _ in range(3):
        up = Up(sandbox, "--model", MODEL, "--worker-arg=--sim-start-s", "--worker-arg=600")
        up.until("worker_spawn_start")
        so_far = len(up.seen)

        up.process.send_signal(signal.SIGINT)
        exit_code, stderr = up.end()

        assert (exit_code, stderr) == (0, "")
        assert "killed" not in up.said()
        assert sandbox.processes() == []
        # A machine that is too busy delays one of them; what waits for the load waits each time.
        if "waiting" not in up.said()[so_far:]:
            break
    else:
        raise AssertionError(f"the end was waited for: {up.seen}")


def test_ctrl_c_before_anything_is_ready_leaves_nothing(sandbox: "Sandbox") -> None:
    up = Up(sandbox)
    assert up.process.stdout is not None
    while not [p for p in sandbox.processes() if "rbee_queen" in _cmdline(p)]:
        assert up.process.poll() is None
        time.sleep(0.02)

    up.process.send_signal(signal.SIGINT)
    exit_code, _ = up.end()

    assert exit_code == 0
    assert sandbox.processes() == []


def test_a_model_that_cannot_be_loaded_ends_it_all(sandbox: "Sandbox") -> None:
    up = Up(sandbox, "--model", MODEL, "--worker-arg=--sim-fail-start")

    failed = up.until("failed")
    exit_code, stderr = up.end()

    assert (exit_code, failed["code"]) == (1, "worker_spawn_failed")
    assert "did not become ready" in stderr
    assert sandbox.processes() == []


@pytest.mark.parametrize("name", ["queen", "hive"])
def test_a_child_that_dies_is_named_and_the_rest_stopped(sandbox: "Sandbox", name: str) -> None:
    up = Up(sandbox, "--model", MODEL)
    log = Path(up.until("up")["logs"]) / f"{name}.log"

    sandbox.find(f"rbee_{name}").kill()
    died = up.until("died")
    exit_code, _ = up.end()

    assert exit_code == 1
    assert f"The {name} was ended by signal 9 (SIGKILL)." in died["message"]
    assert f"{name}.log" in died["message"]
    assert log.read_text().splitlines()[-1][:TAIL_LINE_CHARS] in died["message"]
    assert sandbox.processes() == []


def test_a_worker_that_dies_is_told_and_started_again(sandbox: "Sandbox") -> None:
    up = Up(sandbox, "--model", MODEL)
    up.until("up")

    sandbox.find("rbee_worker").kill()
    died = up.until("worker_restart")
    again = up.until("worker_ready")
    up.process.send_signal(signal.SIGINT)
    exit_code, _ = up.end()

    assert exit_code == 0
    assert "signal 9" in died["message"]
    assert ".log" in died["message"]
    assert MODEL in again["message"]
    assert sandbox.processes() == []


def seen(*states: dict[str, Any]) -> list[str]:
    """Give the actions that heartbeats with one worker in these states lead to."""
    stdout = io.StringIO()
    voice = Voice(Output(json=True, stdout=stdout, stderr=io.StringIO()))
    known: dict[str, Seen] = {}
    fields: dict[str, Any] = {"worker_id": "w", "model": "m", "pid": 7, "port": 9300}
    fields |= {
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": 0,
        "worker": "cpu",
        "devices": [0],
        "started_at": "",
    }
    for state in states:
        workers = [WorkerInfo(**fields | state)] if state else []
        known = compare(known, workers, voice, Path("logs"))
    return [msgspec.json.decode(line)["action"] for line in stdout.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (["starting", "ready", "busy", "ready", "busy"], ["worker_ready"]),
        (["ready", "draining", "ready"], ["worker_ready"]),
        (["ready", "sleeping", "ready"], ["worker_ready"]),
        (["ready", "failed", "failed", ""], ["worker_ready", "worker_failed"]),
        (["ready", "stopping", ""], ["worker_ready", "worker_stopped"]),
        (["ready", "starting 1", "ready 1"], ["worker_ready", "worker_restart", "worker_ready"]),
        (["ready", "ready 1"], ["worker_ready", "worker_restart", "worker_ready"]),
        (["ready 3", "busy 3"], ["worker_ready"]),
    ],
    ids=[
        "busy",
        "drained",
        "asleep",
        "failed",
        "stopped",
        "restarted",
        "restarted-unseen",
        "restarted-before",
    ],
)
def test_what_becomes_of_a_worker_is_told_once(states: list[str], told: list[str]) -> None:
    words = [state.split() for state in states]
    beats = [{"state": word[0], "restarts": int((*word, "0")[1])} if word else {} for word in words]

    assert seen(*beats) == told


def test_a_second_ctrl_c_ends_what_does_not_stop(sandbox: "Sandbox") -> None:
    up = Up(sandbox, "--model", MODEL)
    up.until("up")
    sandbox.find("rbee_hive").suspend()

    up.process.send_signal(signal.SIGINT)
    up.until("stopping")
    up.process.send_signal(signal.SIGINT)
    exit_code, _ = up.end()

    assert exit_code == 130
    assert "ending" in up.said()
    assert sandbox.processes() == []


def test_killed_outright_its_services_stop_too(sandbox: "Sandbox") -> None:
    up = Up(sandbox, "--model", MODEL)
    up.until("up")

    up.process.kill()
    up.end()

    until(lambda: not sandbox.processes(), "everything has ended", HANGS_S)


def test_a_free_port_is_nobody_elses_until_its_service_listens(tmp_path: Path) -> None:
    """It was only looked up, and another program could take it while the service was still loading."""
    wanted = Wanted(
        model=None,
        models_dir=None,
        host="127.0.0.1",
        queen_port=0,
        hive_port=0,
        hive_id=None,
        token=None,
        token_file=None,
        worker_args=[],
        worker_engine=None,
        verbose=False,
    )
    with ExitStack() as reserved:
        plan = make_plan(wanted, {}, tmp_path, reserved)
        ports = [int(url.rpartition(":")[2]) for url in (plan.queen_url, plan.hive_url)]
        assert ports[0] != ports[1]
        for port in ports:
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
            assert taken("127.0.0.1", port) is None
            with bind("127.0.0.1", port):
                assert taken("127.0.0.1", port) is not None


@pytest.mark.parametrize("name", ["queen", "hive"])
def test_a_taken_port_is_said_before_anything_starts(sandbox: "Sandbox", name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = {"queen": "hive", "hive": "queen"}[name]

        done = sandbox.run("rbee", "up", f"--{name}-port", str(port), f"--{other}-port", "0")

    assert (done.returncode, done.stdout) == (1, "")
    assert f"Port {port} of 127.0.0.1 cannot be used for the {name}" in done.stderr
    assert f"--{name}-port {port + 10}" in done.stderr


def test_a_models_folder_that_is_not_there_is_said(sandbox: "Sandbox") -> None:
    done = sandbox.run("rbee", "up", "--queen-port", "0", "--hive-port", "0", "--models-dir", "nowhere")

    assert done.returncode == 1
    assert "--models-dir: there is no folder" in done.stderr


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
