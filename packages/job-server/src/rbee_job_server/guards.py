"""How much one caller may take of a service: the limits, and the one on bodies, which is a middleware.

What bounds a connection before there is a request (head, deadline, number) is in `protocol.py`.
"""

import contextlib
import resource

from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee_contracts.errors import BodyTooLarge
from rbee_contracts.ids import is_step_key
from rbee_job_server.correlation import correlation_id_of, header
from rbee_job_server.errors import error_response

HOP_EXTRA_BYTES = 16_384
"""What a hop may add to a body that it passes on: where it runs, and defaults that the caller left out."""

FILES_BESIDE_CONNECTIONS = 512
"""Open files that a service needs for all but its callers' connections: logs, pipes, connections below."""


class Limits(Struct, frozen=True, kw_only=True):
    """What a service takes from one caller, and from all.

    Args:
        max_body_bytes: of a request; larger is 413.
        max_head_bytes: of a request line with its headers; larger is 431.
        receive_deadline_s: from a request's first byte (or the connection's beginning) until all of it,
            head and body, is here; later is 408.
        max_connections: open at once; one more is answered 503.
        keep_alive_s: how many seconds a connection may idle between two requests. As long as nginx's
            `keepalive_timeout`, and longer than most clients keep theirs: who closes first should be the
            one that sends, or a request may meet the close. Where `max_connections` are open, one that idles
            is closed for a new one.
    """

    max_body_bytes: int = 1_000_000
    max_head_bytes: int = 32_768
    receive_deadline_s: float = 9.0
    max_connections: int = 4096
    keep_alive_s: int = 75


class BodyLimit:
    """Refuse a body that is too large: by its stated length at once, else where it passes the limit.

    A body that comes in pieces is never held beyond the limit. What still comes after the answer is
    thrown away by the protocol, so that the caller can read the answer.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_body_bytes
        if is_step_key(header(scope, b"idempotency-key") or ""):
            limit += HOP_EXTRA_BYTES
        stated = header(scope, b"content-length") or ""
        if stated.isascii() and stated.isdigit() and int(stated[:20]) > limit:
            error = BodyTooLarge(_too_large(limit))
            answer = error_response(error, correlation_id_of(HTTPConnection(scope)))
            await answer(scope, receive, send)
            return
        received = 0

        async def receive_up_to_limit() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    # Starlette's own, so that an engine's mounted app makes a 413 of it too.
                    raise HTTPException(413, _too_large(limit))
            return message

        await self._app(scope, receive_up_to_limit, send)


def _too_large(limit: int) -> str:
    return f"The body has more than {limit} bytes, which is what this service takes (--max-body-bytes)."


def allow_open_files(max_connections: int) -> None:
    """Raise the soft limit of open files so that `max_connections` fit, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + FILES_BESIDE_CONNECTIONS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
