"""Workers' logs: their last lines, kept bounded, read as they grow."""

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from rbee_hive.config import LogLimits

TAIL_LINES = 20
TAIL_BYTES = 65_536

READ_BYTES = 65_536


def size(path: Path) -> int:
    """Give a log's length in bytes: 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tail(path: Path, lines: int = TAIL_LINES, *, since: int = 0) -> list[str]:
    """Give the last lines of a log that are not empty.

    Args:
        since: the offset before which lines belong to an earlier process.
    """
    try:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(since if since <= end else 0, end - TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def rotate(path: Path, limits: LogLimits) -> bool:
    """Move a log's lines aside once it is too long; True when that was done.

    The worker and its engine hold the file open and go on writing to it, at its end, so it is copied and cut
    and not renamed: lines written between the two are lost.
    """
    try:
        if path.stat().st_size < limits.bytes_each:
            return False
        for part in range(limits.parts, 1, -1):
            older = path.with_name(f"{path.name}.{part - 1}")
            if older.exists():
                older.rename(path.with_name(f"{path.name}.{part}"))
        if limits.parts:
            shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)
    except OSError:
        return False
    return True


class LogFolder:
    """The folder of the workers' logs, one for each, and how much is kept of them."""

    def __init__(self, folder: Path, limits: LogLimits) -> None:
        self._folder = folder
        self._limits = limits

    def path(self, worker_id: str) -> Path:
        return self._folder / f"{worker_id}.log"

    def rotate(self, worker_id: str) -> bool:
        """Move a worker's log aside once it is too long; True when that was done."""
        return rotate(self.path(worker_id), self._limits)

    def prune(self, living: Collection[str]) -> None:
        """Delete the oldest logs of workers that are gone, as far as they can be."""
        gone = [path for path in self._folder.glob("*.log") if path.stem not in living]
        gone.sort(key=_age, reverse=True)
        for path in gone[self._limits.workers :]:
            for part in (path, *path.parent.glob(f"{path.name}.*")):
                with suppress(OSError):
                    part.unlink()


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


class LogReader:
    """Reads a log from its last lines on, as it grows; a log that was moved aside is begun anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def last(self, lines: int) -> list[str]:
        """Give the last `lines` lines, and go on from there."""
        try:
            with self._path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                found = self._seek_back(log, end, lines)
        except OSError:
            return []
        self._offset = end
        *whole, self._rest = found.split(b"\n")
        return [_text(line) for line in whole[-lines:]] if lines else []

    def _seek_back(self, log: BinaryIO, end: int, lines: int) -> bytes:
        """Read from the end, a block at a time, until there are enough lines."""
        found, start = b"", end
        while start and found.count(b"\n") <= lines:
            start = max(0, start - READ_BYTES)
            log.seek(start)
            found = log.read(end - start - len(found)) + found
        return found

    def more(self) -> list[str]:
        """Give the whole lines that have come since."""
        try:
            with self._path.open("rb") as log:
                if log.seek(0, os.SEEK_END) < self._offset:
                    self._offset, self._rest = 0, b""
                log.seek(self._offset)
                new = log.read(READ_BYTES * 16)
        except OSError:
            return []
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [_text(line) for line in whole]


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r")
