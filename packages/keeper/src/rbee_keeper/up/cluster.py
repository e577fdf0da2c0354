"""The cluster that `rbee up` runs: started in order, watched, stopped in order, and nothing left behind."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rbee_contracts.errors import RbeeError
from rbee_keeper.up.child import Child
from rbee_keeper.up.descendants import REAP_EVERY_S, adopt_orphans, descendants, end_descendants, reap
from rbee_keeper.up.plan import DRAIN_TIMEOUT_S
from rbee_keeper.up.voice import Voice

# The hive's longest orderly stop: it drains, ends what is left (5 s), stops its workers (10 s), closes (4 s).
STOP_TIMEOUT_S = DRAIN_TIMEOUT_S + 25.0
SAY_WAITING_AFTER_S = 6.0
DEATH_TIMEOUT_S = 10.0


class ChildDied(RbeeError):
    """A service ended by itself."""

    title = "Service died"
    default_code = "service_died"

    def __init__(self, child: Child) -> None:
        super().__init__(f"The {child.name} {child.end_text()}.")
        self.child = child


class Stopped(Exception):
    """A signal asked for the end."""


class Cluster:
    """Owns the children. Use as an async context manager: leaving it ends every process below this one."""

    def __init__(self, voice: Voice, environ: Mapping[str, str]) -> None:
        self._voice = voice
        self._environ = environ
        self._children: list[Child] = []
        self._spared: set[int] = set()
        self._first = asyncio.Event()
        self._second = asyncio.Event()
        self._death: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    async def __aenter__(self) -> Self:
        self._spared = descendants()
        adopt_orphans()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self._on_signal)
        self._keep(self._reap())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._is_stopping = True
        stopping = asyncio.create_task(self._stop_in_order())
        hurried = asyncio.create_task(self._second.wait())
        await asyncio.wait({stopping, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            self._voice.tell("ending", "Ending everything now.")
        for task in (stopping, hurried, *self._tasks):
            task.cancel()
        left = await end_descendants(self._spared)
        if left:
            self._voice.tell("left_behind", f"Could not end: {sorted(left)}", style="red", pids=sorted(left))
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(signum)

    @property
    def was_hurried(self) -> bool:
        """Whether a second signal came, so that nothing could end in order."""
        return self._second.is_set()

    async def start(self, name: str, arguments: list[str], log_path: Path | None) -> None:
        """Start a service as `rbee_<name>`.

        Raises:
            RbeeError: it cannot be started.
        """
        try:
            child = await Child.start(name, f"rbee_{name}", arguments, self._environ, log_path)
        except OSError as exc:
            raise RbeeError(f"The {name} could not be started: {exc}.", code="not_started") from exc
        self._children.append(child)
        self._keep(self._watch(child))

    async def while_alive(self, work: "asyncio.Task[None]", on_stop: Callable[[], None]) -> None:
        """Run `work` until it ends, a signal comes, or a child dies.

        Args:
            on_stop: called at a signal, before what `work` cleans up.

        Raises:
            Stopped: a signal came.
            ChildDied: a child died.
        """
        stop = asyncio.create_task(self._first.wait())
        try:
            waited: set[asyncio.Future[Any]] = {work, stop, self._death}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and not stop.done() and _tells_of_an_end(work.exception()):
                # A child is about to end, perhaps; that is then the cause.
                ends: set[asyncio.Future[Any]] = {stop, self._death}
                await asyncio.wait(ends, timeout=DEATH_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                on_stop()
                raise Stopped
            if self._death.done():
                raise ChildDied(self._death.result())
            await work
        finally:
            stop.cancel()
            work.cancel()
            # What it cleans up (a job to cancel) has its own deadline; a second signal does not wait for it.
            hurried = asyncio.create_task(self._second.wait())
            await asyncio.wait({work, hurried}, return_when=asyncio.FIRST_COMPLETED)
            hurried.cancel()
            if work.done() and not work.cancelled():
                work.exception()  # told by what was raised above; marks it as seen

    def _on_signal(self) -> None:
        if self._first.is_set():
            self._second.set()
        self._first.set()

    async def _watch(self, child: Child) -> None:
        await child.wait()
        if not self._is_stopping and not self._death.done():
            self._death.set_result(child)

    async def _stop_in_order(self) -> None:
        """Stop the last started first: the hive, which stops its workers, then the queen."""
        for child in reversed(self._children):
            if child.exit_code is not None:
                continue
            child.terminate()
            self._voice.tell("stopping", "stopping", who=child.name)
            try:
                async with asyncio.timeout(SAY_WAITING_AFTER_S):
                    await child.wait()
            except TimeoutError:
                text = f"waiting up to {STOP_TIMEOUT_S:.0f} s for what still runs; Ctrl-C ends it at once"
                self._voice.tell("waiting", text, who=child.name)
                try:
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await child.wait()
                except TimeoutError:
                    self._voice.tell("killed", "did not stop in time and was ended", who=child.name)
                    continue
            self._voice.tell("stopped", "stopped", who=child.name)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            reap(frozenset(child.pid for child in self._children))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _tells_of_an_end(exc: BaseException | None) -> bool:
    """Whether a failure looks like that of a service that is ending."""
    return isinstance(exc, RbeeError) and exc.code in ("shutting_down", "unreachable", "stream_cut")
