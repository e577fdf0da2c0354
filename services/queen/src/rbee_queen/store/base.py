"""The seam to the database."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from rbee_contracts.jobs import JobPage, JobRecord, JobState
from rbee_queen.store.records import Record, StoredHive, StoredJob

FORGET_AT_ONCE = 500
"""Jobs that one call of `forget` deletes at most."""


class StoreFailed(Exception):
    """The database cannot be opened, read or written; the message says why and what to do."""


RESTORED_BYTES = 64 * 2**20
"""Narration and results of ended jobs that a restarted queen takes into memory, newest first.

What is beyond it is in the history all the same, without a stream.
"""


class StoreState(Struct, frozen=True, kw_only=True):
    """What a database is. `newest` is the revision that this version of rbee makes.

    `folder` is where the file lies, None where the database is a server's.
    """

    kind: str
    version: str
    revision: str | None
    newest: str
    folder: Path | None


class JobStore(Protocol):
    """Keeps records. Blocking; one thread uses it at a time."""

    def open(self) -> None:
        """Connect, and bring the schema up to date.

        Raises:
            StoreFailed: it cannot be reached, belongs to a newer version, or another queen uses it.
        """

    def write(self, records: Sequence[Record]) -> None:
        """Write records in order, all or none; they survive a SIGKILL of the process once this returns.

        Writing a record again changes nothing. A record of a job that is not stored, or has ended, is
        passed over. The end of a job erases prompt and messages from its operation, which still decodes
        after that.

        Raises:
            StoreFailed: nothing was written; or, where the connection broke, all was or nothing.
        """

    def hives(self) -> list[StoredHive]:
        """Give every hive, by id."""

    def unfinished(self) -> list[StoredJob]:
        """Give every job that has not ended, by seq, with events and steps."""

    def finished_since(self, finished_at: str, *, max_bytes: int = RESTORED_BYTES) -> list[StoredJob]:
        """Give the jobs that ended at or after a time (as `Clock.timestamp` writes it), by seq, with
        events (the terminal one is the last) and steps.

        Those that ended last come first, as far as their events and results have `max_bytes` together.
        """

    def last_seq(self) -> int:
        """Give the highest seq ever used, by forgotten jobs too; 0 in an empty store."""

    def get(self, job_id: str) -> JobRecord | None:
        """Give a job's record."""

    def page(
        self, *, state: JobState | None, operation: str | None, limit: int, before_seq: int | None
    ) -> JobPage:
        """Give up to `limit` records with a smaller seq than `before_seq`, newest first.

        `next_cursor` is the seq of the last one shown, where there are more.
        """

    def forget(self, *, finished_before: str, keep: int) -> int:
        """Delete jobs that ended before a time, and all but the `keep` that ended last; say how many.

        At most `FORGET_AT_ONCE` in one call, oldest first, so that no write waits long: call again until
        it gives 0. With that call what was erased leaves the files of the database too.
        """

    def check(self) -> StoreState:
        """Write something that changes nothing, and say what the database is.

        Raises:
            StoreFailed: it cannot be used.
        """

    def close(self) -> None:
        """Let go of the database."""
