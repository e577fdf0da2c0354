"""`JobClient`: submit operations, read their streams across lost connections, follow a whole service."""

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import aiohttp
import certifi
import msgspec
from aiohttp import ClientTimeout, hdrs
from msgspec import Struct

from rbee_contracts.errors import ErrorBody
from rbee_contracts.events import AnyEvent
from rbee_contracts.jobs import DONE, JobAccepted, JobPage, JobRecord
from rbee_contracts.operations import Operation, encode_operation
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_contracts.trace import TraceContext
from rbee_job_client.errors import ProtocolError, Rejected, StreamCut, Unreachable
from rbee_job_client.frames import FirehoseParser, StreamParser, decode_any_event
from rbee_job_client.sockets import open_socket


class Timeouts(Struct, frozen=True, kw_only=True):
    """Seconds.

    Args:
        connect: to open a connection.
        request: for a whole answer of a route that does not stream, a submit too.
        read: of silence on a stream; above the services' ping interval of 15 s.
        resume: in which a stream that was cut must be taken up again.
    """

    connect: float = 5.0
    request: float = 30.0
    read: float = 40.0
    resume: float = 60.0


T = TypeVar("T")

MAX_ANSWER_BYTES = 64 * 2**20
"""Bound of an answer that is read whole."""

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0

_LOST = (aiohttp.ClientError, TimeoutError)
"""What aiohttp raises when no answer came, or not all of it."""

_JSON: dict[str, str] = {hdrs.CONTENT_TYPE: "application/json"}


def backoff_s() -> Iterator[float]:
    """Delays between attempts: doubling up to `BACKOFF_MAX_S`, with full jitter."""
    limit = BACKOFF_FIRST_S
    while True:
        yield random.uniform(limit / 2, limit)
        limit = min(limit * 2, BACKOFF_MAX_S)


