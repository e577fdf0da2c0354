"""Correlation: one id through every hop's events, log lines and requests."""

import structlog
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_contracts.ids import is_correlation_id, new_correlation_id

HEADER = "X-Correlation-ID"
_NAME = HEADER.lower().encode()


class CorrelationMiddleware:
    """Take the caller's correlation id where it is well formed, else make one; echo it; bind it for logs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, _NAME) or ""
        correlation_id = given if is_correlation_id(given) else new_correlation_id()
        scope.setdefault("state", {})["correlation_id"] = correlation_id
        echoed = (_NAME, correlation_id.encode())

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() != _NAME]
                message["headers"] = [*others, echoed]
            await send(message)

        bound = structlog.contextvars.bind_contextvars(correlation_id=correlation_id)
        try:
            await self._app(scope, receive, send_with_header)
        finally:
            structlog.contextvars.reset_contextvars(**bound)


def header(scope: Scope, name: bytes) -> str | None:
    """Give the first header of this (lower-case) name; for what is asked of every request."""
    for known, value in scope["headers"]:
        if known == name:
            return str(value.decode("latin-1"))
    return None


def correlation_id_of(connection: HTTPConnection) -> str:
    return str(getattr(connection.state, "correlation_id", ""))
