"""What the hive remembers of models between runs: sums it has computed, and when each was last used."""

import contextlib
import os
import threading
from pathlib import Path

import msgspec
from msgspec import Struct

LEDGER_NAME = "models.json"
MAX_SUMS = 50_000
"""Files whose sum is remembered; beyond it the oldest are computed again when they are asked for."""


class KnownSum(Struct, frozen=True):
    """The SHA-256 of a file, good for as long as its size and mtime stay."""

    size: int
    mtime_ns: int
    sha256: str


class _Stored(Struct):
    sums: dict[str, KnownSum] = {}
    used: dict[str, str] = {}


class Ledger:
    """Kept in one small file in the hive's state folder; without a folder, in memory. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / LEDGER_NAME if folder is not None else None
        self._lock = threading.Lock()
        self._stored = self._load()

    def _load(self) -> _Stored:
        """Read what is there. What cannot be read is only forgotten: all of it can be found out again."""
        if self._path is None:
            return _Stored()
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Stored)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _Stored()

    def sum_of(self, path: Path, size: int, mtime_ns: int) -> str | None:
        known = self._stored.sums.get(str(path))
        if known is None or (known.size, known.mtime_ns) != (size, mtime_ns):
            return None
        return known.sha256

    def learn(self, path: Path, size: int, mtime_ns: int, sha256: str) -> None:
        with self._lock:
            self._stored.sums.pop(str(path), None)
            self._stored.sums[str(path)] = KnownSum(size, mtime_ns, sha256)
            while len(self._stored.sums) > MAX_SUMS:
                del self._stored.sums[next(iter(self._stored.sums))]
            self._save()

    def last_used(self, model: str) -> str | None:
        return self._stored.used.get(model)

    def use(self, model: str, timestamp: str) -> None:
        with self._lock:
            self._stored.used[model] = timestamp
            self._save()

    def forget(self, model: str, folder: Path) -> None:
        """Drop what is known of a model that was deleted."""
        with self._lock:
            self._stored.used.pop(model, None)
            inside = f"{folder}/"
            for path in [
                path for path in self._stored.sums if path.startswith(inside) or path == str(folder)
            ]:
                del self._stored.sums[path]
            self._save()

    def _save(self) -> None:
        """Replace the file. One that cannot be written costs the memory between runs, nothing else."""
        if self._path is None:
            return
        fresh = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.encode(self._stored))
            os.replace(fresh, self._path)
