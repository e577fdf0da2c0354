"""One service as a child process: its own session, its log, its end."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rbee_keeper.text import printable

TAIL_LINES = 12
TAIL_BYTES = 65_536
TAIL_LINE_CHARS = 400

# The child is told to stop when `rbee up` dies without a word (SIGKILL), and then becomes the service.
# Its own session keeps the terminal's Ctrl-C from it: only `rbee up` gets that, and stops all in order.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A running service. `log_path` is None where its log goes to the terminal."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log_path: Path | None) -> None:
        self.name = name
        self.pid = process.pid
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(
        cls, name: str, module: str, arguments: Sequence[str], env: Mapping[str, str], log_path: Path | None
    ) -> "Child":
        """Start `python -m module`.

        Raises:
            OSError: it cannot be started, or its log cannot be written.
        """
        command = [sys.executable, "-m", module, *arguments]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid())]
        with contextlib.ExitStack() as files:
            output = None if log_path is None else files.enter_context(log_path.open("wb"))
            process = await asyncio.create_subprocess_exec(
                *launcher,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT if output is not None else None,
                env=env,
                start_new_session=True,
            )
        return cls(name, process, log_path)

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        return await self._process.wait()

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def end_text(self) -> str:
        """Say how it ended."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"was ended by signal {-code} ({signal.Signals(-code).name})"
        return f"ended by itself with status {code}"

    def tail(self) -> list[str]:
        """Give the last lines of its log."""
        if self.log_path is None:
            return []
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        return [_short(printable(line)) for line in text.splitlines() if line.strip()][-TAIL_LINES:]


def _short(line: str) -> str:
    return line if len(line) <= TAIL_LINE_CHARS else f"{line[:TAIL_LINE_CHARS]}…"
