"""The event log of one job: what was said, in order, for any number of readers at any time."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator

import msgspec

from rbee_contracts.errors import RbeeError
from rbee_contracts.events import AnyEvent, ModelDownloadProgress, encode_event
from rbee_contracts.sse import START, Position
from rbee_job_server.blocks import BLOCK_EVENTS, ENTRY_BYTES, Block, Entry

DONE_FRAME = b"data: [DONE]\n\n"

MAX_LOG_BYTES = 16 * 2**20
"""Memory bound of one log. An event that would go past it ends the job instead (`output_too_large`)."""

WRITE_BYTES = 256 * 2**10
"""Most that a reader is given at once, and that its connection takes at once: a reader that stalls holds
about two of these besides the kernel's own buffers."""


class OutputTooLarge(RbeeError):
    """The job has said more than its log may hold."""

    title = "Output too large"
    default_code = "output_too_large"


class EventLog:
    """Append-only; ends with one terminal event. Only the job that owns it appends.

    Readers never take anything away: each `LogReader` has its own place. The newest events are kept as
    the frames they go out as; older ones are folded into blocks, which a reader does not notice. A
    progress event replaces the one before it; its place stays, so that whoever has had it goes on there.
    `size` is what all of it takes in memory, in bytes.
    """

    __slots__ = (
        "_block_events",
        "_blocks",
        "_folded",
        "_listeners",
        "_progress",
        "_tail",
        "closed",
        "narrations",
        "outputs",
        "size",
    )

    def __init__(self, block_events: int = BLOCK_EVENTS) -> None:
        self._block_events = block_events
        self._blocks: list[Block] = []
        self._folded = 0  # events in blocks
        self._tail: list[Entry] = []
        self._progress: dict[tuple[str, str], int] = {}
        self._listeners: dict[Callable[[], None], None] = {}
        self.narrations = 0
        self.outputs = 0
        self.size = 0
        self.closed = False

    def __len__(self) -> int:
        """Give how many events were said, replaced ones too."""
        return self.narrations + self.outputs

    @property
    def position(self) -> Position:
        return Position(self.narrations, self.outputs)

    @property
    def newest_frame(self) -> bytes:
        """The newest event, of a log that has one: the newest is never folded or replaced."""
        return self._tail[-1].frame

    def append(self, event: AnyEvent, body: bytes | None = None) -> bytes:
        """Add an event and wake the readers. Returns its JSON; a terminal event closes the log.

        Args:
            body: the event's JSON, where it is known already.
        """
        if self.closed:
            raise RuntimeError(f"event {event.action!r} after the terminal event of {event.job_id}")
        kind = event.kind
        if body is None:
            body = encode_event(event)  # may raise: before anything is changed
        if kind == "output":
            self.outputs += 1
        else:
            self.narrations += 1
            self.closed = kind == "terminal"
            if isinstance(event, ModelDownloadProgress):
                self._replace(event)
        self._add(kind == "output", b"id: %d-%d\ndata: %b\n\n" % (self.narrations, self.outputs, body))
        return body

    def append_output(self, body: bytes) -> None:
        """Add output of which there is nothing but its JSON, which must be right for this place."""
        self.outputs += 1
        self._add(True, b"id: %d-%d\ndata: %b\n\n" % (self.narrations, self.outputs, body))

    def _add(self, is_output: bool, frame: bytes) -> None:
        tail = self._tail
        tail.append(Entry(self.narrations, self.outputs, is_output, frame))
        self.size += len(frame) + ENTRY_BYTES
        if len(tail) == 2 * self._block_events:
            self._fold()
        for tell in self._listeners:
            tell()

    def has_room(self, body: bytes) -> bool:
        """Whether an event with this JSON still fits."""
        return self.size + len(body) <= MAX_LOG_BYTES

    def is_seen(self, position: Position) -> bool:
        """Whether a reader at `position` has had the whole of a closed log."""
        return self.closed and position.narrations >= self.narrations and position.outputs >= self.outputs

    def reader(self, position: Position = START, *, write_bytes: int = WRITE_BYTES) -> "LogReader":
        return LogReader(self, position, write_bytes)

    def has_been_at(self, position: Position) -> bool:
        """Whether `position` is a place that this log has been at."""
        seq = sum(position)
        if not 0 < seq <= len(self):
            return seq == 0
        if seq > self._folded:
            entry = self._tail[seq - self._folded - 1]
            return (entry.narrations, entry.outputs) == position
        return self._blocks[(seq - 1) // self._block_events].position_at(seq) == position

    def folded_before(self, position: Position) -> int:
        """Give how many of the first events, in whole blocks, a reader at `position` has had for sure."""
        n, i = position
        blocks = itertools.takewhile(lambda b: b.last.narrations <= n and b.last.outputs <= i, self._blocks)
        return self._block_events * sum(1 for _ in blocks)

    def entries_after(self, seq: int) -> Iterable[Entry]:
        """Give what follows the first `seq` events; what is folded is made again only as it is asked for."""
        if seq >= self._folded:
            return self._tail[seq - self._folded :]
        return self._replay(seq)

    def _replay(self, seq: int) -> Iterator[Entry]:
        while seq < self._folded:
            number = seq // self._block_events
            yield from self._blocks[number].entries_after(seq)
            seq = (number + 1) * self._block_events
        yield from self._tail

    def subscribe(self, on_append: Callable[[], None]) -> None:
        """Have `on_append` called at every append, from within it: it may only note it, or schedule."""
        self._listeners[on_append] = None

    def unsubscribe(self, on_append: Callable[[], None]) -> None:
        del self._listeners[on_append]

    async def changed(self) -> None:
        """Wait for the next append."""
        waiter = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self.subscribe(wake)
        try:
            await waiter
        finally:
            self.unsubscribe(wake)

    def _fold(self) -> None:
        oldest = self._tail[: self._block_events]
        del self._tail[: self._block_events]
        block = Block(oldest, self._blocks[-1].last if self._blocks else START)
        self._blocks.append(block)
        self._folded += len(oldest)
        self.size += block.size - sum(entry.size for entry in oldest)

    def _replace(self, event: ModelDownloadProgress) -> None:
        """Drop the progress before `event`, which is about to become the newest in the log."""
        key = (event.actor, event.data.model)
        seq = self._progress.get(key)
        self._progress[key] = len(self)
        if seq is None:
            return
        if seq <= self._folded:
            self.size -= self._blocks[(seq - 1) // self._block_events].drop(seq)
        else:
            at = seq - self._folded - 1
            self.size -= len(self._tail[at].frame)
            self._tail[at] = msgspec.structs.replace(self._tail[at], frame=b"")


class LogReader:
    """A place in a log. Gives every event after it exactly once, then `[DONE]`.

    Narration and output are counted apart, so a reader whose position comes from another copy of the
    log (rebuilt after a loss, in another order, or longer than this one yet) still gets exactly what it
    has not had.
    """

    __slots__ = ("_had", "_log", "_seq", "_write_bytes", "finished")

    def __init__(self, log: EventLog, position: Position, write_bytes: int) -> None:
        self._log = log
        self._write_bytes = write_bytes
        self.finished = False
        if log.has_been_at(position):
            self._seq = sum(position)
            self._had: Position | None = None
        else:
            self._seq = log.folded_before(position)
            self._had = position

    def take(self) -> bytes:
        """Give what is pending, at most `WRITE_BYTES` or one event; empty when there is nothing."""
        log, had = self._log, self._had
        if had is None and not log.closed and self._seq + 1 == len(log):
            # As good as always: one event has come since. It cannot be a replaced one.
            self._seq += 1
            return log.newest_frame
        frames: list[bytes] = []
        room = self._write_bytes
        for entry in log.entries_after(self._seq):
            frame = entry.frame
            if frame and (had is None or entry.is_new_to(had)):
                if frames and len(frame) > room:
                    break
                frames.append(frame)
                room -= len(frame)
            self._seq = entry.seq
        else:
            if log.closed and not self.finished and room > 0:
                self.finished = True
                frames.append(DONE_FRAME)
        return b"".join(frames)

    @property
    def is_up_to_date(self) -> bool:
        """Whether all that is in the log was taken, and more may come."""
        return self._seq == len(self._log) and not self._log.closed

    async def wait(self) -> None:
        """Wait until `take` may have something."""
        if self.is_up_to_date:
            await self._log.changed()

    def subscribe(self, on_append: Callable[[], None]) -> None:
        """See `EventLog.subscribe`."""
        self._log.subscribe(on_append)

    def unsubscribe(self, on_append: Callable[[], None]) -> None:
        self._log.unsubscribe(on_append)
