"""What a running job says, told to whoever waits for it: narration, and downloads as they go on."""

from types import TracebackType
from typing import Self

from rbee_contracts.events import AnyEvent, DownloadProgress, ModelDownloadProgress, Token
from rbee_keeper.output import Output
from rbee_keeper.progress import Display, open_display
from rbee_keeper.text import one_line

LOG_ACTION = "worker_log"
"""The action of the events that carry lines of a worker's log, several in one message."""


class Teller:
    """Takes the events of a job and tells them on stderr; with --json nothing, or each event on stdout.

    A context manager: at its end nothing moves on the terminal any more.

    Args:
        events: with --json, write the events themselves; for commands whose result is a stream.
        output: write the job's output, and the lines of a log, to stdout.
        whole: tell the job's beginning and end too.
        ending: tell how it ended; not where the command itself says what was done.
    """

    def __init__(
        self,
        out: Output,
        *,
        events: bool = False,
        output: bool = False,
        whole: bool = False,
        ending: bool = True,
    ) -> None:
        self._out = out
        self._events = events
        self._output = output
        self._whole = whole
        self._ending = ending
        self._display: Display | None = None
        self.last_progress: DownloadProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, event: AnyEvent) -> None:
        if self._out.json:
            if self._events:
                self._out.event(event)
        elif isinstance(event, ModelDownloadProgress):
            self.last_progress = event.data
            if self._display is None:
                self._display = open_display(self._out)
            self._display.show(event.data)
        elif isinstance(event, Token):
            if self._output:
                self._out.text(event.message)
        elif event.action == LOG_ACTION:
            if self._output:
                self._log(event.message)
        elif event.kind == "terminal":
            self.close()
            if self._whole:
                self._out.narrate(event)
        elif event.kind == "narration" and not self._is_passed_over(event.action):
            self._out.narrate(event)

    def _log(self, lines: str) -> None:
        """Write lines of a log: as they are for a pipe, harmless for a person."""
        if self._out.to_person:
            lines = "\n".join(map(one_line, lines.split("\n")))
        self._out.line(lines)

    def _is_passed_over(self, action: str) -> bool:
        # Why a job failed is the command's own last word.
        if action == "error" or (action == "execute" and not self._whole):
            return True
        return action.endswith("_complete") and not self._ending

    def close(self) -> None:
        """Leave the terminal as it was; what comes after may open it again."""
        if self._display is not None:
            self._display.close()
            self._display = None
