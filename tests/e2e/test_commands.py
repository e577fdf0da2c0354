"""`make demo` and `rbee up` with a real engine, and the commands of the getting-started page."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import running_hub
from rbee_ports import HeldPort
from rbee_processes import BIN, MARKER, REPOSITORY, Cluster, marked_processes, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

EXPECTED = "it starts when somebody reads it, every event in it has a number"
PROMPT = "A job is an event stream:"


@pytest.fixture
def queen_port() -> Iterator[HeldPort]:
    with HeldPort() as port:
        yield port


@pytest.fixture
def hive_port() -> Iterator[HeldPort]:
    with HeldPort() as port:
        yield port


@pytest.fixture
def marker() -> Iterator[str]:
    """Mark processes in their environment; none may be left at the end."""
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    yield marker
    left = marked_processes(marker)
    for process in left:
        process.kill()
    assert not left


def environment(**more: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "COLUMNS": "200"} | more


def test_make_demo(marker: str) -> None:
    """The demo ends by itself, its tokens continue the docs' sentence, and one id is in every hop's log."""
    done = subprocess.run(
        [BIN / "python", "scripts/demo.py"],
        cwd=REPOSITORY,
        env=environment(**{MARKER: marker}),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    tokens = "".join(re.findall(r'"action":"token","message":"((?:[^"\\]|\\.)*)"', done.stdout))
    assert tokens.strip().startswith(EXPECTED)
    assert "data: [DONE]" in done.stdout
    streamed = set(re.findall(r'"correlation_id":"([^"]+)"', done.stdout))
    assert len(streamed) == 1
    correlation_id = streamed.pop()
    shown = done.stdout[done.stdout.rindex("data: [DONE]") :]
    for service in ("queen", "hive", "worker"):
        # Under each service's name stand its own lines with the id.
        assert re.search(rf"{service}.*\n(.+\n)*?.*{correlation_id}", shown), (
            f"no line of the {service}: {shown}"
        )
    assert marked_processes(marker) == []


def test_ctrl_c_of_rbee_up_leaves_no_process(
    marker: str, queen_port: HeldPort, hive_port: HeldPort, tmp_path: Path
) -> None:
    command = ["rbee", "up", "--model", "rbee-tiny", "--models-dir", str(REPOSITORY / "models")]
    command += ["--queen-port", str(queen_port), "--hive-port", str(hive_port)]
    output = tmp_path / "up.log"
    with output.open("wb") as log:
        up = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(**{MARKER: marker, "XDG_STATE_HOME": str(tmp_path)}),
            start_new_session=True,
        )
    try:
        until(lambda: "Ready." in output.read_text() or up.poll() is not None, "rbee up is ready", 600)
        infer = [
            "rbee",
            "infer",
            "--queen",
            queen_port.url,
            "--model",
            "rbee-tiny",
            "--temperature",
            "0",
            PROMPT,
        ]
        answer = subprocess.run(infer, env=environment(), capture_output=True, text=True, timeout=300)
        assert (answer.returncode, EXPECTED in answer.stdout) == (0, True), output.read_text() + answer.stderr
        assert len(marked_processes(marker)) >= 4
    finally:
        os.killpg(up.pid, signal.SIGINT)
        code = up.wait(180)

    assert code in (0, 130)
    assert marked_processes(marker) == [], output.read_text()


def commands_of(name: str) -> list[str]:
    page = (REPOSITORY / "docs/getting-started.md").read_text()
    found = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1].splitlines()


def run(cluster: Cluster, command: str, **ids: str) -> str:
    """Run a line of the page that must succeed; give its output."""
    done = attempt(cluster, command, **ids)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def attempt(cluster: Cluster, command: str, **ids: str) -> subprocess.CompletedProcess[str]:
    """Run a line of the page, with its addresses and ids replaced by real ones."""
    for name, value in ids.items():
        command = command.replace(name, value)
    command = command.replace("http://10.0.0.5:7833", cluster.queen.url).replace(
        "http://10.0.0.7:7835", cluster.hive.url
    )
    words = shlex.split(command)
    variables = dict(
        word.split("=", 1) for word in words if "=" in word.split("://")[0] and not word.startswith("-")
    )
    words = [word for word in words if word.split("=", 1)[0] not in variables]
    return subprocess.run(
        words,
        env=environment(RBEE_QUEEN_URL=cluster.queen.url) | variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_commands_of_the_getting_started_page(cluster: Cluster) -> None:
    for name in ("rbee-status", "scripts"):
        for command in commands_of(name):
            assert "rbee-tiny" in run(cluster, command), command
    assert EXPECTED in run(cluster, commands_of("rbee-infer")[0] + " --temperature 0")

    spawn, listing, show, logs, stop = commands_of("workers")
    before = {worker["worker_id"] for worker in cluster.run({"operation": "worker_list"})["workers"]}
    assert "its engine is loading" in run(cluster, spawn)
    after = {worker["worker_id"] for worker in cluster.run({"operation": "worker_list"})["workers"]}
    (worker_id,) = after - before
    assert worker_id in run(cluster, listing)
    assert "ready" in run(cluster, show, WORKER_ID=worker_id)
    assert "EngineCore" in run(cluster, logs, WORKER_ID=worker_id)
    run(cluster, stop, WORKER_ID=worker_id)
    assert worker_id not in run(cluster, listing)

    job_list, show, follow, cancel = commands_of("jobs")
    # It waits for its first reader, so it has not ended however long the command takes to begin.
    job_id = cluster.submit({"operation": "infer", "model": "rbee-tiny", "prompt": PROMPT})
    run(cluster, cancel, JOB_ID=job_id)
    assert job_id in run(cluster, job_list)
    assert "cancelled" in run(cluster, show, JOB_ID=job_id)
    finished = cluster.events(
        {"operation": "infer", "model": "rbee-tiny", "prompt": PROMPT, "temperature": 0}
    )
    assert EXPECTED in run(cluster, follow, JOB_ID=finished[0]["job_id"])


def test_the_commands_for_models_and_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "models"
    models.mkdir()
    with running_hub() as hub:
        hub.add("org/name", REPOSITORY / "models/rbee-tiny")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        with Cluster(tmp_path, engine="sim", models=models) as cluster:
            download, listing, show, delete = commands_of("models")

            assert "org/name" in run(cluster, download)
            assert "org/name" in run(cluster, listing)
            assert "LlamaForCausalLM" in run(cluster, show)
            assert "org/name is deleted" in run(cluster, delete)
            assert "org/name" not in run(cluster, listing)
            for command in commands_of("machines"):
                # Each fails where its exit status is not 0.
                if command.endswith("check"):
                    # What does not answer within a few seconds is told as a failure, on a busy machine too.
                    until(lambda: attempt(cluster, command).returncode == 0, f"{command} finds all in order")  # noqa: B023
                else:
                    assert cluster.hive_id in run(cluster, command), command
