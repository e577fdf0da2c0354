"""What one caller may take of a service: bytes, seconds, connections. Real sockets."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
import httpx
import psutil
import pytest
from rbee_inprocess import PATIENCE_S, Frame, Running, actions, eventually, exchange, let_pass, running

from rbee_contracts.ids import new_job_id, step_key
from rbee_contracts.operations import Infer, Status
from rbee_job_server import JobContext, protocol
from rbee_job_server.guards import HOP_EXTRA_BYTES, Limits

DEADLINE_S = 0.3
LIMIT = 1_000_000


async def speak(operation: Infer, context: JobContext) -> None:
    context.emit_token("one")
    await anyio.sleep(3 * Limits().receive_deadline_s if operation.prompt == "slow" else 0)
    context.emit_token("two")


async def nothing(_: Status, __: JobContext) -> None: ...


@asynccontextmanager
async def serving(**limits: float) -> AsyncIterator[Running]:
    kept = Limits(**limits)  # type: ignore[arg-type]
    async with running({Infer: speak, Status: nothing}, limits=kept) as service:
        yield service


@pytest.fixture
async def service() -> AsyncIterator[Running]:
    """A service whose callers have all the time they need."""
    async with serving(receive_deadline_s=3600) as service:
        yield service


@pytest.fixture
async def strict() -> AsyncIterator[Running]:
    """A service whose callers have very little time."""
    async with serving(receive_deadline_s=DEADLINE_S) as service:
        yield service


def refusal(answer: bytes) -> tuple[int, str]:
    """Check that an answer is one whole error of ours; give its status and code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)
    assert set(error) == {"error", "details", "code", "correlation_id"}
    assert all(error.values())
    assert b"content-length: %d" % len(body) in head
    assert b"x-correlation-id: " + error["correlation_id"].encode() in head.lower()
    return int(head.split()[1]), error["code"]


async def drip(port: int, first: bytes, drop: bytes, every_s: float = 0.05) -> tuple[bytes, float]:
    """Send `first` and then `drop` again and again; give the answer, and when the connection was closed.

    The quickest of up to three, as a busy machine delays some and a missing deadline all. One that would not
    be closed while anything comes fails by `PATIENCE_S`.
    """
    answer, closed_after_s = await drip_once(port, first, drop, every_s)
    for _ in range(2):
        if closed_after_s >= DEADLINE_S + 1:
            _, again_s = await drip_once(port, first, drop, every_s)
            closed_after_s = min(closed_after_s, again_s)
    return answer, closed_after_s


async def drip_once(port: int, first: bytes, drop: bytes, every_s: float) -> tuple[bytes, float]:
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        writer.write(first)
        with suppress(OSError):
            while drop:
                await asyncio.sleep(every_s)
                writer.write(drop)
                await writer.drain()

    sending = asyncio.create_task(send())
    answer = b""
    try:
        with anyio.fail_after(PATIENCE_S), suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                answer += chunk
    finally:
        sending.cancel()
        writer.transport.abort()
    return answer, time.monotonic() - begun


# --- heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rest",
    [
        b"/health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 5_000_000 + b"\r\n\r\n",
        b"/health HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"X%d: y\r\n" % n for n in range(20_000))
        + b"\r\n",
        b"/health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 10_000 + b"\r\n",
        b"/" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"/health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 33_000 + b"\r\n\r\n",
        b"/health HTTP/1.1\r\nHost: localhost\r\n" + b"x" * 5_000_000,
    ],
    ids=[
        "one header",
        "20,000 headers",
        "10,000 tiny headers",
        "address",
        "just too large",
        "name without end",
    ],
)
async def test_a_head_that_is_too_large_is_431(service: Running, rest: bytes) -> None:
    """F46."""
    memory = psutil.Process().memory_info().rss
    answer = await exchange(service.port, b"GET " + rest)

    assert refusal(answer) == (431, "head_too_large")
    assert psutil.Process().memory_info().rss - memory < 30e6
    assert (await service.http.get("/health")).status_code == 200


async def test_a_head_that_is_just_not_too_large_is_served(service: Running) -> None:
    answer = await service.http.get("/health", headers={"X": "x" * 32_000})

    assert answer.status_code == 200


async def test_each_request_of_a_connection_has_its_own_head(service: Running) -> None:
    """What earlier requests of the connection had is not counted again."""
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n%b\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    for _ in range(3):
        writer.write(request % b"")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    writer.write(request % b"" + request % b"Connection: close\r\n")
    both = await reader.read()

    assert both.count(b"HTTP/1.1 200") == 2
    writer.close()


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/1.1\r\n bad\r\n\r\n"]
)
async def test_what_is_no_http_is_400_in_the_one_shape(service: Running, junk: bytes) -> None:
    assert refusal(await exchange(service.port, junk)) == (400, "invalid_http")


