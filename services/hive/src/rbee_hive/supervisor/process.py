"""One worker process: started by this hive or found running, waited for and ended with all that is its."""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from signal import Signals

import anyio
import anyio.to_thread
import structlog

from rbee_hive.supervisor.machine import Ending
from rbee_hive.supervisor.processes import Family, LinuxSystem, ProcessStat, System

log = structlog.get_logger(__name__)

KILL_EVERY_S = 0.05
KILL_LIMIT_S = 10.0
"""SIGKILL is sent again until nothing is left, for this long: a process in the kernel may take a while."""


class NotStarted(Exception):
    """A process could not be started, or had ended before it could be held."""


class WorkerProcess:
    """A worker's process and everything below it. Only what is proven ours is signalled.

    Args:
        child: where this hive has started it; an adopted process is another's child.
    """

    def __init__(self, family: Family, child: subprocess.Popen[bytes] | None) -> None:
        leader = family.leader
        assert leader is not None
        self._family = family
        self._handle = leader.handle
        self._child = child
        self.pid = leader.stat.pid
        self.start_ticks = leader.stat.start_ticks
        self.ending: Ending | None = None

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        log_path: Path,
        nonce: str,
        pass_fds: Sequence[int] = (),
    ) -> "WorkerProcess":
        """Start `command` in a session of its own, its output appended to `log_path`.

        Args:
            nonce: what `env` holds as proof.
            pass_fds: file descriptors it inherits, under the same numbers.

        Raises:
            NotStarted: it cannot be started, or the log cannot be written.
        """

        def run() -> subprocess.Popen[bytes]:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            with log_path.open("ab") as output:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
            _unprotect(child.pid)
            return child

        try:
            # To its end, whatever happens meanwhile: a process that was started must be known.
            with anyio.CancelScope(shield=True):
                child = await anyio.to_thread.run_sync(run)
        except OSError as exc:
            raise NotStarted(exc.strerror or str(exc)) from exc
        family = Family(LinuxSystem(), nonce)
        if not family.lead(child.pid):
            child.kill()
            child.wait()
            raise NotStarted("it cannot be held: is /proc there, and is a file descriptor free?")
        return cls(family, child)

    @classmethod
    def adopt(
        cls, pid: int, start_ticks: int, nonce: str, system: System | None = None
    ) -> "WorkerProcess | None":
        """Take up a process that another hive has started; None where `pid` is not proven to be it."""
        family = Family(system or LinuxSystem(), nonce)
        if not family.lead(pid, start_ticks):
            family.close()
            return None
        family.scan()
        return cls(family, None)

    @property
    def is_child(self) -> bool:
        return self._child is not None

    async def wait(self) -> Ending:
        """Wait for the process's own end. How it ended is told to its parent only."""
        if self.ending is None:
            await anyio.wait_readable(self._handle)
            self.ending = self._reap()
        return self.ending

    def _reap(self) -> Ending:
        if self._child is None:
            return Ending()
        code = self._child.wait()  # it has ended: this does not block
        return Ending(signal=-code) if code < 0 else Ending(exit_code=code)

    async def scan(self) -> None:
        """Take hold of what it has started since, so that it is found when its own process has gone."""
        await anyio.to_thread.run_sync(self._family.scan)

    def pids(self) -> list[int]:
        """Give the pids that it has, and had, as far as they were found."""
        return self._family.pids()

    def held(self) -> list[ProcessStat]:
        """Give the processes of it that live, of those found so far."""
        return self._family.alive()

    async def signal(self, pid: int, signum: Signals) -> bool:
        """Signal one process of it; False where `pid` is none that lives."""
        await self.scan()
        return self._family.send(pid, signum)

    def terminate(self) -> None:
        """SIGTERM to its own process, which ends its engine."""
        self._family.terminate()

    async def kill(self) -> None:
        """SIGKILL all of it."""
        await anyio.to_thread.run_sync(self._family.kill)

    async def clear(self) -> list[int]:
        """End what is left of it; gives the pids there were. Bounded by `KILL_LIMIT_S`."""
        await self.scan()
        left = [stat.pid for stat in self._family.alive()]
        with anyio.move_on_after(KILL_LIMIT_S) as limit:
            while await anyio.to_thread.run_sync(self._family.kill):  # noqa: ASYNC110 (no event tells it)
                await anyio.sleep(KILL_EVERY_S)
        if limit.cancelled_caught:
            log.error("worker_processes_left", pids=[stat.pid for stat in self._family.alive()])
        return left

    def close(self) -> None:
        """Let go of it; its processes are left as they are."""
        self._family.close()


def _unprotect(pid: int) -> None:
    """Let the kernel end a worker for want of memory before its hive, which a service manager may protect."""
    score = Path(f"/proc/{pid}/oom_score_adj")
    with suppress(OSError, ValueError):
        if int(score.read_text()) < 0:
            score.write_text("0")


def ending_text(ending: Ending) -> str:
    """Say how a process ended, to go on after its name."""
    if ending.signal is not None:
        return f"was ended by signal {ending.signal}"
    if ending.exit_code is not None:
        return f"exited with status {ending.exit_code}"
    return "has ended (its status is not known: another hive had started it)"
