"""From a job's stream to the answer of a front door's request.

A chunk's JSON is cut out of its event and never decoded: it is the last member, and what comes before it
are strings and numbers, so that the first `,"data":` of the event is where it begins.
"""

import msgspec
from msgspec import Struct

from rbee_contracts.events import (
    Chunk,
    Error,
    ExecuteCancelled,
    ExecuteComplete,
    ExecuteError,
    ExecuteTimeout,
    OpenAIHead,
    OpenAIResponse,
    OpenAIResult,
    decode_event,
)
from rbee_contracts.jobs import JobError
from rbee_queen.openai.endpoints import Dialect
from rbee_queen.openai.errors import error_body, error_frame, status_of

_CHUNK = b'{"action":"chunk","message":"'
_UNNAMED = _CHUNK + b'","'
_DATA = b',"data":'
_DONE = b"data: [DONE]\n\n"

_text = msgspec.json.Decoder(str).decode


class Reply(Struct, frozen=True, kw_only=True):
    """An answer that is not streamed."""

    status: int
    content_type: str
    body: bytes


class Answer:
    """What is known so far of one job's answer.

    `feed` takes what the job's stream brings; as long as `head` is unknown nothing can be answered.
    """

    def __init__(self, dialect: Dialect, correlation_id: str) -> None:
        self._dialect = dialect
        self._correlation_id = correlation_id
        self._body = b""
        self._error: JobError | None = None
        self._has_told_error = False
        self.head: OpenAIHead | None = None
        self.is_over = False

    @property
    def is_stream(self) -> bool:
        """Whether the answer is an event stream, which begins before the job has ended."""
        return self.head is not None and self.head.stream

    def feed(self, frames: bytes) -> bytes:
        """Take whole frames of the job's stream; give those of the answer, where it is an event stream."""
        parts: list[bytes] = []
        for frame in frames.split(b"\n\n"):
            start = frame.find(b"data: ")
            if start < 0:
                continue
            event = frame[start + 6 :]
            if event.startswith(_CHUNK):
                self._take_chunk(event, parts)
            elif event != b"[DONE]":
                self._take(event, parts)
        return b"".join(parts)

    def _take_chunk(self, event: bytes, parts: list[bytes]) -> None:
        at = event.find(_DATA)
        if at < 0:
            chunk = decode_event(event)
            assert isinstance(chunk, Chunk)
            data, name = bytes(chunk.data), chunk.message
        else:
            data = event[at + len(_DATA) : -1]
            name = ""
            if not event.startswith(_UNNAMED):
                name = _text(event[len(_CHUNK) - 1 : event.index(b',"actor":')])
        if not self.is_stream:
            self._body = data
            return
        self._has_told_error = name == "error" or data.startswith(b'{"error":')
        if name:
            parts += (b"event: ", name.encode(), b"\n")
        parts += (b"data: ", data, b"\n\n")

    def _take(self, body: bytes, parts: list[bytes]) -> None:
        match event := decode_event(body):
            case OpenAIResponse(data=head) if not self.is_stream:  # one that was tried again goes on
                self.head = head
            case Error():
                self._error = JobError(code=event.code, message=event.message, retryable=event.retryable)
            case ExecuteComplete():
                self.is_over = True
                if self.is_stream and msgspec.convert(event.data, OpenAIResult).done:
                    parts.append(_DONE)
            case ExecuteError() | ExecuteCancelled() | ExecuteTimeout():
                self.is_over = True
                if self._error is None:
                    retryable = isinstance(event, ExecuteTimeout)
                    self._error = JobError(code=event.code, message=event.message, retryable=retryable)
                if self.is_stream:
                    parts.append(self._last_frame(self._error))

    def _last_frame(self, error: JobError) -> bytes:
        if self._has_told_error:
            return _DONE if self._dialect is Dialect.OPENAI else b""
        status = status_of(error)
        return error_frame(self._dialect, status, error.message, error.code, self._correlation_id)

    def reply(self) -> Reply:
        """Give the answer of a job that is over and streamed nothing: the engine's own, if there is one."""
        head, error = self.head, self._error
        if head is not None and self._body:
            is_json = "json" in head.content_type
            if error is None or (head.status >= 400 and is_json):
                body = self._body if is_json else _text(self._body).encode()
                return Reply(status=head.status, content_type=head.content_type, body=body)
        error = error or JobError(code="engine_error", message="The answer was empty.", retryable=False)
        status = status_of(error)
        body = error_body(self._dialect, status, error.message, error.code, self._correlation_id)
        return Reply(status=status, content_type="application/json", body=body)
