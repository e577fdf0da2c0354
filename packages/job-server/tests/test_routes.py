"""The job routes on a real port: what every service answers."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rbee_inprocess import (
    PATIENCE_S,
    ManualClock,
    Running,
    actions,
    eventually,
    exchange,
    frames_of,
    running,
    text_of,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import Unavailable
from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import DeviceList, HiveList, Infer, ModelList, OpenAI, QueenCheck, Status
from rbee_job_server import Handlers, JobContext, streams
from rbee_job_server.event_log import MAX_LOG_BYTES
from rbee_job_server.guards import Limits
from rbee_job_server.registry import LOG_RETENTION_S

pytestmark = pytest.mark.anyio

INFER = {"operation": "infer", "model": "m", "prompt": "one two three"}
HANG = {"operation": "status"}
UNKNOWN = "job-00000000-0000-4000-8000-000000000001"


async def speak(operation: Infer, context: JobContext) -> dict[str, int]:
    """One token a word, each in a turn of the loop of its own."""
    words = str(operation.prompt).split()
    for word in words:
        context.emit_token(word)
        await asyncio.sleep(0)
    return {"tokens": len(words)}


async def hang(_: Status, __: JobContext) -> None:
    await anyio.sleep_forever()


async def crash(_: QueenCheck, __: JobContext) -> None:
    raise ZeroDivisionError("SECRET")


async def refuse(_: ModelList, __: JobContext) -> None:
    raise Unavailable("No disk.", code="no_disk")


async def flood(_: OpenAI, context: JobContext) -> None:
    """Speaks as fast as it can, and less than ends a job, however late its reader leaves."""
    while context.job.log is not None and context.job.log.size < MAX_LOG_BYTES // 2:
        for _item in range(50):
            context.emit_token("x")
        await asyncio.sleep(0)
    await anyio.sleep_forever()


async def shout(_: DeviceList, context: JobContext) -> None:
    """Says 10 MB."""
    for _item in range(2000):
        context.emit_token("x" * 5000)
        await asyncio.sleep(0)


async def break_down(_: Request) -> Response:
    raise ZeroDivisionError("SECRET")


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def service(clock: ManualClock) -> AsyncIterator[Running]:
    handlers: Handlers = {
        Infer: speak,
        Status: hang,
        QueenCheck: crash,
        ModelList: refuse,
        OpenAI: flood,
        DeviceList: shout,
    }
    limits = Limits(max_body_bytes=8_000_000)
    async with running(handlers, clock=clock, routes=[Route("/break", break_down)], limits=limits) as service:
        yield service


def check_error(answer: httpx.Response, status: int, code: str) -> Any:
    """Check the one error body, and give it."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error", "details", "code", "correlation_id"}
    assert all(isinstance(value, str) and value for value in body.values())
    assert body["code"] == code
    assert body["correlation_id"] == answer.headers["X-Correlation-ID"]
    assert answer.headers["Content-Type"] == "application/json"
    assert ("Retry-After" in answer.headers) is (status in (429, 503))
    for secret in ("SECRET", "Traceback", ".py"):
        assert secret not in answer.text
    return body


# --- submit --------------------------------------------------------------------------------------------


async def test_a_submit_gives_a_stream_that_works(service: Running) -> None:
    answer = await service.http.post("/v1/jobs", json=INFER)
    accepted = answer.json()
    stream = await service.http.get(accepted["sse_url"])

    assert answer.status_code == 200
    assert accepted["sse_url"] == f"/v1/jobs/{accepted['job_id']}/stream"
    assert "Preference-Applied" not in answer.headers
    assert stream.status_code == 200
    assert stream.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert stream.headers["Cache-Control"] == "no-store"
    assert stream.content.startswith(b"retry: 500\n\n")
    assert stream.content.endswith(b"data: [DONE]\n\n")
    frames = frames_of(stream.content)
    assert [(frame.id, frame.action) for frame in frames] == [
        ("1-0", "execute"),
        ("1-1", "token"),
        ("1-2", "token"),
        ("1-3", "token"),
        ("2-3", "execute_complete"),
        ("", "[DONE]"),
    ]
    assert frames[-2].json["data"] == {"tokens": 3}


