"""Running a service: its socket, its signals, its one task group, and how it stops.

uvicorn serves; everything around it is here because by itself it waits for open streams for ever on
SIGTERM, and answers 200 for ever when a background task has crashed.
"""

import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
import structlog
import uvicorn
from msgspec import Struct
from starlette.types import ASGIApp

from rbee_contracts.errors import Unavailable
from rbee_job_server.server import JobServer

log = structlog.get_logger(__name__)

EXIT_OK = 0
EXIT_CRASHED = 1
EXIT_BAD_CONFIG = 2

BACKLOG = 4096
WEB_STOP_S = 4.0


class ServeConfig(Struct, frozen=True, kw_only=True):
    """Where to listen, and how long running jobs may take to end on SIGTERM, in seconds."""

    host: str
    port: int
    drain_timeout_s: float = 30.0


class CannotBind(Exception):
    """The address is taken or not ours; the message says what to do."""


class ServiceFailed(Exception):
    """Raised by a loop to stop the service with a cause and exit code 1."""


def bind(host: str, port: int) -> socket.socket:
    """Bind the listening socket; port 0 takes a free one.

    Raises:
        CannotBind: with one line for the person who started it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, or asyncio does not set TCP_NODELAY: 40 ms more for every small answer.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.set_inheritable(False)
    except OSError as exc:
        sock.close()
        raise CannotBind(
            f"cannot listen on {host}:{port}: {exc.strerror or exc}. "
            "Stop what listens there, or choose another --host or --port."
        ) from exc
    return sock


def adopt(fd: int) -> socket.socket:
    """Take over a listening socket that the parent process made.

    Raises:
        CannotBind: `fd` is none.
    """
    try:
        sock = socket.socket(fileno=fd)
        sock.getsockname()
    except OSError as exc:
        raise CannotBind(f"file descriptor {fd} is no socket: {exc.strerror or exc}.") from exc
    sock.set_inheritable(False)
    return sock


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which `serve` below owns, and with a word when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Loop = Callable[[], Awaitable[None]]


async def serve(
    app: ASGIApp,
    server: JobServer,
    sock: socket.socket,
    config: ServeConfig,
    *,
    loops: Sequence[Loop] = (),
    on_listening: Callable[[], Awaitable[None]] | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """Serve until a signal or a failure, then stop in order; give the exit code.

    A second signal ends the draining at once.

    Args:
        loops: what runs beside the server for the whole life of the service; one that raises (or ends)
            stops the service with exit code 1.
        on_listening: called once requests are answered.
        on_stop: called when the jobs have drained, before the listener closes.
    """
    exit_code = EXIT_OK
    web = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            server_header=False,
        )
    )
    stop = anyio.Event()

    def fail(exc: BaseException, loop: str) -> None:
        nonlocal exit_code
        exit_code = EXIT_CRASHED
        if isinstance(exc, ServiceFailed):
            log.error("service_failed", cause=str(exc), loop=loop)
        else:
            log.error("loop_crashed", loop=loop, exc_info=exc)
        stop.set()

    async def supervised(loop: Loop, name: str) -> None:
        try:
            await loop()
        except Exception as exc:
            fail(exc, name)
        else:
            fail(ServiceFailed("a loop that runs for the service's life has ended"), name)

    web_ended = anyio.Event()

    async def run_web() -> None:
        try:
            await web.serve(sockets=[sock])
        finally:
            web_ended.set()
            web.listening.set()
            stop.set()

    async with anyio.create_task_group() as group, _signals() as received:
        drain_scope = anyio.CancelScope()

        async def wait_for_signals() -> None:
            async for signum in received:
                log.info("signal_received", signal=signum.name, again=stop.is_set())
                if stop.is_set():
                    drain_scope.cancel()
                stop.set()

        await group.start(server.run)
        for loop in loops:
            group.start_soon(supervised, loop, getattr(loop, "__qualname__", repr(loop)))
        group.start_soon(wait_for_signals)
        group.start_soon(run_web)
        await web.listening.wait()
        host, port = sock.getsockname()[:2]
        log.info("listening", host=host, port=port)
        if on_listening is not None:
            await on_listening()
        await stop.wait()

        server.stopping = True
        if exit_code == EXIT_OK:
            log.info("draining", timeout_s=config.drain_timeout_s)
            with drain_scope:
                await server.drain(config.drain_timeout_s)
        await server.end_all(Unavailable("The service is stopping.", code="shutting_down"))
        if on_stop is not None:
            await on_stop()
        server.firehose.close()
        web.should_exit = True
        with anyio.move_on_after(WEB_STOP_S):
            await web_ended.wait()
        group.cancel_scope.cancel()
    log.info("stopped", exit_code=exit_code)
    return exit_code


@asynccontextmanager
async def _signals() -> AsyncIterator[AsyncIterator[signal.Signals]]:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        yield received
