"""Running a service: its socket, its signals, its one task group, and how it stops.

uvicorn serves; everything around it is here because by itself it waits for open streams for ever on
SIGTERM, and answers 200 for ever when a background task has crashed.
"""

import gc
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import anyio
import structlog
import uvicorn
from msgspec import Struct
from starlette.types import ASGIApp

from rbee_contracts.errors import Unavailable
from rbee_job_server.guards import Limits, allow_open_files
from rbee_job_server.protocol import guarded
from rbee_job_server.server import JobServer
from rbee_job_server.sockets import notice_gone_peers
from rbee_job_server.systemd import Reporter

log = structlog.get_logger(__name__)

EXIT_OK = 0
EXIT_CRASHED = 1
EXIT_BAD_CONFIG = 2

BACKLOG = 4096
WEB_STOP_S = 4.0

CRASH_GRACE_S = 0.2
"""For each step of a stop after a crash: the jobs' clean-up, the service's own, the open streams."""

CRASH_EXIT_S = 0.9
"""After a crash the process is gone by then, even where something holds it."""


COLLECT_AFTER = (50_000, 20, 50)
"""The garbage collector's thresholds. With Python's own (700, 10, 10), each new job and stream brings on many
rounds over everything that the service has loaded, about a tenth of its CPU time under load."""


class ServeConfig(Struct, frozen=True, kw_only=True):
    """Where to listen, how long running jobs may take to end on SIGTERM, and what callers may take."""

    host: str
    port: int
    drain_timeout_s: float = 30.0
    limits: Limits = Limits()


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
        notice_gone_peers(sock)
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
        notice_gone_peers(sock)
    except OSError as exc:
        raise CannotBind(f"file descriptor {fd} is no socket: {exc.strerror or exc}.") from exc
    sock.set_inheritable(False)
    return sock


def web_config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Give how uvicorn serves an app of ours; logs, signals and the lifespan are the service's own."""
    return uvicorn.Config(
        app,
        http=guarded(limits),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=limits.keep_alive_s,
        timeout_graceful_shutdown=2,
        server_header=False,
        proxy_headers=False,
    )


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


