"""How rbee's errors look over HTTP: one status for each class, one body for all."""

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from rbee_contracts.errors import (
    BodyTooLarge,
    Conflict,
    DeadlineExceeded,
    ErrorBody,
    Forbidden,
    Gone,
    InvalidRequest,
    NoCapacity,
    NotFound,
    NotImplementedHere,
    RbeeError,
    Unauthorized,
    Unavailable,
    WorkerLost,
)
from rbee_job_server.correlation import HEADER as CORRELATION_HEADER
from rbee_job_server.correlation import correlation_id_of

log = structlog.get_logger(__name__)


class NotJson(InvalidRequest):
    """The body says of itself that it is something else."""

    title = "Unsupported media type"
    default_code = "unsupported_media_type"


STATUS: dict[type[RbeeError], int] = {
    InvalidRequest: 400,
    NotJson: 415,
    Unauthorized: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    Gone: 410,
    BodyTooLarge: 413,
    NotImplementedHere: 501,
    NoCapacity: 503,
    Unavailable: 503,
    DeadlineExceeded: 504,
    WorkerLost: 502,
    RbeeError: 500,
}

RETRY_AFTER_S = 2
"""Sent with every 429 and 503."""

_HTTP_CODES = {404: "route_not_found", 405: "method_not_allowed"}
_encoder = msgspec.json.Encoder()


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoder.encode(value), status, headers=headers, media_type="application/json")


def error_response(error: RbeeError, correlation_id: str) -> Response:
    status = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return json_response(error.body(correlation_id), status, headers)


async def _on_rbee_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RbeeError)
    return error_response(exc, correlation_id_of(request))


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    path = request.scope["path"][:200]  # not `request.url`, which a hostile Host header breaks
    if exc.status_code == 413:
        return error_response(BodyTooLarge(exc.detail), correlation_id_of(request))
    details = f"{request.method} {path}: {exc.detail}"
    if exc.status_code == 404:
        details = f"{request.method} {path} is not a route of this service."
    code = _HTTP_CODES.get(exc.status_code, "http_error")
    body = ErrorBody(error=exc.detail, details=details, code=code, correlation_id=correlation_id_of(request))
    return json_response(body, exc.status_code, dict(exc.headers or {}))


async def _on_crash(request: Request, exc: Exception) -> Response:
    correlation_id = correlation_id_of(request)
    log.error(
        "request_crashed",
        method=request.method,
        path=request.scope["path"][:200],
        correlation_id=correlation_id,
        exc_info=exc,
    )
    answer = error_response(
        RbeeError("This is a fault of rbee: its log has the cause under the correlation id."), correlation_id
    )
    answer.headers[CORRELATION_HEADER] = correlation_id  # this runs outside the middleware that echoes it
    return answer


async def _on_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


EXCEPTION_HANDLERS: dict[int | type[Exception], ExceptionHandler] = {
    RbeeError: _on_rbee_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_client_gone,
    Exception: _on_crash,
}
