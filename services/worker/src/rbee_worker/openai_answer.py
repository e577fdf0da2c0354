"""What vLLM's OpenAI app answers, taken apart: frames of its event streams, usage, errors. Pure."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from msgspec import Raw, Struct

from rbee_contracts.errors import InvalidRequest, NoCapacity, NotFound, NotImplementedHere, RbeeError
from rbee_contracts.events import Usage

DONE = b"[DONE]"

BUSY = frozenset({429, 503})
"""Statuses that say nothing about the request: it may run elsewhere, or later."""

MAX_MESSAGE_CHARS = 500


class NotJson(RbeeError):
    """The engine's app has answered with what it says is JSON and is none."""

    title = "Engine error"
    default_code = "engine_error"


class Frame(NamedTuple):
    """One server-sent event: its name, if it has one, and its data as they stand."""

    event: str
    data: bytes


class FrameParser:
    """Cuts an event stream into frames, whatever pieces it comes in; comments and ids are left out."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Frame]:
        """Take a piece; give the frames that are complete with it."""
        text = self._rest + piece
        if b"\r" in text:  # JSON has it escaped, so it only ever ends a line
            held = text.endswith(b"\r")
            text = text.replace(b"\r\n", b"\n")
            if not held:
                text = text.replace(b"\r", b"\n")
        *frames, self._rest = text.split(b"\n\n")
        for frame in frames:
            if frame.startswith(b"data: ") and b"\n" not in frame:
                yield Frame("", frame[6:])
            elif (parsed := _parse(frame)) is not None:
                yield parsed

    @property
    def pending(self) -> int:
        """Bytes of the frame that is not complete yet."""
        return len(self._rest)


def _parse(frame: bytes) -> Frame | None:
    event, data = "", []
    for line in frame.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event = value.decode(errors="replace")
    return Frame(event, b"\n".join(data)) if data else None


_skim = msgspec.json.Decoder(Raw)


def as_json(data: bytes) -> Raw:
    """Give JSON as it stands.

    Raises:
        NotJson: it is none, and nothing that holds it could be read by the hop above.
    """
    try:
        return _skim.decode(data)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise NotJson("The engine's answer is not JSON.") from exc


def is_error(frame: Frame) -> bool:
    """Whether a frame ends a stream with an error, in OpenAI's way or in Anthropic's."""
    return frame.event == "error" or frame.data.startswith(b'{"error":')


class _Tokens(Struct):
    """A `usage` by any of its names: OpenAI's, or that of Responses and Anthropic."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class _Inner(Struct):
    usage: _Tokens | None = None


class _Told(Struct):
    usage: _Tokens | None = None
    response: _Inner | None = None


_told = msgspec.json.Decoder(_Told)


def usage_of(data: bytes) -> Usage | None:
    """Give the usage that a body or a chunk tells; None where it tells none that can be read."""
    try:
        told = _told.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    tokens = told.usage or (told.response.usage if told.response is not None else None)
    if tokens is None:
        return None
    prompt = _first(tokens.prompt_tokens, tokens.input_tokens)
    completion = _first(tokens.completion_tokens, tokens.output_tokens)
    total = _first(tokens.total_tokens, prompt + completion)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)


def _first(*values: int | None) -> int:
    return next((value for value in values if value is not None), 0)


class _ErrorInfo(Struct):
    message: str = ""


class _ErrorAnswer(Struct):
    error: _ErrorInfo | str


_error = msgspec.json.Decoder(_ErrorAnswer)


def message_of(body: bytes) -> str:
    """Give an error body's message in one line; empty where it has none."""
    try:
        error = _error.decode(body).error
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return ""
    text = " ".join((error if isinstance(error, str) else error.message).split())
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"


def failure_of(status: int, endpoint: str, body: bytes) -> RbeeError:
    """Say as an error of ours that the engine has refused a request, or failed it.

    The engine's own words about a request may quote it, and what a job fails with is kept: they are left
    out here and are in the job's output, but for those of an engine that is too busy.
    """
    if status in BUSY:
        return NoCapacity(
            message_of(body) or "The engine is too busy; try again in a moment.", code="engine_busy"
        )
    text = f"The engine answered {endpoint} with status {status}; its answer is the job's output."
    match status:
        case 404:
            return NotFound(text, code="engine_not_found")
        case 501:
            return NotImplementedHere(text, code="engine_not_implemented")
        case _ if status < 500:
            return InvalidRequest(text, code="engine_refused")
        case _:
            return RbeeError(text, code="engine_error")
