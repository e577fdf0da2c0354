"""One request's log lines from one machine: the hive's own, and those in the logs of its workers."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import anyio
from anyio import to_thread

from rbee_contracts.nodes import LogLine, LogSearchResult
from rbee_contracts.operations import LogSearch
from rbee_job_server import Handlers, JobContext
from rbee_job_server.log_search import LogRing, find, kept_since, newest, own_lines

SEARCHED_BYTES = 512 * 2**20
"""Read of workers' logs for one search, the newest first; a few tenths of a second for each 100 MiB."""

SEARCHES_AT_ONCE = 2
"""Files that are read at a time, for all searches: requests need the threads and the processor too."""


class HiveLogs:
    """Executes `log_search` on this machine.

    Args:
        actor: this hive, as it names itself in its log.
        folder: where the workers' logs are, those of workers that are gone too.
    """

    def __init__(self, ring: LogRing, actor: str, folder: Path) -> None:
        self._ring = ring
        self._actor = actor
        self._folder = folder
        self._turn = anyio.CapacityLimiter(SEARCHES_AT_ONCE)

    def table(self) -> Handlers:
        return {LogSearch: self.search}

    async def search(self, op: LogSearch, _: JobContext) -> LogSearchResult:
        """Give the lines of one request, in the order of their time."""
        now = datetime.now(UTC)
        oldest = 0.0 if op.since_s is None else now.timestamp() - op.since_s
        notes = [kept_since(self._ring, self._actor)]
        lines = await to_thread.run_sync(own_lines, self._ring, op, self._actor, limiter=self._turn)
        left = SEARCHED_BYTES
        for path, size in await to_thread.run_sync(logs_since, self._folder, oldest, limiter=self._turn):
            left -= size
            if left < 0:
                notes.append(
                    f"{self._actor} has searched the newest {SEARCHED_BYTES >> 20} MiB of its workers' logs, "
                    "and not what is older."
                )
                break
            lines += await to_thread.run_sync(search_file, path, op, now, limiter=self._turn)
        kept = await to_thread.run_sync(newest, lines, op.limit, limiter=self._turn)
        if len(kept) < len(lines):
            notes.append(
                f"{self._actor} has left out the {len(lines) - len(kept)} oldest lines; see `limit`."
            )
        return LogSearchResult(correlation_id=op.correlation_id, lines=kept, notes=notes)


def logs_since(folder: Path, oldest: float) -> list[tuple[Path, int]]:
    """Give the logs that were written to after a time, parts that were moved aside too, the newest first."""
    found = []
    for path in folder.glob("*.log*"):
        try:
            stat = path.stat()
        except OSError:
            continue
        if stat.st_mtime >= oldest:
            found.append((stat.st_mtime, path, stat.st_size))
    return [(path, size) for _, path, size in sorted(found, reverse=True)]


def search_file(path: Path, op: LogSearch, now: datetime) -> list[LogLine]:
    """Give the lines of one request in one worker's log; none where it is gone meanwhile."""
    worker_id = path.name.partition(".log")[0]
    try:
        return list(find(_lines(path), op, service=f"worker/{worker_id}", now=now))
    except OSError:
        return []


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as log:
        for line in log:
            yield line.rstrip("\n")
