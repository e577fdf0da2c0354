"""The client against real job servers, connections that break, and servers that misbehave."""

import asyncio
import gzip
import itertools
import os
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rbee_inprocess import ManualClock, Running, TcpRelay, eventually, running, scripted, tcp_relay

from rbee_contracts.errors import InvalidRequest, Unavailable
from rbee_contracts.events import (
    AnyEvent,
    Error,
    Execute,
    ExecuteCancelled,
    ExecuteComplete,
    ExecuteError,
    Gap,
    Narration,
    Token,
    encode_event,
)
from rbee_contracts.ids import new_job_id
from rbee_contracts.jobs import DONE, JobAccepted
from rbee_contracts.nodes import ServiceInfo
from rbee_contracts.operations import HiveList, Infer, ModelList, ModelLoad, Status
from rbee_contracts.sse import START, Position
from rbee_job_client import JobClient, ProtocolError, Rejected, StreamCut, Timeouts, Unreachable, frames
from rbee_job_client import client as client_module
from rbee_job_client.frames import Frame, StreamParser, decode_any_event
from rbee_job_server import Handlers, JobContext
from rbee_job_server.registry import LOG_RETENTION_S

pytestmark = pytest.mark.anyio

PATIENT = Timeouts(connect=600, request=600, read=600, resume=600)
"""No time of its own ends anything, however slow the machine is: what hangs is ended by pytest."""

QUICK = Timeouts(connect=600, request=600, read=600, resume=0.6)
"""A stream that is lost is soon given up; each answer is waited for all the same."""

HANGS_S = 50.0
"""What takes longer hangs."""

JOB_ID = "job-00000000-0000-4000-8000-000000000001"
COMMON: dict[str, Any] = {
    "actor": "worker/w1",
    "job_id": JOB_ID,
    "correlation_id": "corr-1",
    "timestamp": "2026-01-01T00:00:00.000000Z",
}
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
EXECUTE = Execute(message="go", formatted="", **COMMON)
END = ExecuteComplete(message="end", formatted="", **COMMON)
HARD_TEXTS = [
    "\u2028\u2029\x85\x0b\x0c",
    "a\r\n\r\nb\rc\n\nd",
    "data: x\n\n",
    "\U0001f41dé",
    "",
    " ",
    "\ufeff",
    "\x00",
]

LARGE_TEXT = "\u2028é\U0001f41d\r\n" * 200_000


def token(text: str, index: int = 0) -> Token:
    return Token(message=text, index=index, **COMMON)


def frame(event_id: str, event: AnyEvent) -> bytes:
    return b"id: %b\ndata: %b\n\n" % (event_id.encode(), encode_event(event))


def text_of(events: list[AnyEvent]) -> str:
    return "".join(event.message for event in events if isinstance(event, Token))


async def speak(operation: Infer, context: JobContext) -> dict[str, int]:
    words = str(operation.prompt).split(" ")
    for number, word in enumerate(words):
        if number % 10 == 0:
            context.narrate("said", f"word {number}")
        context.emit_token(f"{word} ")
        await asyncio.sleep(0)
    return {"tokens": len(words)}


async def hang(_: Status, __: JobContext) -> None:
    await anyio.sleep_forever()


async def say_much(_: HiveList, context: JobContext) -> None:
    context.emit_token(LARGE_TEXT)


async def refuse(_: ModelList, __: JobContext) -> None:
    raise Unavailable("No disk.", code="no_disk")


HANDLERS: Handlers = {Infer: speak, Status: hang, ModelList: refuse, HiveList: say_much}


@pytest.fixture
async def service() -> AsyncIterator[Running]:
    async with running(HANDLERS) as service:
        yield service


@pytest.fixture
async def client(service: Running) -> AsyncIterator[JobClient]:
    async with JobClient(service.url, timeouts=PATIENT) as client:
        yield client


@pytest.fixture
async def relay(service: Running) -> AsyncIterator[TcpRelay]:
    async with tcp_relay(service.port) as relay:
        yield relay


async def read_all(client: JobClient, job_id: str, position: Position = START) -> list[AnyEvent]:
    return [event async for event in client.stream(job_id, position)]


# --- requests ------------------------------------------------------------------------------------------


async def test_a_job_from_submit_to_its_end(client: JobClient) -> None:
    accepted = await client.submit(Infer(model="m", prompt="a b"), correlation_id="mine")
    events = await read_all(client, accepted.job_id)

    assert [type(event) for event in events] == [Execute, Narration, Token, Token, ExecuteComplete]
    assert text_of(events) == "a b "
    assert {event.correlation_id for event in events} == {"mine"}
    assert {event.job_id for event in events} == {accepted.job_id}


async def test_submit_and_stream(client: JobClient) -> None:
    events = [event async for event in client.submit_and_stream(ModelList())]

    assert [type(event) for event in events] == [Execute, Error, ExecuteError]