async def test_a_job_does_not_start_before_it_is_read(service: Running) -> None:
    job_id = await service.submit(INFER)

    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["state"] == "pending"
    await service.read(job_id)
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["state"] == "completed"


@pytest.mark.parametrize("prefer", ["respond-async", "wait=5, Respond-Async;x=y", "respond-async, wait=1"])
async def test_respond_async_runs_without_a_reader(service: Running, prefer: str) -> None:
    answer = await service.http.post("/v1/jobs", json=INFER, headers={"Prefer": prefer})
    job = service.server.registry.get(answer.json()["job_id"])

    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    await eventually(lambda: job.state == "completed", "the job ran")


async def test_another_preference_changes_nothing(service: Running) -> None:
    answer = await service.http.post("/v1/jobs", json=INFER, headers={"Prefer": "wait=5"})

    assert answer.status_code == 200
    assert "Preference-Applied" not in answer.headers


async def test_unknown_fields_are_named_to_the_caller_but_not_to_a_hop(service: Running) -> None:
    body = INFER | {"max_token": 5}
    frames = await service.read(await service.submit(body))
    hop = await service.read(await service.submit(body, Idempotency_Key=f"{new_job_id()}/infer/0"))

    assert actions(frames)[:2] == ["execute", "warning"]
    assert "max_tokens" in frames[1].json["message"]
    assert "warning" not in actions(hop)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_operation"),
        (b'{"operation":"invalid_op"}', 400, "invalid_operation"),
        (b'{"operation":"infer","model":"../x","prompt":"p"}', 400, "invalid_field"),
        (b'{"operation":"infer","model":"m","prompt":"\xff"}', 400, "invalid_json"),
        (b'{"operation":"status","\xff":1}', 400, "invalid_json"),
        (b'{"operation":"status","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "invalid_json"),
        (b'\xef\xbb\xbf{"operation":"status"}', 400, "invalid_json"),
        (b'{"operation":"hive_list"}', 501, "not_implemented"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_refused_submit_says_why(service: Running, body: bytes, status: int, code: str) -> None:
    check_error(await service.http.post("/v1/jobs", content=body), status, code)

    assert len(service.server.registry) == 0


async def test_the_error_of_the_design(service: Running) -> None:
    body = check_error(
        await service.http.post("/v1/jobs", json={"operation": "invalid_op"}), 400, "invalid_operation"
    )

    assert (body["error"], body["details"]) == ("Invalid operation", "Unknown operation: invalid_op")


async def test_the_header_of_a_hops_deadline_limits_the_job(service: Running) -> None:
    frames = await service.read(await service.submit(HANG, X_Deadline_Ms="50"))

    assert actions(frames) == ["execute", "execute_timeout", "[DONE]"]
    assert frames[-2].json["code"] == "timeout"


@pytest.mark.parametrize("value", ["", "-1", "1.5", "abc", "1e3", "9" * 13])
async def test_a_malformed_deadline_is_refused(service: Running, value: str) -> None:
    answer = await service.http.post("/v1/jobs", json=INFER, headers={"X-Deadline-Ms": value})

    check_error(answer, 400, "invalid_request")


# --- Idempotency-Key -----------------------------------------------------------------------------------


async def test_the_same_key_and_operation_give_the_same_job(service: Running) -> None:
    first = await service.submit(INFER, Idempotency_Key="order:1/a")
    again = await service.submit(dict(reversed(INFER.items())), Idempotency_Key="order:1/a")

    assert first == again
    assert len(await service.read(first)) == 6
    assert await service.submit(INFER, Idempotency_Key="order:1/a") == first


async def test_the_same_key_at_the_same_time_gives_one_job(service: Running) -> None:
    found: list[str] = []

    async def submit() -> None:
        found.append(await service.submit(INFER, Idempotency_Key="k", Prefer="respond-async"))

    async with anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(submit)

    assert len(found) == 30
    assert len(set(found)) == len(service.server.registry) == 1


async def test_the_same_key_with_another_operation_is_a_conflict(service: Running) -> None:
    await service.submit(INFER, Idempotency_Key="k")
    answer = await service.http.post(
        "/v1/jobs", json=INFER | {"prompt": "x"}, headers={"Idempotency-Key": "k"}
    )

    check_error(answer, 409, "idempotency_conflict")


@pytest.mark.parametrize("key", ["", "a b", "é".encode("latin-1"), "x" * 129, "a,b", '"a"'])
async def test_a_malformed_key_is_refused(service: Running, key: str | bytes) -> None:
    value = key if isinstance(key, bytes) else key.encode()
    headers = httpx.Headers([(b"Idempotency-Key", value)])

    check_error(
        await service.http.post("/v1/jobs", json=INFER, headers=headers), 400, "invalid_idempotency_key"
    )


# --- streams -------------------------------------------------------------------------------------------


async def test_a_path_with_a_slash_more_is_no_route_and_no_redirect(service: Running) -> None:
    """It was a 307, which many clients answer by sending the body again, or not at all."""
    answer = await service.http.post("/v1/jobs/", json={"operation": "status"})

    assert (answer.status_code, answer.json()["code"]) == (404, "route_not_found")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.rbee+json", 200),
        ("", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 200),  # as `curl -d` says of all that it sends
        ("multipart/form-data; boundary=x", 415),
        ("text/json+json", 415),
    ],
)
async def test_what_says_that_it_is_no_json_is_refused(
    service: Running, content_type: str, status: int
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = await service.http.post("/v1/jobs", content=b'{"operation":"status"}', headers=headers)

    assert answer.status_code == status
    assert answer.json().get("code") == ("unsupported_media_type" if status == 415 else None)


async def test_head_tells_of_a_stream_and_starts_nothing(service: Running) -> None:
    job_id = await service.submit(INFER)
    answer = await service.http.head(f"/v1/jobs/{job_id}/stream")
    firehose = await service.http.head("/v1/events")

    assert (answer.status_code, answer.content) == (firehose.status_code, firehose.content) == (200, b"")
    assert answer.headers["content-type"] == firehose.headers["content-type"]
    assert answer.headers["content-type"].startswith("text/event-stream")
    job = service.server.registry.get(job_id)
    assert (job.state, job.readers, service.server.firehose.followers) == ("pending", 0, 0)
    assert (await service.http.head("/v1/jobs/job-unknown/stream")).status_code == 404


async def test_resuming_gives_exactly_the_rest_from_every_place(service: Running) -> None:
    job_id = await service.submit(INFER)
    frames = await service.read(job_id)

    for place, frame in enumerate(frames[:-2]):
        assert await service.read(job_id, frame.id) == frames[place + 1 :]
    assert await service.read(job_id) == frames
    assert await service.read(job_id, "0-0") == frames


async def test_a_place_on_another_copy_of_the_log_gives_what_is_missing(service: Running) -> None:
    job_id = await service.submit(INFER)
    await service.read(job_id)

    assert [frame.id for frame in await service.read(job_id, "0-2")] == ["1-0", "1-3", "2-3", ""]


async def test_after_the_end_a_reader_that_has_all_is_told_to_stop(service: Running) -> None:
    job_id = await service.submit(INFER)
    last = (await service.read(job_id))[-2].id
    for seen in (last, "2-4", "99-99"):
        answer = await service.http.get(f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": seen})
        assert (answer.status_code, answer.content) == (204, b"")


async def test_a_reader_ahead_of_the_log_gets_what_comes_after(service: Running) -> None:
    job_id = await service.submit(INFER)

    assert [frame.id for frame in await service.read(job_id, "1-2")] == ["1-3", "2-3", ""]


@pytest.mark.parametrize("value", ["1", "x", "1-2-3", "-1-0", "1 -1", "0x1-1", "9" * 33 + "-1", "\xb9-1"])
async def test_a_malformed_last_event_id_is_refused(service: Running, value: str) -> None:
    job_id = await service.submit(HANG)
    headers = httpx.Headers([(b"Last-Event-ID", value.encode("latin-1"))])

    for path in (f"/v1/jobs/{job_id}/stream", "/v1/events"):
        check_error(await service.http.get(path, headers=headers), 400, "invalid_last_event_id")
    assert service.server.registry.get(job_id).state == "pending"


@pytest.mark.parametrize("job_id", [UNKNOWN, "job-1", "%2e%2e", "x" * 5000, "%00", "%ff", "%0d%0aX:y"])
async def test_an_unknown_job_is_404_on_every_route(service: Running, job_id: str) -> None:
    for method, path in (("GET", "/stream"), ("GET", ""), ("DELETE", "")):
        answer = await service.http.request(method, f"/v1/jobs/{job_id}{path}")
        check_error(answer, 404, "job_not_found")


async def test_output_that_is_no_longer_kept_is_gone(service: Running, clock: ManualClock) -> None:
    job_id = await service.submit(INFER)
    await service.read(job_id)
    await eventually(lambda: service.server.registry.get(job_id).readers == 0, "the reader left")
    clock.now += LOG_RETENTION_S + 1
    service.server.registry.sweep(clock.now)

    for headers in ({}, {"Last-Event-ID": "1-1"}, {"Last-Event-ID": "2-3"}):
        answer = await service.http.get(f"/v1/jobs/{job_id}/stream", headers=headers)
        check_error(answer, 410, "output_expired")
    assert (await service.http.get(f"/v1/jobs/{job_id}")).json()["state"] == "completed"


async def test_two_readers_at_once_get_the_same(service: Running) -> None:
    job_id = await service.submit(INFER | {"prompt": "word " * 200})
    got: list[list[Any]] = []

    async def read() -> None:
        got.append(await service.read(job_id))

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(read)

    assert got[0] == got[1] == got[2]
    assert len(got[0]) == 203


async def test_jobs_never_see_each_others_events(service: Running) -> None:
    names = [f"name{number}" for number in range(10)]
    job_ids = [await service.submit(INFER | {"prompt": f"{name} " * 50}) for name in names]
    got: dict[str, list[Any]] = {}

    async def read(job_id: str) -> None:
        got[job_id] = await service.read(job_id)

    async with anyio.create_task_group() as tasks:
        for job_id in job_ids:
            tasks.start_soon(read, job_id)

    for job_id, name in zip(job_ids, names, strict=True):
        assert {frame.json["job_id"] for frame in got[job_id][:-1]} == {job_id}
        assert text_of(got[job_id]) == name * 50


async def test_an_idle_stream_sends_comments(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.02)
    job_id = await service.submit(HANG)
    body = b""
    async with service.http.stream("GET", f"/v1/jobs/{job_id}/stream") as answer:
        async for chunk in answer.aiter_raw():
            body += chunk
            if body.count(b": ping\n\n") >= 3:
                break

    assert actions(frames_of(body)) == ["execute"]


# --- cancel --------------------------------------------------------------------------------------------


async def test_a_cancelled_job_ends_its_stream_and_may_be_cancelled_again(service: Running) -> None:
    job_id = await service.submit(HANG)
    async with anyio.create_task_group() as tasks:
        frames: list[Any] = []

        async def read() -> None:
            frames.extend(await service.read(job_id))

        tasks.start_soon(read)
        await eventually(lambda: service.server.registry.get(job_id).state == "running", "it runs")
        for _ in range(2):
            answer = await service.http.delete(f"/v1/jobs/{job_id}")
            assert (answer.status_code, answer.json()) == (200, {"job_id": job_id, "status": "cancelled"})

    assert actions(frames) == ["execute", "execute_cancelled", "[DONE]"]
    assert frames[-2].json["code"] == "cancelled"


async def test_a_pending_job_that_is_cancelled_never_runs(service: Running) -> None:
    job_id = await service.submit(INFER)
    await service.http.delete(f"/v1/jobs/{job_id}")

    assert actions(await service.read(job_id)) == ["execute_cancelled", "[DONE]"]


@pytest.mark.parametrize("operation", [INFER, {"operation": "model_list"}])
async def test_a_finished_job_cannot_be_cancelled(service: Running, operation: dict[str, str]) -> None:
    job_id = await service.submit(operation)
    await service.read(job_id)

    check_error(await service.http.delete(f"/v1/jobs/{job_id}"), 409, "job_finished")


async def test_cancelling_races_completion_to_one_end(service: Running) -> None:
    """F25."""
    ends: set[str] = set()
    for words in (0, 5, 20, 50, 100, 200, 400, 50_000):
        job_id = await service.submit(INFER | {"prompt": "w " * words}, Prefer="respond-async")
        answer = await service.http.delete(f"/v1/jobs/{job_id}")
        said = actions(await service.read(job_id))
        ends.add(said[-2])

        assert said[-1] == "[DONE]"
        assert sum(action.startswith("execute_") for action in said) == 1
        assert answer.status_code == (200 if said[-2] == "execute_cancelled" else 409)
    assert ends == {"execute_cancelled", "execute_complete"}


# --- records -------------------------------------------------------------------------------------------


async def test_a_record_tells_what_became_of_a_job(service: Running) -> None:
    job_id = await service.submit(INFER, X_Correlation_ID="corr.of_mine-1")
    await service.read(job_id)
    failed = await service.submit({"operation": "model_list"})
    await service.read(failed)
    record = (await service.http.get(f"/v1/jobs/{job_id}")).json()

    assert record["correlation_id"] == "corr.of_mine-1"
    assert (record["operation"], record["model"], record["state"]) == ("infer", "m", "completed")
    assert record["result"] == {"tokens": 3}
    assert record["created_at"] <= record["started_at"] <= record["finished_at"]
    assert "one two" not in str(record)
    error = (await service.http.get(f"/v1/jobs/{failed}")).json()["error"]
    assert error == {"code": "no_disk", "message": "No disk.", "retryable": True}


async def test_the_list_filters_by_state_and_operation(service: Running) -> None:
    done, waiting = await service.submit(INFER), await service.submit(INFER)
    hanging = await service.submit(HANG, Prefer="respond-async")
    await service.read(done)

    async def ids(**query: str) -> list[str]:
        answer = await service.http.get("/v1/jobs", params=query)
        assert answer.json()["next_cursor"] is None
        return [job["job_id"] for job in answer.json()["jobs"]]

    assert await ids() == [hanging, waiting, done]
    assert await ids(operation="infer") == [waiting, done]
    assert await ids(state="completed") == [done]
    assert await ids(state="running", operation="status") == [hanging]
    assert await ids(state="pending", operation="status") == []
    assert await ids(operation="no_such") == []


async def test_paging_is_stable_while_new_jobs_come(service: Running) -> None:
    job_ids = [await service.submit(INFER) for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    for _ in itertools.count():
        query = {"limit": "3"} | ({"cursor": cursor} if cursor else {})
        page = (await service.http.get("/v1/jobs", params=query)).json()
        assert len(page["jobs"]) <= 3
        seen += [job["job_id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        await service.submit(INFER)

    assert seen == job_ids[::-1]


@pytest.mark.parametrize(
    "query",
    [
        *(
            "limit=0",
            "limit=-1",
            "limit=1001",
            "limit=x",
            "limit=",
            "limit=99999999999999999999",
            "limit=%C2%B2",
        ),
        *("cursor=x", "cursor=-1", "cursor=", "cursor=1.5", "cursor=99999999999999999999", "cursor=%C2%B2"),
        *("state=done", "state=", "state=%00", "limit=1_0"),
    ],
)
async def test_a_malformed_query_is_refused(service: Running, query: str) -> None:
    check_error(await service.http.get(f"/v1/jobs?{query}"), 400, "invalid_request")


# --- errors and correlation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "route_not_found"),
        ("GET", f"/v1/jobs/{UNKNOWN}/nope", 404, "route_not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("POST", f"/v1/jobs/{UNKNOWN}", 405, "method_not_allowed"),
        ("POST", "/v1/events", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/break", 500, "internal_error"),
    ],
)
async def test_errors_have_one_shape(
    service: Running, method: str, path: str, status: int, code: str
) -> None:
    answer = await service.http.request(method, path, headers={"X-Correlation-ID": "mine"})

    assert check_error(answer, status, code)["correlation_id"] == "mine"


async def test_a_crash_under_a_job_names_the_correlation_id_only(service: Running) -> None:
    frames = await service.read(await service.submit({"operation": "queen_check"}, X_Correlation_ID="mine"))

    assert actions(frames) == ["execute", "error", "execute_error", "[DONE]"]
    assert "mine" in frames[1].json["message"]
    assert "SECRET" not in frames[1].data


@pytest.mark.parametrize("given_id", ["a", "A.b_c-9", "x" * 64])
async def test_a_well_formed_correlation_id_is_kept(service: Running, given_id: str) -> None:
    answer = await service.http.get("/health", headers={"X-Correlation-ID": given_id})
    job_id = await service.submit(INFER, X_Correlation_ID=given_id)

    assert answer.headers["X-Correlation-ID"] == given_id
    assert {frame.json["correlation_id"] for frame in (await service.read(job_id))[:-1]} == {given_id}


@pytest.mark.parametrize(
    "value",
    [b"x" * 65, b"x" * 10_240, b"", b"a b", b"\xff\xfe", "é".encode(), b"a;b", b"a/b", b"a\tb", b'"'],
)
async def test_a_hostile_correlation_id_is_replaced(service: Running, value: bytes) -> None:
    """F49."""
    answer = await service.http.get("/health", headers=httpx.Headers([(b"X-Correlation-ID", value)]))

    assert answer.status_code == 200
    assert answer.headers["X-Correlation-ID"].startswith("corr-")


@pytest.mark.parametrize(
    "line",
    [
        b"X-Correlation-ID: a\x00b",
        b"X-Correlation-ID: a\x1b[31mb",
        b"X-Correlation-ID: a\x7fb",
        b"X-Correlation-ID: a\rEvil: b",
        b"X-Correlation-ID: a\nEvil: b",
        b"X-Correlation-ID: a\r\n Evil: b",
        b"X-Correlation-ID: a\r\nX-Correlation-ID: b\x01",
    ],
)
async def test_control_bytes_in_a_correlation_id_never_come_back(service: Running, line: bytes) -> None:
    """F49."""
    answer = await exchange(
        service.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n%b\r\nConnection: close\r\n\r\n" % line
    )
    head = answer.split(b"\r\n\r\n")[0].lower()

    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    assert b"evil" not in head
    assert b"\x00" not in head
    assert b"\x1b" not in head
    if answer.startswith(b"HTTP/1.1 200"):
        assert head.count(b"x-correlation-id: ") == 1
    assert (await service.http.get("/health")).status_code == 200


@pytest.mark.parametrize("host", [b"[", b"[::1", b"a b", b"x/y?z#", b"\xff", b"", b"//", b"@", b"x:99999999"])
@pytest.mark.parametrize("path", [b"/nope", b"/v1/jobs/x", b"/%ff%fe", b"/%00"])
async def test_a_hostile_host_is_no_crash(service: Running, host: bytes, path: bytes) -> None:
    answer = await exchange(
        service.port, b"GET %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % (path, host)
    )

    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 404")), answer


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    body=st.binary(max_size=100)
    | st.dictionaries(
        st.sampled_from(["operation", "model", "prompt", "hive_id", "x"]),
        st.sampled_from(["infer", "status", "hive_list", "m", "", "\x00", "../x"])
        | st.integers()
        | st.none(),
        max_size=5,
    ).map(lambda value: httpx.Request("POST", "http://x", json=value).content),
    content_type=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""]),
)
async def test_no_body_is_a_crash(service: Running, body: bytes, content_type: str) -> None:
    """F48."""
    answer = await service.http.post("/v1/jobs", content=body, headers={"Content-Type": content_type})

    assert answer.status_code in (200, 400, 415, 501)
    assert (answer.status_code == 415) is (content_type in ("text/plain", "multipart/form-data"))
    assert "correlation_id" in answer.json() or "job_id" in answer.json()


async def test_service_routes(service: Running) -> None:
    assert (await service.http.get("/health")).json() == {"status": "ok"}
    assert (await service.http.get("/ready")).json() == {"ready": True}
    info = (await service.http.get("/v1/info")).json()
    assert (info["name"], info["id"], info["boot"]) == ("worker", "w1", service.server.boot)
    assert info["uptime_s"] >= 0


async def test_a_service_that_is_not_ready_says_why() -> None:
    async with running({HiveList: hang}, not_ready=lambda: "loading") as service:
        answer = await service.http.get("/ready")

    assert (answer.status_code, answer.json()) == (503, {"ready": False, "reason": "loading"})
    assert answer.headers["Retry-After"]


# --- clients that leave --------------------------------------------------------------------------------


async def open_stream(service: Running, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Read a stream over a bare socket as far as its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
    with anyio.fail_after(PATIENCE_S):
        await reader.readuntil(b"retry: 500")
    return reader, writer


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_is_noticed(service: Running, how: str) -> None:
    job_id = await service.submit(HANG)
    job = service.server.registry.get(job_id)
    connections = [await open_stream(service, f"/v1/jobs/{job_id}/stream") for _ in range(3)]
    assert job.readers == 3
    for left, (_, writer) in zip((2, 1, 0), connections, strict=True):
        writer.close() if how == "close" else writer.transport.abort()
        await eventually(lambda left=left: job.readers == left, "a reader is gone")  # type: ignore[misc]

    assert job.state == "running"


async def test_the_firehose_notices_a_follower_that_leaves(service: Running) -> None:
    _, writer = await open_stream(service, "/v1/events")
    assert service.server.firehose.is_followed
    writer.transport.abort()

    await eventually(lambda: service.server.firehose.followers == 0, "the follower is gone")


@pytest.mark.parametrize("reads", [True, False], ids=["reading", "stalled"])
async def test_a_client_that_leaves_a_flood_is_noticed_and_the_loop_stays_responsive(
    service: Running, reads: bool
) -> None:
    """F16, F26: the job of a reader that left is cancelled, and others are served meanwhile."""
    job_id = await service.submit({"operation": "openai", "endpoint": "/v1/completions", "body": {}})
    job = service.server.registry.get(job_id)
    reader, writer = await open_stream(service, f"/v1/jobs/{job_id}/stream")
    for _ in range(20 if reads else 0):
        await reader.read(100_000)
    with anyio.fail_after(PATIENCE_S):
        assert (await service.http.get("/health")).status_code == 200
    writer.transport.abort()

    await eventually(lambda: job.readers == 0, "the reader is gone")
    await eventually(lambda: job.state == "cancelled", "the job is cancelled")
    with anyio.fail_after(PATIENCE_S):
        await service.server.drain(600)


async def test_a_slow_reader_costs_the_others_nothing(service: Running) -> None:
    """F18."""
    job_id = await service.submit({"operation": "device_list"})
    _, slow = await open_stream(service, f"/v1/jobs/{job_id}/stream")
    frames = await service.read(job_id)

    assert len(text_of(frames)) == 10_000_000
    slow.transport.abort()


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_crash(
    service: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b'POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"operation"')
    await writer.drain()
    assert (await service.http.get("/health")).status_code == 200
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    for _ in range(20):
        await service.http.get("/health")

    assert "request_crashed" not in capsys.readouterr().out
