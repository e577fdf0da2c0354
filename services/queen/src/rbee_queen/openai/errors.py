"""Errors as OpenAI's and Anthropic's clients know them: a status for each code, and their bodies. Pure."""

import msgspec

from rbee_contracts.errors import ErrorBody
from rbee_contracts.jobs import JobError
from rbee_job_server.errors import NotJson
from rbee_queen.openai.endpoints import Dialect

STATUS_OF_CODE: dict[str, int] = {
    "invalid_request": 400,
    "invalid_field": 400,
    "model_required": 400,
    "engine_refused": 400,
    "unknown_endpoint": 404,
    "model_not_found": 404,
    "engine_not_found": 404,
    "worker_not_found": 404,
    "hive_not_found": 404,
    "cancelled": 499,
    "abandoned": 499,
    "engine_not_implemented": 501,
    "timeout": 504,
}
"""What a failed job's code is as a status; any other is 503 where a retry may help, and else 500."""

_OPENAI_TYPES = {403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {"unauthorized": "invalid_api_key", "body_too_large": "request_too_large"}

_encode = msgspec.json.Encoder().encode
_body_decoder = msgspec.json.Decoder(ErrorBody)


class UnsupportedMediaType(NotJson):
    """The body comes as what this endpoint does not take."""


def status_of(error: JobError) -> int:
    """Give the status that a failed job is answered with."""
    return STATUS_OF_CODE.get(error.code) or (503 if error.retryable else 500)


def error_body(dialect: Dialect, status: int, message: str, code: str, correlation_id: str = "") -> bytes:
    """Write an error in one of the two shapes."""
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
        error: dict[str, object] = {"type": kind, "message": message}
        return _encode({"type": "error", "error": error, "request_id": correlation_id})
    kind = _OPENAI_TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": _param(code), "code": _CODES.get(code, code)}
    return _encode({"error": error})


def _param(code: str) -> str | None:
    return "model" if code in ("model_not_found", "model_required") else None


def error_frame(dialect: Dialect, status: int, message: str, code: str, correlation_id: str = "") -> bytes:
    """Write an error as the last frame of a stream that has begun."""
    body = error_body(dialect, status, message, code, correlation_id)
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % body
    return b"data: %b\n\ndata: [DONE]\n\n" % body


def reshaped(dialect: Dialect, status: int, body: bytes) -> bytes | None:
    """Give an error body of the job routes in another shape; None where it is no such body."""
    try:
        error = _body_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeError):
        return None
    return error_body(dialect, status, error.details, error.code, error.correlation_id)