async def test_the_options_of_a_submit_travel_as_headers(client: JobClient, service: Running) -> None:
    accepted = await client.submit(Status(), respond_async=True, idempotency_key="k", time_left_s=0.05)
    again = await client.submit(Status(), respond_async=True, idempotency_key="k")
    job = service.server.registry.get(accepted.job_id)

    assert again == accepted
    assert job.policy.timeout_s == 0.05
    await eventually(lambda: job.state == "failed", "it ran by itself and timed out")


async def test_cancel_says_whether_there_was_something_to_cancel(client: JobClient) -> None:
    accepted = await client.submit(Status(), respond_async=True)
    done = await client.submit(ModelList())
    await read_all(client, done.job_id)

    assert await client.cancel(accepted.job_id)
    assert await client.cancel(accepted.job_id)
    assert not await client.cancel(done.job_id)
    assert not await client.cancel(new_job_id())
    assert isinstance((await read_all(client, accepted.job_id))[-1], ExecuteCancelled)


async def test_records_and_lists_decode(client: JobClient) -> None:
    first = await client.submit(Infer(model="m", prompt="a"))
    await client.submit(Status())
    await read_all(client, first.job_id)

    assert (await client.get(first.job_id)).state == "completed"
    page = await client.list_jobs(limit=1)
    assert [job.operation for job in page.jobs] == ["status"]
    assert [job.job_id for job in (await client.list_jobs(cursor=page.next_cursor)).jobs] == [first.job_id]
    assert [job.job_id for job in (await client.list_jobs(operation="infer", state="completed")).jobs] == [
        first.job_id
    ]
    assert (await client.get_json("/v1/info", ServiceInfo)).name == "worker"


@pytest.mark.parametrize(
    ("ask", "status", "code", "retryable"),
    [
        (lambda client: client.submit(ModelLoad(model="m")), 501, "not_implemented", False),
        (lambda client: client.get(JOB_ID), 404, "job_not_found", False),
        (
            lambda client: client.submit(Status(), idempotency_key="a b"),
            400,
            "invalid_idempotency_key",
            False,
        ),
        (lambda client: read_all(client, JOB_ID), 404, "job_not_found", False),
    ],
)
async def test_an_error_answer_is_rejected_with_its_own_words(
    client: JobClient, ask: Callable[[JobClient], Any], status: int, code: str, retryable: bool
) -> None:
    with pytest.raises(Rejected) as caught:
        await ask(client)

    assert (caught.value.status, caught.value.code, caught.value.retryable) == (status, code, retryable)
    assert caught.value.details


async def test_a_stopping_service_rejects_for_now(client: JobClient, service: Running) -> None:
    service.server.stopping = True

    with pytest.raises(Rejected) as caught:
        await client.submit(Status())
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (503, "shutting_down", True)


async def test_output_that_is_no_longer_kept_is_rejected() -> None:
    clock = ManualClock()
    async with running(HANDLERS, clock=clock) as service, JobClient(service.url, timeouts=QUICK) as client:
        accepted = await client.submit(ModelList())
        await read_all(client, accepted.job_id)
        await eventually(lambda: service.server.registry.get(accepted.job_id).readers == 0, "the reader left")
        clock.now += LOG_RETENTION_S + 1
        service.server.registry.sweep(clock.now)

        with pytest.raises(Rejected) as caught:
            await read_all(client, accepted.job_id)
    assert (caught.value.status, caught.value.code) == (410, "output_expired")


def answer(status: int, body: bytes, content_type: str = "application/json") -> list[bytes]:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return [head.encode() + b"Connection: close\r\n\r\n" + body]


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad gateway</html>", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"error":1}', b"null"]
)
@pytest.mark.parametrize("status", [400, 404, 502, 503])
async def test_an_error_answer_of_another_shape_is_rejected_too(status: int, body: bytes) -> None:
    async with scripted(answer(status, body)) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(Rejected) as caught:
            await client.submit(Status())
        assert (caught.value.status, caught.value.code) == (status, "rejected")
        assert str(status) in caught.value.details

        # A stream that may be had later is asked for again; one that may not is refused at once.
        with pytest.raises(StreamCut if status == 503 else Rejected, match=str(status)):
            await read_all(client, JOB_ID)


@pytest.mark.parametrize(
    "body",
    [b"", b"hello", b"{}", b"\xff", b"[" * 100_000, b'{"job_id":"../x","sse_url":"/"}', b'{"job_id":1}'],
)
async def test_a_success_that_cannot_be_read_is_a_protocol_error(body: bytes) -> None:
    async with scripted(answer(200, body)) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(ProtocolError):
            await client.submit(Status())


async def test_a_redirect_is_not_followed() -> None:
    """F50."""
    redirect = [
        b"HTTP/1.1 307 X\r\nLocation: http://169.254.169.254/\r\n",
        b"Content-Length: 0\r\nConnection: close\r\n\r\n",
    ]
    async with scripted(redirect) as (url, heads), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(ProtocolError):
            await client.submit(Status())
    assert len(heads) == 1


