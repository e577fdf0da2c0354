"""The response to a front door's request: reads its job, and cancels it when the client has gone."""

from collections.abc import Callable

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee_job_server import EventStreamResponse, JobServer
from rbee_job_server.errors import RETRY_AFTER_S
from rbee_job_server.event_log import LogReader
from rbee_job_server.jobs import Job
from rbee_queen.openai.answer import Answer

JOB_ID_HEADER = "X-Job-ID"


class JobResponse:
    """Answers with what a job says. The job starts when this is called, and ends when its client leaves."""

    def __init__(self, server: JobServer, job: Job, answer: Answer) -> None:
        self._server = server
        self._job = job
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        job, answer = self._job, self._answer
        source = _AnswerSource(self._server.attach(job), answer)
        response: Response | EventStreamResponse | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_until_disconnect, receive, tasks.cancel_scope)
                head = await source.until_known()
                tasks.cancel_scope.cancel()
            if source.is_known:
                response = self._response(source, head)
                await response(scope, receive, send)
        finally:
            self._server.detach(job)

    def _response(self, source: "_AnswerSource", head: bytes) -> "Response | EventStreamResponse":
        headers = {JOB_ID_HEADER: self._job.id}
        if self._answer.is_stream:
            return EventStreamResponse(
                source,
                head=head,
                on_close=lambda: None,
                job_id=self._job.id,
                headers=[(name.lower().encode(), value.encode()) for name, value in headers.items()],
                pings=False,
            )
        reply = self._answer.reply()
        if reply.status in (429, 503):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        return Response(reply.body, reply.status, headers=headers | {"Content-Type": reply.content_type})


class _AnswerSource:
    """The frames of an answer, out of those of its job."""

    def __init__(self, reader: LogReader, answer: Answer) -> None:
        self._reader = reader
        self._answer = answer
        self.finished = False

    @property
    def is_known(self) -> bool:
        """Whether it is known what to answer: a stream has begun, or all of the job is here."""
        return self._answer.is_stream or self.finished

    async def until_known(self) -> bytes:
        """Wait until it is known what to answer; give the frames that came with that."""
        while True:
            frames = self.take()
            if self.is_known:
                return frames
            await self._reader.wait()

    def take(self) -> bytes:
        frames = self._reader.take()
        self.finished = self._reader.finished
        return self._answer.feed(frames) if frames else b""

    async def wait(self) -> None:
        await self._reader.wait()

    @property
    def is_up_to_date(self) -> bool:
        return self._reader.is_up_to_date

    def subscribe(self, on_append: Callable[[], None]) -> None:
        self._reader.subscribe(on_append)

    def unsubscribe(self, on_append: Callable[[], None]) -> None:
        self._reader.unsubscribe(on_append)


async def _until_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
