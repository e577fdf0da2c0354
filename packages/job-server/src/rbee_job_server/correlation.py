"""Correlation: one id through every hop's events, log lines and requests."""

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_contracts.ids import is_correlation_id, new_correlation_id

HEADER = "X-Correlation-ID"


class CorrelationMiddleware:
    """Take the caller's correlation id where it is well formed, else make one; echo it; bind it for logs."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = HTTPConnection(scope).headers.get(HEADER, "")
        correlation_id = given if is_correlation_id(given) else new_correlation_id()
        scope.setdefault("state", {})["correlation_id"] = correlation_id

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = correlation_id
            await send(message)

        with structlog.contextvars.bound_contextvars(correlation_id=correlation_id):
            await self._app(scope, receive, send_with_header)


def correlation_id_of(connection: HTTPConnection) -> str:
    return str(getattr(connection.state, "correlation_id", ""))
