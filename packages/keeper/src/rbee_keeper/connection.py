"""The connection to a service: kept over cuts, and its loss told at once to whoever waits."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from rbee_contracts.events import AnyEvent
from rbee_contracts.sse import Position
from rbee_job_client import JobClient, Rejected, StreamCut, Timeouts, Unreachable

SUBMIT_TIMEOUT_S = 30.0
"""For an answer that is no stream."""

RESUME_S = 60.0
"""How long a lost stream is tried again before the command gives up."""

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 1.0
"""Pauses between the tries, doubling from the first. An inference ends 5 s after its last reader has gone."""

OnConnection = Callable[[bool], None]
"""Told False when a stream is lost, and True when the service answers again."""


class PatientClient(JobClient):
    """A `JobClient` that tells of a lost stream while it tries to get it back.

    Args:
        on_connection: told of losses and returns; never twice the same.
        resume_s: how long a lost stream is tried again, in seconds.
    """

    def __init__(
        self, base_url: str, *, token: str | None, on_connection: OnConnection, resume_s: float = RESUME_S
    ) -> None:
        super().__init__(base_url, token=token, timeouts=Timeouts(request=SUBMIT_TIMEOUT_S, resume=0))
        self._on_connection = on_connection
        self._resume_s = resume_s

    async def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        """As `JobClient.stream_from`, and tell of losses.

        Raises:
            StreamCut: the stream was lost and not regained within `resume_s`.
        """
        outage: _Outage | None = None
        while True:
            try:
                async with aclosing(super().stream_from(job_id, position)) as events:
                    async for seen, event in events:
                        position, outage = seen, None
                        yield seen, event
                return
            except StreamCut as exc:
                outage = outage or _Outage(job_id, position, self._resume_s)
                await self._regain(outage, exc)

    async def _regain(self, outage: "_Outage", cause: StreamCut) -> None:
        """Wait until the service tells of the job again."""
        self._on_connection(False)
        while True:
            await outage.pause(self.base_url, cause)
            try:
                await self.get(outage.job_id)
            except (Unreachable, Rejected) as exc:
                if not exc.retryable:
                    raise
            else:
                self._on_connection(True)
                return


class _Outage:
    """One time without the stream: from its loss to the next event."""

    def __init__(self, job_id: str, position: Position, resume_s: float) -> None:
        self.job_id = job_id
        self._position = position
        self._resume_s = resume_s
        self._ends_at = asyncio.get_running_loop().time() + resume_s
        self._pause_s = RETRY_FIRST_S

    async def pause(self, url: str, cause: StreamCut) -> None:
        """Wait before the next try.

        Raises:
            StreamCut: it has lasted too long.
        """
        if asyncio.get_running_loop().time() + self._pause_s > self._ends_at:
            raise StreamCut(
                f"The connection to {url} was lost and could not be regained within {self._resume_s:g} s. "
                "The job may still run. When the service answers again, read on with: "
                f"rbee job stream {self.job_id} --from {self._position}"
            ) from cause
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, RETRY_MAX_S)
