"""The event log of one job: what was said, in order, for any number of readers at any time."""

import asyncio
from typing import NamedTuple

from rbee_contracts.events import AnyEvent, encode_event
from rbee_contracts.sse import START, Position

DONE_FRAME = b"data: [DONE]\n\n"


class Entry(NamedTuple):
    """One event as it goes out on the job's stream, and where it stands."""

    narrations: int
    outputs: int
    is_output: bool
    frame: bytes


class EventLog:
    """Append-only; ends with one terminal event. Only the job that owns it appends.

    Readers never take anything away: each `LogReader` has its own place. `size` is in bytes of frames.
    """

    __slots__ = ("_entries", "_waiters", "closed", "narrations", "outputs", "size")

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self.narrations = 0
        self.outputs = 0
        self.size = 0
        self.closed = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def position(self) -> Position:
        return Position(self.narrations, self.outputs)

    def append(self, event: AnyEvent) -> bytes:
        """Add an event and wake the readers. Returns its JSON; a terminal event closes the log."""
        if self.closed:
            raise RuntimeError(f"event {event.action!r} after the terminal event of {event.job_id}")
        kind = event.kind
        body = encode_event(event)  # may raise: before anything is changed
        if kind == "output":
            self.outputs += 1
        else:
            self.narrations += 1
            self.closed = kind == "terminal"
        frame = b"id: %d-%d\ndata: %b\n\n" % (self.narrations, self.outputs, body)
        self._entries.append(Entry(self.narrations, self.outputs, kind == "output", frame))
        self.size += len(frame)
        if self._waiters:
            self._wake()
        return body

    def is_seen(self, position: Position) -> bool:
        """Whether a reader at `position` has had the whole of a closed log."""
        return self.closed and position.narrations >= self.narrations and position.outputs >= self.outputs

    def reader(self, position: Position = START) -> "LogReader":
        return LogReader(self, position)

    def entries_from(self, index: int) -> list[Entry]:
        return self._entries[index:]

    def index_of(self, position: Position) -> int | None:
        """Give the index after `position` where it is a place this log has been at, else None."""
        index = position.narrations + position.outputs
        if index == 0:
            return 0
        if index > len(self._entries):
            return None
        entry = self._entries[index - 1]
        return index if (entry.narrations, entry.outputs) == position else None

    async def changed(self) -> None:
        """Wait for the next append."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()


class LogReader:
    """A place in a log. Gives every event after it exactly once, then `[DONE]`.

    Narration and output are counted apart, so a reader whose position comes from another copy of the
    log (rebuilt after a loss, in another order, or longer than this one yet) still gets exactly what it
    has not had.
    """

    __slots__ = ("_index", "_log", "_position", "finished")

    def __init__(self, log: EventLog, position: Position) -> None:
        index = log.index_of(position)
        self._log = log
        self._index = index or 0
        self._position = None if index is not None else position
        self.finished = False

    def take(self) -> bytes:
        """Give all frames that are pending, in one piece; empty when there are none."""
        entries = self._log.entries_from(self._index)
        self._index += len(entries)
        if self._position is not None:
            n, i = self._position
            entries = [e for e in entries if (e.outputs > i if e.is_output else e.narrations > n)]
        frames = [entry.frame for entry in entries]
        if self._log.closed and not self.finished:
            self.finished = True
            frames.append(DONE_FRAME)
        return b"".join(frames)

    async def wait(self) -> None:
        """Wait until `take` may have something."""
        if self._index == len(self._log) and not self._log.closed:
            await self._log.changed()
