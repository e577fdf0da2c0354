"""The front door over real sockets: each request is a job, and answers look as OpenAI's clients expect."""

from typing import Any

import anyio
import httpx
import msgspec
import pytest
from rbee_front_door import (
    answer_json,
    begin_stream,
    end_stream,
    front_door,
    hive,
    lying,
    worker,
)
from rbee_inprocess import Running, eventually, exchange

from rbee_contracts.errors import NoCapacity, RbeeError, WorkerLost
from rbee_contracts.events import OpenAIHead, OpenAIResult
from rbee_contracts.operations import OpenAI
from rbee_job_server import JobContext
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_queen.openai import Aliases

pytestmark = pytest.mark.anyio

TOKEN = "a-token-of-the-cluster"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


async def stream_three(_: OpenAI, context: JobContext) -> OpenAIResult:
    begin_stream(context)
    for number in range(3):
        context.emit_chunk(msgspec.Raw(b'{"n": %d}' % number))
    return end_stream()


def only_job(service: Running) -> Any:
    (job,) = service.server.registry
    return job


# --- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/openai"])
async def test_a_body_goes_through_byte_for_byte_and_comes_back_so(prefix: str) -> None:
    body = '{ "model" :"m",  "x": 1e999, "ü": "\\u00e9", "model2": [1, 2] }'.encode()
    async with front_door() as service:
        answer = await service.http.post(
            prefix + CHAT,
            content=body,
            headers={"Content-Type": "application/json", "X-Correlation-ID": "corr-1"},
        )
        job = only_job(service)

    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["X-Job-ID"] == job.id
    assert answer.headers["X-Correlation-ID"] == job.correlation_id == "corr-1"
    assert answer.headers["Content-Type"] == "application/json"
    assert (job.state, job.operation.model, job.operation.endpoint) == ("completed", "m", CHAT)


async def test_a_stream_has_neither_ids_nor_pings_nor_a_retry() -> None:
    async with front_door(stream_three) as service:
        answer = await service.http.post(CHAT, json={"model": "m", "stream": True})
        job = only_job(service)

    assert answer.content == b'data: {"n": 0}\n\ndata: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'
    assert answer.headers["X-Job-ID"] == job.id
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"


async def test_named_events_keep_their_names_and_no_end_mark_is_invented() -> None:
    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        begin_stream(context)
        context.emit_chunk(msgspec.Raw(b'{"type":"ping"}'), "ping")
        context.emit_chunk(msgspec.Raw(b'{"a":",\\"data\\":"}'), 'odd ,"data": "name"')
        return end_stream(done=False)

    async with front_door(place) as service:
        answer = await service.http.post(MESSAGES, json={"model": "m", "stream": True})

    assert answer.content.decode() == (
        'event: ping\ndata: {"type":"ping"}\n\nevent: odd ,"data": "name"\ndata: {"a":",\\"data\\":"}\n\n'
    )


async def test_text_comes_back_as_text() -> None:
    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        context.narrate("openai_response", "x", OpenAIHead(status=200, content_type="text/plain"))
        context.emit_chunk(msgspec.Raw(msgspec.json.encode("1\n„hello“")))
        return OpenAIResult(status=200, content_type="text/plain")

    async with front_door(place) as service:
        answer = await service.http.post(CHAT, json={"model": "m"})

    assert (answer.text, answer.headers["Content-Type"]) == ("1\n„hello“", "text/plain")


async def test_a_request_is_a_job_like_any_other() -> None:
    async with front_door(stream_three) as service:
        answer = await service.http.post(CHAT, json={"model": "m"})
        job_id = answer.headers["X-Job-ID"]
        listed = (await service.http.get("/v1/jobs?operation=openai")).json()["jobs"]
        replayed = await service.read(job_id)

    assert [(job["job_id"], job["model"], job["state"]) for job in listed] == [(job_id, "m", "completed")]
    assert [frame.action for frame in replayed].count("chunk") == 3


async def test_a_request_shows_on_the_firehose() -> None:
    async with (
        front_door(stream_three) as service,
        service.http.stream("GET", "/v1/events?output=1") as events,
    ):
        lines = events.aiter_lines()
        await anext(lines)
        answer = await service.http.post(CHAT, json={"model": "m"})
        job_id = answer.headers["X-Job-ID"]
        actions = []
        with anyio.fail_after(45):
            async for line in lines:
                if line.startswith("data: "):
                    event = msgspec.json.decode(line[6:])
                    assert event["job_id"] == job_id
                    actions.append(event["action"])
                if actions and actions[-1] == "execute_complete":
                    break

    assert actions == ["execute", "openai_response", "chunk", "chunk", "chunk", "execute_complete"]


