"""One file per worker: what the next hive needs to take it up again, and to prove that it is ours."""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog
from msgspec import Struct

log = structlog.get_logger(__name__)

SUFFIX = ".json"


class WorkerRecord(Struct, frozen=True, kw_only=True):
    """What is written down of one worker. It holds the worker's token: mode 0600.

    `pid` is None from before its process is started until it is known; `nonce` finds the process all the
    same. `spawn_job_id` is the hive's job that asked for it. `log_offset`: where this process's lines begin.
    """

    worker_id: str
    model: str
    kind: str
    devices: list[int]
    args: list[str]
    port: int
    token: str
    nonce: str
    boot_id: str
    started_at: str
    pid: int | None = None
    pgid: int | None = None
    start_ticks: int | None = None
    spawn_job_id: str | None = None
    restarts: int = 0
    log_offset: int = 0
    has_been_ready: bool = False
    is_stopping: bool = False
    is_draining: bool = False
    reserved_bytes: int | None = None


_decoder = msgspec.json.Decoder(WorkerRecord)


class Records:
    """The folder of records. Each is written whole: a crash leaves the one before or the new one.

    Args:
        folder: made with the first record, readable for this user only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, record: WorkerRecord) -> None:
        """Write or replace a record, durably.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._path(record.worker_id)
        partial = path.with_suffix(".tmp")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def forget(self, worker_id: str) -> None:
        """Take a record away; one that is not there is no error."""
        self._path(worker_id).unlink(missing_ok=True)

    def read(self) -> Iterator[WorkerRecord]:
        """Give all records, by id. One that cannot be read is set aside under another name, and logged."""
        if not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            try:
                record = _decoder.decode(path.read_bytes())
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
                log.error("worker_record_unreadable", file=path.name, reason=str(exc))
                path.rename(path.with_suffix(".unreadable"))
                continue
            yield record

    def _path(self, worker_id: str) -> Path:
        return self._folder / f"{worker_id}{SUFFIX}"
