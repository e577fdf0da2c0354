"""`rbee` while the services behind it fail: what a person who waits is told, and when."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rbee_processes import BIN, until
from rbee_restarts import RestartableCluster

pytestmark = pytest.mark.timeout(400)

TOKENS = 200
STEP_MS = 80


class Command:
    """A running `rbee`; what it prints goes to files, so that it can be looked at while it runs."""

    def __init__(self, cluster: RestartableCluster, folder: Path, *arguments: str) -> None:
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RBEE_")}
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [BIN / "rbee", *arguments],
                env=inherited | {"RBEE_QUEEN_URL": cluster.queen.url},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def output(self) -> str:
        return self._stdout.read_text()

    @property
    def said(self) -> list[str]:
        return self._stderr.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RestartableCluster]:
    with RestartableCluster(tmp_path, engine="sim") as cluster:
        cluster.spawn("m", "--sim-step-ms", str(STEP_MS))
        yield cluster


def infer(cluster: RestartableCluster, folder: Path) -> Command:
    """Start a long inference; its first output is there."""
    command = Command(cluster, folder, "infer", "--model", "m", "--max-tokens", str(TOKENS), "Hello")
    until(lambda: len(command.output.split()) > 5, "output has begun")
    return command


def test_the_loss_of_the_queen_is_said_at_once_and_its_return_too(
    cluster: RestartableCluster, tmp_path: Path
) -> None:
    command = infer(cluster, tmp_path)
    url = cluster.queen.url

    lost = [f"The connection to {url} was lost. Reconnecting …"]

    cluster.kill_queen()
    until(lambda: command.said == lost, "the loss is said")
    cluster.start_queen()
    status = command.process.wait(240)

    assert status == 0
    assert command.said == [*lost, f"Connected to {url} again."]
    assert len(command.output.split()) == TOKENS


def test_ctrl_c_without_a_queen_says_that_the_job_may_go_on(
    cluster: RestartableCluster, tmp_path: Path
) -> None:
    command = infer(cluster, tmp_path)
    cluster.kill_queen()
    until(lambda: command.said, "the loss is said")

    command.process.send_signal(signal.SIGINT)
    status = command.process.wait(180)

    assert status == 130
    assert "could not be cancelled; it may go on. Stop it: rbee job cancel job-" in command.said[-1]
    cluster.start_queen()