async def test_nobody_there_is_unreachable() -> None:
    with socket.socket() as reserved:  # bound, so that nobody else gets its port, and not listened on
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        async with JobClient(url, timeouts=PATIENT) as client:
            with pytest.raises(Unreachable) as caught:
                await client.submit(Status())
    assert url in caught.value.details
    assert caught.value.retryable


Conversation = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(speak: Conversation) -> AsyncIterator[str]:
    """Serve each connection with `speak`, until it is lost; give the URL."""
    speaking: set[asyncio.StreamWriter] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        speaking.add(writer)
        try:
            await speak(reader, writer)
        except OSError:
            pass
        finally:
            speaking.discard(writer)
            writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        await eventually(lambda: not speaking, "the connections are closed")


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([b""], "nothing answers there"),
        ([b"nonsense\r\n\r\n"], "the connection was lost"),
        ([b"HTTP/1.1 200 OK\r\nContent-Le"], "(nothing answers there|the connection was lost)"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"], "the connection was lost"),
        (
            [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"],
            "the connection was lost",
        ),
        (None, "it did not answer in time"),
    ],
    ids=["closed", "no-http", "cut-head", "cut-body", "no-gzip", "silent"],
)
async def test_a_lost_answer_is_unreachable_and_says_how(chunks: list[bytes] | None, reason: str) -> None:
    timeouts = Timeouts(connect=600, request=0.5) if chunks is None else PATIENT
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=timeouts) as client:
        with pytest.raises(Unreachable) as caught:
            await client.submit(Status())
    assert re.fullmatch(rf"No answer from {url} \({reason}\)\. Is it running there\?", caught.value.details)


async def test_a_connection_that_is_reset_is_unreachable() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()

    async with serving(reset) as url, JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(Unreachable, match="nothing answers there"):
            await client.submit(Status())
        with pytest.raises(StreamCut, match="nothing answers there"):
            await read_all(client, JOB_ID)


async def test_tls_that_cannot_be_agreed_on_is_unreachable() -> None:
    async with scripted([b"nonsense\r\n\r\n"]) as (url, _):
        secure = url.replace("http:", "https:")
        async with JobClient(secure, timeouts=Timeouts(connect=0.5)) as client:
            with pytest.raises(Unreachable, match="nothing answers there"):
                await client.submit(Status())


@pytest.mark.parametrize("url", ["localhost:7833", "ftp://localhost:1", "http://h:99999", "http://[::1", ""])
async def test_an_address_that_is_none_is_unreachable(url: str) -> None:
    async with JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(Unreachable, match="no URL of a service"):
            await client.submit(Status())
        with pytest.raises(StreamCut, match="no URL of a service"):
            await read_all(client, JOB_ID)


