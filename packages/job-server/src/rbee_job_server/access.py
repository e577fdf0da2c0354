"""Who may speak to a service: the token, the Host and Origin rule, and tickets for a browser's EventSource.

One middleware stands before all routes, so that a route is closed unless it is named in `OPEN_PATHS`.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable

import structlog
from msgspec import Struct
from starlette.datastructures import QueryParams
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee_contracts.access import is_loopback
from rbee_contracts.errors import Forbidden, RbeeError, Unauthorized
from rbee_job_server.correlation import correlation_id_of
from rbee_job_server.errors import error_response

log = structlog.get_logger(__name__)

OPEN_PATHS = frozenset({"/health"})
"""What answers without a token. Host and Origin are checked on these too."""

TICKET_S = 60
"""How long a ticket may wait until it is first used."""

TICKETS_REMEMBERED = 10_000
"""Tickets that were used in time and may go on resuming; beyond it the oldest are forgotten."""

REFUSALS_LOGGED_EVERY_S = 1.0

_stream_path = re.compile(r"/v1/jobs/([^/]+)/stream\Z").match
_authority = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?\Z").match
_origin = re.compile(r"https?://([^/]+)\Z", re.IGNORECASE).match


class AccessConfig(Struct, frozen=True, kw_only=True):
    """Who may speak to a service.

    Args:
        token: what every caller must bring; None where whoever reaches the service may use it.
        allowed_hosts: names besides the loopback ones that Host and Origin may have.
    """

    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"AccessConfig(token={'…' if self.token else None}, allowed_hosts={self.allowed_hosts})"


class Tickets:
    """Makes and checks what opens one job's stream without a token.

    A ticket is the time it expires and a MAC over that and the job's id, under a key that ends with this
    process. EventSource reconnects with the URL it has, so a ticket that was first used in time may go on
    resuming, with a Last-Event-ID, for as long as the job's log is kept.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._key = secrets.token_bytes(32)
        self._used: dict[str, None] = {}

    def issue(self, job_id: str) -> str:
        """Give a ticket for one job, to be used within `TICKET_S`."""
        expires = f"{self._now() + TICKET_S:.3f}"
        return f"{expires}.{self._mac(job_id, expires)}"

    def admits(self, job_id: str, ticket: str, *, resumes: bool) -> bool:
        """Whether `ticket` opens this job's stream now. `resumes`: the reader has had some of it."""
        expires, _, mac = ticket.rpartition(".")
        if not _is_same(mac.encode(errors="replace"), self._mac(job_id, expires).encode()):
            return False
        if self._now() < float(expires):  # ours, as the MAC says
            if ticket not in self._used:
                self._used[ticket] = None
                if len(self._used) > TICKETS_REMEMBERED:
                    del self._used[next(iter(self._used))]
            return True
        return resumes and ticket in self._used

    def _mac(self, job_id: str, expires: str) -> str:
        text = f"{job_id}\n{expires}".encode(errors="replace")
        return base64.urlsafe_b64encode(hmac.digest(self._key, text, "sha256")).rstrip(b"=").decode()


class Access:
    """Decides on each request from its scope alone, before any route sees it."""

    def __init__(self, config: AccessConfig | None = None, tickets: Tickets | None = None) -> None:
        config = config or AccessConfig()
        self.tickets = tickets or Tickets()
        self._digest = None if config.token is None else _digest(config.token.encode())
        self._allowed_hosts = {host.lower() for host in config.allowed_hosts}
        # A page cannot know the token, so that with one a Host or an Origin tells nothing.
        self._checks_hosts = config.token is None or bool(config.allowed_hosts)
        self._refusals = 0
        self._logged_at = -REFUSALS_LOGGED_EVERY_S

    def refusal(self, scope: Scope) -> RbeeError | None:
        """Say why a request may not be served; None where it may."""
        if self._checks_hosts:
            hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
            if len(hosts) != 1 or not self._is_allowed(hosts[0]):
                return Forbidden(
                    "This service does not answer under the host name of this request. "
                    "Start it with --allowed-host NAME to use it under that name.",
                    code="forbidden_host",
                )
            if origins and not (len(origins) == 1 and self._is_own_page(origins[0])):
                return Forbidden(
                    "Web pages of this origin may not use this service. "
                    "Start it with --allowed-host NAME to allow the pages of a host.",
                    code="forbidden_origin",
                )
        if self._digest is None or scope["path"] in OPEN_PATHS:
            return None
        if self._has_token(scope) or self._has_ticket(scope):
            return None
        return Unauthorized(
            "This service asks for its token, as `Authorization: Bearer TOKEN`. "
            "rbee's own commands take it from RBEE_TOKEN or --token-file."
        )

    def _is_allowed(self, authority: str) -> bool:
        match = _authority(authority)
        if match is None:
            return False
        host = match[1].strip("[]").lower().rstrip(".")
        return is_loopback(host) or host in self._allowed_hosts

    def _is_own_page(self, origin: str) -> bool:
        match = _origin(origin)
        return match is not None and self._is_allowed(match[1])

    def _has_token(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not given:  # Anthropic's clients bring it in a header of its own
            given = [b"Bearer " + value for name, value in scope["headers"] if name == b"x-api-key"]
        if len(given) != 1 or self._digest is None:
            return False
        kind, _, token = given[0].partition(b" ")
        # Compared as digests, which have one length whatever was sent.
        return hmac.compare_digest(_digest(token.strip(b" ")), self._digest) and kind.lower() == b"bearer"

    def _has_ticket(self, scope: Scope) -> bool:
        match = _stream_path(scope["path"])
        if match is None or scope["method"] != "GET":
            return False
        tickets = QueryParams(scope["query_string"]).getlist("ticket")
        resumes = any(_values(scope, b"last-event-id"))
        return len(tickets) == 1 and self.tickets.admits(match[1], tickets[0], resumes=resumes)

    def log_refusal(self, scope: Scope, error: RbeeError) -> None:
        """Log a refusal, once a second at most: whoever is refused must not fill the disk."""
        self._refusals += 1
        now = time.monotonic()
        if now - self._logged_at >= REFUSALS_LOGGED_EVERY_S:
            peer = scope["client"][0] if scope.get("client") else None
            path = ascii(scope["path"][:100])
            log.warning("access_refused", code=error.code, peer=peer, path=path, refusals=self._refusals)
            self._logged_at, self._refusals = now, 0


class AccessMiddleware:
    """Refuse what `access` refuses, whatever the route; sockets that are not HTTP, always."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        error = self._access.refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
            return
        self._access.log_refusal(scope, error)
        await error_response(error, correlation_id_of(HTTPConnection(scope)))(scope, receive, send)


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _is_same(given: bytes, ours: bytes) -> bool:
    return hmac.compare_digest(_digest(given), _digest(ours))
