"""A download as it goes on: bars at a terminal, a plain line now and then elsewhere."""

from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from rbee_contracts.events import DownloadProgress
from rbee_keeper.output import Output
from rbee_keeper.text import one_line
from rbee_keeper.units import clock, count, share, size

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_EVERY_S = 5.0
"""Seconds between two lines where no bars can be drawn."""

MAX_FILES = 8
"""Files with a bar of their own; the rest are in the bar of the whole."""

NAME_CELLS = range(12, 61)
"""How much may stand before a bar; of what is longer the end is shown, which tells paths apart."""

BESIDE_NAME_CELLS = 44
"""What is kept for the bar and for what stands behind it."""


def line(progress: DownloadProgress) -> str:
    """Tell how far a download is, in one line."""
    done, total = progress.bytes_done, progress.bytes_total
    amount = size(done) if total is None else f"{size(done)} of {size(total)} ({share(done, total)})"
    files = (
        f", {progress.files_done} of {count(progress.files_total, 'file')}" if progress.files_total else ""
    )
    eta = "" if progress.eta_s is None else f", {clock(progress.eta_s)} to go"
    return f"{progress.model}: {amount}, {size(progress.rate)}/s{eta}{files}"


def short(name: str, cells: int) -> str:
    """Give a name, or its end where it is longer than so many cells."""
    name = one_line(name)
    return name if len(name) <= cells else f"…{name[1 - cells :]}"


def name_cells(width: int) -> int:
    """Give how much may stand before a bar on a terminal of this width."""
    return min(max(width - BESIDE_NAME_CELLS, NAME_CELLS.start), NAME_CELLS.stop - 1)


class Display(Protocol):
    """Shows a download until it is closed."""

    def show(self, progress: DownloadProgress) -> None: ...

    def close(self) -> None: ...


def open_display(out: Output) -> Display:
    """Choose how downloads are shown to whoever looks at stderr."""
    if out.can_redraw:
        console = out.live_console()
        if not console.is_dumb_terminal:
            return Bars(out)
    return Lines(out)


class Lines:
    """A line at once, then one every `LINE_EVERY_S` seconds, and one when all bytes are there."""

    def __init__(self, out: Output, now: Callable[[], float] = monotonic) -> None:
        self._out = out
        self._now = now
        self._next: float | None = None

    def show(self, progress: DownloadProgress) -> None:
        now = self._now()
        is_due = self._next is None or now >= self._next
        if is_due or progress.bytes_done == progress.bytes_total:
            self._out.say(line(progress))
            self._next = now + LINE_EVERY_S

    def close(self) -> None:
        """Nothing is held."""


class Bars:
    """One bar for the whole and one for each file under way, with the rate and the time to go."""

    def __init__(self, out: Output) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._open = ExitStack()
        self._console = out.live_console()
        self._bars = self._open.enter_context(
            Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[done]:>4}", markup=False),
                # As wide as they get, so that nothing jumps; the bar takes what is left.
                TextColumn("{task.fields[rate]:>9}", markup=False, style="cyan"),
                TextColumn("{task.fields[eta]:>7}", markup=False),
                console=self._console,
                auto_refresh=False,
                transient=True,
                expand=True,
            )
        )
        self._open.enter_context(out.beside(self._console))
        self._tasks: dict[str | None, TaskID] = {}

    def show(self, progress: DownloadProgress) -> None:
        done, total = progress.bytes_done, progress.bytes_total
        label = size(done) if total is None else f"{size(done)} of {size(total)}"
        if progress.files_total:
            label = f"{progress.files_done} of {count(progress.files_total, 'file')}, {label}"
        self._bar(None, label, done, total, f"{size(progress.rate)}/s", clock(progress.eta_s))
        current = progress.current[:MAX_FILES]
        for path in self._tasks.keys() - {file.path for file in current} - {None}:
            self._bars.remove_task(self._tasks.pop(path))
        for file in current:
            self._bar(file.path, file.path, file.bytes_done, file.bytes_total)
        self._bars.refresh()

    def close(self) -> None:
        self._open.close()

    def _bar(
        self, key: str | None, label: str, done: int, total: int | None, rate: str = "", eta: str = ""
    ) -> None:
        """Bring a bar up to date; the first time, draw it."""
        description = short(label, name_cells(self._console.width))
        if key in self._tasks:
            self._bars.update(
                self._tasks[key],
                description=description,
                completed=done,
                total=total,
                done=share(done, total),
                rate=rate,
                eta=eta,
            )
        else:
            self._tasks[key] = self._bars.add_task(
                description, completed=done, total=total, done=share(done, total), rate=rate, eta=eta
            )
