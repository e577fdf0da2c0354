"""The `openai` job: any ASGI app's answer becomes events, and leaving the job frees the app."""

import base64
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_inprocess import Frame as JobFrame
from rbee_inprocess import Running, actions, eventually, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rbee_contracts.events import Usage
from rbee_contracts.operations import OpenAI
from rbee_worker.engine.base import Engine
from rbee_worker.engine.sim import SimEngine, SimParameters
from rbee_worker.openai import OpenAIHandler
from rbee_worker.openai_answer import Frame, FrameParser, failure_of, message_of, usage_of

SSE = "text/event-stream; charset=utf-8"


def app_of(answer: Callable[[Request], Awaitable[Response]], path: str = "/v1/completions") -> Starlette:
    return Starlette(routes=[Route(path, answer, methods=["POST"])])


@asynccontextmanager
async def worker_of(app: object, *, is_tracing: bool = False) -> AsyncIterator[Running]:
    engine = cast(Engine, SimpleNamespace(http_app=app, is_tracing=is_tracing))
    async with running({OpenAI: OpenAIHandler(engine)}) as service:
        yield service


async def ask(app: object, body: dict[str, Any] | None = None, **fields: Any) -> list[JobFrame]:
    async with worker_of(app) as service:
        operation = {"operation": "openai", "endpoint": "/v1/completions", "body": body or {"model": "m"}}
        return await service.read(await service.submit(operation | fields))


def streaming(*pieces: str) -> Starlette:
    async def answer(_: Request) -> Response:
        async def pieces_of() -> AsyncIterator[str]:
            for piece in pieces:
                yield piece

        return StreamingResponse(pieces_of(), media_type="text/event-stream")

    return app_of(answer)


async def crash(_: Request) -> Response:
    raise ZeroDivisionError("SECRET")


# --- what a job says -----------------------------------------------------------------------------------


async def test_a_body_is_one_chunk_and_its_usage_is_the_jobs() -> None:
    async def answer(_: Request) -> Response:
        text = '{"id": 1,  "usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
        return Response(text, media_type="application/json")

    frames = await ask(app_of(answer))

    assert actions(frames) == [
        "execute", "infer_start", "openai_response", "chunk", "execute_complete", "[DONE]",
    ]  # fmt: skip
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert frames[2].json["data"] == {"status": 200, "content_type": "application/json", "stream": False}
    assert '"data":{"id": 1,  "usage":{' in frames[3].data
    assert frames[4].json["data"] == {"status": 200, "content_type": "application/json", "usage": usage}