async def test_an_answer_that_drips_times_out_as_a_whole() -> None:
    """It was waited for as long as something came."""

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.05)

    async with serving(drip) as url, JobClient(url, timeouts=Timeouts(connect=600, request=0.5)) as client:
        with anyio.fail_after(HANGS_S), pytest.raises(Unreachable, match="in time"):
            await client.get(JOB_ID)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_a_body_that_is_never_read_times_out() -> None:
    """It was waited for without end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with JobClient(url, timeouts=Timeouts(connect=600, request=0.5)) as client:
            with anyio.fail_after(HANGS_S), pytest.raises(Unreachable, match="in time"):
                await client.post_json("/v1/large", "x" * 30_000_000)


async def test_proxies_of_the_environment_are_not_used(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with JobClient(service.url, timeouts=QUICK) as client:
        assert (await client.get_json("/v1/info", ServiceInfo)).name == "worker"


async def test_what_a_request_carries() -> None:
    with_cookie = [b"HTTP/1.1 404 X\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"]
    async with (
        scripted(with_cookie) as (url, heads),
        JobClient(f"{url}/under/", token="t", timeouts=PATIENT) as client,
    ):
        with pytest.raises(Rejected):
            await client.submit(Status(), correlation_id="c", respond_async=True, idempotency_key="k")
        with pytest.raises(Rejected):
            await read_all(client, JOB_ID, Position(3, 4))
        assert not await client.cancel(JOB_ID, correlation_id="d")
    submit, read, cancel = (head.decode().split("\r\n") for head in heads)

    assert submit[0] == "POST /under/v1/jobs HTTP/1.1"
    assert {
        "Authorization: Bearer t",
        "Content-Type: application/json",
        "X-Correlation-ID: c",
        "Prefer: respond-async",
        "Idempotency-Key: k",
    } < set(submit)
    assert read[0] == f"GET /under/v1/jobs/{JOB_ID}/stream HTTP/1.1"
    assert {"Authorization: Bearer t", "Accept: text/event-stream", "Last-Event-ID: 3-4"} < set(read)
    assert cancel[0] == f"DELETE /under/v1/jobs/{JOB_ID} HTTP/1.1"
    assert {"Authorization: Bearer t", "X-Correlation-ID: d"} < set(cancel)
    assert not any(line.startswith("Cookie:") for line in (*submit, *read, *cancel))


async def test_a_client_that_is_closed_asks_nothing_more(service: Running) -> None:
    unused, used = JobClient(service.url, timeouts=PATIENT), JobClient(service.url, timeouts=PATIENT)
    await used.get_json("/v1/info", ServiceInfo)
    for client in (unused, used):
        await client.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await client.get_json("/v1/info", ServiceInfo)
        await client.aclose()


async def test_closing_a_client_cuts_the_streams_that_are_being_read(service: Running) -> None:
    client = JobClient(service.url, timeouts=PATIENT)  # with its long timeouts: they are not what ends it
    job_id = (await client.submit(Status())).job_id
    began = asyncio.Event()

    async def read_the_job() -> None:
        async for _ in client.stream(job_id):
            began.set()

    with anyio.fail_after(HANGS_S):
        reading = asyncio.ensure_future(read_the_job())
        await began.wait()
        await client.aclose()
        with pytest.raises(StreamCut):
            await reading


async def test_a_submit_that_is_never_answered_times_out() -> None:
    timeouts = Timeouts(connect=600, request=0.1)
    async with scripted(None) as (url, _), JobClient(url, timeouts=timeouts) as client:
        with anyio.fail_after(HANGS_S), pytest.raises(Unreachable, match="in time"):
            await client.submit(Status())


async def test_a_submit_whose_answer_is_cut_is_unreachable() -> None:
    cut_off = [b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"]
    async with scripted(cut_off) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(Unreachable):
            await client.submit(Status())


# --- streams that break --------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [[300], [700, 900, 1300, 5000], [1, 2, 3, 2000], [600] * 4])
async def test_a_stream_goes_on_after_each_cut(service: Running, relay: TcpRelay, limits: list[int]) -> None:
    prompt = " ".join(f"word{number}" for number in range(300))
    relay.limits = list(limits)
    async with (
        JobClient(service.url, timeouts=PATIENT) as direct,
        JobClient(relay.url, timeouts=PATIENT) as client,
    ):
        accepted = await direct.submit(Infer(model="m", prompt=prompt, resume_window_s=60))
        whole: list[AnyEvent] = []
        async with aclosing(client.stream_from(accepted.job_id, START)) as events:
            async for position, event in events:
                whole.append(event)
                n, i = position
                assert n + i == len(whole)

    assert text_of(whole) == f"{prompt} "
    assert sum(isinstance(event, Narration) for event in whole) == 30
    assert isinstance(whole[-1], ExecuteComplete)
    assert relay.accepted == len(limits) + 1


async def test_a_stream_can_be_taken_up_by_another_client(service: Running, client: JobClient) -> None:
    accepted = await client.submit(Infer(model="m", prompt="a b c", resume_window_s=60))
    async with aclosing(client.stream_from(accepted.job_id, START)) as events:
        position = await anext(at async for at, event in events if isinstance(event, Token))
    async with JobClient(service.url, timeouts=PATIENT) as other:
        rest = await read_all(other, accepted.job_id, position)

    assert text_of(rest) == "b c "


async def test_a_stream_that_cannot_be_resumed_is_cut(relay: TcpRelay) -> None:
    """F23."""
    events: list[AnyEvent] = []

    async def read(client: JobClient, job_id: str) -> None:
        async for event in client.stream(job_id):
            events.append(event)
            relay.refusing = True
            relay.cut()

    async with JobClient(relay.url, timeouts=QUICK) as client:
        accepted = await client.submit(Status())
        with anyio.fail_after(HANGS_S), pytest.raises(StreamCut) as caught:
            await read(client, accepted.job_id)

    assert [type(event) for event in events] == [Execute]
    assert accepted.job_id in caught.value.details
    assert "1-0" in caught.value.details
    assert caught.value.retryable


@pytest.mark.parametrize(
    "chunks",
    [
        [SSE_HEAD],
        [SSE_HEAD, frame("1-0", EXECUTE)],
        [SSE_HEAD, frame("1-0", EXECUTE), frame("1-1", token("a"))[:-1]],
        [SSE_HEAD, frame("1-0", EXECUTE), frame("2-0", END)[:-2]],
        [SSE_HEAD, frame("1-0", EXECUTE), b"data: [DONE]"],
        [SSE_HEAD, b": ping\n\n"],
        [SSE_HEAD[:20]],
        [b""],
        [b"nonsense\r\n\r\n"],
        [SSE_HEAD.replace(b"text/event-stream", b"text/html"), b"<html>"],
        [SSE_HEAD.replace(b"Connection", b"Content-Length: 9999\r\nConnection"), frame("1-0", EXECUTE)],
        [SSE_HEAD.replace(b"Connection", b"Transfer-Encoding: chunked\r\nConnection"), b"5\r\nid: "],
    ],
    ids=lambda chunks: repr(chunks[-1])[:30],
)
async def test_an_end_before_the_terminal_event_is_never_a_success(chunks: list[bytes]) -> None:
    """F23."""
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with anyio.fail_after(HANGS_S), pytest.raises(StreamCut):
            await read_all(client, JOB_ID)


async def test_done_without_a_terminal_event_is_never_a_success() -> None:
    """F23."""
    chunks = [SSE_HEAD, frame("1-0", EXECUTE), b"data: [DONE]\n\n"]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with anyio.fail_after(HANGS_S), pytest.raises((StreamCut, ProtocolError)):
            await read_all(client, JOB_ID)


async def test_the_terminal_event_is_the_end_even_without_done() -> None:
    chunks = [SSE_HEAD, frame("1-0", EXECUTE), frame("2-0", END)]
    async with scripted(chunks) as (url, heads), JobClient(url, timeouts=QUICK) as client:
        events = await read_all(client, JOB_ID)

    assert events == [EXECUTE, END]
    assert len(heads) == 1


async def test_a_partial_frame_is_read_again_after_the_cut() -> None:
    whole = frame("1-1", token("whole"))
    first = [SSE_HEAD, frame("1-0", EXECUTE), whole[: len(whole) // 2]]
    second = [SSE_HEAD, b"retry: 500\n\n", whole, frame("2-1", END), b"data: [DONE]\n\n"]
    async with scripted(first, second) as (url, heads), JobClient(url, timeouts=PATIENT) as client:
        events = await read_all(client, JOB_ID)

    assert events == [EXECUTE, token("whole"), END]
    assert b"last-event-id" not in heads[0].lower()
    assert b"last-event-id: 1-0\r\n" in heads[1].lower()


async def test_a_stream_that_falls_silent_is_taken_up_again() -> None:
    """F19."""
    over = [SSE_HEAD, frame("1-0", EXECUTE), frame("2-0", END)]
    timeouts = Timeouts(connect=600, request=600, read=0.2, resume=600)
    async with scripted(None, over) as (url, heads), JobClient(url, timeouts=timeouts) as client:
        assert await read_all(client, JOB_ID) == [EXECUTE, END]
    assert len(heads) >= 2  # more where the machine held the second answer up


async def test_a_reader_that_has_all_gets_nothing_and_no_error(client: JobClient) -> None:
    accepted = await client.submit(ModelList())
    positions = [position async for position, _ in client.stream_from(accepted.job_id, START)]

    assert await read_all(client, accepted.job_id, positions[-1]) == []


async def test_a_frame_that_is_no_event_is_a_protocol_error() -> None:
    for bad in (b"id: 1-0\ndata: {}\n\n", b"id: x\ndata: {}\n\n", b"data: ERROR: it broke\n\n"):
        async with scripted([SSE_HEAD, bad]) as (url, _), JobClient(url, timeouts=QUICK) as client:
            with pytest.raises(ProtocolError):
                await read_all(client, JOB_ID)


async def test_narration_of_a_newer_version_is_no_protocol_error() -> None:
    newer = Narration(action="infer_worker", message="There.", data={"rack": 7}, **COMMON)
    chunks = [SSE_HEAD, frame("1-0", newer), frame("2-0", END), b"data: [DONE]\n\n"]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        assert await read_all(client, JOB_ID) == [newer, END]


async def test_pings_are_no_events() -> None:
    """F22: some readers give an empty event for each comment after an `id:`."""
    ping = b": ping\n\n"
    chunks = [
        SSE_HEAD,
        ping,
        b"retry: 500\n\n",
        ping,
        frame("1-0", EXECUTE),
        ping,
        ping,
        frame("2-0", END),
        ping,
    ]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        assert await read_all(client, JOB_ID) == [EXECUTE, END]


# --- bytes ---------------------------------------------------------------------------------------------


def parse(chunks: Iterable[bytes]) -> list[AnyEvent]:
    parser = StreamParser()
    frames = [frame for chunk in chunks for frame in parser.feed(chunk)]
    assert frames.pop() == Frame("", DONE, frames[-1].id)
    return [decode_any_event(frame.data) for frame in frames]


def body_of(events: list[AnyEvent]) -> bytes:
    frames = [frame(f"0-{number}", event) for number, event in enumerate(events, 1)]
    return b"retry: 500\n\n" + b"".join(frames) + frame(f"1-{len(events)}", END) + b"data: [DONE]\n\n"


LINE_ENDS = pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])


@LINE_ENDS
@settings(deadline=None, max_examples=60)
@given(
    said=st.lists(st.text(max_size=20) | st.sampled_from(HARD_TEXTS), max_size=6),
    places=st.lists(st.integers(0, 4000), max_size=12),
)
def test_any_chunking_gives_the_same_stream(line_end: bytes, said: list[str], places: list[int]) -> None:
    """F24."""
    events: list[AnyEvent] = [token(text, index) for index, text in enumerate(said)]
    body = body_of(events).replace(b"\n", line_end)
    bounds = [0, *sorted(place % len(body) for place in places), len(body)]

    assert parse(body[start:end] for start, end in itertools.pairwise(bounds)) == [*events, END]


@LINE_ENDS
def test_every_single_byte_boundary(line_end: bytes) -> None:
    """F24."""
    events: list[AnyEvent] = [token(text, index) for index, text in enumerate(HARD_TEXTS)]
    body = body_of(events).replace(b"\n", line_end)

    assert parse(bytes([byte]) for byte in body) == [*events, END]
    for place in range(1, len(body)):
        assert parse([body[:place], body[place:]]) == [*events, END]


async def test_a_stream_that_comes_byte_by_byte() -> None:
    """F24."""
    events: list[AnyEvent] = [token(text, index) for index, text in enumerate(HARD_TEXTS)]
    chunks = [SSE_HEAD, *(bytes([byte]) for byte in body_of(events))]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=PATIENT) as client:
        assert await read_all(client, JOB_ID) == [*events, END]


def gzipped(head: bytes, *bodies: bytes) -> list[bytes]:
    return [
        head.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection") + gzip.compress(b"".join(bodies))
    ]


async def test_what_a_proxy_has_compressed_is_read() -> None:
    accepted = msgspec.json.encode(JobAccepted(job_id=JOB_ID, sse_url=f"/v1/jobs/{JOB_ID}/stream"))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    stream = gzipped(SSE_HEAD, frame("1-0", EXECUTE), frame("2-0", END))
    answers = scripted(gzipped(head, accepted), stream)
    async with answers as (url, _), JobClient(url, timeouts=QUICK) as client:
        assert (await client.submit(Status())).job_id == JOB_ID
        assert await read_all(client, JOB_ID) == [EXECUTE, END]


async def test_an_answer_that_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_ANSWER_BYTES", 100_000)
    endless = gzipped(SSE_HEAD, b" " * 20_000_000)
    async with scripted(endless) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(ProtocolError, match="answered 200 with more than 100000 bytes"):
            await client.submit(Status())
        with pytest.raises(ProtocolError, match="answered 200 with more than 100000 bytes"):
            await client.get_bytes("/metrics")

    refusal = answer(502, b" " * 1_000_000)
    async with scripted(refusal) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(Rejected, match="answered 502"):
            await client.submit(Status())


async def test_a_frame_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """F24."""
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100_000)
    chunks = [SSE_HEAD, frame("1-0", EXECUTE), b"data: " + b"x" * 1_000_000]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(ProtocolError, match="a frame is longer than 100000 bytes"):
            await read_all(client, JOB_ID)
        with pytest.raises(StreamCut, match="a frame is longer than 100000 bytes"):
            await anext(client.heartbeats("", Beat))


async def test_a_token_of_a_megabyte_goes_through(client: JobClient) -> None:
    """F24."""
    accepted = await client.submit(HiveList())
    with anyio.fail_after(HANGS_S):
        events = await read_all(client, accepted.job_id)

    assert text_of(events) == LARGE_TEXT


@pytest.mark.parametrize("text", HARD_TEXTS)
async def test_hard_texts_go_through_a_real_server(client: JobClient, text: str) -> None:
    accepted = await client.submit(Infer(model="m", prompt=text.replace(" ", "_")))
    events = await read_all(client, accepted.job_id)

    assert text_of(events) == text.replace(" ", "_") + " "


# --- leaving -------------------------------------------------------------------------------------------


async def test_leaving_a_stream_closes_its_connection(service: Running, client: JobClient) -> None:
    """F16, F27."""
    accepted = await client.submit(Status())
    job = service.server.registry.get(accepted.job_id)
    for _ in range(20):
        async with aclosing(client.stream(accepted.job_id)) as events:
            await anext(events)
    await eventually(lambda: job.readers == 0, "all readers are gone")


async def test_many_cancelled_streams_leave_no_connection(service: Running, relay: TcpRelay) -> None:
    """F27."""
    async with JobClient(relay.url, timeouts=PATIENT) as client:
        accepted = await client.submit(Status())
        async with anyio.create_task_group() as tasks:
            for _ in range(150):
                tasks.start_soon(read_all, client, accepted.job_id)
            job = service.server.registry.get(accepted.job_id)
            await eventually(lambda: job.readers == 150, "all read at once")
            tasks.cancel_scope.cancel()
        await eventually(lambda: job.readers == 0, "all readers are gone")
        await eventually(lambda: relay.open <= 2, "all stream connections are closed")


def open_sockets() -> int:
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum("socket:" in link for link in links)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
async def test_a_thousand_cancelled_requests_leave_no_descriptor(service: Running, relay: TcpRelay) -> None:
    """F27: submits and streams, left at any moment of theirs."""
    async with JobClient(relay.url, timeouts=PATIENT) as client:
        accepted = await client.submit(Status())
        before = open_sockets()
        for number in range(1000):
            task = asyncio.ensure_future(
                client.submit(ModelList()) if number % 2 else read_all(client, accepted.job_id)
            )
            for _ in range(number % 40):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        job = service.server.registry.get(accepted.job_id)
        await eventually(lambda: job.readers == 0, "all readers are gone")
        await eventually(lambda: relay.open <= 2, "all connections but the kept ones are closed")
        await eventually(lambda: open_sockets() <= before + 4, "their descriptors are free")
        assert (await client.get(accepted.job_id)).job_id == accepted.job_id


# --- heartbeats ----------------------------------------------------------------------------------------


class Beat(msgspec.Struct):
    number: int


async def test_heartbeats_decode_and_their_end_is_a_cut() -> None:
    chunks = [SSE_HEAD, b': ping\n\nevent: heartbeat\ndata: {"number":1}\n\nevent: other\ndata: x\n\n']
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        beats = client.heartbeats("", Beat)
        assert await anext(beats) == Beat(1)
        with pytest.raises(StreamCut):
            await anext(beats)


@pytest.mark.parametrize(
    "data",
    [b"no json", b'{"number":"x"}', b'{"new":' + b"[" * 100_000 + b"]" * 100_000 + b',"number":1}'],
    ids=["no-json", "wrong-type", "deeply-nested"],
)
async def test_a_heartbeat_that_cannot_be_read_is_a_cut(data: bytes) -> None:
    """F41, F48: whoever follows a service outlasts what it says."""
    chunks = [SSE_HEAD, b"event: heartbeat\ndata: " + data + b"\n\n"]
    async with scripted(chunks) as (url, _), JobClient(url, timeouts=QUICK) as client:
        with pytest.raises(StreamCut):
            await anext(client.heartbeats("", Beat))


# --- follow --------------------------------------------------------------------------------------------


class Following:
    """A follower in a task: what it got and how its connection fared."""

    def __init__(self, client: JobClient, *, output: bool = True) -> None:
        self.client = client
        self.output = output
        self.batches: list[list[AnyEvent]] = []
        self.connections: list[bool] = []

    @property
    def events(self) -> list[AnyEvent]:
        return [event for batch in self.batches for event in batch]

    async def run(self) -> None:
        async for batch in self.client.follow(output=self.output, on_connection=self.connections.append):
            assert batch
            self.batches.append(batch)

    def has_end_of(self, job_id: str) -> Callable[[], bool]:
        return lambda: any(event.job_id == job_id and event.kind == "terminal" for event in self.events)


async def test_following_gives_all_jobs_in_batches(service: Running, client: JobClient) -> None:
    following, public = Following(client), Following(client, output=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(following.run)
        tasks.start_soon(public.run)
        await eventually(lambda: following.connections == public.connections == [True], "connected")
        prompt = " ".join(["w"] * 2000)
        jobs = [await client.submit(Infer(model="m", prompt=prompt), respond_async=True) for _ in range(3)]
        for job in jobs:
            await eventually(following.has_end_of(job.job_id), "all came")
            await eventually(public.has_end_of(job.job_id), "all came to the other")
        tasks.cancel_scope.cancel()

    for job in jobs:
        own = [event for event in following.events if event.job_id == job.job_id]
        assert text_of(own) == "w " * 2000
        assert own == [
            msgspec.structs.replace(event, event_id=str(position))
            async for position, event in _open_and_read(service, job.job_id)
        ]
    assert len(following.batches) < len(following.events) / 5
    assert {event.kind for event in public.events} == {"narration", "terminal"}


async def _open_and_read(service: Running, job_id: str) -> AsyncIterator[tuple[Position, AnyEvent]]:
    async with JobClient(service.url, timeouts=PATIENT) as client:
        async for found in client.stream_from(job_id, START):
            yield found


@pytest.mark.parametrize("limit", [1500, 5000, 20_000])
async def test_following_goes_on_after_a_cut(service: Running, relay: TcpRelay, limit: int) -> None:
    async with (
        JobClient(relay.url, timeouts=PATIENT) as client,
        JobClient(service.url, timeouts=PATIENT) as direct,
    ):
        following = Following(client)
        async with anyio.create_task_group() as tasks:
            relay.limits = [limit]
            tasks.start_soon(following.run)
            await eventually(lambda: following.connections, "connected")
            job = await direct.submit(
                Infer(model="m", prompt=" ".join(map(str, range(1000)))), respond_async=True
            )
            await eventually(following.has_end_of(job.job_id), "all came")
            tasks.cancel_scope.cancel()

    assert text_of(following.events) == "".join(f"{number} " for number in range(1000))
    assert following.connections == [True, False, True, False]
    assert not any(isinstance(event, Gap) for event in following.events)
    assert any(b"last-event-id" in request.lower() for request in relay.requests)


async def test_a_service_that_lost_its_memory_gives_one_gap() -> None:
    async with (
        running(HANDLERS) as first,
        running(HANDLERS) as second,
        tcp_relay(first.port) as relay,
        JobClient(relay.url, timeouts=PATIENT) as client,
        anyio.create_task_group() as tasks,
    ):
        following = Following(client)
        tasks.start_soon(following.run)
        await eventually(lambda: following.connections == [True], "connected")
        relay.target = second.port
        relay.cut()
        await eventually(lambda: following.events, "something came")
        accepted = await client.submit(ModelList(), respond_async=True)
        await eventually(following.has_end_of(accepted.job_id), "what followed came")
        tasks.cancel_scope.cancel()

    assert [type(event) for event in following.events] == [Gap, Execute, Error, ExecuteError]
    assert following.connections == [True, False, True, False]


async def test_a_frame_cut_just_before_its_end_comes_once() -> None:
    def firehose_frame(seq: int, event: AnyEvent) -> bytes:
        return b"id: ab12-%d\ndata: %b\n\n" % (seq, encode_event(event))

    head = b"retry: 500\nid: ab12-%d\n\n"
    first, second = firehose_frame(1, token("first")), firehose_frame(2, token("second"))
    cut = [SSE_HEAD, head % 0, first, second[:-1]]
    rest = [SSE_HEAD, head % 1, second]
    async with scripted(cut, rest, None) as (url, heads), JobClient(url, timeouts=PATIENT) as client:
        following = Following(client)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.run)
            await eventually(lambda: len(heads) == 3, "both were read")
            tasks.cancel_scope.cancel()

    assert following.events == [token("first"), token("second")]
    assert [
        b"last-event-id: ab12-%d\r\n" % seq in h.lower() for seq, h in zip((1, 2), heads[1:], strict=True)
    ] == [True] * 2


async def test_following_outlasts_refusals_and_nonsense(service: Running, relay: TcpRelay) -> None:
    nonsense = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"nonsense"]
    async with (
        scripted(answer(503, b""), nonsense, [b""]) as (url, heads),
        JobClient(url, timeouts=PATIENT) as client,
    ):
        following = Following(client)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.run)
            await eventually(lambda: len(heads) >= 4, "it came again")
            tasks.cancel_scope.cancel()
    assert following.connections == []

    async with JobClient(relay.url, timeouts=PATIENT) as client:
        following = Following(client)
        relay.refusing = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.run)
            await eventually(lambda: relay.accepted >= 2, "it tries again")
            assert following.connections == []
            relay.refusing = False
            await eventually(lambda: following.connections == [True], "connected")
            tasks.cancel_scope.cancel()


async def test_a_follower_that_is_told_that_the_service_answers_connects_at_once(
    relay: TcpRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F36: a hive that is listed as online is followed by then, whatever the backoff has grown to."""
    monkeypatch.setattr(client_module, "backoff_s", lambda: itertools.repeat(3600.0))
    relay.refusing = True
    async with JobClient(relay.url, timeouts=PATIENT) as client, anyio.create_task_group() as tasks:
        following = Following(client)
        tasks.start_soon(following.run)
        await eventually(lambda: relay.accepted, "it tries")
        # Whether the attempt is over by now or not.
        client.hurry()
        relay.refusing = False
        await eventually(lambda: following.connections == [True], "connected")
        tasks.cancel_scope.cancel()