async def test_an_upgrade_is_not_made(service: Running) -> None:
    answer = await exchange(
        service.port,
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    )

    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_long_correlation_id_is_replaced(service: Running) -> None:
    """F49."""
    answer = await service.http.get("/health", headers={"X-Correlation-ID": "c" * 10_000})

    assert answer.headers["X-Correlation-ID"].startswith("corr-")


# --- bodies --------------------------------------------------------------------------------------------


def body_of(size: int) -> bytes:
    body = b'{"operation":"infer","model":"m","prompt":"%b"}'
    return body % (b"x" * (size - len(body) + 2))


async def test_a_body_up_to_the_limit_is_taken(service: Running) -> None:
    answer = await service.http.post("/v1/jobs", content=body_of(LIMIT))

    assert answer.status_code == 200


async def test_a_body_that_says_it_is_too_large_is_413_at_once(service: Running) -> None:
    """F46: the answer comes though the body never does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (LIMIT + 1))
    with anyio.fail_after(PATIENCE_S):
        answer = await reader.readuntil(b"}")
    writer.close()

    assert refusal(answer) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/info", "/nope"])
async def test_413_reaches_a_client_that_sends_all_before_it_reads(service: Running, path: str) -> None:
    answer = await service.http.post(path, content=body_of(LIMIT + 1))

    assert answer.status_code == 413
    assert answer.json()["code"] == "body_too_large"
    assert answer.json()["correlation_id"] == answer.headers["X-Correlation-ID"]
    assert (await service.http.get("/health")).status_code == 200


async def test_a_body_in_pieces_is_413_where_it_passes_the_limit(service: Running) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield body_of(LIMIT)
        yield b" "

    answer = await service.http.post("/v1/jobs", content=pieces())

    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


async def test_an_endless_body_takes_no_memory(service: Running) -> None:
    """F46: 200 MB in pieces; the answer comes after the first of them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"%x\r\n%b\r\n" % (65_536, b" " * 65_536)
    memory = psutil.Process().memory_info().rss
    most = 0
    for _ in range(3_200):
        writer.write(piece)
        await writer.drain()
        most = max(most, psutil.Process().memory_info().rss - memory)
    answer = await reader.readuntil(b"}")
    writer.transport.abort()

    assert refusal(answer) == (413, "body_too_large")
    assert most < 30e6


async def test_a_hop_may_pass_on_a_body_that_the_hop_above_took(service: Running) -> None:
    """It adds where the job runs, so the limit must not be met between two hops."""
    key = {"Idempotency-Key": step_key(new_job_id(), "infer"), "Prefer": "respond-async"}
    passed = await service.http.post("/v1/jobs", content=body_of(LIMIT + 500), headers=key)
    too_large = await service.http.post("/v1/jobs", content=body_of(LIMIT + HOP_EXTRA_BYTES + 1), headers=key)

    assert (passed.status_code, too_large.status_code) == (202, 413)


# --- deadlines -----------------------------------------------------------------------------------------

HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"GET /", b"x"),
        (b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b""),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n", b" "),
    ],
    ids=["silence", "empty lines", "address", "headers", "body", "no body", "chunks", "expect"],
)
async def test_a_request_that_is_not_there_in_time_ends_its_connection(
    strict: Running, first: bytes, drop: bytes
) -> None:
    """F47: by a deadline for all of it, not for each read; others are served meanwhile."""
    served = 0

    async def others() -> None:
        nonlocal served
        while True:
            with suppress(httpx.HTTPError):  # these have little time, too
                answer = await strict.http.get("/health")
                served += answer.status_code == 200

    async with anyio.create_task_group() as meanwhile:
        meanwhile.start_soon(others)
        answer, closed_after_s = await drip(strict.port, first, drop)
        for _ in range(5):  # those who ask meanwhile have little time, too
            if served:
                break
            await drip(strict.port, first, drop)
        assert served, "nobody else was served meanwhile"
        meanwhile.cancel_scope.cancel()

    final = answer.rpartition(b"HTTP/1.1 100 Continue\r\n\r\n")[2]
    assert refusal(final) == (408, "request_timeout")
    assert DEADLINE_S * 0.9 < closed_after_s < DEADLINE_S + 1


