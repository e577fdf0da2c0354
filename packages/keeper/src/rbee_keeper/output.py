"""What a call prints, and for whom: a person at a terminal, a pipe, or a program that reads JSON."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from rbee_contracts.errors import RbeeError
from rbee_keeper.grid import Grid, fit, least_width, without_empty
from rbee_keeper.remedies import explain
from rbee_keeper.text import one_line, printable, printable_json

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "ready": "green",
    "online": "green",
    "completed": "green",
    "ok": "green",
    "busy": "cyan",
    "running": "cyan",
    "starting": "yellow",
    "connecting": "yellow",
    "pending": "yellow",
    "sleeping": "yellow",
    "draining": "yellow",
    "stopping": "yellow",
    "cancelled": "yellow",
    "degraded": "yellow",
    "warning": "yellow",
    "orphan": "yellow",
    "failed": "red",
    "unreachable": "red",
    "lost": "red",
}
"""How a state is coloured, by the first word of its cell."""


class Output:
    """Writes to stdout what was asked for, and to stderr what is said about it."""

    def __init__(self, *, json: bool, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.json = json
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        for stream in (self._stdout, self._stderr):
            # A terminal that cannot show a character gets a "?", not a traceback.
            reconfigure = getattr(stream, "reconfigure", None)
            if reconfigure is not None:
                reconfigure(errors="replace")
        self.to_person = self._stdout.isatty()
        self.is_unicode = (getattr(self._stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        self.has_told_end = False
        self._at_line_start = True
        self._live: Console | None = None

    # --- results ---------------------------------------------------------------------------------------

    def text(self, text: str) -> None:
        """Write output as it comes, and get it out at once."""
        if not text:
            return
        self._stdout.write(printable(text) if self.to_person else text)
        self._stdout.flush()
        self._at_line_start = text.endswith("\n")

    def end_text(self) -> None:
        """End the line that output has begun."""
        if not self._at_line_start:
            self.text("\n")

    def line(self, text: str) -> None:
        self.text(f"{text}\n")

    def styled(self, text: str, style: str) -> None:
        """Write a line, in colour for a person."""
        if style and self.to_person:
            from rich.text import Text

            self._console().print(Text(printable(text), style=style), soft_wrap=True)
        else:
            self.line(text)

    def document(self, value: object) -> None:
        """Write one JSON document, readable where a person looks on."""
        encoded = msgspec.json.encode(value)
        self._json_line(msgspec.json.format(encoded, indent=2) if self.to_person else encoded)

    def event(self, value: object) -> None:
        """Write one JSON event on one line. A job's terminal event tells the end; nothing follows it."""
        self.has_told_end = self.has_told_end or getattr(value, "kind", None) == "terminal"
        self._json_line(msgspec.json.encode(value))

    def grid(self, grid: Grid) -> None:
        """Write a table: drawn for a person, as wide as the terminal; bare and whole for a pipe."""
        if not grid.rows:
            self.line(grid.empty)
            return
        grid = msgspec.structs.replace(grid, rows=[tuple(map(one_line, row)) for row in grid.rows])
        if self.to_person:
            self._draw(without_empty(grid))
            return
        lines = [tuple(column.upper() for column in grid.columns), *grid.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for cells in lines:
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            self.line("  ".join(padded).rstrip())

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Write what is known of one thing, each fact after its label."""
        width = max((len(label) for label, _ in facts), default=0)
        if not self.to_person:
            for label, value in facts:
                self.line(f"{label:{width}}  {one_line(value)}".rstrip())
            return
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for label, value in facts:
            table.add_row(label, Text(one_line(value), style=_style(value)))
        self._console().print(table)

    def block(self, title: str, lines: Sequence[str]) -> None:
        """Write lines that somebody else wrote, under a title and set off from the rest."""
        self.line(title)
        for line in lines:
            self.line(f"  {one_line(line)}")

    # --- what is said about it ---------------------------------------------------------------------------

    @property
    def can_redraw(self) -> bool:
        """Whether stderr is a terminal that a person looks at."""
        return self._stderr.isatty() and not self.json

    def live_console(self) -> "Console":
        """Make a console for something that moves on stderr."""
        from rich.console import Console

        return Console(file=self._stderr, highlight=False)

    @contextmanager
    def beside(self, console: "Console") -> Iterator[None]:
        """Have what is said meanwhile appear above what moves on `console`."""
        self._live = console
        try:
            yield
        finally:
            self._live = None

    def say(self, text: str, *, style: str = "") -> None:
        """Tell a person something beside the output; it never gets into a pipe."""
        if self.to_person and self._stderr.isatty():
            self.end_text()
        if self._live is not None or (self._stderr.isatty() and style):
            from rich.console import Console
            from rich.text import Text

            console = self._live or Console(file=self._stderr, highlight=False)
            console.print(Text(printable(text), style=style), soft_wrap=True)
        else:
            self._stderr.write(f"{printable(text) if self._stderr.isatty() else text}\n")
            self._stderr.flush()

    def narrate(self, event: Any) -> None:
        """Tell what an event narrates."""
        self.say(event.formatted or event.message, style="dim")

    def connection(self, url: str, is_there: bool) -> None:
        """Tell that a service was lost, or that it answers again."""
        if is_there:
            self.say(f"Connected to {url} again.", style="green")
        else:
            self.say(f"The connection to {url} was lost. Reconnecting …", style="yellow")

    def left(self, job_id: str, was_cancelled: bool) -> None:
        """Tell of a job that was left before its end and could not be cancelled."""
        if not was_cancelled:
            self.say(
                f"{job_id} could not be cancelled; it may go on. Stop it: rbee job cancel {job_id}",
                style="yellow",
            )

    def failure(self, error: RbeeError, url: str) -> None:
        """Tell why the command failed and what to do; with `json` the error is the document.

        Unless a stream of events has told it already.
        """
        if self.json and not self.has_told_end:
            self.event(error.body())
        else:
            self.end_text()
        self.say(f"Error: {explain(error, url)}", style="red")

    def abandon(self) -> None:
        """Stop writing to a stdout that nobody reads any more, also at the interpreter's end."""
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stdout.fileno())

    def _json_line(self, encoded: bytes) -> None:
        document = encoded.decode()
        self._stdout.write((printable_json(document) if self.to_person else document) + "\n")
        self._stdout.flush()

    def _draw(self, grid: Grid) -> None:
        from rich import box
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        console = self._console()
        shown, left_out = fit(grid, console.width, cell_len)
        table = Table(title=grid.title, title_justify="left", title_style="bold", header_style="dim")
        table.box, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, False, False
        table.padding, table.collapse_padding = (0, 1), True
        does_fit = least_width(shown, cell_len) <= console.width
        for column in shown.columns:
            table.add_column(
                column,
                justify="right" if column in shown.to_the_right else "left",
                overflow="fold",
                # Names are there to be copied: broken over lines only where there is no other way.
                no_wrap=does_fit and column not in shown.elastic,
            )
        for row in shown.rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
        console.print(table)
        if left_out:
            self.styled(f"Too narrow to show: {', '.join(left_out)}. All of it: --json", "dim")

    def _console(self) -> "Console":
        from rich.console import Console

        return Console(file=self._stdout, highlight=False)


def _style(cell: str) -> str:
    return STYLES.get(cell.partition(" ")[0].partition("(")[0], "")