async def test_a_follower_that_is_hurried_during_an_attempt_tries_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "backoff_s", lambda: itertools.repeat(3600.0))
    begun, hurried = anyio.Event(), anyio.Event()

    async def refuse_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        tries.append(begun.is_set())
        begun.set()
        await hurried.wait()
        writer.write(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    tries: list[bool] = []
    async with (
        serving(refuse_late) as url,
        JobClient(url, timeouts=PATIENT) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(Following(client).run)
        await begun.wait()
        client.hurry()
        hurried.set()
        await eventually(lambda: tries == [False, True], "it tries again, once")
        tasks.cancel_scope.cancel()


async def test_a_client_that_is_closed_while_a_reader_waits_cuts_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hive may be forgotten, or move, while what it answered is read again."""
    waits = anyio.Event()

    def backoff() -> Iterator[float]:
        waits.set()
        yield 0.2

    monkeypatch.setattr(client_module, "backoff_s", backoff)
    async with scripted([b""]) as (url, _):
        client = JobClient(url, timeouts=PATIENT)

        async def close() -> None:
            await waits.wait()
            await client.aclose()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(close)
            with pytest.raises((StreamCut, Unreachable)):
                async for _ in client.stream(new_job_id()):
                    pass


async def test_the_contracts_errors_are_what_callers_catch() -> None:
    assert not issubclass(Rejected, InvalidRequest)
    assert {cls.default_code for cls in (Unreachable, StreamCut, ProtocolError)} == {
        "unreachable",
        "stream_cut",
        "protocol_error",
    }
