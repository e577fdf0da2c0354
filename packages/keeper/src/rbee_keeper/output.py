"""What a call prints, and for whom: a person at a terminal, a pipe, or a program that reads JSON."""

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

import msgspec
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_keeper.remedies import explain

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = {code: None for code in [*range(0x20), 0x7F, *range(0x80, 0xA0)] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Give `text` without the control characters that could steer a terminal."""
    return text.translate(_SHOWN)


class Grid(Struct, frozen=True, kw_only=True):
    """A table, however it is going to be shown. `empty`: what is said where there are no rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    empty: str


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
        self.has_told_end = False
        self._at_line_start = True

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
        """Write a table: drawn for a person, bare columns for a pipe."""
        if not grid.rows:
            self.line(grid.empty)
        elif self.to_person:
            from rich import box
            from rich.table import Table
            from rich.text import Text

            table = Table(title=grid.title, title_justify="left", title_style="bold", header_style="dim")
            table.box, table.show_edge, table.pad_edge = box.SIMPLE_HEAD, False, False
            for column in grid.columns:
                # What names a thing is there to be copied, so it is never cut.
                table.add_column(column, no_wrap=column in _NAMES)
            for row in grid.rows:
                table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
            self._console().print(table)
        else:
            lines = [tuple(column.upper() for column in grid.columns), *grid.rows]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            for cells in lines:
                padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
                self.line("  ".join(padded).rstrip())

    # --- what is said about it ---------------------------------------------------------------------------

    def say(self, text: str, *, style: str = "") -> None:
        """Tell a person something beside the output; it never gets into a pipe."""
        if self.to_person and self._stderr.isatty():
            self.end_text()
        if self._stderr.isatty() and style:
            from rich.console import Console
            from rich.text import Text

            console = Console(file=self._stderr, soft_wrap=True, highlight=False)
            console.print(Text(printable(text), style=style))
        else:
            self._stderr.write(f"{printable(text) if self._stderr.isatty() else text}\n")
            self._stderr.flush()

    def narrate(self, event: Any) -> None:
        """Tell what an event narrates."""
        self.say(event.formatted or event.message, style="dim")

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
        self._stdout.write(encoded.decode() + "\n")
        self._stdout.flush()

    def _console(self) -> "Console":
        from rich.console import Console

        return Console(file=self._stdout, highlight=False)


_NAMES = frozenset({"job", "worker", "hive", "device", "operation", "state"})
_STYLES = {
    "ready": "green",
    "online": "green",
    "completed": "green",
    "running": "cyan",
    "starting": "yellow",
    "connecting": "yellow",
    "pending": "yellow",
    "stopping": "yellow",
    "cancelled": "yellow",
    "failed": "red",
    "unreachable": "red",
}
