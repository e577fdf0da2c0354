"""A worker process is ended with everything it started, and its last words are kept."""

import signal
import sys
from pathlib import Path

import psutil
from rbee_inprocess import eventually

from rbee_hive.process import WorkerProcess

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
ORPHANING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
sys.exit(3)
"""


async def start(script: str, tmp_path: Path) -> WorkerProcess:
    return await WorkerProcess.start([sys.executable, "-c", script], {}, tmp_path / "logs" / "w.log")


async def child_of(process: WorkerProcess) -> psutil.Process:
    await eventually(process.tail, "it speaks")
    return psutil.Process(int(process.tail()[0].split()[1]))


async def gone(process: psutil.Process) -> None:
    await eventually(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "it is gone"
    )


async def test_a_process_that_ignores_sigterm_is_killed_with_its_group_after_the_grace(
    tmp_path: Path,
) -> None:
    process = await start(STUBBORN, tmp_path)
    child = await child_of(process)

    assert await process.stop(grace_s=0.2) == -signal.SIGKILL
    await gone(child)


async def test_what_a_process_leaves_behind_is_ended(tmp_path: Path) -> None:
    process = await start(ORPHANING, tmp_path)
    child = await child_of(process)

    assert await process.wait() == 3
    await gone(child)


async def test_the_tail_is_the_last_lines_and_survives_odd_bytes(tmp_path: Path) -> None:
    script = "import sys; [print('line', i) for i in range(5000)]; sys.stdout.flush();"
    script += "sys.stdout.buffer.write(b'\\xff end\\n')"
    process = await start(script, tmp_path)
    await process.wait()

    assert len(process.tail()) == 20
    assert process.tail(2) == ["line 4999", "\ufffd end"]
