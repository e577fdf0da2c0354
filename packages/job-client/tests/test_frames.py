"""Splitting the firehose's bytes: the same events, wherever the network cuts them."""

import itertools
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee_contracts.events import AnyEvent, Narration, Token, encode_event
from rbee_contracts.ids import new_job_id
from rbee_job_client import frames
from rbee_job_client.frames import FirehoseParser

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
PING = b": ping\n\n"


def token(text: str, number: int = 0) -> Token:
    return Token(message=text, index=number, event_id=f"1-{number + 1}", **COMMON)


def frame(event: AnyEvent, seq: int) -> bytes:
    return b"id: ab12-%d\ndata: %b\n\n" % (seq, encode_event(event))


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
