"""The disk of the models folder: how much is free, and how much of that is promised to downloads."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from rbee_contracts.errors import NoCapacity

KEPT_FREE_SHARE = 0.01
KEPT_FREE_MAX_BYTES = 2**30
"""A download leaves one percent of the disk free, 1 GiB at most: logs and databases may lie there too."""

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def readable(size: float) -> str:
    """Say a number of bytes as a person would, in powers of ten."""
    unit = 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size /= 1000
        unit += 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 or size >= 99.5 else f"{size:.1f} {_UNITS[unit]}"


class Reservation:
    """Bytes promised to one download; shrinks as they are written. `release` gives back what is left."""

    def __init__(self, space: "Space", size: int) -> None:
        self._space = space
        self._left = size

    @property
    def left(self) -> int:
        return self._left

    def written(self, size: int) -> None:
        """Say that bytes lie on the disk now; a negative number, that they were thrown away."""
        with self._space.lock:
            self._left = max(0, self._left - size)

    def release(self) -> None:
        with self._space.lock:
            self._left = 0
            self._space.forget(self)


class Space:
    """The one place that promises disk space. Safe to use from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reservations: list[Reservation] = []
        self.lock = threading.Lock()

    def measure(self) -> tuple[int, int]:
        """Give the bytes of the disk, and how many of them may still be written."""
        folder = self._folder
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        disk = os.statvfs(folder)
        return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize

    @property
    def reserved(self) -> int:
        with self.lock:
            return sum(reservation.left for reservation in self._reservations)

    def reserve(self, size: int, model: str, remedy: Callable[[], str]) -> Reservation:
        """Promise `size` bytes to the download of `model`.

        Args:
            remedy: says what could be deleted.

        Raises:
            NoCapacity: so much is not free; names how much is missing.
        """
        total, free = self.measure()
        kept = min(int(total * KEPT_FREE_SHARE), KEPT_FREE_MAX_BYTES)
        with self.lock:
            promised = sum(reservation.left for reservation in self._reservations)
            missing = size + promised + kept - free
            if size == 0 or missing <= 0:
                reservation = Reservation(self, size)
                self._reservations.append(reservation)
                return reservation
        others = f" and {readable(promised)} are promised to other downloads" if promised else ""
        raise no_space(
            f"{model} needs {readable(size)} more on the disk of the models folder, where {readable(free)} "
            f"are free{others}; {readable(missing)} are missing ({readable(kept)} stay free). {remedy()}"
        )

    def forget(self, reservation: Reservation) -> None:
        if reservation in self._reservations:
            self._reservations.remove(reservation)


def no_space(details: str) -> NoCapacity:
    """Give the error of a full disk. To try again helps only once somebody has made room."""
    return NoCapacity(details, code="no_space", title="No space", retryable=False)