async def test_each_frame_of_a_stream_is_one_chunk_and_its_end_mark_is_told_in_the_result() -> None:
    frames = await ask(
        streaming(
            'data: {"a": 1}\n\ndata: {"b"',
            ":2}\n\n: ping\n\n",
            'event: named\ndata: {"c":3,"usage":{"input_tokens":1,"output_tokens":2}}\n\n',
            "data: [DONE]\n\n",
        )
    )

    chunks = [frame.json for frame in frames if frame.action == "chunk"]
    assert [(chunk["index"], chunk["message"]) for chunk in chunks] == [(0, ""), (1, ""), (2, "named")]
    assert '"data":{"a": 1}}' in frames[3].data
    assert frames[2].json["data"]["stream"] is True
    assert frames[-2].json["data"] == {
        "status": 200,
        "content_type": SSE,
        "done": True,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


async def test_text_is_a_chunk_that_is_a_json_string() -> None:
    async def answer(_: Request) -> Response:
        return PlainTextResponse("1\n00:00 --> „hello“")

    frames = await ask(app_of(answer))

    assert frames[3].json["data"] == "1\n00:00 --> „hello“"


async def test_the_app_gets_the_body_byte_for_byte_and_an_id_that_names_the_job() -> None:
    seen: dict[str, Any] = {}

    async def answer(request: Request) -> Response:
        seen.update(body=await request.body(), headers=dict(request.headers))
        return JSONResponse({})

    async with worker_of(app_of(answer)) as service:
        raw = b'{ "model":"m", "x": 1e999, "y":"\xc3\xa9\\u00e9" }'
        body = b'{"operation":"openai","endpoint":"/v1/completions","body":%b}' % raw
        headers = {"X-Correlation-ID": "corr-1"}
        job_id = (await service.http.post("/v1/jobs", content=body, headers=headers)).json()["job_id"]
        await service.read(job_id)

    assert seen["body"] == raw
    assert seen["headers"]["x-request-id"] == f"corr-1-{job_id}"
    assert seen["headers"]["content-type"] == "application/json"


@pytest.mark.parametrize("is_tracing", [True, False])
async def test_an_engine_that_traces_is_told_the_callers_trace(is_tracing: bool) -> None:
    seen: list[str | None] = []
    trace = f"00-{'a' * 32}-{'b' * 16}-01"

    async def answer(request: Request) -> Response:
        seen.append(request.headers.get("traceparent"))
        return JSONResponse({})

    async with worker_of(app_of(answer), is_tracing=is_tracing) as service:
        operation = {"operation": "openai", "endpoint": "/v1/completions", "body": {"model": "m"}}
        await service.read(await service.submit(operation, traceparent=trace))

    assert seen == [trace if is_tracing else None]


async def test_a_form_goes_through_base64() -> None:
    seen: dict[str, Any] = {}

    async def answer(request: Request) -> Response:
        seen.update(body=await request.body(), type=request.headers["content-type"])
        return JSONResponse({})

    app = app_of(answer, "/v1/audio/transcriptions")
    await ask(
        app,
        endpoint="/v1/audio/transcriptions",
        body_base64=base64.b64encode(b"\xff\x00form").decode(),
        content_type="multipart/form-data; boundary=x",
    )

    assert seen == {"body": b"\xff\x00form", "type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("endpoint", "path"), [("/v1/tokenize", "/tokenize"), ("/v1/messages/count_tokens",) * 2]
)
async def test_vllms_own_path_is_asked(endpoint: str, path: str) -> None:
    async def answer(_: Request) -> Response:
        return JSONResponse({"ok": True})

    frames = await ask(app_of(answer, path), endpoint=endpoint)

    assert frames[3].json["data"] == {"ok": True}


async def test_the_sim_engines_app_answers_too() -> None:
    engine = SimEngine("m", SimParameters(step_ms=0.1, prefill_tokens_per_s=1e9))
    await engine.start()
    try:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
        frames = await ask(engine.http_app, body, endpoint="/v1/chat/completions")
    finally:
        await engine.stop()

    assert actions(frames).count("chunk") == 5  # the role, three tokens, the end
    assert frames[-2].json["data"]["done"] is True


# --- what it fails with --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "engine_refused"),
        (404, "engine_not_found"),
        (422, "engine_refused"),
        (500, "engine_error"),
        (501, "engine_not_implemented"),
    ],
)
async def test_a_refusal_is_the_jobs_output_and_its_words_are_not_in_its_error(
    status: int, code: str
) -> None:
    refusal = {"error": {"message": "bad SECRET prompt", "type": "T", "param": None, "code": status}}

    async def answer(_: Request) -> Response:
        return JSONResponse(refusal, status)

    frames = await ask(app_of(answer))

    assert actions(frames)[2:] == ["openai_response", "chunk", "error", "execute_error", "[DONE]"]
    assert frames[2].json["data"]["status"] == status
    assert frames[3].json["data"] == refusal
    error = frames[4].json
    assert (error["code"], error["retryable"]) == (code, False)
    assert "SECRET" not in frames[4].data


@pytest.mark.parametrize("status", [429, 503])
async def test_an_engine_that_is_too_busy_has_said_nothing_so_that_another_may(status: int) -> None:
    async def answer(_: Request) -> Response:
        return JSONResponse({"error": {"message": "The engine is currently\nbusy", "code": status}}, status)

    frames = await ask(app_of(answer))

    assert actions(frames)[2:] == ["error", "execute_error", "[DONE]"]
    error = frames[2].json
    assert (error["code"], error["retryable"]) == ("engine_busy", True)
    assert error["message"] == "The engine is currently busy"


@pytest.mark.parametrize(
    "pieces",
    [
        ('data: {"a":1}\n\n', 'data: {"error":{"message":"x","code":500}}\n\ndata: [DONE]\n\n'),
        ('data: {"a":1}\n\n', 'event: error\ndata: {"type":"error","error":{}}\n\n'),
    ],
    ids=["openai", "anthropic"],
)
async def test_an_error_in_the_middle_of_a_stream_fails_the_job(pieces: tuple[str, ...]) -> None:
    frames = await ask(streaming(*pieces))

    assert actions(frames)[2:] == ["openai_response", "chunk", "chunk", "error", "execute_error", "[DONE]"]
    assert frames[5].json["code"] == "engine_error"


