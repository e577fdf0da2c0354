"""One worker process: started in a group of its own, its log kept, ended with all its children."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
import anyio.to_thread
from anyio.abc import Process

TAIL_LINES = 20
TAIL_BYTES = 16_384


class WorkerProcess:
    """A process and its group.

    Only this class signals it: once `exit_code` is known, the pid may be anybody's.
    """

    def __init__(self, process: Process, log_path: Path) -> None:
        self._process = process
        self.pid = process.pid
        self.log_path = log_path

    @classmethod
    async def start(
        cls, command: Sequence[str], env: Mapping[str, str], log_path: Path, pass_fds: Sequence[int] = ()
    ) -> "WorkerProcess":
        """Start `command` in a session of its own, its output appended to `log_path`.

        Args:
            pass_fds: file descriptors it inherits, under the same numbers.

        Raises:
            OSError: it cannot be started, or the log cannot be written.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as output:
            process = await anyio.open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        return cls(process, log_path)

    @property
    def exit_code(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the process to end, then end what it left behind in its group."""
        code = await self._process.wait()
        self._kill_group()
        return code

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, up to `grace_s` seconds to drain, then SIGKILL of the whole group."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with anyio.move_on_after(grace_s):
            return await self.wait()
        self._kill_group()
        return await self.wait()

    def kill(self) -> None:
        """SIGKILL the whole group, at once."""
        if self.exit_code is None:
            self._kill_group()

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """Give the last lines of its log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