class _Ending:
    """Why and how the service ends: asked for by `stop`, its exit code, and whether it must be quick."""

    def __init__(self, on_crash: Callable[[], None]) -> None:
        self.stop = anyio.Event()
        self.draining = anyio.CancelScope()
        self.exit_code = EXIT_OK
        self.is_crash = False
        self._on_crash = on_crash

    def fail(self, exc: BaseException, loop: str) -> None:
        """Take in that a loop has failed, and make sure that the process ends for it."""
        self.exit_code = EXIT_CRASHED
        if isinstance(exc, ServiceFailed):
            log.error("service_failed", cause=str(exc), loop=loop)
        else:
            log.error("loop_crashed", loop=loop, exc_info=exc)
            self._hurry()
        self.stop.set()

    def _hurry(self) -> None:
        """See to it that the process is gone in time, whatever hangs from here on."""
        if self.is_crash:
            return
        self.is_crash = True
        watchdog = threading.Timer(CRASH_EXIT_S, os._exit, [EXIT_CRASHED])
        watchdog.daemon = True
        watchdog.start()
        self.draining.cancel()
        try:
            self._on_crash()
        except Exception as exc:
            log.error("clean_up_failed", exc_info=exc)

    async def supervise(
        self,
        loop: Callable[..., Awaitable[None]],
        name: str,
        *,
        task_status: anyio.abc.TaskStatus[None] | None = None,
    ) -> None:
        """Run what lives as long as the service; its end, however it comes, is the service's."""
        try:
            await (loop() if task_status is None else loop(task_status=task_status))
        except Exception as exc:
            self.fail(exc, name)
        else:
            self.fail(ServiceFailed("a loop that runs for the service's life has ended"), name)

    @asynccontextmanager
    async def step(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Bound one step of the stop; after a crash to very little."""
        with anyio.move_on_after(CRASH_GRACE_S if self.is_crash else timeout_s):
            yield


async def serve(
    app: ASGIApp,
    server: JobServer,
    sock: socket.socket,
    config: ServeConfig,
    *,
    loops: Sequence[Loop] = (),
    on_listening: Callable[[], Awaitable[None]] | None = None,
    on_drained: Callable[[], None] | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    on_crash: Callable[[], None] = lambda: None,
    on_leave: Callable[[], None] | None = None,
    reporter: Reporter | None = None,
) -> int:
    """Serve until a signal or a failure, then stop in order; give the exit code.

    A second signal ends the draining at once. After a crash the process ends within a second.

    Args:
        loops: what runs beside the server for the whole life of the service; one that raises (or ends)
            stops the service with exit code 1.
        on_listening: called once requests are answered.
        on_drained: called when the drain is over, before what still runs is ended or left.
        on_stop: called when the jobs have drained, before the listener closes; has little time after a
            crash.
        on_crash: called at once when a loop has crashed: ends what must not outlive the process.
        on_leave: called on SIGUSR1, which then stops the service without draining, and leaves its jobs and
            what runs for them to the next run. Without it that signal is not taken. A service manager's
            SIGTERM before `reporter` has told that the service is ready does the same.
        reporter: tells the service manager how the service is; none is told without it.
    """
    allow_open_files(config.limits.max_connections)
    web = _Server(web_config(app, config.limits))
    ending = _Ending(on_crash)
    web_ended = anyio.Event()
    reporter = reporter or Reporter()
    reporter.watch("jobs", lambda: server.last_round)

    async def run_web() -> None:
        try:
            await web.serve(sockets=[sock])
        except Exception as exc:
            ending.fail(exc, "web")
        finally:
            web_ended.set()
            web.listening.set()
            ending.stop.set()

    taken = [signal.SIGTERM, signal.SIGINT] + ([signal.SIGUSR1] if on_leave is not None else [])
    async with anyio.create_task_group() as group, _signals(taken) as received:

        async def wait_for_signals() -> None:
            async for signum in received:
                log.info("signal_received", signal=signum.name, again=ending.stop.is_set())
                # A start that a service manager breaks off, for a restart too, gets no SIGUSR1 before.
                if on_leave is not None and (signum == signal.SIGUSR1 or reporter.is_starting):
                    server.keeps_jobs = True
                    on_leave()
                    ending.draining.cancel()
                elif ending.stop.is_set():
                    ending.draining.cancel()
                ending.stop.set()

        await group.start(ending.supervise, server.run, "JobServer.run")
        for loop in loops:
            group.start_soon(ending.supervise, loop, getattr(loop, "__qualname__", repr(loop)))
        group.start_soon(wait_for_signals)
        group.start_soon(run_web)
        await web.listening.wait()
        _spare_collector()
        host, port = sock.getsockname()[:2]
        log.info("listening", host=host, port=port)
        if on_listening is not None:
            await on_listening()
        if not ending.stop.is_set():
            reporter.ready()
        group.start_soon(ending.supervise, reporter.run, "Reporter.run")
        await ending.stop.wait()

        server.stopping = True
        reporter.stopping(config.drain_timeout_s)
        if ending.exit_code == EXIT_OK:
            log.info("draining", timeout_s=config.drain_timeout_s)
            with ending.draining:
                await server.drain(config.drain_timeout_s)
        async with ending.step():
            if on_drained is not None:
                on_drained()
            if server.is_durable:
                await server.leave()
            else:
                await server.end_all(Unavailable("The service is stopping.", code="shutting_down"))
        if on_stop is not None:
            async with ending.step():
                await on_stop()
        server.firehose.close()
        web.should_exit = True
        async with ending.step(WEB_STOP_S):
            await web_ended.wait()
        group.cancel_scope.cancel()
    log.info("stopped", exit_code=ending.exit_code)
    return ending.exit_code


def _spare_collector() -> None:
    """Keep what has been loaded out of the garbage collector's rounds, and have fewer of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


@asynccontextmanager
async def _signals(taken: Sequence[signal.Signals]) -> AsyncIterator[AsyncIterator[signal.Signals]]:
    """Receive the signals that stop a service; once it has stopped, one more changes nothing."""
    try:
        with anyio.open_signal_receiver(*taken) as received:
            yield received
    finally:
        for signum in taken:
            signal.signal(signum, signal.SIG_IGN)
