"""Services in this process on real ports, connections that fail on command, and time that is only counted."""

import asyncio
import math
import selectors
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import anyio
import httpx
import msgspec
import uvicorn
from msgspec import Struct
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from rbee_contracts.errors import Unavailable
from rbee_contracts.events import AnyEvent, decode_event
from rbee_job_server import Handlers, JobServer, JobServerConfig, bind, build_app
from rbee_job_server.access import AccessConfig
from rbee_job_server.clock import Clock
from rbee_job_server.guards import Limits
from rbee_job_server.serve import web_config

T = TypeVar("T")

PATIENCE_S = 45.0
"""How long a test waits for what must come soon, on a machine that may stop any process for seconds."""


# --- waiting -------------------------------------------------------------------------------------------


async def eventually(condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """Poll until `condition` gives something true; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {timeout_s:g} s still not: {what}"
        await anyio.sleep(0.002)
    return value


# --- counted time --------------------------------------------------------------------------------------


class _CountingSelector(selectors.DefaultSelector):
    """Where a selector would wait, counts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will never come"
            self.now += max(0.0, timeout)
        return ready


class CountedTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only by being waited for: an hour's sleep takes no time."""

    def __init__(self) -> None:
        self._counting = _CountingSelector()
        super().__init__(self._counting)

    def time(self) -> float:
        return self._counting.now


def let_pass(seconds: float) -> None:
    """Have the loop's clock go on: what was to come in that time comes now."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


class LoopClock:
    """The running loop's time, for code that takes a clock."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def timestamp(self) -> str:
        return "2026-01-01T00:00:00.000000Z"


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def timestamp(self) -> str:
        return "2026-01-01T00:00:00.000000Z"


def run_counted(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main` in counted time."""

    async def run() -> None:
        await main()

    with asyncio.Runner(loop_factory=CountedTimeLoop) as runner:
        runner.run(run())


# --- services ------------------------------------------------------------------------------------------


class _WebServer(uvicorn.Server):
    """uvicorn without signals and without its polls, which take 0.1 s each."""

    def __init__(self, app: Starlette, limits: Limits) -> None:
        super().__init__(web_config(app, limits))
        self.listening = anyio.Event()
        self.stopped = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.stopped.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        state = self.server_state
        await eventually(lambda: not (state.connections or state.tasks), "all connections closed")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running(Struct):
    """A job server that answers at `url`."""

    server: JobServer
    url: str
    http: httpx.AsyncClient

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def submit(self, operation: Mapping[str, Any], **headers: str) -> str:
        """Submit and give the job's id; `_` in a header's name stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post("/v1/jobs", json=operation, headers=named)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["job_id"])

    async def read(self, job_id: str, last_event_id: str = "") -> "list[Frame]":
        """Read a job's stream to its end."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        answer = await self.http.get(f"/v1/jobs/{job_id}/stream", headers=headers)
        assert answer.status_code == 200, answer.text
        return frames_of(answer.content)


@asynccontextmanager
async def running(
    handlers: Handlers,
    *,
    service: str = "worker",
    actor: str = "worker/w1",
    config: JobServerConfig | None = None,
    clock: Clock | None = None,
    routes: Sequence[BaseRoute] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    not_ready: Callable[[], str | None] = lambda: None,
    access: AccessConfig | None = None,
    limits: Limits | None = None,
    extend: Callable[[JobServer, Starlette], None] = lambda _, __: None,
) -> AsyncIterator[Running]:
    """Run a job server on a port of its own. `extend` may add to its app what needs the server."""
    server = JobServer(service=service, actor=actor, handlers=handlers, config=config, clock=clock)
    app = build_app(
        server,
        name="worker",
        service_id="w1",
        version="0.0.0",
        routes=routes,
        not_ready=not_ready,
        access=access,
        limits=limits,
    )
    extend(server, app)
    sock = bind(host, port)
    url = f"http://{host}:{sock.getsockname()[1]}"
    web = _WebServer(app, limits or Limits())
    web_ended = anyio.Event()

    async def run_web() -> None:
        await web.serve([sock])
        web_ended.set()

    async with anyio.create_task_group() as tasks:
        await tasks.start(server.run)
        tasks.start_soon(run_web)
        await web.listening.wait()
        try:
            async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as http:
                yield Running(server=server, url=url, http=http)
        finally:
            with anyio.CancelScope(shield=True):
                await server.end_all(Unavailable("The test is over."), grace_s=1)
                server.firehose.close()
                web.stopped.set()
                await web_ended.wait()
        tasks.cancel_scope.cancel()


# --- frames --------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One server-sent event: its id and its data, both as they stand on the wire."""

    id: str
    data: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.data)

    @property
    def event(self) -> AnyEvent:
        return decode_event(self.data)

    @property
    def action(self) -> str:
        return "[DONE]" if self.data == "[DONE]" else str(self.json["action"])


def frames_of(body: bytes) -> list[Frame]:
    """Split a stream's bytes into its frames with data; comments and `retry` are left out."""
    assert body.endswith(b"\n\n") or not body
    frames = []
    for block in body.decode().split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith((":", "retry: "))]
        fields = dict(line.split(": ", 1) for line in lines)
        assert len(fields) == len(lines)
        assert set(fields) <= {"id", "data"}
        if "data" in fields:
            frames.append(Frame(fields.get("id", ""), fields["data"]))
    return frames


def actions(frames: Sequence[Frame]) -> list[str]:
    return [frame.action for frame in frames]


def text_of(frames: Sequence[Frame]) -> str:
    """The text of all tokens."""
    return "".join(str(frame.json["message"]) for frame in frames if frame.action == "token")


# --- connections that fail -----------------------------------------------------------------------------


class TcpRelay:
    """A TCP port in front of another one, whose connections can be cut, held and refused.

    `limits`: one number for each of the next connections: how many bytes it may carry towards the
    client before it is cut.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.limits: list[int] = []
        self.refusing = False
        self.accepted = 0
        self.requests: list[bytes] = []
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open(self) -> int:
        """How many sockets are open."""
        return len(self._writers)

    def cut(self) -> None:
        """Reset every open connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        try:
            if self.refusing:
                return
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(upstream)
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._upwards, reader, upstream, tasks.cancel_scope)
                    await self._downwards(upstream_reader, writer)
                    tasks.cancel_scope.cancel()
            finally:
                self._writers.discard(upstream)
                upstream.transport.abort()
        except OSError:
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _upwards(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scope: anyio.CancelScope
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                self.requests.append(data)
                writer.write(data)
                await writer.drain()
        scope.cancel()

    async def _downwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.limits.pop(0) if self.limits else math.inf
        with suppress(OSError):
            while left and (data := await reader.read(int(min(left, 65536)))):
                left -= len(data)
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def tcp_relay(port: int) -> AsyncIterator[TcpRelay]:
    """Put a relay in front of a local port."""
    relay = TcpRelay(port)
    listener = await asyncio.start_server(relay._accept, "127.0.0.1", 0)
    relay.port = listener.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        listener.close()
        relay.cut()
        with anyio.CancelScope(shield=True):
            await eventually(lambda: relay.open == 0, "the relay's connections closed")


@asynccontextmanager
async def scripted(*answers: Sequence[bytes] | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Serve answers byte by byte as given: one list of chunks for each connection, then it is closed.

    None keeps the connection open and silent; the last answer is repeated. Gives the URL and the heads
    of the requests as they come.
    """
    heads: list[bytes] = []
    over = asyncio.Event()
    writers: set[asyncio.StreamWriter] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            chunks = answers[min(len(heads), len(answers) - 1)]
            heads.append(head)
            if chunks is None:
                await over.wait()
            for chunk in chunks or ():
                writer.write(chunk)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writers.discard(writer)
            writer.close()

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", heads
    finally:
        over.set()
        listener.close()
        with anyio.CancelScope(shield=True):
            await eventually(lambda: not writers, "the scripted connections closed")


async def exchange(port: int, request: bytes) -> bytes:
    """Send bytes as they are and give all that comes back until the peer closes or resets."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    try:
        writer.write(request)
        with anyio.fail_after(PATIENCE_S), suppress(ConnectionError):
            while chunk := await reader.read(65_536):
                answer += chunk
        return answer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
