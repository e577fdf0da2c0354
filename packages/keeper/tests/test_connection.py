"""A stream that is lost: who is told, what is tried, and when it is given up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace

import anyio
import msgspec
import pytest

from rbee_contracts.sse import START
from rbee_job_client import Rejected, StreamCut, Timeouts
from rbee_keeper import connection
from rbee_keeper.connection import PatientClient

JOB = "job-00000000-0000-4000-8000-000000000000"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
RECORD = msgspec.json.encode(
    {"job_id": JOB, "operation": "infer", "state": "running", "correlation_id": "c", "created_at": "x"}
)


def answer(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def token(index: int) -> bytes:
    event = {
        "action": "token",
        "message": str(index),
        "index": index,
        "actor": "queen",
        "job_id": JOB,
        "correlation_id": "c",
        "timestamp": "2026-01-02T03:04:05Z",
    }
    return b"id: 0-%d\ndata: %s\n\n" % (index + 1, msgspec.json.encode(event))


def ending() -> bytes:
    event = {
        "action": "execute_complete",
        "message": "done",
        "formatted": "done",
        "actor": "queen",
        "job_id": JOB,
        "correlation_id": "c",
        "timestamp": "2026-01-02T03:04:05Z",
    }
    return b"id: 1-9\ndata: %s\n\ndata: [DONE]\n\n" % msgspec.json.encode(event)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time of the connection's own run out, however slow the machine is."""
    monkeypatch.setattr(connection, "Timeouts", partial(Timeouts, connect=600, read=600))


class Service:
    """Answers stream requests and record requests from scripts; the last answer of each is given for ever."""

    def __init__(self, streams: list[bytes], records: list[bytes]) -> None:
        self._scripts = {"stream": streams, "record": records}
        self.asked: list[str] = []

    async def __call__(self, connection: anyio.abc.SocketStream) -> None:
        async with connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await connection.receive()
            head = request.decode().lower()
            kind = "stream" if "/stream" in head.splitlines()[0] else "record"
            self.asked.append(kind)
            script = self._scripts[kind]
            await connection.send(script.pop(0) if len(script) > 1 else script[0])


@asynccontextmanager
async def client_of(
    service: Service, told: list[bool], resume_s: float = 600.0
) -> AsyncIterator[PatientClient]:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, service)
        url = f"http://127.0.0.1:{port}"
        client = PatientClient(url, token=None, on_connection=told.append, resume_s=resume_s)
        async with client:
            yield client
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_lost_stream_goes_on_where_it_was_and_both_are_told() -> None:
    told: list[bool] = []
    service = Service(
        [HEAD + token(0), HEAD + token(1) + ending()],
        [answer("503 Service Unavailable", b"{}"), answer("200 OK", RECORD)],
    )
    async with client_of(service, told) as client:
        events = [event async for event in client.stream(JOB)]

    assert [event.message for event in events] == ["0", "1", "done"]
    assert told == [False, True]
    assert service.asked == ["stream", "record", "record", "stream"]


@pytest.mark.anyio
async def test_a_job_that_is_gone_is_not_waited_for() -> None:
    told: list[bool] = []
    body = msgspec.json.encode({"error": "Not found", "details": "No job.", "code": "job_not_found"})
    service = Service([HEAD + token(0)], [answer("404 Not Found", body)])
    async with client_of(service, told) as client:
        with pytest.raises(Rejected) as caught:
            _ = [event async for event in client.stream(JOB)]

    assert caught.value.code == "job_not_found"
    assert told == [False]


@pytest.mark.anyio
async def test_a_stream_that_is_cut_again_and_again_is_given_up_with_the_way_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []

    class Counted:
        """Time of which a tenth of a second passes with each word of the connection."""

        def time(self) -> float:
            return len(told) * 0.1

    service = Service([HEAD + token(0), HEAD], [answer("200 OK", RECORD)])
    monkeypatch.setattr(connection, "asyncio", SimpleNamespace(get_running_loop=Counted, sleep=asyncio.sleep))
    async with client_of(service, told, resume_s=0.5) as client:
        with pytest.raises(StreamCut, match=f"rbee job stream {JOB} --from 0-1"):
            _ = [event async for event in client.stream_from(JOB, START)]

    assert told == [False, True, False, True, False]
