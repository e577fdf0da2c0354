"""Amounts, durations, moments and bars as people read them; pure."""

from collections.abc import Sequence
from datetime import UTC, datetime

PARTS_OF_A_BAR = {True: "█▒░", False: "#=."}
"""What a bar is drawn with, where the terminal shows Unicode and where it does not: used, promised, free."""


def size(count: float) -> str:
    """Give a number of bytes in the units of files and networks, e.g. `1.84 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def memory(count: float | None) -> str:
    """Give a number of bytes in the unit that memory is sold in, e.g. `1.5 GiB`."""
    if count is None:
        return "-"
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """Give a duration in its two largest units, e.g. `2h 1m`."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if hours == 0:
        return f"{minutes}m {int(seconds % 60)}s"
    return f"{hours}h {minutes % 60}m" if days == 0 else f"{days}d {hours % 24}h"


def clock(seconds: float | None) -> str:
    """Give the time to go as a clock does, e.g. `1:02:03`; `-:--` where it is not known."""
    if seconds is None:
        return "-:--"
    whole = int(seconds)
    minutes, rest = whole // 60 % 60, whole % 60
    return f"{whole // 3600}:{minutes:02}:{rest:02}" if whole >= 3600 else f"{minutes}:{rest:02}"


def share(part: float, whole: float | None) -> str:
    """Give a share in per cent, never rounded up to 100 %; `-` where the whole is not known."""
    return "-" if not whole else f"{min(100, int(100 * part / whole))}%"


def with_unit(value: float | None, unit: str) -> str:
    """Give a measured value, or `-` where there is none."""
    return "-" if value is None else f"{value:.0f} {unit}"


def count(number: int, noun: str) -> str:
    """Give a number with its noun, e.g. `1 file`, `2 files`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def bar(used: float, promised: float, whole: float, width: int, *, is_unicode: bool = True) -> str:
    """Draw what is used of a whole, what is promised beyond that, and what is free.

    What is used at all takes one cell at least, and what is free too, so that neither looks like none.
    """
    parts = PARTS_OF_A_BAR[is_unicode]
    if whole <= 0:
        return parts[2] * width

    def cells(amount: float) -> int:
        rounded = round(width * min(max(amount, 0.0), whole) / whole)
        if 0 < amount < whole:
            rounded = min(max(rounded, 1), width - 1)
        return rounded

    taken = cells(used)
    reached = max(taken, cells(max(used, promised)))
    return parts[0] * taken + parts[1] * (reached - taken) + parts[2] * (width - reached)


def indices(numbers: Sequence[int]) -> str:
    """Give the indices of devices, e.g. `0,1`."""
    return ",".join(map(str, numbers))


def moment(text: str | None) -> datetime | None:
    """Read a moment from the wire; None where there is none, or it cannot be read."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def local(text: str | None, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Give a moment in this machine's time zone; what cannot be read is given as it stands."""
    at = moment(text)
    if at is None:
        return text or "-"
    here = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone()
    return here.strftime(form)
