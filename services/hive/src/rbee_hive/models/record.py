"""What stands beside a downloaded model: where it came from, and what its files must be."""

import hashlib
import os
from pathlib import Path

import msgspec
from msgspec import Struct

RECORD_NAME = ".rbee.json"
"""In the model's folder, so that it comes, moves and goes with it."""

MAX_RECORD_BYTES = 16 * 2**20
HASH_CHUNK_BYTES = 8 * 2**20


class RecordedFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file as it was when it had been verified. Its sum counts while size and mtime are the same.

    `git_sha1` is the id under which the hub knows a file that is not in large file storage.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    git_sha1: str | None = None


class Record(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Written when a model is published. `revision` is the commit, None where the source had none."""

    model: str
    source: str
    revision: str | None = None
    downloaded_at: str = ""
    files: list[RecordedFile] = []


_decoder = msgspec.json.Decoder(Record)


def read_record(folder: Path) -> Record | None:
    """Give a model's record; None where it has none, or none that can be read."""
    try:
        with (folder / RECORD_NAME).open("rb") as file:
            return _decoder.decode(file.read(MAX_RECORD_BYTES))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def write_record(folder: Path, record: Record) -> None:
    """Write a model's record, durably."""
    with (folder / RECORD_NAME).open("wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        os.fsync(file.fileno())


class Sums:
    """The sums of one file, fed as it comes: SHA-256 always, and where asked for the SHA-1 of a git blob.

    Args:
        size: of the whole file, which a git blob's SHA-1 begins with.
        git: whether that is wanted; it takes as long again.
    """

    def __init__(self, size: int, *, git: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._git_sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else None

    def feed(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        if self._git_sha1 is not None:
            self._git_sha1.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def git_sha1(self) -> str | None:
        return self._git_sha1.hexdigest() if self._git_sha1 is not None else None
