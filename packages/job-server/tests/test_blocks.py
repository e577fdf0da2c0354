"""Folding: it changes what a log takes in memory, and not one byte of what its readers get."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.events import (
    AnyEvent,
    Chunk,
    DownloadProgress,
    ExecuteComplete,
    ModelDownloadProgress,
    Narration,
    Token,
    TokenData,
    encode_event,
)
from rbee_contracts.sse import START, Position
from rbee_job_server.blocks import BLOCK_EVENTS, MIN_RUN, Entry, TokenRun, fold
from rbee_job_server.event_log import DONE_FRAME, MAX_LOG_BYTES, WRITE_BYTES, EventLog

COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "job_id": "job-00000000-0000-4000-8000-000000000000",
    "correlation_id": "corr-1",
}
NOW = "2026-01-01T00:00:00.000000Z"
END = ExecuteComplete(message="end", formatted="", timestamp=NOW, **COMMON)

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(
        [
            "",
            '"',
            "\\",
            '\\"',
            "\u2028",
            "\r\n",
            "\ufeff",
            "\0",
            "🦀",
            "data: x",
            "\n\n",
            '","actor":"x',
            "id: 1-1",
        ]
    ),
)
TIMES = st.one_of(
    st.sampled_from(
        [NOW, "2026-01-01T00:00:00.999999Z", "2026-01-01T00:00:01.000001Z", "1969-12-31T23:59:59.999999Z"]
    ),
    # Times that are not of the form which we write must come back as they were, too.
    st.sampled_from(
        [
            "",
            "now",
            "2026-01-01T00:00:00Z",
            "2026-01-01T00:00:00.00 001Z",
            "2026-01-01T00:00:00.+00001Z",
            "2026-01-01T24:00:00.000000Z",
            "2026-01-01 00:00:00.000000Z",
            "2026-W01-4T00:00:00.000000Z",
            "0001-01-01T00:00:00.000000Z",
            "9999-12-31T23:59:60.000000Z",
            "٢٠٢٦-01-01T00:00:00.000000Z",
        ]
    ),
)


def token(text: str, index: int, **fields: Any) -> Token:
    return Token(message=text, index=index, **{"timestamp": NOW} | COMMON | fields)


class _Maker:
    """Makes the events of one log: each knows the index it ought to have."""

    def __init__(self) -> None:
        self.outputs = 0

    def make(self, kind: str, text: str, time: str, actor: str) -> list[AnyEvent]:
        fields = COMMON | {"timestamp": time, "actor": actor}
        progress = DownloadProgress(model=actor, bytes_done=0, bytes_total=None, rate=1.0, eta_s=None)
        match kind:
            case "tokens":
                return [self._token(text, fields) for _ in range(MIN_RUN + 3)]
            case "token":
                return [self._token(text, fields)]
            case "token with data":
                return [self._token(text, fields | {"data": TokenData(choice=1)})]
            case "repeated token":
                return [self._token(text, fields | {"repeated": True})]
            case "token out of order":
                return [msgspec.structs.replace(self._token(text, fields), index=7)]
            case "chunk":
                self.outputs += 1
                return [Chunk(message="", index=self.outputs - 1, data=msgspec.Raw(b'{"x":1}'), **fields)]
            case "progress":
                return [ModelDownloadProgress(message=text, formatted="", data=progress, **fields)]
        return [Narration(action="said", message=text, **fields)]

    def _token(self, text: str, fields: dict[str, Any]) -> Token:
        self.outputs += 1
        return Token(message=text, index=self.outputs - 1, **fields)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "tokens",
                "tokens",
                "token",
                "token with data",
                "repeated token",
                "token out of order",
                "chunk",
                "progress",
                "progress",
                "narration",
            ]
        ),
        TEXTS,
        TIMES,
        st.sampled_from(["worker/w1", "hive/h1"]),
    ),
    max_size=14,
)


def read(log: EventLog, position: Position, write_bytes: int = WRITE_BYTES) -> list[bytes]:
    reader = log.reader(position, write_bytes=write_bytes)
    return list(iter(reader.take, b""))


@settings(max_examples=200, deadline=None)
@given(
    EVENTS, st.sampled_from([1, 2, MIN_RUN, 2 * MIN_RUN, 40]), st.sampled_from([1, 700, 2**18]), st.booleans()
)
def test_a_folded_log_reads_as_one_that_keeps_all(
    kinds: list[tuple[str, str, str, str]], block_events: int, write_bytes: int, is_ended: bool
) -> None:
    folded, kept = EventLog(block_events), EventLog(10**9)
    maker = _Maker()
    events = [event for kind in kinds for event in maker.make(*kind)] + [END] * is_ended
    places = [START]
    for event in events:
        body = encode_event(event)
        assert folded.append(event, body) == kept.append(event) == body
        places.append(folded.position)
    elsewhere = [Position(n + 1, i) for n, i in places] + [Position(n, i + 1) for n, i in places]

    for place in {*places, *elsewhere}:
        pieces = read(folded, place, write_bytes)
        assert b"".join(pieces) == b"".join(read(kept, place))
        for piece in pieces:
            frames = piece.count(b"\n\n")
            assert len(piece) <= write_bytes + len(DONE_FRAME) or frames == 1 or piece.endswith(DONE_FRAME)
    assert folded.size >= 0
    assert folded.is_seen(folded.position) is is_ended


def test_a_run_of_tokens_is_merged_and_goes_on_across_seconds() -> None:
    log = EventLog(10**9)
    for index in range(40):
        log.append(token(f"t{index}", index, timestamp=f"2026-01-01T00:00:{index:02d}.{index * 7:06d}Z"))
    entries = list(log.entries_after(0))

    folded = list(fold(entries))

    # Ids of one, and of two digits.
    assert [len(run) if isinstance(run, TokenRun) else 0 for run in folded] == [9, 31]
    assert [made for run in folded for made in run.entries_after(0)] == entries  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, MIN_RUN - 1])
def test_few_tokens_stay_as_they_are(count: int) -> None:
    log = EventLog(10**9)
    for index in range(count):
        log.append(token("t", index))

    assert all(isinstance(segment, Entry) for segment in fold(list(log.entries_after(0))))


def test_a_merged_token_takes_its_text_and_less_than_thirty_bytes() -> None:
    log = EventLog()
    count = 100 * BLOCK_EVENTS
    for index in range(count):
        log.append(token("text", index))
    tail = sum(entry.size for entry in log.entries_after(count - BLOCK_EVENTS + 1)) * 2

    assert log.size - tail < count * (len("text") + 30)


def test_a_download_of_any_length_takes_no_more_memory() -> None:
    log, sizes = EventLog(8), []
    for index in range(1000):
        data = DownloadProgress(model="m", bytes_done=index, bytes_total=None, rate=1.0, eta_s=None)
        log.append(
            ModelDownloadProgress(message=f"{index:9}", formatted="", data=data, timestamp=NOW, **COMMON)
        )
        sizes.append(log.size)

    assert max(sizes[100:]) <= max(sizes[:100]) + 10
    (body,) = read(log, START)
    assert body.startswith(b"id: 1000-0\n")


def test_progress_that_was_folded_is_replaced_all_the_same() -> None:
    log = EventLog(2)

    def progress(model: str, done: int) -> ModelDownloadProgress:
        data = DownloadProgress(model=model, bytes_done=done, bytes_total=None, rate=1.0, eta_s=None)
        return ModelDownloadProgress(message=model, formatted="", data=data, timestamp=NOW, **COMMON)

    log.append(progress("a", 1))
    log.append(progress("b", 1))
    for index in range(9):
        log.append(token("x", index))
    log.append(progress("a", 2))

    frames = b"".join(read(log, START)).split(b"\n\n")
    assert [frame.split(b"\n")[0] for frame in frames if b'"bytes_done"' in frame] == [b"id: 2-0", b"id: 3-9"]
    # Whoever had the one that is gone goes on behind it.
    assert b"".join(read(log, Position(1, 0))).startswith(b"id: 2-0\n")


def test_a_reader_never_builds_more_than_one_write() -> None:
    log = EventLog()
    for index in range(20_000):
        log.append(token("text", index))

    pieces = read(log, START)
    assert max(map(len, pieces)) <= WRITE_BYTES
    assert len(pieces) > 1
    assert b"".join(pieces).count(b"\n\n") == 20_000


def test_an_event_larger_than_a_write_comes_alone_and_is_not_copied() -> None:
    log = EventLog()
    for index, text in enumerate(["a", "x" * 2 * WRITE_BYTES, "b"]):
        log.append(token(text, index))
    log.append(END)

    pieces = read(log, START)
    assert [piece.count(b"\n\n") for piece in pieces] == [1, 1, 3]
    assert any(pieces[1] is entry.frame for entry in log.entries_after(0))


def test_room_is_what_is_left_of_the_bound() -> None:
    log = EventLog()
    assert log.has_room(b"x" * MAX_LOG_BYTES)
    log.append(token("a", 0))
    assert not log.has_room(b"x" * MAX_LOG_BYTES)
    assert log.has_room(b"x" * (MAX_LOG_BYTES - log.size))
