"""Splitting the firehose's bytes: the same events, wherever the network cuts them."""

import itertools
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.events import AnyEvent, Chunk, Narration, Token, decode_event, encode_event
from rbee_contracts.ids import new_job_id
from rbee_job_client import frames
from rbee_job_client.frames import FirehoseParser, decode_any_event

COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "job_id": new_job_id(),
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
HARD_TEXTS = [
    "\u2028\u2029\x85\x0b\x0c\x1c",
    "\r\n\r\n\n\ndata: x\n\nid: y\r",
    ": ping\n\n",
    "\U0001f41d" * 3,
    "",
    "\ufeff",
]
NULL = msgspec.Raw(b"null")
PING = b": ping\n\n"


def token(text: str, number: int = 0) -> Token:
    return Token(message=text, index=number, event_id=f"1-{number + 1}", **COMMON)


def frame(event: AnyEvent, seq: int) -> bytes:
    return b"id: ab12-%d\ndata: %b\n\n" % (seq, encode_event(event))


def on_firehose(event: AnyEvent, seq: int) -> bytes:
    """The frame as the firehose writes it: with the event's place, if it has one, first."""
    place = b'"event_id":"%b",' % event.event_id.encode() if event.event_id else b""
    fields = encode_event(msgspec.structs.replace(event, event_id=None))[1:]
    return b"id: ab12-%d\ndata: {%b%b\n\n" % (seq, place, fields)


def cut(body: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(bounds)]


texts = st.text(max_size=20) | st.sampled_from(HARD_TEXTS)


@settings(deadline=None)
@given(
    said=st.lists(texts, max_size=8), places=st.lists(st.integers(0, 5000), max_size=12), pings=st.booleans()
)
def test_any_chunking_gives_the_same_events(said: list[str], places: list[int], pings: bool) -> None:
    events = [token(text, number) for number, text in enumerate(said)]
    body = b"retry: 500\nid: ab12-0\n\n" + b"".join(
        frame(event, seq) + (PING if pings else b"") for seq, event in enumerate(events, 1)
    )
    parser = FirehoseParser()
    got = [event for chunk in cut(body, places) for event in parser.feed(chunk)]

    assert got == events
    assert parser.last_event_id == f"ab12-{len(events)}"
    assert parser.undecodable == 0


@settings(deadline=None)
@given(
    said=st.lists(texts | st.sampled_from(['","action":"', '{"event_id":"']), max_size=8),
    kinds=st.lists(st.sampled_from(["token", "chunk", "said"]), min_size=8, max_size=8),
    places=st.lists(st.integers(0, 5000), max_size=12),
)
def test_raw_output_is_the_same_events_whose_output_is_not_decoded_yet(
    said: list[str], kinds: list[str], places: list[int]
) -> None:
    events: list[AnyEvent] = []
    for number, (text, kind) in enumerate(zip(said, kinds, strict=False)):
        match kind:
            case "token":
                events.append(token(text, number))
            case "chunk":
                events.append(Chunk(message=text, index=number, event_id="1-1", data=NULL, **COMMON))
            case _:
                events.append(Narration(action="said", message=text, **COMMON))
    body = b"".join(on_firehose(event, seq) + PING for seq, event in enumerate(events, 1))
    parser = FirehoseParser()
    got = [event for chunk in cut(body, places) for event in parser.feed_raw(chunk)]

    assert [isinstance(event, bytes) for event in got] == [event.kind == "output" for event in events]
    assert [decode_event(event) if isinstance(event, bytes) else event for event in got] == events
    assert parser.last_event_id == (f"ab12-{len(events)}" if events else None)


@pytest.mark.parametrize(
    ("action", "data"),
    [("infer_schedule", {"because": "a newer queen"}), ("model_download_progress", 7), ("warning", [])],
)
def test_narration_of_a_newer_version_is_free_narration(action: str, data: Any) -> None:
    """Dropped here, it was missed, and reading the job's own stream for it failed the job."""
    event = Narration(action=action, message="Hi.", formatted="[x] Hi.", data=data, **COMMON)
    parser = FirehoseParser()

    assert parser.feed(frame(event, 1)) == parser.feed_raw(frame(event, 2)) == [event]
    assert parser.undecodable == 0


@pytest.mark.parametrize("action", ["execute", "error", "execute_error", "token", "chunk"])
def test_what_is_acted_on_is_never_taken_for_free_narration(action: str) -> None:
    event = Narration(action=action, message="Hi.", data=7, **COMMON)

    with pytest.raises(msgspec.ValidationError):
        decode_any_event(encode_event(event))


def test_every_single_byte_boundary() -> None:
    events = [token(text, number) for number, text in enumerate(HARD_TEXTS)]
    body = b"".join(frame(event, seq) for seq, event in enumerate(events, 1))
    for place in range(len(body) + 1):
        parser = FirehoseParser()
        assert parser.feed(body[:place]) + parser.feed(body[place:]) == events
    parser = FirehoseParser()
    assert [event for byte in body for event in parser.feed(bytes([byte]))] == events


def test_the_id_is_that_of_the_last_whole_frame() -> None:
    parser = FirehoseParser()
    whole, half = frame(token("a"), 1), frame(token("b"), 2)

    parser.feed(whole + half[:-1])
    assert parser.last_event_id == "ab12-1"
    parser.reset()
    assert parser.feed(half) == [token("b")]
    assert parser.last_event_id == "ab12-2"


def test_a_frame_with_an_id_and_no_data_is_a_place_to_resume_from() -> None:
    parser = FirehoseParser()

    assert parser.feed(b"retry: 500\nid: ab12-7\n\n") == []
    assert parser.last_event_id == "ab12-7"


def test_what_is_no_event_is_passed_over_and_counted() -> None:
    parser = FirehoseParser()
    body = b"".join(
        b"id: ab12-%d\ndata: %b\n\n" % (seq, data)
        for seq, data in enumerate(
            [b"{", b"[]", b'{"action":"token"}', b"\xff", b"[" * 100_000, b"[DONE]"], 1
        )
    )

    assert parser.feed(body + frame(token("a"), 9)) == [token("a")]
    assert parser.undecodable == 6
    assert parser.last_event_id == "ab12-9"


def test_an_event_of_a_newer_version_comes_through() -> None:
    parser = FirehoseParser()
    event = Narration(action="from_the_future", message="Hi.", **COMMON)

    assert parser.feed(frame(event, 1)) == [event]


def test_a_frame_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
    parser = FirehoseParser()

    parser.feed(b"x" * 1000)

    with pytest.raises(ValueError, match="longer than 1000"):
        parser.feed(b"x")


@settings(deadline=None)
@given(
    chunks=st.lists(
        st.binary(max_size=60) | st.sampled_from([b"\n\n", b"id: ", b"data: ", PING]), max_size=20
    )
)
def test_no_bytes_are_a_crash(chunks: list[bytes]) -> None:
    parser = FirehoseParser()
    for chunk in chunks:
        with suppress(ValueError):  # an id that is no text
            parser.feed(chunk)
    parser.reset()

    assert parser.feed(frame(token("a"), 1)) == [token("a")]