class JobClient:
    """Speaks the job contract to one service. Use as an async context manager, or `aclose` it.

    Args:
        base_url: e.g. `http://127.0.0.1:7833`.
        token: sent with every request, where the service asks for one.
        timeouts: see `Timeouts`.

    Every method raises `Rejected` for an error answer and `Unreachable` for none. Redirects are not
    followed, proxies that the environment names are not used, and no cookies are kept.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeouts = timeouts or Timeouts()
        self._headers: dict[str, str] = {} if token is None else {hdrs.AUTHORIZATION: f"Bearer {token}"}
        self.heard_at: float | None = None
        """Monotonic time of the last bytes of a firehose that is followed, pings too."""
        # Loading the certificates takes 20 ms.
        self._ssl: ssl.SSLContext | bool = (
            ssl.create_default_context(cafile=certifi.where()) if self.base_url.startswith("https:") else True
        )
        self._request_timeout = self._within(self._timeouts.request)
        read_s = self._timeouts.read
        self._stream_timeout = ClientTimeout(
            total=None, connect=read_s, sock_connect=self._timeouts.connect, sock_read=read_s
        )
        self._session: aiohttp.ClientSession | None = None
        self._streams: set[aiohttp.ClientResponse] = set()
        self._hurried = asyncio.Event()
        """Set, and replaced, when followers are to connect now."""
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. A stream that is being read then is cut."""
        self._is_closed = True
        for response in self._streams:
            # aiohttp closes the connection and tells nobody, who would then wait for ever.
            response.content.set_exception(aiohttp.ClientPayloadError())
        if self._session is not None:
            await self._session.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        """The session, which is made in the event loop that first asks for it."""
        if self._is_closed:
            raise RuntimeError(f"The client of {self.base_url} is closed.")
        if self._session is None:
            # 0 is aiohttp's "no limit"; idle connections are given up long before the services close them,
            # or a submit could meet the close.
            connector = aiohttp.TCPConnector(
                ssl=self._ssl, limit=0, keepalive_timeout=4.0, socket_factory=open_socket
            )
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session

    # --- requests --------------------------------------------------------------------------------------

    async def submit(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        respond_async: bool = False,
        idempotency_key: str | None = None,
        time_left_s: float | None = None,
        trace: TraceContext | None = None,
    ) -> JobAccepted:
        """Submit an operation. Unless `respond_async`, it starts when its stream is first read."""
        headers = _JSON | _correlation(correlation_id)
        if respond_async:
            headers["Prefer"] = "respond-async"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        if time_left_s is not None:
            headers["X-Deadline-Ms"] = str(int(time_left_s * 1000))
        if trace is not None:
            headers |= trace.headers
        answer = await self._request(
            hdrs.METH_POST, "/v1/jobs", headers=headers, content=encode_operation(operation)
        )
        return _decode(answer, JobAccepted)

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool:
        """Cancel a job. False when it had already ended, or is not known."""
        try:
            await self._request(hdrs.METH_DELETE, f"/v1/jobs/{job_id}", headers=_correlation(correlation_id))
        except Rejected as exc:
            if exc.status in (404, 409):
                return False
            raise
        return True

    async def get(self, job_id: str) -> JobRecord:
        """Give a job's record."""
        return _decode(await self._request(hdrs.METH_GET, f"/v1/jobs/{job_id}"), JobRecord)

    async def list_jobs(
        self,
        *,
        state: str | None = None,
        operation: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> JobPage:
        """List records, newest first."""
        query = {"state": state, "operation": operation, "limit": str(limit), "cursor": cursor}
        params = {name: value for name, value in query.items() if value is not None}
        return _decode(await self._request(hdrs.METH_GET, "/v1/jobs", params=params), JobPage)

    async def get_json(self, path: str, type_: type[T], *, timeout_s: float | None = None) -> T:
        """Give the answer of another route of the service, decoded as `type_`."""
        return _decode(await self._request(hdrs.METH_GET, path, timeout_s=timeout_s), type_)

    async def get_bytes(self, path: str, *, timeout_s: float | None = None) -> bytes:
        """Give the answer of another route of the service as it is."""
        return (await self._request(hdrs.METH_GET, path, timeout_s=timeout_s)).body

    async def post_json(self, path: str, body: object, *, timeout_s: float | None = None) -> None:
        """Post a struct to another route of the service."""
        content = msgspec.json.encode(body)
        await self._request(hdrs.METH_POST, path, headers=_JSON, content=content, timeout_s=timeout_s)

    # --- streams ---------------------------------------------------------------------------------------

    async def stream(self, job_id: str, position: Position = START) -> AsyncGenerator[AnyEvent, None]:
        """Give a job's events from after `position` to its terminal one, across lost connections.

        Raises:
            StreamCut: the connection was lost and not regained within `timeouts.resume`, or this was closed.
            Rejected: the service does not know the job, or no longer has its output.
        """
        async with aclosing(self.stream_from(job_id, position)) as events:
            async for _, event in events:
                yield event

    async def stream_from(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        """As `stream`, with each event's position."""
        delays = backoff_s()
        begun = position
        give_up_at: float | None = None
        while True:
            try:
                async with aclosing(self._stream_once(job_id, position)) as events:
                    async for (n, i), event in events:
                        if event.kind == "output":
                            is_new, seen = i > position.outputs, position._replace(outputs=i)
                        else:
                            is_new, seen = n > position.narrations, position._replace(narrations=n)
                        if not is_new:
                            continue  # from a peer that sends again what we have
                        position, delays, give_up_at = seen, backoff_s(), None
                        yield position, event
                        if event.kind == "terminal":
                            return
                if begun == START:
                    raise ProtocolError(
                        f"{self.base_url} ended the stream of {job_id} without a terminal event."
                    )
                return
            except (StreamCut, Unreachable, Rejected) as exc:
                if not exc.retryable or self._is_closed:
                    raise
                now = asyncio.get_running_loop().time()
                give_up_at = give_up_at or now + self._timeouts.resume
                delay = next(delays)
                if now + delay > give_up_at:
                    raise StreamCut(
                        f"The stream of {job_id} was cut after event {position} and could not be resumed "
                        f"within {self._timeouts.resume:g} s: {exc.details} Read it again from there."
                    ) from exc
                await asyncio.sleep(delay)
                if self._is_closed:
                    raise

    async def submit_and_stream(
        self, operation: Operation, *, correlation_id: str | None = None
    ) -> AsyncGenerator[AnyEvent, None]:
        """Submit, then give the job's events to its terminal one."""
        accepted = await self.submit(operation, correlation_id=correlation_id)
        async with aclosing(self.stream(accepted.job_id)) as events:
            async for event in events:
                yield event

    def follow(
        self,
        *,
        output: bool = False,
        on_connection: Callable[[bool], None] | None = None,
    ) -> AsyncIterator[list[AnyEvent]]:
        """Follow the service's firehose for ever, in batches as they arrive, across lost connections.

        A `Gap` event says that some were lost. `on_connection` is told True when following and False
        when the connection is lost.
        """
        parser = FirehoseParser()
        return self._follow(parser, parser.feed, output, on_connection)

    def follow_raw(
        self, *, on_connection: Callable[[bool], None] | None = None
    ) -> AsyncIterator[list[AnyEvent | bytes]]:
        """As `follow` with output, which is left as the JSON that came: for whoever passes it on."""
        parser = FirehoseParser()
        return self._follow(parser, parser.feed_raw, True, on_connection)

    async def _follow(
        self,
        parser: FirehoseParser,
        feed: Callable[[bytes], list[T]],
        output: bool,
        on_connection: Callable[[bool], None] | None,
    ) -> AsyncIterator[list[T]]:
        delays = backoff_s()
        path = "/v1/events?output=1" if output else "/v1/events"
        while True:
            connected, hurried = False, self._hurried  # so that one who hurries during the attempt is heard
            try:
                headers = {"Last-Event-ID": parser.last_event_id} if parser.last_event_id else {}
                async with self._open(path, headers) as response:
                    while chunk := await response.content.readany():
                        self.heard_at = time.monotonic()
                        events = feed(chunk)
                        if not connected and parser.last_event_id is not None:
                            connected, hurried = True, self._hurried
                            delays = backoff_s()
                            if on_connection is not None:
                                on_connection(True)
                        if events:
                            yield events
            except (*_LOST, Rejected, ValueError):
                pass
            finally:
                if connected and on_connection is not None:
                    on_connection(False)
            parser.reset()
            with suppress(TimeoutError):
                async with asyncio.timeout(next(delays)):
                    await hurried.wait()

    def hurry(self) -> None:
        """Have a follower that waits to connect again do so at once: it is known that the service answers."""
        self._hurried.set()
        self._hurried = asyncio.Event()

    async def heartbeats(self, query: str, type_: type[T]) -> AsyncGenerator[T, None]:
        """Give the service's heartbeats, decoded as `type_`, over one connection.

        Raises:
            StreamCut: the connection ended.
        """
        parser = StreamParser()
        try:
            async with self._open(f"/v1/heartbeats/stream?{query}") as response:
                self._check_type(response)
                while chunk := await response.content.readany():
                    for frame in parser.feed(chunk):
                        if frame.event == "heartbeat":
                            yield msgspec.json.decode(frame.data, type=type_)
        except (*_LOST, ValueError, RecursionError) as exc:
            raise StreamCut(f"{self.base_url}: {_reason(exc)}.") from exc
        raise StreamCut(f"{self.base_url} closed its heartbeats.")

    async def _stream_once(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        """Read one connection's worth; a connection that ends before `[DONE]` is a `StreamCut`."""
        headers: dict[str, str] = {hdrs.ACCEPT: "text/event-stream"}
        if position != START:
            headers["Last-Event-ID"] = str(position)
        parser = StreamParser()
        try:
            async with self._open(f"/v1/jobs/{job_id}/stream", headers) as response:
                if response.status == 204:
                    return
                self._check_type(response)
                while chunk := await response.content.readany():
                    for frame in parser.feed(chunk):
                        if frame.data == DONE:
                            return
                        position = parse_event_id(frame.id)
                        yield position, decode_any_event(frame.data)
        except _LOST as exc:
            raise StreamCut(f"{self.base_url}: {_reason(exc)}.") from exc
        except ValueError as exc:
            raise ProtocolError(f"{self.base_url} sent a frame that is no event: {exc}") from exc
        raise StreamCut(f"{self.base_url} closed the stream before its end.")

    def _within(self, timeout_s: float) -> ClientTimeout:
        return ClientTimeout(total=timeout_s, sock_connect=self._timeouts.connect)

    @asynccontextmanager
    async def _open(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for a stream; to leave it before its end closes its connection."""
        async with self._http.get(
            self.base_url + path, headers=headers, timeout=self._stream_timeout, allow_redirects=False
        ) as response:
            self._streams.add(response)
            try:
                if response.status >= 400:
                    _raise_for_status(await _read(response))
                yield response
            finally:
                self._streams.discard(response)

    def _check_type(self, response: aiohttp.ClientResponse) -> None:
        kind = response.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0]
        if "text/event-stream" not in kind:
            raise StreamCut(f"{self.base_url}: it answered with {kind!r} in place of an event stream.")

    async def _request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        timeout_s: float | None = None,
    ) -> "_Answer":
        """Ask for an answer that is read whole."""
        timeout = self._request_timeout if timeout_s is None else self._within(timeout_s)
        try:
            async with self._http.request(
                method,
                self.base_url + path,
                params=params,
                headers=headers,
                data=content,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                answer = await _read(response)
        except _LOST as exc:
            raise Unreachable(
                f"No answer from {self.base_url} ({_reason(exc)}). Is it running there?"
            ) from exc
        _raise_for_status(answer)
        if len(answer.body) > MAX_ANSWER_BYTES:
            raise ProtocolError(
                f"{answer.url} answered {answer.status} with more than {MAX_ANSWER_BYTES} bytes."
            )
        return answer


def _correlation(correlation_id: str | None) -> dict[str, str]:
    return {} if correlation_id is None else {"X-Correlation-ID": correlation_id}


def _reason(exc: Exception) -> str:
    """Say it as a person would; aiohttp's own words name sockets and TLS settings."""
    match exc:
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return f"no URL of a service: {exc}"
        case aiohttp.ClientConnectionError() if not isinstance(exc, aiohttp.SocketTimeoutError):
            return "nothing answers there"
        case TimeoutError():
            return "it did not answer in time"
        case aiohttp.ClientError():
            return "the connection was lost"
        case _:
            return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


class _Answer(NamedTuple):
    url: str
    status: int
    body: bytes


async def _read(response: aiohttp.ClientResponse) -> _Answer:
    """Read an answer whole; of one that is too large, so much that this can be told."""
    body = await response.content.readany()
    if not response.content.at_eof():
        parts, size = [body], len(body)
        while size <= MAX_ANSWER_BYTES and (part := await response.content.readany()):
            parts.append(part)
            size += len(part)
        body = b"".join(parts)
    return _Answer(str(response.url), response.status, body)


def _raise_for_status(answer: _Answer) -> None:
    if answer.status < 400:
        return
    try:
        body = msgspec.json.decode(answer.body, type=ErrorBody)
    except (ValueError, RecursionError):
        body = ErrorBody(error="Rejected", details=f"{answer.url} answered {answer.status}.", code="rejected")
    raise Rejected(body.details, status=answer.status, code=body.code, title=body.error)


def _decode(answer: _Answer, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.body, type=type_)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"{answer.url} answered {answer.status} with an unreadable body.") from exc
