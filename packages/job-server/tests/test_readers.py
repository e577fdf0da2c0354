"""Readers that stall, that vanish and that leave in crowds: they cost little, and nobody else anything."""

import asyncio
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress

import anyio
import pytest
from rbee_inprocess import PATIENCE_S, Running, actions, eventually, let_pass, running, text_of
from starlette.types import Message, Scope
from structlog.testing import capture_logs
from structlog.typing import EventDict

from rbee_contracts.operations import Infer
from rbee_job_server import JobContext, sockets, streams
from rbee_job_server.access import AccessConfig
from rbee_job_server.event_log import WRITE_BYTES
from rbee_job_server.jobs import Job
from rbee_job_server.streams import CONNECTION, EventStreamResponse

pytestmark = pytest.mark.anyio

MIB = 2**20


async def infer(operation: Infer, context: JobContext) -> None:
    """Say as many MiB as the prompt tells, then wait for ever if it says so."""
    count, _, then = str(operation.prompt).partition(" ")
    for _ in range(int(count)):
        context.emit_token("x" * MIB)
    if then == "wait":
        await anyio.sleep_forever()
    if then == "tick":
        while True:
            context.emit_token("tick")
            await anyio.sleep(0.05)


async def submit(service: Running, prompt: str) -> Job:
    job_id = await service.submit(
        {"operation": "infer", "model": "m", "prompt": prompt}, Prefer="respond-async"
    )
    return service.server.registry.get(job_id)


def open_stream(port: int, job: Job, *, buffer_bytes: int | None = None) -> socket.socket:
    """Ask for a job's stream, and read nothing."""
    client = socket.socket()
    if buffer_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    client.connect(("127.0.0.1", port))
    client.sendall(f"GET /v1/jobs/{job.id}/stream HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return client


def closed_readers(logs: list[EventDict]) -> list[tuple[str, str]]:
    """The reason and the job of each reader that was closed."""
    return [(entry["reason"], entry["job_id"]) for entry in logs if entry["event"] == "reader_closed"]


# --- readers that stall --------------------------------------------------------------------------------


async def test_a_stalled_reader_is_closed_with_a_reason_and_another_gets_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "UNANSWERED_MS", 3_600_000)  # or the kernel may come first
    with capture_logs() as logs:
        async with running({Infer: infer}) as service:
            job = await submit(service, "12")
            with open_stream(service.port, job, buffer_bytes=4096):
                await eventually(lambda: job.readers == 1, "the reader is there")
                frames = await service.read(job.id)

                assert len(text_of(frames)) == 12 * MIB
                assert actions(frames)[-1] == "[DONE]"
                assert closed_readers(logs) == []
                let_pass(streams.PING_S + streams.READER_STALL_S)
                await eventually(lambda: job.readers == 0, "the stalled reader is closed")

    assert closed_readers(logs) == [("stalled", job.id)]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
async def test_a_reader_that_takes_nothing_is_closed_by_the_kernel_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "UNANSWERED_MS", 300)
    with capture_logs() as logs:
        async with running({Infer: infer}) as service:
            job = await submit(service, "12")
            with open_stream(service.port, job, buffer_bytes=4096):
                await eventually(lambda: closed_readers(logs), "the reader is closed")
                await eventually(lambda: job.readers == 0, "it has left")

    assert closed_readers(logs) == [("unanswered", job.id)]


class Endless:
    """A source that always has more."""

    finished = False
    taken = 0

    def __init__(self, piece: bytes) -> None:
        self._piece = piece

    def take(self) -> bytes:
        self.taken += 1
        return self._piece

    async def wait(self) -> None:
        await anyio.sleep_forever()


class Silent(Endless):
    """A source that has nothing."""

    def take(self) -> bytes:
        return b""


class Blocked:
    """A connection that takes a head and then `free` bodies; each further send waits for ever."""

    def __init__(self, free: int = 0) -> None:
        self.bodies: list[bytes] = []
        self.turns: list[int] = []
        self.turn = 0
        self.aborted = anyio.Event()
        self._free = free

    error: Exception | None = None

    @property
    def scope(self) -> Scope:
        return {"type": "http", "extensions": {CONNECTION: {"connection": self}}}

    def abort(self) -> None:
        self.aborted.set()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            self.turns.append(self.turn)
            if len(self.bodies) > self._free:
                await anyio.sleep_forever()

    async def receive(self) -> Message:
        await self.aborted.wait()
        return {"type": "http.disconnect"}

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize("is_our_server", [True, False])
async def test_what_a_stalled_reader_holds_is_one_piece(
    monkeypatch: pytest.MonkeyPatch, is_our_server: bool
) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.01)
    monkeypatch.setattr(streams, "READER_STALL_S", 0.03)
    source, connection, closed = Endless(b"x" * (5 * MIB)), Blocked(free=2), anyio.Event()
    response = EventStreamResponse(source, on_close=closed.set)
    with anyio.fail_after(PATIENCE_S):
        await response(
            connection.scope if is_our_server else {"type": "http"}, connection.receive, connection.send
        )

    assert closed.is_set()
    assert connection.aborted.is_set() is is_our_server
    assert source.taken == 1
    assert [len(body) for body in connection.bodies] == [WRITE_BYTES] * 3