async def test_a_request_may_be_a_plain_job_instead() -> None:
    async with front_door() as service:
        job_id = await service.submit({"operation": "openai", "endpoint": CHAT, "body": {"model": "m"}})
        frames = await service.read(job_id)

    assert frames[2].json["data"] == {"model": "m"}


# --- which model ---------------------------------------------------------------------------------------


async def test_an_alias_changes_the_model_and_nothing_else() -> None:
    aliases = Aliases.parse(["gpt-4o=m"])
    async with front_door(aliases=aliases) as service:
        body = b'{"a": [1,  2], "model": "gpt-4o", "z": "\\u00e9"}'
        answer = await service.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})

    assert answer.content == b'{"a":[1,  2],"model":"m","z":"\\u00e9"}'


async def test_without_a_model_the_only_one_that_is_served_is_meant() -> None:
    async with front_door() as service:
        answer = await service.http.post(CHAT, json={})
        job = only_job(service)

    assert (answer.status_code, answer.json()) == (200, {})
    assert job.operation.model is None


async def test_without_a_model_and_with_several_served_it_must_be_named() -> None:
    hives = [hive(workers=[worker("a"), worker("b", worker_id="w2")])]
    async with front_door(hives=hives) as service:
        answer = await service.http.post(CHAT, json={})

    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "The body must name a `model`; served now: a, b.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_required",
    }


async def test_an_unknown_model_is_404_and_near_names_are_told() -> None:
    hives = [hive(workers=[worker("llama-3-8b")], models=[lying("qwen3")])]
    async with front_door(hives=hives) as service:
        answer = await service.http.post(CHAT, json={"model": "lama-3-8b"})
        job = only_job(service)

    error = answer.json()["error"]
    assert answer.status_code == 404
    assert (error["code"], error["type"], error["param"]) == (
        "model_not_found",
        "invalid_request_error",
        "model",
    )
    assert "Did you mean llama-3-8b?" in error["message"]
    assert (job.state, answer.headers["X-Job-ID"]) == ("failed", job.id)


@pytest.mark.parametrize("body", [{"model": "m"}, {}], ids=["model", "only-model"])
async def test_a_queen_that_has_just_started_hears_her_hives_before_she_refuses(body: dict[str, Any]) -> None:
    hives = [hive()]

    async def settled() -> None:
        hives[:] = [hive(workers=[worker("m")])]

    async with front_door(hives=hives, settled=settled) as service:
        answer = await service.http.post(CHAT, json=body)
        job = only_job(service)

    assert (answer.status_code, job.state) == (200, "completed")


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("application/json", b"{", 400, "invalid_request"),
        ("application/json", b"", 400, "invalid_request"),
        ("application/json", b"[]", 400, "invalid_request"),
        ("application/json", b'{"model":7}', 400, "invalid_request"),
        ("application/json", b'{"model":""}', 400, "invalid_request"),
        ("application/json", b'{"model":"' + b"x" * 300 + b'"}', 400, "invalid_request"),
        ("application/json", b'{"x":"\xff"}', 400, "invalid_request"),
        ("application/json", b'{"model":"\\ud800"}', 400, "invalid_request"),
        ("application/json", b'{"x":' + b"[" * 100_000, 400, "invalid_request"),
        ("text/plain", b"{}", 415, "unsupported_media_type"),
        ("", b"{}", 415, "unsupported_media_type"),
        ("application/json", b'{"x":"' + b"x" * 20_000 + b'"}', 413, "request_too_large"),
    ],
    ids=[
        "cut", "empty", "list", "model is a number", "model is empty", "model too long", "not utf-8",
        "lone surrogate", "too deep", "text", "no type", "too large",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_what_cannot_be_passed_on_is_refused_in_the_clients_own_shape(
    path: str, content_type: str, body: bytes, status: int, code: str
) -> None:
    limits = Limits(max_body_bytes=10_000)
    if code != "request_too_large":
        limits = Limits()
    async with front_door(limits=limits) as service:
        headers = {"Content-Type": content_type} if content_type else {}
        answer = await service.http.post(path, content=body, headers=headers)

    assert answer.status_code == status
    error = answer.json()["error"]
    assert len(error["message"]) > 10
    if path == CHAT:
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
    else:
        kind = "request_too_large" if status == 413 else "invalid_request_error"
        assert (answer.json()["type"], error["type"]) == ("error", kind)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (CHAT, {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}),
        ("/v1/models", {"type": "invalid_request_error", "param": None, "code": "invalid_api_key"}),
        (MESSAGES, {"type": "authentication_error"}),
    ],
)
async def test_without_the_token_it_is_401_in_the_clients_own_shape(
    path: str, expected: dict[str, str | None]
) -> None:
    async with front_door(access=AccessConfig(token=TOKEN)) as service:
        answer = await service.http.request("GET" if path == "/v1/models" else "POST", path)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert "token" in error.pop("message")
    assert error == expected


