"""The `openai` job: a request to vLLM's own OpenAI app, called in memory, and its answer as events."""

import base64
import binascii
from typing import Any

import anyio
import msgspec
import structlog
from msgspec import Raw
from starlette.types import ASGIApp, Message

from rbee_contracts.errors import InvalidRequest, RbeeError, Unavailable
from rbee_contracts.events import OpenAIHead, OpenAIResult, Usage
from rbee_contracts.operations import OpenAI
from rbee_job_server import JobContext
from rbee_job_server.event_log import MAX_LOG_BYTES, OutputTooLarge
from rbee_worker.engine.base import Engine
from rbee_worker.openai_answer import (
    BUSY,
    DONE,
    Frame,
    FrameParser,
    as_json,
    failure_of,
    is_error,
    usage_of,
)

log = structlog.get_logger(__name__)

LEAVE_S = 0.5
"""How long the engine's app may take to notice that nobody waits for its answer; then it is cancelled."""

ENDPOINTS = {
    "/v1/audio/transcriptions": "/v1/audio/transcriptions",
    "/v1/chat/completions": "/v1/chat/completions",
    "/v1/completions": "/v1/completions",
    "/v1/detokenize": "/detokenize",
    "/v1/embeddings": "/v1/embeddings",
    "/v1/messages": "/v1/messages",
    "/v1/messages/count_tokens": "/v1/messages/count_tokens",
    "/v1/rerank": "/v1/rerank",
    "/v1/responses": "/v1/responses",
    "/v1/score": "/v1/score",
    "/v1/tokenize": "/tokenize",
}
"""The endpoints that `openai` may name, each with the path that vLLM has for it."""


class OpenAIHandler:
    """Runs `openai` on one engine's own app."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, op: OpenAI, context: JobContext) -> OpenAIResult:
        path = ENDPOINTS.get(op.endpoint)
        if path is None:
            raise InvalidRequest(
                f"There is no endpoint {op.endpoint!r} here; there are {', '.join(ENDPOINTS)}.",
                code="unknown_endpoint",
            )
        app = self._engine.http_app
        if app is None:
            raise Unavailable("The engine has not loaded.", code="worker_not_ready")
        context.narrate("infer_start", f"{op.endpoint} of {op.model or 'this worker'} has started.")
        trace = context.job.trace if self._engine.is_tracing else None
        exchange = _Exchange(op, context, _body(op), {} if trace is None else trace.headers)
        await exchange.run(app, path)
        return exchange.result()


def _body(op: OpenAI) -> bytes:
    if op.body_base64 is None:
        return bytes(op.body)
    try:
        return base64.b64decode(op.body_base64, validate=True)
    except binascii.Error as exc:
        raise InvalidRequest(f"`body_base64` is not base64: {exc}") from exc


class _Exchange:
    """One request in the app, from its body to its last frame. `send` turns what comes into events."""

    def __init__(self, op: OpenAI, context: JobContext, body: bytes, headers: dict[str, str]) -> None:
        self._op = op
        self._context = context
        self._headers = headers
        self._request: bytes | None = body
        self._length = len(body)
        self._nobody_waits = anyio.Event()
        self._ended = anyio.Event()
        self._head: OpenAIHead | None = None
        self._frames = FrameParser()
        self._parts: list[bytes] = []
        self._size = 0
        self._is_done = False
        self._has_failed = False
        self._telling_usage: bytes | None = None
        self._failure: RbeeError | None = None

    async def run(self, app: ASGIApp, path: str) -> None:
        """Call the app and wait for its answer. Left early, the app sees its client disconnect."""
        app_scope = anyio.CancelScope(shield=True)

        async def call() -> None:
            try:
                with app_scope:
                    await app(self._scope(path), self._receive, self._send)
            except RbeeError as exc:
                self._failure = exc
            except Exception as exc:
                # Its own message may quote the request.
                log.error("engine_app_crashed", error=type(exc).__name__, endpoint=self._op.endpoint)
            finally:
                self._ended.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            try:
                await self._ended.wait()
            finally:
                if not self._ended.is_set():
                    # Cancelled at once, vLLM would leave a request without a stream running.
                    self._nobody_waits.set()
                    with anyio.move_on_after(LEAVE_S, shield=True):
                        await self._ended.wait()
                    app_scope.cancel()

    def _scope(self, path: str) -> dict[str, Any]:
        # The correlation id finds the request in the engine's log; the job id makes it unique.
        request_id = f"{self._context.correlation_id}-{self._context.job_id}"
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                (b"content-type", self._op.content_type.encode()),
                (b"content-length", b"%d" % self._length),
                (b"x-request-id", request_id.encode()),
                *((name.encode(), value.encode()) for name, value in self._headers.items()),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

    async def _receive(self) -> Message:
        if self._request is not None:
            body, self._request = self._request, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._nobody_waits.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begin(message)
        elif message["type"] == "http.response.body" and self._head is not None:
            body = message.get("body", b"")
            if self._head.stream:
                self._stream(body)
            else:
                self._collect(body, is_last=not message.get("more_body", False))

    def _begin(self, message: Message) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
        content_type = headers.get(b"content-type", b"").decode("latin-1")
        stream = content_type.startswith("text/event-stream")
        self._head = OpenAIHead(status=message["status"], content_type=content_type, stream=stream)
        if self._head.status not in BUSY:
            self._context.narrate(
                "openai_response",
                f"{self._op.endpoint} answers with {self._head.status}.",
                self._head,
            )

    def _stream(self, piece: bytes) -> None:
        for frame in self._frames.feed(piece):
            if frame.data == DONE:
                self._is_done = True
            else:
                self._chunk(frame)
        if self._frames.pending > MAX_LOG_BYTES:
            raise OutputTooLarge("The engine said more at once than a job may say.")

    def _chunk(self, frame: Frame) -> None:
        if b'"usage":{' in frame.data:
            self._telling_usage = frame.data
        self._has_failed = self._has_failed or is_error(frame)
        self._context.emit_chunk(as_json(frame.data), frame.event)

    def _collect(self, piece: bytes, *, is_last: bool) -> None:
        self._size += len(piece)
        if self._size > MAX_LOG_BYTES:
            raise OutputTooLarge("The engine said more than a job may say.")
        self._parts.append(piece)
        if not is_last:
            return
        assert self._head is not None
        body = b"".join(self._parts)
        self._parts = [body]
        if self._head.status in BUSY:
            return
        if "json" in self._head.content_type:
            self._telling_usage = body
            self._context.emit_chunk(as_json(body))
        else:
            self._context.emit_chunk(Raw(msgspec.json.encode(body.decode(errors="replace"))))

    def result(self) -> OpenAIResult:
        """Give the result.

        Raises:
            RbeeError: the engine refused the request, failed it, or said nothing.
        """
        if self._failure is not None:
            raise self._failure
        head = self._head
        if head is None:
            raise RbeeError("The engine ended the request without an answer.", code="engine_aborted")
        if head.status >= 400:
            raise failure_of(head.status, self._op.endpoint, b"".join(self._parts))
        if self._has_failed:
            raise RbeeError(
                "The engine failed the request in the middle of its answer, whose last chunk has the cause.",
                code="engine_error",
            )
        usage: Usage | None = None if self._telling_usage is None else usage_of(self._telling_usage)
        self._context.job.usage = usage
        return OpenAIResult(
            status=head.status, content_type=head.content_type, done=self._is_done, usage=usage
        )