async def test_the_second_request_of_a_connection_has_a_deadline_too(strict: Running) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    answer, closed_after_s = await drip(strict.port, request + b"GET /hea", b"l")

    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"408" in answer
    assert closed_after_s < DEADLINE_S + 1


async def test_what_still_comes_after_413_has_the_same_deadline(strict: Running) -> None:
    answer, closed_after_s = await drip(strict.port, HEAD + b"Content-Length: 2000000\r\n\r\n", b" " * 100)

    assert refusal(answer) == (413, "body_too_large")
    assert closed_after_s < DEADLINE_S + 1


async def passes(seconds: float) -> None:
    """Have time go by, and what was to come in it be done with."""
    let_pass(seconds)
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_answer_may_take_longer_than_the_request() -> None:
    async with serving() as service:
        job_id = await service.submit({"operation": "infer", "model": "m", "prompt": "slow"})
        job = service.server.registry.get(job_id)
        frames: list[Frame] = []

        async def read() -> None:
            frames.extend(await service.read(job_id))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await eventually(lambda: job.outputs, "it has begun to answer")
            for _ in range(4):
                await passes(Limits().receive_deadline_s + protocol.HELD_UP_S / 2)

    assert actions(frames) == ["execute", "token", "token", "execute_complete", "[DONE]"]


async def test_a_request_that_this_process_was_too_busy_to_read_is_served() -> None:
    """An engine that loads holds up the loop; that is not the caller's fault."""
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(HEAD + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: 22\r\n\r\n{")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        await passes(Limits().receive_deadline_s + 2 * protocol.HELD_UP_S)
        writer.write(b'"operation":"status"}')

        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


# --- connections ---------------------------------------------------------------------------------------


async def test_an_idle_connection_outlasts_those_who_use_it_and_then_ends() -> None:
    """httpx gives up idle connections after 5 s, and nginx after 60; who is closed first meets the close."""
    async with serving() as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        for _ in range(2):
            writer.write(HEAD.replace(b"POST /v1/jobs", b"GET /health") + b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"}")
            await passes(65)
        await passes(15)
        with anyio.fail_after(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()


async def test_one_connection_too_many_is_503_and_the_others_go_on() -> None:
    async with serving(max_connections=3, receive_deadline_s=3600) as service:
        held = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(3)]
        for _, writer in held:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        refused = await exchange(service.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for reader, writer in held:
            writer.write(b"Connection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()

        assert refusal(refused) == (503, "too_many_connections")
        assert b"retry-after: " in refused

        async def is_served() -> bool:
            with suppress(httpx.HTTPError):
                return (await service.http.get("/health")).status_code == 200
            return False

        with anyio.fail_after(PATIENCE_S):
            while not await is_served():  # noqa: ASYNC110 (no event tells of it)
                await anyio.sleep(0.01)


async def test_an_idle_connection_makes_room_for_a_new_one() -> None:
    """Or whoever opens connections, asks once on each and leaves them open would shut everybody out."""
    async with serving(max_connections=3, receive_deadline_s=3600) as service:
        held = []
        for _ in range(6):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            held.append((reader, writer))
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with anyio.fail_after(PATIENCE_S):
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        ended = [reader for reader, _ in held if await _is_at_end(reader)]
        for _, writer in held:
            writer.close()

        assert len(ended) == 3


async def _is_at_end(reader: asyncio.StreamReader) -> bool:
    with anyio.move_on_after(0.2):
        return await reader.read() == b""
    return False


async def test_refused_connections_are_closed_even_if_the_caller_goes_on_sending(service: Running) -> None:
    _, closed_after_s = await drip(service.port, b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000, b"x" * 1000)

    assert closed_after_s < protocol.LINGER_S + 1


async def test_a_connection_leaves_nothing_behind(strict: Running) -> None:
    before = len(asyncio.all_tasks())
    for _ in range(20):
        _, writer = await asyncio.open_connection("127.0.0.1", strict.port)
        writer.write(HEAD + b"Content-Length: 10\r\n\r\n")
        await asyncio.sleep(0.005)
        writer.transport.abort()

    await eventually(lambda: len(asyncio.all_tasks()) <= before, "the requests' tasks have ended")


def test_the_process_may_open_as_many_files_as_connections_need() -> None:
    script = """
import resource
from rbee_job_server.guards import allow_open_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
allow_open_files(1000)
soft, now = resource.getrlimit(resource.RLIMIT_NOFILE)
assert now == hard
assert soft >= min(1000, hard), soft
"""
    subprocess.run([sys.executable, "-c", script], check=True)