@pytest.mark.parametrize(
    ("name", "value"), [("Authorization", f"Bearer {TOKEN}"), ("x-api-key", TOKEN)], ids=["bearer", "api key"]
)
async def test_the_token_may_come_as_either_clients_bring_it(name: str, value: str) -> None:
    async with front_door(access=AccessConfig(token=TOKEN)) as service:
        answer = await service.http.post(MESSAGES, json={"model": "m"}, headers={name: value})
        wrong = await service.http.post(MESSAGES, json={"model": "m"}, headers={name: value + "x"})

    assert (answer.status_code, wrong.status_code) == (200, 401)


async def test_a_foreign_page_is_refused_in_the_clients_own_shape() -> None:
    async with front_door() as service:
        answer = await service.http.post(CHAT, json={}, headers={"Origin": "http://elsewhere.example"})

    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden_origin"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/openai/v1/nothing", 404)],
)
async def test_a_wrong_method_or_path_is_told_in_openais_shape(method: str, path: str, status: int) -> None:
    async with front_door() as service:
        answer = await service.http.request(method, path)

    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_other_routes_keep_their_own_shape() -> None:
    async with front_door() as service:
        answer = await service.http.get("/v1/nothing")

    assert answer.json()["code"] == "route_not_found"


async def test_what_the_engine_refuses_comes_back_word_for_word() -> None:
    words = b'{"error": {"message":"temperature must be non-negative",  "code":400}}'

    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        answer_json(context, words, 400)
        raise RbeeError("Refused.", code="engine_refused")

    async with front_door(place) as service:
        answer = await service.http.post(CHAT, json={"model": "m"})
        job = only_job(service)

    assert (answer.status_code, answer.content) == (400, words)
    assert job.state == "failed"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (NoCapacity("All full.", code="no_worker"), 503, "server_error"),
        (WorkerLost("w1 exited."), 500, "server_error"),
        (ZeroDivisionError("SECRET"), 500, "server_error"),
    ],
    ids=["no capacity", "worker lost", "crash"],
)
async def test_a_failed_job_is_answered_by_its_code(error: Exception, status: int, kind: str) -> None:
    async def place(_: OpenAI, __: JobContext) -> OpenAIResult:
        raise error

    async with front_door(place) as service:
        answer = await service.http.post(CHAT, json={"model": "m"})
        anthropic = await service.http.post(MESSAGES, json={"model": "m"})

    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert "SECRET" not in answer.text
    assert anthropic.json()["type"] == "error"
    expected = "overloaded_error" if status == 503 else "api_error"
    assert anthropic.json()["error"]["type"] == expected


async def test_a_service_that_stops_takes_nothing_new() -> None:
    async with front_door() as service:
        service.server.stopping = True
        answer = await service.http.post(CHAT, json={"model": "m"})

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "shutting_down"
    assert answer.headers["Retry-After"]


async def test_the_time_that_is_left_bounds_a_request() -> None:
    async def place(_: OpenAI, __: JobContext) -> OpenAIResult:
        await anyio.sleep_forever()
        raise AssertionError

    async with front_door(place) as service:
        answer = await service.http.post(CHAT, json={"model": "m"}, headers={"X-Deadline-Ms": "30"})
        bad = await service.http.post(CHAT, json={"model": "m"}, headers={"X-Deadline-Ms": "soon"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        (CHAT, b"data: [DONE]\n\n"),
        (MESSAGES, b""),
    ],
)
async def test_an_error_after_the_first_byte_is_a_frame_and_ends_the_stream(path: str, rest: bytes) -> None:
    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        begin_stream(context)
        context.emit_chunk(msgspec.Raw(b'{"n":0}'))
        raise WorkerLost("w1 exited with status 1.")

    async with front_door(place) as service:
        answer = await service.http.post(path, json={"model": "m"})

    first, last, end = answer.content.split(b"\n\n", 2)
    assert (answer.status_code, first, end) == (200, b'data: {"n":0}', rest)
    error = msgspec.json.decode(last.removeprefix(b"event: error\n").removeprefix(b"data: "))["error"]
    assert error["message"] == "w1 exited with status 1."
    assert last.startswith(b"event: error\n") == (path == MESSAGES)


