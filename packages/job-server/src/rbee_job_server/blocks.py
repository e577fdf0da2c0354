"""Older events of a log, folded: a run of plain tokens is one text with offsets, not a frame for each.

The frames of such a run differ in message, id, index and timestamp alone. They are cut into these parts,
and put together again, the same to the byte, for the reader that comes back for them.
"""

import itertools
import operator
import time
from array import array
from collections.abc import Iterator, Sequence
from datetime import datetime

from msgspec import Struct

from rbee_contracts.sse import Position

BLOCK_EVENTS = 256
"""Events that are folded at a time. A log keeps its newest one to two blocks as they are."""

MIN_RUN = 8
"""Shorter runs of tokens stay as they are: a run has a cost of its own."""

ENTRY_BYTES = 160
"""What keeping a frame costs besides its bytes: the objects around it."""

RUN_BYTES = 600
"""What keeping a run costs besides its tokens."""

_TOKEN = b'{"action":"token","message":"'
_HEAD = b"id: %d-%d\ndata: " + _TOKEN
_ACTOR = b'","actor":"'
_END = b'Z","index":%d}\n\n'
_FRAME = _HEAD + b"%b%b%b%06d" + _END
_SECOND_BYTES = len("2026-01-01T00:00:00.")
_MICROS_BYTES = len("000000")
_TIME_BYTES = _SECOND_BYTES + _MICROS_BYTES


class Entry(Struct, frozen=True, gc=False):
    """One event as it goes out on the job's stream, and where it stands. A replaced one has no frame.

    There is one for each token, so it is kept out of the garbage collector's rounds.
    """

    narrations: int
    outputs: int
    is_output: bool
    frame: bytes

    @property
    def seq(self) -> int:
        """Its place among all events of the log, from 1."""
        return self.narrations + self.outputs

    @property
    def size(self) -> int:
        return len(self.frame) + ENTRY_BYTES

    def is_new_to(self, had: Position) -> bool:
        """Whether a reader who has had all up to `had` has not had this."""
        return self.outputs > had.outputs if self.is_output else self.narrations > had.narrations


class TokenRun:
    """Tokens in a row that have everything in common but text, time and number."""

    __slots__ = ("_common", "_ends", "_first", "_narrations", "_text", "_times")

    def __init__(
        self, narrations: int, first: int, common: bytes, texts: Sequence[bytes], times: "array[int]"
    ) -> None:
        self._narrations = narrations
        self._first = first
        self._common = common  # from behind the text up to the time
        self._text = b"".join(texts)  # as it stands in the JSON
        self._ends = array("I", itertools.accumulate(map(len, texts)))
        self._times = times  # microseconds of the epoch

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def seq(self) -> int:
        """Place of its first token."""
        return self._narrations + self._first

    @property
    def size(self) -> int:
        return len(self._text) + 12 * len(self) + RUN_BYTES

    def position_at(self, seq: int) -> Position:
        return Position(self._narrations, seq - self._narrations)

    def entries_after(self, seq: int) -> Iterator[Entry]:
        """Make the tokens after `seq` again, one at a time."""
        narrations, common, text = self._narrations, self._common, self._text
        ends, times = self._ends, self._times
        skipped = max(0, seq + 1 - self.seq)
        start = ends[skipped - 1] if skipped else 0
        second: int | None = None
        second_text = b""
        for at in range(skipped, len(ends)):
            if times[at] // 1_000_000 != second:
                second = times[at] // 1_000_000
                second_text = _second_text(second)
            outputs, end = self._first + at, ends[at]
            frame = _FRAME % (
                narrations,
                outputs,
                text[start:end],
                common,
                second_text,
                times[at] % 1_000_000,
                outputs - 1,
            )
            start = end
            yield Entry(narrations, outputs, True, frame)


class Block:
    """Events in a row, some of which may have been replaced. `before` is the place they follow."""

    __slots__ = ("_segments", "before", "last")

    def __init__(self, entries: Sequence[Entry], before: Position) -> None:
        self.before = before
        self.last = Position(entries[-1].narrations, entries[-1].outputs)
        self._segments: list[Entry | TokenRun] = list(fold(entries))

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self._segments)

    def entries_after(self, seq: int) -> Iterator[Entry]:
        for segment in self._segments:
            if isinstance(segment, Entry):
                if segment.seq > seq:
                    yield segment
            elif segment.seq + len(segment) - 1 > seq:
                yield from segment.entries_after(seq)

    def position_at(self, seq: int) -> Position:
        """Give the place of an event in this block, also of one that has been replaced."""
        known = self.before
        for segment in self._segments:
            if segment.seq > seq:
                break
            if isinstance(segment, Entry):
                known = Position(segment.narrations, segment.outputs)
            else:
                known = segment.position_at(min(seq, segment.seq + len(segment) - 1))
        # What is between is gone, and only narration is ever replaced.
        return Position(known.narrations + seq - sum(known), known.outputs)

    def drop(self, seq: int) -> int:
        """Forget the narration at `seq`; give its size."""
        at = next(at for at, segment in enumerate(self._segments) if segment.seq == seq)
        return self._segments.pop(at).size


def fold(entries: Sequence[Entry]) -> Iterator[Entry | TokenRun]:
    """Merge the runs of tokens among `entries`; leave out what has been replaced."""
    at = 0
    while at < len(entries):
        entry = entries[at]
        run = _run_at(entries, at) if entry.is_output else None
        if run is not None:
            yield run
            at += len(run)
        else:
            if entry.frame:
                yield entry
            at += 1


def _run_at(entries: Sequence[Entry], at: int) -> TokenRun | None:
    """Merge the tokens that stand at `at`; None where they are too few, or not of the plain form.

    A run ends where its ids get one more digit, so that all its texts begin at the same place.
    """
    narrations, first, frame = entries[at].narrations, entries[at].outputs, entries[at].frame
    text_at = len(_HEAD % (narrations, first))
    end = len(frame) - len(_END % (first - 1)) - _TIME_BYTES
    common = frame[frame.rfind(_ACTOR, text_at, max(0, end)) : max(0, end)]
    timed = b""  # `common` and the second
    second = 0
    texts: list[bytes] = []
    seconds: list[int] = []
    micros: list[bytes] = []
    most = 10 ** len(str(first)) - first
    for outputs, entry in enumerate(entries[at : at + most], first):
        frame = entry.frame
        tail = _END % (outputs - 1)
        end = len(frame) - len(tail) - _MICROS_BYTES
        if not timed or not frame.startswith(timed, end - len(timed)):
            timed = frame[max(0, end - _SECOND_BYTES - len(common)) : max(0, end)]
            found = _second_of(timed[-_SECOND_BYTES:]) if common and timed.startswith(common) else None
            if found is None:
                break
            second = found * 1_000_000
        if not (entry.is_output and frame.endswith(tail) and frame.startswith(_TOKEN, text_at - len(_TOKEN))):
            break
        texts.append(frame[text_at : end - len(timed)])
        seconds.append(second)
        micros.append(frame[end : end + _MICROS_BYTES])
    if len(texts) < MIN_RUN or not b"".join(micros).isdigit():
        return None
    times = array("q", map(operator.add, seconds, map(int, micros)))
    return TokenRun(narrations, first, common, texts, times)


def _second_of(text: bytes) -> int | None:
    """Read a time's part up to its point; None where it would not be written so again."""
    try:
        second = int(datetime.fromisoformat(f"{text[:-1].decode()}+00:00").timestamp())
    except ValueError:
        return None
    return second if _second_text(second) == text else None


def _second_text(second: int) -> bytes:
    return time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second)).encode()
