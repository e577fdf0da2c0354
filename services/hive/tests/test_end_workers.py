"""`rbee-hive end-workers`: what a hive has left and no other takes up is ended, and nothing else."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rbee_inprocess import eventually
from rbee_processes import BIN, Cluster, is_alive, until

from rbee_contracts.access import NONCE_VARIABLE
from rbee_hive.config import load
from rbee_hive.supervisor.leftovers import end_left
from rbee_hive.supervisor.logs import tail
from rbee_hive.supervisor.process import WorkerProcess
from rbee_hive.supervisor.processes import boot_id
from rbee_hive.supervisor.records import Records, WorkerRecord

pytestmark = pytest.mark.timeout(180)

NONCE = "a-nonce-of-a-left-worker"
OBEDIENT = "import os, time; print('here', os.getpid(), flush=True); time.sleep(600)"
"""It speaks: a process that has begun only just has no environment yet to be known by."""

STUBBORN = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {OBEDIENT!r}], start_new_session=True)
time.sleep(600)
"""


def end_workers(cluster: Cluster) -> subprocess.CompletedProcess[str]:
    arguments = ["--config", "none", "--hive-id", "box1", "--state-dir", str(cluster.state_dir)]
    command = [str(BIN / "rbee-hive"), "end-workers", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)


def test_a_left_worker_is_ended_and_one_that_a_hive_has_is_not(tmp_path: Path) -> None:
    with Cluster(tmp_path, engine="sim") as cluster:
        worker = psutil.Process(cluster.spawn("m")["pid"])
        refused = end_workers(cluster)

        assert refused.returncode == 2
        assert "another hive runs with the state folder" in refused.stderr
        assert is_alive(worker)

        assert cluster.hive.terminate(signal.SIGUSR1) == 0
        assert is_alive(worker)
        ended = end_workers(cluster)

        assert ended.returncode == 0, ended.stderr
        assert '"worker_ended"' in ended.stderr
        until(lambda: not is_alive(worker), "it is gone")
        assert list((cluster.state_dir / "workers").glob("*.json")) == []
        again = end_workers(cluster)
        assert (again.returncode, again.stderr) == (0, "")


def record(worker_id: str, boot: str, process: WorkerProcess | None) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        model="m",
        kind="cpu",
        devices=[0],
        args=[],
        port=9300,
        token="a-token-of-a-test",
        nonce=NONCE,
        boot_id=boot,
        started_at="2026-01-01T00:00:00Z",
        pid=None if process is None else process.pid,
        start_ticks=None if process is None else process.start_ticks,
    )


async def started(script: str, folder: Path) -> tuple[WorkerProcess, str]:
    """Start a worker's process that runs `script`; give it with the first line that is said."""
    log = folder / "logs/w.log"
    command = [sys.executable, "-c", script]
    process = await WorkerProcess.start(command, {NONCE_VARIABLE: NONCE}, log, NONCE)
    lines = await eventually(lambda: tail(log), "it speaks")
    return process, lines[0]


async def test_one_that_does_not_obey_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    process, line = await started(STUBBORN, tmp_path)
    child = psutil.Process(int(line.split()[1]))
    records = Records(tmp_path / "workers")
    records.write(record("w1", boot_id(), process))

    assert await end_left(tmp_path, grace_s=0.1)
    assert (await process.wait()).signal == signal.SIGKILL
    process.close()
    await eventually(lambda: not is_alive(child), "its child is gone too")
    assert list(records.read()) == []


async def test_what_a_dead_worker_has_started_is_found_by_its_nonce_and_ended(tmp_path: Path) -> None:
    process, line = await started(STUBBORN, tmp_path)
    child = psutil.Process(int(line.split()[1]))
    psutil.Process(process.pid).kill()
    await process.wait()
    process.close()
    Records(tmp_path / "workers").write(record("w1", boot_id(), process))

    assert await end_left(tmp_path)
    await eventually(lambda: not is_alive(child), "the orphan is gone")


async def test_a_record_of_an_earlier_boot_names_nobody(tmp_path: Path) -> None:
    process, _ = await started(OBEDIENT, tmp_path)
    records = Records(tmp_path / "workers")
    records.write(record("w1", "an-earlier-boot", process))

    assert await end_left(tmp_path)
    assert list(records.read()) == []
    assert is_alive(process.pid)
    await process.kill()
    await process.wait()
    process.close()


async def test_a_record_that_cannot_be_removed_spares_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = await started(OBEDIENT, tmp_path)
    records = Records(tmp_path / "workers")
    records.write(record("w1", "an-earlier-boot", None))
    records.write(record("w2", boot_id(), process))

    def read_only(records: Records, worker_id: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Records, "forget", read_only)

    assert await end_left(tmp_path)
    assert (await process.wait()).signal == signal.SIGTERM
    process.close()


def test_the_commands_of_the_hive(capsys: pytest.CaptureFixture[str]) -> None:
    asked = load(["end-workers", "--config", "none"], {})
    assert (asked.ends_workers, asked.is_shown) == (True, False)
    shown = load(["config", "--config", "none"], {})
    assert (shown.ends_workers, shown.is_shown) == (False, True)
    with pytest.raises(SystemExit):
        load(["end-worker"], {})
    assert "there is no command end-worker. Did you mean end-workers?" in capsys.readouterr().err