@pytest.mark.parametrize("dialect", ["openai", "anthropic"])
async def test_the_engines_own_error_in_a_stream_is_not_told_twice(dialect: str) -> None:
    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        begin_stream(context)
        if dialect == "openai":
            context.emit_chunk(msgspec.Raw(b'{"error":{"message":"x"}}'))
        else:
            context.emit_chunk(msgspec.Raw(b'{"type":"error"}'), "error")
        raise RbeeError("Failed.", code="engine_error")

    async with front_door(place) as service:
        answer = await service.http.post(CHAT if dialect == "openai" else MESSAGES, json={"model": "m"})

    assert answer.content == (
        b'data: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n'
        if dialect == "openai"
        else b'event: error\ndata: {"type":"error"}\n\n'
    )


# --- leaving -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "no stream"])
async def test_a_client_that_leaves_cancels_its_job_at_once(streams: bool) -> None:
    left = anyio.Event()

    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        try:
            if streams:
                begin_stream(context)
                context.emit_chunk(msgspec.Raw(b'{"n":0}'))
            await anyio.sleep_forever()
        finally:
            left.set()
        raise AssertionError

    async with front_door(place) as service:
        client = await anyio.connect_tcp("127.0.0.1", service.port)
        body = b'{"model":"m"}'
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await client.send(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        if streams:
            assert b'{"n":0}' in await _first_frame(client)
        await eventually(lambda: any(job.state == "running" for job in service.server.registry), "running")
        job = only_job(service)
        await client.aclose()
        with anyio.fail_after(45):
            await left.wait()
        await eventually(lambda: job.state == "cancelled", "the job is cancelled")
        terminal = (await service.read(job.id))[-2]

    assert terminal.json["code"] == "abandoned"


async def _first_frame(client: anyio.abc.SocketStream) -> bytes:
    data = b""
    while b"\n\n" not in data:
        data += await client.receive()
    return data


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "no stream"])
async def test_delete_ends_the_request_that_is_waiting(streams: bool) -> None:
    started = anyio.Event()

    async def place(_: OpenAI, context: JobContext) -> OpenAIResult:
        if streams:
            begin_stream(context)
        started.set()
        await anyio.sleep_forever()
        raise AssertionError

    async with front_door(place) as service, anyio.create_task_group() as tasks:
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await service.http.post(CHAT, json={"model": "m"}))

        tasks.start_soon(ask)
        with anyio.fail_after(45):
            await started.wait()
            deleted = await service.http.delete(f"/v1/jobs/{only_job(service).id}")
            await eventually(lambda: answers, "the answer is here")

    assert deleted.status_code == 200
    (answer,) = answers
    if streams:
        assert answer.content.endswith(b"\n\ndata: [DONE]\n\n")
        assert b'"code":"cancelled"' in answer.content
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (499, "cancelled")


async def test_two_requests_on_one_connection() -> None:
    body = b'{"model":"m"}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n" % len(body)
    async with front_door(stream_three) as service:
        both = await exchange(
            service.port, request + b"\r\n" + body + request + b"Connection: close\r\n\r\n" + body
        )
        jobs = list(service.server.registry)

    assert both.count(b"data: [DONE]") == 2
    assert [job.state for job in jobs] == ["completed", "completed"]


# --- models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/openai"])
async def test_models_lists_what_runs_and_what_lies_somewhere(prefix: str) -> None:
    hives = [
        hive(
            "h1", workers=[worker("org/big"), worker("org/big", "starting", "w2")], models=[lying("org/big")]
        ),
        hive("h2", models=[lying("org/big"), lying("small", max_model_len=512)]),
    ]
    aliases = Aliases.parse(["gpt=org/big", "none=gone"], ["loud=small"])
    async with front_door(hives=hives, aliases=aliases) as service:
        listed = (await service.http.get(prefix + "/v1/models")).json()
        one = await service.http.get(prefix + "/v1/models/org/big")
        encoded = await service.http.get(prefix + "/v1/models/org%2Fbig")
        missing = await service.http.get(prefix + "/v1/models/smal")

    assert listed["object"] == "list"
    assert [(m["id"], m["state"], m["max_model_len"], m["root"]) for m in listed["data"]] == [
        ("org/big", "ready", 2048, "org/big"),
        ("small", "on_disk", 512, "small"),
        ("gpt", "ready", 2048, "org/big"),
        ("loud", "on_disk", 512, "small"),
    ]
    assert [m["parent"] for m in listed["data"]] == [None, None, None, "small"]
    big = listed["data"][0]
    assert [w["state"] for w in big["workers"]] == ["ready", "starting"]
    assert big["hives"] == ["h1", "h2"]
    assert big["created"] == 1767225600
    assert one.json() == encoded.json() == big
    assert missing.status_code == 404
    assert "Did you mean small?" in missing.json()["error"]["message"]
