"""The tests' own view of processes, ports and time holds while these come and go."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import rbee_processes
from rbee_containers import ask, do
from rbee_ports import HOST, HeldPort
from rbee_processes import is_alive, title_of, until

from rbee_job_server import bind


def test_a_process_that_ends_while_it_is_looked_at_is_not_alive_and_has_no_title() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:

        class Ending(psutil.Process):
            """One that ends just after its existence has been checked."""

            def status(self) -> Any:
                child.kill()
                child.wait()
                return super().status()

        process = Ending(child.pid)
        assert is_alive(child.pid)
        assert "time.sleep(600)" in title_of(process)
        assert not is_alive(process)
    assert not is_alive(child.pid)
    assert title_of(process) == ""


def test_a_held_port_is_its_services_alone_while_that_is_down_too() -> None:
    with HeldPort() as held:
        address = (HOST, held.number)
        for _ in range(2):
            with bind(*address) as service, socket.create_connection(address) as caller:
                answer, _ = service.accept()
                with answer:
                    answer.sendall(b"here")
                    assert caller.recv(4) == b"here"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(address)


def test_a_condition_is_asked_once_more_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits may have been held up just then, and what it waits for have come meanwhile."""
    asked: list[float] = []
    now = 0.0

    def held_up() -> bool:
        nonlocal now
        asked.append(now)
        now += 100.0
        return len(asked) > 1

    clock = SimpleNamespace(monotonic=lambda: now, sleep=lambda _: None)
    monkeypatch.setattr(rbee_processes, "time", clock)

    assert until(held_up, "it is so", timeout_s=60)
    assert asked == [0.0, 100.0]
    asked.clear()
    with pytest.raises(AssertionError, match="after 60 s still not: it is so"):
        until(lambda: held_up() and False, "it is so", timeout_s=60)
    assert len(asked) == 2


class Forgetful:
    """Plays a container whose engine drops what its first commands say."""

    def __init__(self, folder: Path, drops: int) -> None:
        self.folder = folder
        self.drops = drops

    def exec_run(self, command: list[str], environment: dict[str, str] | None = None) -> tuple[int, bytes]:
        command = [word.replace("/var/tmp", str(self.folder)) for word in command]
        done = subprocess.run(command, capture_output=True, env=os.environ | (environment or {}), check=False)
        self.drops -= 1
        return done.returncode, b"" if self.drops >= 0 else done.stdout


def test_what_a_container_says_is_whole_though_its_engine_drops_some_and_a_command_runs_once(
    tmp_path: Path,
) -> None:
    count = tmp_path / "count"
    container: Any = Forgetful(tmp_path, drops=2)
    command = ("sh", "-c", f"echo run >>{count}; echo $WORD; echo wrong >&2; exit 3")
    assert do(container, *command, environment={"WORD": "hello"}) == (3, "hello\nwrong\n")
    assert count.read_text() == "run\n"

    container.drops = 2
    assert ask(container, "sh", "-c", "echo hello; exit 3") == (3, "hello\n")
