"""The trace context: what W3C allows is taken, and everything else is as if nothing had been sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_contracts.trace import MAX_TRACESTATE_CHARS, TraceContext, parse_trace

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"


def test_what_is_taken_is_what_is_sent_on() -> None:
    trace = parse_trace(GOOD, "vendor=1,other=2")

    assert trace == TraceContext(GOOD, "vendor=1,other=2")
    assert trace.headers == {"traceparent": GOOD, "tracestate": "vendor=1,other=2"}
    assert TraceContext(GOOD).headers == {"traceparent": GOOD}


def test_of_a_newer_version_the_part_is_taken_that_all_have() -> None:
    assert parse_trace(f"01-{TRACE}-{SPAN}-00-and-more") == TraceContext(f"00-{TRACE}-{SPAN}-00")
    assert parse_trace(f"cc-{TRACE}-{SPAN}-01") == TraceContext(GOOD)


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("nothing", ""),
        ("no trace", f"00-{'0' * 32}-{SPAN}-01"),
        ("no span", f"00-{TRACE}-{'0' * 16}-01"),
        ("the version that none has", f"ff-{TRACE}-{SPAN}-01"),
        ("more than version 00 has", f"{GOOD}-more"),
        ("capitals", GOOD.upper()),
        ("short", GOOD[:-1]),
        ("a line break", f"{GOOD}\n"),
        ("a blank", f" {GOOD}"),
    ],
)
def test_what_is_malformed_is_not_taken(what: str, given: str) -> None:
    assert parse_trace(given, "a=b") is None, what


@pytest.mark.parametrize("state", ["", "a" * (MAX_TRACESTATE_CHARS + 1), "a=é", "a=\r\nb"])
def test_a_state_that_cannot_be_sent_on_is_dropped_alone(state: str) -> None:
    assert parse_trace(GOOD, state) == TraceContext(GOOD)


@given(st.text(max_size=80), st.none() | st.text(max_size=40))
def test_whatever_comes_is_taken_or_not(traceparent: str, tracestate: str | None) -> None:
    trace = parse_trace(traceparent, tracestate)

    assert trace is None or all(value.isascii() and value.isprintable() for value in trace.headers.values())
