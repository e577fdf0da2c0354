"""A worker process is ended with everything it started; one that is not proven ours is left alone."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rbee_inprocess import eventually
from rbee_processes import is_alive

from rbee_contracts.access import NONCE_VARIABLE
from rbee_hive.supervisor.logs import tail
from rbee_hive.supervisor.machine import Ending
from rbee_hive.supervisor.process import NotStarted, WorkerProcess, ending_text
from rbee_hive.supervisor.processes import LinuxSystem

pytestmark = pytest.mark.timeout(120)

CHILD = "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"
"""It speaks itself: a process that has begun only just has no environment yet to be known by."""

STUBBORN = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
time.sleep(600)
"""
ORPHANING = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
sys.exit(3)
"""
NONCE = "a-nonce-of-a-test"


async def start(script: str, folder: Path, nonce: str = NONCE) -> WorkerProcess:
    env = {NONCE_VARIABLE: nonce}
    return await WorkerProcess.start([sys.executable, "-c", script], env, folder / "logs" / "w.log", nonce)


async def child_of(folder: Path) -> psutil.Process:
    lines = await eventually(lambda: tail(folder / "logs" / "w.log"), "it speaks")
    return psutil.Process(int(lines[0].split()[1]))


async def gone(process: psutil.Process) -> None:
    await eventually(lambda: not is_alive(process), "it is gone")


async def test_a_process_that_ignores_sigterm_is_killed_with_all_it_started(tmp_path: Path) -> None:
    process = await start(STUBBORN, tmp_path)
    child = await child_of(tmp_path)
    process.terminate()
    await process.kill()

    assert await process.wait() == Ending(signal=signal.SIGKILL)
    await gone(child)
    assert await process.clear() == []
    process.close()


async def test_what_a_process_leaves_behind_is_ended_wherever_it_went(tmp_path: Path) -> None:
    """Its child is in a session of its own: only the nonce says whose it is."""
    process = await start(ORPHANING, tmp_path)
    child = await child_of(tmp_path)

    assert await process.wait() == Ending(exit_code=3)
    assert await process.clear() == [child.pid]
    await gone(child)
    process.close()


async def test_what_cannot_be_started_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotStarted, match="No such file"):
        await WorkerProcess.start([str(tmp_path / "none")], {}, tmp_path / "w.log", NONCE)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


async def test_a_process_is_adopted_by_pid_start_and_nonce(tmp_path: Path) -> None:
    process = await start(STUBBORN, tmp_path)
    child = await child_of(tmp_path)
    adopted = WorkerProcess.adopt(process.pid, process.start_ticks, NONCE)

    assert adopted is not None
    assert {stat.pid for stat in adopted.held()} == {process.pid, child.pid}
    assert WorkerProcess.adopt(process.pid, process.start_ticks + 1, NONCE) is None
    assert WorkerProcess.adopt(process.pid, process.start_ticks, "another-nonce") is None
    await adopted.kill()
    assert await adopted.wait() == Ending(), "its status belongs to who started it"
    assert await process.wait() == Ending(signal=signal.SIGKILL)
    await gone(child)
    for held in (adopted, process):
        held.close()


async def test_a_foreign_process_with_the_recorded_pid_is_not_adopted(
    stranger: subprocess.Popen[bytes],
) -> None:
    """F09."""
    stat = LinuxSystem().stat(stranger.pid)
    assert stat is not None

    assert WorkerProcess.adopt(stranger.pid, stat.start_ticks, NONCE) is None
    assert stranger.poll() is None


def test_linux_tells_of_processes() -> None:
    system, own = LinuxSystem(), os.getpid()
    stat = system.stat(own)

    assert stat is not None
    assert (stat.ppid, stat.session, stat.is_ended) == (os.getppid(), os.getsid(0), False)
    assert own in system.pids()
    assert system.stat(2**22 + 1) is None
    assert system.nonce(2**22 + 1) is None
    assert system.open(2**22 + 1) is None


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (Ending(exit_code=1), "exited with status 1"),
        (Ending(signal=9), "was ended by signal 9"),
        (Ending(), "not known"),
    ],
)
def test_how_it_ended_in_words(ending: Ending, text: str) -> None:
    assert text in ending_text(ending)