@pytest.mark.parametrize(
    ("app", "code"),
    [
        (streaming("data: {not json}\n\n"), "engine_error"),
        (streaming("data: " + "x" * (17 * 2**20)), "output_too_large"),
        (app_of(crash), "engine_error"),
        (None, "worker_not_ready"),
    ],
    ids=["not json", "too large", "crash", "no app"],
)
async def test_what_is_no_answer_fails_the_job(app: object, code: str) -> None:
    frames = await ask(app)

    assert next(frame.json["code"] for frame in frames if frame.action == "error") == code


async def test_an_app_that_says_nothing_fails_the_job() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    frames = await ask(silent)

    assert frames[2].json["code"] == "engine_aborted"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"endpoint": "/v1/load_lora_adapter"}, "unknown_endpoint"),
        ({"body_base64": "abc"}, "invalid_request"),
    ],
    ids=["endpoint", "base64"],
)
async def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], code: str) -> None:
    frames = await ask(streaming(), **fields)

    assert next(frame.json["code"] for frame in frames if frame.action == "error") == code


# --- leaving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notices", [True, False], ids=["by its disconnect", "by force"])
async def test_a_cancelled_job_frees_the_app_within_a_second(notices: bool) -> None:
    asked, left = anyio.Event(), anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked.set()
        try:
            if notices:
                assert (await receive())["type"] == "http.disconnect"
            else:
                await anyio.sleep_forever()
        finally:
            left.set()

    async with worker_of(app) as service:
        operation = {"operation": "openai", "endpoint": "/v1/completions", "body": {}}
        job_id = await service.submit(operation, Prefer="respond-async")
        with anyio.fail_after(45):
            await asked.wait()
            assert (await service.http.delete(f"/v1/jobs/{job_id}")).status_code == 200
            await left.wait()
        job = service.server.registry.get(job_id)
        assert job.state == "cancelled"
        await eventually(lambda: not service.server._running, "the handler has ended")


# --- the parts -----------------------------------------------------------------------------------------

frames_st = st.lists(
    st.tuples(
        st.sampled_from(["", "message_start", "é"]),
        st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1, max_size=20),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(frames=frames_st, newline=st.sampled_from(["\n", "\r\n"]), cuts=st.lists(st.integers(0, 400)))
def test_frames_are_the_same_however_they_are_cut(
    frames: list[tuple[str, str]], newline: str, cuts: list[int]
) -> None:
    text = ""
    for event, data in frames:
        text += f": comment{newline}{newline}"
        text += f"event: {event}{newline}" if event else ""
        text += f"data: {data}{newline}{newline}"
    wire = text.encode()
    parser = FrameParser()
    found: list[Frame] = []
    places = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    for start, end in itertools.pairwise(places):
        found += parser.feed(wire[start:end])

    assert found == [Frame(event, data.encode()) for event, data in frames]
    assert parser.pending == 0


def test_data_on_several_lines_is_joined() -> None:
    assert list(FrameParser().feed(b"data: a\ndata:b\nid: 7\n\n")) == [Frame("", b"a\nb")]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}', (1, 2, 3)),
        (b'{"usage":{"prompt_tokens":4,"total_tokens":4}}', (4, 0, 4)),
        (b'{"usage":{"input_tokens":1,"output_tokens":2}}', (1, 2, 3)),
        (b'{"response":{"usage":{"input_tokens":1,"output_tokens":2,"total_tokens":3}}}', (1, 2, 3)),
        (b'{"usage":null}', None),
        (b'{"usage":"much"}', None),
        (b"[", None),
    ],
)
def test_usage_is_read_by_any_of_its_names(data: bytes, expected: tuple[int, int, int] | None) -> None:
    usage = usage_of(data)

    if expected is None:
        assert usage is None
    else:
        prompt, completion, total = expected
        assert usage == Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)


def test_a_busy_engine_without_words_gets_some() -> None:
    assert message_of(b"oops") == ""
    assert message_of(b'{"error":"Slow\\n down"}') == "Slow down"
    assert len(message_of(b'{"error":{"message":"%b"}}' % (b"x" * 9999))) == 500
    assert "try again" in failure_of(503, "/v1/x", b"").details
