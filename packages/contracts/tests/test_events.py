"""Events round-trip, and what a newer peer says never breaks this version."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_contracts.events import (
    EVENTS,
    Chunk,
    ExecuteComplete,
    Narration,
    Token,
    TokenData,
    decode_event,
    encode_event,
    event_type,
)
from rbee_contracts.operations import OPERATIONS
from rbee_contracts.results import RESULTS

JOB_ID = "job-00000000-0000-4000-8000-000000000001"
COMMON: dict[str, Any] = {
    "message": 'Text with "quotes", \u2028, \x00 and \U0001f41d.\n',
    "actor": "worker/w1",
    "job_id": JOB_ID,
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TIMINGS = {"queue_ms": 0.5, "prefill_ms": 1.0, "decode_ms": 2.0, "ttft_ms": 1.5, "tokens_per_second": 9.0}
DATA: dict[str, Any] = {
    "infer_schedule": {
        "model": "m",
        "hive_id": "h",
        "worker_id": "w",
        "reason": "least loaded",
        "candidates": [{"hive_id": "h", "worker_id": "w", "model": "m", "score": None, "reason": "full"}],
    },
    "infer_worker": {"hive_id": "h", "worker_id": "w", "port": 9300},
    "infer_complete": {"usage": USAGE, "finish_reason": "stop", "timings": TIMINGS, "stop_reason": 7},
    "openai_response": {"status": 200, "content_type": "text/event-stream", "stream": True},
    "worker_spawn_complete": {"worker_id": "w", "pid": 7, "port": 9300, "model": "m", "devices": [0]},
    "model_download_progress": {
        "model": "m",
        "bytes_done": 1,
        "bytes_total": None,
        "rate": 1.0,
        "eta_s": None,
        "files_done": 1,
        "files_total": 2,
        "current": [{"path": "a.bin", "bytes_done": 1, "bytes_total": None}],
    },
    "token": {"choice": 1, "logprobs": [[{"token_id": 1, "token": "a", "logprob": -0.5}]]},
    "chunk": {"choices": [{"delta": {"content": "é"}}]},
    "execute_complete": {"anything": [1, None]},
    "warning": {"field": "max_token"},
}
OWN: dict[str, dict[str, Any]] = {
    "error": {"code": "worker_lost", "retryable": True},
    "token": {"index": 3},
    "chunk": {"index": 0},
    "execute_error": {"code": "worker_lost"},
    "execute_cancelled": {"code": "not_read"},
    "execute_timeout": {"code": "timeout"},
}


def fields_of(action: str) -> dict[str, Any]:
    fields = COMMON | {"action": action} | OWN.get(action, {})
    if "formatted" in EVENTS[action].__struct_fields__:
        fields["formatted"] = "[worker/w1] Text."
    if action in DATA:
        fields["data"] = DATA[action]
    return fields


@pytest.mark.parametrize("action", sorted(EVENTS))
@pytest.mark.parametrize("extra", [{}, {"event_id": "3-4", "repeated": True}], ids=["plain", "with id"])
def test_every_event_round_trips(action: str, extra: dict[str, Any]) -> None:
    fields = fields_of(action) | extra
    event = decode_event(msgspec.json.encode(fields))

    assert type(event) is EVENTS[action] is event_type(action)
    assert event.action == action
    assert msgspec.json.decode(encode_event(event)) == fields
    assert decode_event(encode_event(event)) == event


@pytest.mark.parametrize("action", sorted(EVENTS))
def test_unknown_fields_of_a_newer_peer_are_ignored(action: str) -> None:
    fields = fields_of(action)

    assert decode_event(msgspec.json.encode(fields | {"from_the_future": [{"x": 1}]})) == decode_event(
        msgspec.json.encode(fields)
    )


def test_each_kind_is_what_the_design_says() -> None:
    outputs = {action for action, kind in EVENTS.items() if kind.kind == "output"}
    terminals = {action for action, kind in EVENTS.items() if kind.kind == "terminal"}

    assert outputs == {"token", "chunk"}
    assert terminals == {"execute_complete", "execute_error", "execute_cancelled", "execute_timeout"}


def test_an_unknown_action_decodes_as_narration() -> None:
    event = decode_event(msgspec.json.encode(COMMON | {"action": "worker_dreams", "data": {"of": "sheep"}}))

    assert isinstance(event, Narration)
    assert (event.action, event.kind, event.data) == ("worker_dreams", "narration", {"of": "sheep"})


def test_no_free_narration_passes_for_a_terminal_event() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(msgspec.json.encode(COMMON | {"action": "execute_error"}))


@pytest.mark.parametrize("name", sorted(COMMON))
@pytest.mark.parametrize("action", ["token", "free_narration"])
def test_an_event_without_a_common_field_is_refused(name: str, action: str) -> None:
    fields = {key: value for key, value in COMMON.items() if key != name} | {"action": action, "index": 0}

    with pytest.raises(msgspec.DecodeError):
        decode_event(msgspec.json.encode(fields))


def test_a_chunk_keeps_its_raw_bytes() -> None:
    raw = b'{"b":1, "a" : 1.50e0}'
    event = Chunk(**COMMON, index=0, data=msgspec.Raw(raw))
    decoded = decode_event(encode_event(event))

    assert raw in encode_event(event)
    assert isinstance(decoded, Chunk)
    assert bytes(decoded.data) == raw


def test_a_plain_token_carries_nothing_it_does_not_need() -> None:
    assert set(msgspec.json.decode(encode_event(Token(**COMMON, index=0)))) == {*COMMON, "action", "index"}
    assert b"choice" not in encode_event(Token(**COMMON, index=0, data=TokenData()))


@given(text=st.text())
def test_any_text_goes_through_a_token_on_one_line(text: str) -> None:
    body = encode_event(Token(**(COMMON | {"message": text}), index=0))

    assert b"\n" not in body
    assert b"\r" not in body
    assert decode_event(body).message == text


@given(data=st.binary() | st.text().map(str.encode))
def test_any_bytes_give_an_event_or_a_decode_error(data: bytes) -> None:
    try:
        event = decode_event(data)
    except msgspec.DecodeError:
        return
    assert event.action


@pytest.mark.parametrize(
    "data",
    [
        b'{"action":"token","message":"\xff"}',
        b'{"action":"\xff"}',
        b"[" * 100_000,
        b'{"action":"free","data":' + b"[" * 100_000,
        b'{"action":"token","x":' + b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:30]),
)
def test_hostile_bytes_are_a_decode_error(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_event(data)


def test_results_are_of_operations_and_decode() -> None:
    assert set(RESULTS) <= set(OPERATIONS.values())
    for kind in RESULTS.values():
        msgspec.json.schema(kind)
    assert ExecuteComplete(**COMMON, formatted="").data is None