async def test_a_reader_that_does_not_even_take_a_ping_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.01)
    monkeypatch.setattr(streams, "READER_STALL_S", 0.03)
    connection, closed = Blocked(), anyio.Event()
    with anyio.fail_after(PATIENCE_S):
        await EventStreamResponse(Silent(b""), on_close=closed.set)(
            connection.scope, connection.receive, connection.send
        )

    assert closed.is_set()
    assert connection.bodies == [streams.PING_FRAME]


async def test_every_piece_has_a_turn_of_the_loop_of_its_own() -> None:
    connection = Blocked(free=40)
    response = EventStreamResponse(Endless(b"x" * MIB), on_close=lambda: None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.count_turns)
        tasks.start_soon(response, connection.scope, connection.receive, connection.send)
        await eventually(lambda: len(connection.bodies) > 40, "the connection is blocked")
        tasks.cancel_scope.cancel()

    assert max(map(len, connection.bodies)) == WRITE_BYTES
    assert len(set(connection.turns)) == len(connection.turns)


# --- readers that leave --------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def many_files() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this user may open only {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
@pytest.mark.parametrize(("count", "prompt"), [(1000, "0 wait"), (100, "4 wait")])
async def test_readers_leave_in_a_crowd_and_nothing_of_them_stays(
    monkeypatch: pytest.MonkeyPatch, count: int, prompt: str
) -> None:
    """F26, F27. With the second prompt they leave in the middle of a large write."""
    monkeypatch.setattr(sockets, "UNANSWERED_MS", 3_600_000)  # the first must not go before the last has come
    with many_files(), ExitStack() as clients:
        async with running({Infer: infer}) as service:
            job = await submit(service, prompt)
            files, tasks = open_files(), len(asyncio.all_tasks())
            for _ in range(count):
                clients.enter_context(open_stream(service.port, job, buffer_bytes=4096))
                await asyncio.sleep(0)
            await eventually(lambda: job.readers == count, "all have come")

            clients.close()

            await eventually(lambda: job.readers == 0, "all have left")
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks, "their tasks are gone")
            await eventually(lambda: open_files() <= files, "their connections are gone")
            assert job.state == "running"
            assert job.log is not None
            assert not job.log._listeners


# --- readers that vanish -------------------------------------------------------------------------------

_NAMESPACE_CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as client:
    client.sendall(f"GET /v1/jobs/{sys.argv[3]}/stream HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
    client.settimeout(None)
    while client.recv(65536):
        pass
"""


@contextmanager
def far_machine() -> Iterator[tuple[str, list[str]]]:
    """Make a network namespace with a cable to it: our address on it, and what runs a command there."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the command `ip`")
    name, ours = f"rbee{os.getpid()}", f"rb{os.getpid()}"
    # Of this process alone, as another run may be under way on this machine.
    network = ipaddress.ip_address("198.18.0.0") + 4 * (os.getpid() % 2**15)
    here, there = str(network + 1), str(network + 2)
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        for command in [
            f"ip link add {ours} type veth peer name far netns {name}",
            f"ip addr add {here}/30 dev {ours}",
            f"ip link set {ours} up",
            f"ip -n {name} addr add {there}/30 dev far",
            f"ip -n {name} link set far up",
        ]:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield here, ["ip", "netns", "exec", name]
    finally:
        # By name: the namespace lives on for a while, as long as a connection in it has not ended.
        subprocess.run(["ip", "link", "del", ours], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", name], check=True)


@asynccontextmanager
async def far_reader(there: list[str], address: str, port: int, job: Job) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *there, sys.executable, "-c", _NAMESPACE_CLIENT, address, str(port), job.id
    )
    try:
        await eventually(lambda: job.readers == 1, "the far reader is there")
        yield
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_reader_whose_cable_is_cut_is_noticed_busy_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """F19, with the times of the real settings divided by five or so."""
    monkeypatch.setattr(sockets, "UNANSWERED_MS", 1000)
    monkeypatch.setattr(sockets, "PROBE_AFTER_S", 1)
    monkeypatch.setattr(sockets, "PROBE_EVERY_S", 1)
    with far_machine() as (address, there):
        async with running(
            {Infer: infer}, host=address, access=AccessConfig(allowed_hosts=(address,))
        ) as service:
            busy, idle = await submit(service, "0 tick"), await submit(service, "0 wait")
            async with (
                far_reader(there, address, service.port, busy),
                far_reader(there, address, service.port, idle),
            ):
                # From now on the far side drops what comes, without a word.
                await anyio.run_process([*there, "ip", "addr", "flush", "dev", "far"])
                await eventually(lambda: busy.readers == 0, "the busy one is noticed")
                await eventually(lambda: idle.readers == 0, "the idle one is noticed")


def test_a_vanished_reader_is_noticed_within_fifteen_seconds() -> None:
    probed = sockets.PROBE_AFTER_S + -(-sockets.UNANSWERED_MS // 1000) + sockets.PROBE_EVERY_S

    assert probed <= 15
