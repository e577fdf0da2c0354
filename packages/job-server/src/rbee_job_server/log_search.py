"""The log lines of one request: kept in memory for a while, found again by correlation id.

A line belongs to a request that names its correlation id, or, where the engine has written it, the id that
the engine has for it: `<correlation id>-<job id>`.
"""

import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from rbee_contracts.nodes import LogLine
from rbee_contracts.operations import LogSearch

RING_CHARS = 8 * 2**20
"""Characters of lines that a service keeps of its own log; beyond it the oldest go first."""

MAX_TEXT_CHARS = 4000
"""Of one line that is told; the rest is cut."""

MAX_RESULT_BYTES = 4 * 2**20
"""Of all lines that are told at once, as JSON; beyond it the newest are. Well below what one job may say."""

_ORDER = {"debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 4}
_TEXT_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_KNOWN = ("timestamp", "service", "event", "level", "correlation_id")
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class LogRing:
    """The newest lines of this process's log, as JSON. Any thread may log; one searches."""

    def __init__(self, max_chars: int = RING_CHARS) -> None:
        self._max_chars = max_chars
        self._lines: deque[str] = deque()
        self._chars = 0
        self._lock = threading.Lock()
        self.has_dropped = False

    def __call__(self, _logger: object, _method: str, line: Any) -> str:
        """Keep a line and give it back: the last processor of structlog's."""
        self.keep(str(line))
        return str(line)

    def keep(self, line: str) -> None:
        """Keep a line."""
        with self._lock:
            self._lines.append(line)
            self._chars += len(line)
            while self._chars > self._max_chars:
                self._chars -= len(self._lines.popleft())
                self.has_dropped = True

    def lines(self) -> list[str]:
        """Give all lines that are kept, oldest first."""
        with self._lock:
            return list(self._lines)

    @property
    def since(self) -> str | None:
        """The time of the oldest line that is kept."""
        return next((line.timestamp for text in self.lines()[:1] if (line := _of_json(text, ""))), None)


def find(texts: Iterable[str], op: LogSearch, *, service: str, now: datetime) -> Iterator[LogLine]:
    """Give the lines among `texts`, one process's in their order, that belong to a request.

    Args:
        service: who has written them, whatever they say of themselves: an engine writes what it likes.
        now: this machine's time, from which `since_s` counts back.
    """
    after = "" if op.since_s is None else _timestamp(now - timedelta(seconds=op.since_s))
    least = _ORDER[op.level]
    as_value = f'"{op.correlation_id}"'
    jobs_in = re.compile(rf"{re.escape(op.correlation_id)}-(job-[0-9a-f-]{{36}})").findall
    jobs: set[str] = set()
    last = ""
    for text in texts:
        is_json = text.startswith("{")
        if op.correlation_id not in text:
            if is_json:
                last = text
            continue
        # A short id is in many lines, and a request's id may be one that thousands have.
        is_of_engine = not jobs.isdisjoint(jobs_in(text))
        line = _of_json(text, service) if is_json and (is_of_engine or as_value in text) else None
        if line is not None:
            last = text
            if line.facts.pop("correlation_id", None) == op.correlation_id:
                jobs.add(str(line.facts.get("job_id")))
            elif not is_of_engine:
                continue
        elif is_of_engine:
            # The engine's clock is not told as ours is: it was after what we had logged before.
            before = _of_json(last, service)
            line = _of_text(text, service, "" if before is None else before.timestamp)
        else:
            continue
        if line.timestamp >= after and _ORDER.get(line.level, 1) >= least:
            yield line


def newest(lines: list[LogLine], limit: int, max_bytes: int = MAX_RESULT_BYTES) -> list[LogLine]:
    """Give lines in the order of their time, the newest only where there are too many."""
    lines = sorted(lines, key=lambda line: line.timestamp)
    size, kept = 0, 0
    for line in reversed(lines[-limit:]):
        size += len(msgspec.json.encode(line))
        if size > max_bytes:
            break
        kept += 1
    return lines[len(lines) - kept :]


def own_lines(ring: LogRing, op: LogSearch, service: str) -> list[LogLine]:
    """Give what this service itself has logged of a request, as far as it is kept."""
    return list(find(ring.lines(), op, service=service, now=datetime.now(UTC)))


def kept_since(ring: LogRing, service: str) -> str:
    """Say how far back this service's own lines go."""
    why = "older ones were dropped" if ring.has_dropped else "when it was started"
    return f"{service} has its own lines since {ring.since or 'now'}: {why}."


def _of_json(text: str, service: str) -> LogLine | None:
    try:
        values = _decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    event, timestamp = values.get("event"), values.get("timestamp")
    if not ("service" in values and isinstance(timestamp, str)):
        return None
    kept = {name: value for name, value in values.items() if name not in _KNOWN or name == "correlation_id"}
    return LogLine(
        timestamp=timestamp,
        service=service,
        level=str(values.get("level", "info")),
        event=str(event)[:MAX_TEXT_CHARS],
        facts=kept,
    )


def _of_text(text: str, service: str, timestamp: str) -> LogLine:
    level = _TEXT_LEVEL.search(text[:200])
    return LogLine(
        timestamp=timestamp,
        service=service,
        level="info" if level is None else level[1].lower(),
        event=text[:MAX_TEXT_CHARS],
    )


def _timestamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
