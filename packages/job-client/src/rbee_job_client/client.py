"""`JobClient`: submit operations, read their streams across lost connections, follow a whole service."""

import asyncio
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport
from httpx_sse import EventSource, SSEError
from msgspec import Struct

from rbee_contracts.errors import ErrorBody
from rbee_contracts.events import AnyEvent
from rbee_contracts.jobs import DONE, JobAccepted, JobPage, JobRecord
from rbee_contracts.operations import Operation, encode_operation
from rbee_contracts.sse import START, Position, parse_event_id
from rbee_job_client.errors import ProtocolError, Rejected, StreamCut, Unreachable
from rbee_job_client.frames import FirehoseParser, decode_any_event
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

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0


def backoff_s() -> Iterator[float]:
    """Delays between attempts: doubling up to `BACKOFF_MAX_S`, with full jitter."""
    limit = BACKOFF_FIRST_S
    while True:
        yield random.uniform(limit / 2, limit)
        limit = min(limit * 2, BACKOFF_MAX_S)


class _Transport(AiohttpTransport):
    """aiohttp under httpx, with sockets of our own.

    What httpx-aiohttp leaves as it is, an answer that is not HTTP, is mapped too.
    """

    def __init__(self, *, is_tls: bool) -> None:
        # Loading the system's certificates takes 20 ms. Without TLS nothing is trusted instead: a context
        # that has no certificate cannot open a connection.
        verify = True if is_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        super().__init__(verify=verify, trust_env=False, client=self._open_session)

    def _open_session(self) -> aiohttp.ClientSession:
        # 0 is aiohttp's "no limit"; idle connections are given up before the services close them after
        # 5 s, or a submit could meet the close.
        connector = aiohttp.TCPConnector(
            ssl=self.ssl_context, limit=0, keepalive_timeout=4.0, socket_factory=open_socket
        )
        return aiohttp.ClientSession(connector=connector)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except aiohttp.ClientError as exc:
            raise httpx.RemoteProtocolError(str(exc)) from exc


class JobClient:
    """Speaks the job contract to one service. Use as an async context manager, or `aclose` it.

    Args:
        base_url: e.g. `http://127.0.0.1:7833`.
        token: sent with every request, where the service asks for one.
        timeouts: see `Timeouts`.
        transport: for tests; by default httpx's aiohttp transport.

    Every method raises `Rejected` for an error answer and `Unreachable` for none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeouts: Timeouts | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._timeouts = timeouts or Timeouts()
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._transport = transport or _Transport(is_tls=self.base_url.startswith("https:"))
        # For streams; `_request` speaks to the transport itself.
        self._http = httpx.AsyncClient(
            base_url=self.base_url, headers=self._headers, transport=self._transport, trust_env=False
        )
        self._jobs_url = httpx.URL(f"{self.base_url}/v1/jobs")
        self._request_timeout = httpx.Timeout(self._timeouts.request, connect=self._timeouts.connect)
        self._stream_timeout = httpx.Timeout(self._timeouts.read, connect=self._timeouts.connect)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    # --- requests --------------------------------------------------------------------------------------

    async def submit(
        self,
        operation: Operation,
        *,
        correlation_id: str | None = None,
        respond_async: bool = False,
        idempotency_key: str | None = None,
        time_left_s: float | None = None,
    ) -> JobAccepted:
        """Submit an operation. Unless `respond_async`, it starts when its stream is first read."""
        headers = {"Content-Type": "application/json"} | _correlation(correlation_id)
        if respond_async:
            headers["Prefer"] = "respond-async"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        if time_left_s is not None:
            headers["X-Deadline-Ms"] = str(int(time_left_s * 1000))
        response = await self._request(
            "POST", self._jobs_url, content=encode_operation(operation), headers=headers
        )
        return _decode(response, JobAccepted)

    async def cancel(self, job_id: str, *, correlation_id: str | None = None) -> bool:
        """Cancel a job. False when it had already ended, or is not known."""
        try:
            await self._request("DELETE", f"/v1/jobs/{job_id}", headers=_correlation(correlation_id))
        except Rejected as exc:
            if exc.status in (404, 409):
                return False
            raise
        return True

    async def get(self, job_id: str) -> JobRecord:
        """Give a job's record."""
        return _decode(await self._request("GET", f"/v1/jobs/{job_id}"), JobRecord)

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
        return _decode(await self._request("GET", "/v1/jobs", params=params), JobPage)

    async def get_json(self, path: str, type_: type[T], *, timeout_s: float | None = None) -> T:
        """Give the answer of another route of the service, decoded as `type_`."""
        timeout = None if timeout_s is None else httpx.Timeout(timeout_s)
        return _decode(await self._request("GET", path, timeout=timeout), type_)

    async def post_json(self, path: str, body: object, *, timeout_s: float | None = None) -> None:
        """Post a struct to another route of the service."""
        headers = {"Content-Type": "application/json"}
        timeout = None if timeout_s is None else httpx.Timeout(timeout_s)
        content = msgspec.json.encode(body)
        await self._request("POST", path, content=content, headers=headers, timeout=timeout)

    # --- streams ---------------------------------------------------------------------------------------

    async def stream(self, job_id: str, position: Position = START) -> AsyncGenerator[AnyEvent, None]:
        """Give a job's events from after `position` to its terminal one, across lost connections.

        Raises:
            StreamCut: the connection was lost and not regained within `timeouts.resume`.
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
                if not exc.retryable:
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
            connected = False
            try:
                headers = {"Last-Event-ID": parser.last_event_id} if parser.last_event_id else {}
                async with self._http.stream(
                    "GET", path, headers=headers, timeout=self._stream_timeout
                ) as response:
                    await _raise_for_status(response)
                    async for chunk in response.aiter_raw():
                        events = feed(chunk)
                        if not connected and parser.last_event_id is not None:
                            connected = True
                            delays = backoff_s()
                            if on_connection is not None:
                                on_connection(True)
                        if events:
                            yield events
            except (httpx.HTTPError, Rejected, ValueError):
                pass
            finally:
                if connected and on_connection is not None:
                    on_connection(False)
            parser.reset()
            await asyncio.sleep(next(delays))

    async def heartbeats(self, query: str, type_: type[T]) -> AsyncGenerator[T, None]:
        """Give the service's heartbeats, decoded as `type_`, over one connection.

        Raises:
            StreamCut: the connection ended.
        """
        path = f"/v1/heartbeats/stream?{query}"
        try:
            async with self._http.stream("GET", path, timeout=self._stream_timeout) as response:
                await _raise_for_status(response)
                async with aclosing(EventSource(response).aiter_sse()) as frames:
                    async for frame in frames:
                        if frame.event == "heartbeat":
                            yield msgspec.json.decode(frame.data, type=type_)
        except (httpx.HTTPError, SSEError, msgspec.MsgspecError, RecursionError) as exc:
            raise StreamCut(f"{self.base_url}: {_reason(exc)}.") from exc
        raise StreamCut(f"{self.base_url} closed its heartbeats.")

    async def _stream_once(
        self, job_id: str, position: Position
    ) -> AsyncGenerator[tuple[Position, AnyEvent], None]:
        """Read one connection's worth; a connection that ends before `[DONE]` is a `StreamCut`."""
        headers = {"Accept": "text/event-stream"}
        if position != START:
            headers["Last-Event-ID"] = str(position)
        try:
            async with self._http.stream(
                "GET", f"/v1/jobs/{job_id}/stream", headers=headers, timeout=self._stream_timeout
            ) as response:
                await _raise_for_status(response)
                if response.status_code == 204:
                    return
                async with aclosing(EventSource(response).aiter_sse()) as frames:
                    async for frame in frames:
                        if not frame.data:
                            continue
                        if frame.data == DONE:
                            return
                        try:
                            position = parse_event_id(frame.id)
                            event = decode_any_event(frame.data)
                        except (ValueError, msgspec.DecodeError) as exc:
                            raise ProtocolError(
                                f"{self.base_url} sent a frame that is no event: {exc}"
                            ) from exc
                        yield position, event
        except (httpx.HTTPError, SSEError) as exc:
            raise StreamCut(f"{self.base_url}: {_reason(exc)}.") from exc
        raise StreamCut(f"{self.base_url} closed the stream before its end.")

    async def _request(
        self,
        method: str,
        url: httpx.URL | str,
        *,
        params: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        timeout: httpx.Timeout | None = None,
    ) -> httpx.Response:
        """Ask for an answer that is read whole.

        Straight from the transport: a client's cookies, redirects and authentication, of which we have
        none, cost a hop's submit as much again.
        """
        request = httpx.Request(
            method,
            url if isinstance(url, httpx.URL) else self.base_url + url,
            params=params,
            headers=self._headers | (headers or {}),
            content=content,
            extensions={"timeout": (timeout or self._request_timeout).as_dict()},
        )
        try:
            response = await self._transport.handle_async_request(request)
            response.request = request
            try:
                await response.aread()
            finally:
                await response.aclose()
        except httpx.HTTPError as exc:
            raise Unreachable(
                f"No answer from {self.base_url} ({_reason(exc)}). Is it running there?"
            ) from exc
        await _raise_for_status(response)
        return response


def _correlation(correlation_id: str | None) -> dict[str, str]:
    return {} if correlation_id is None else {"X-Correlation-ID": correlation_id}


def _reason(exc: Exception) -> str:
    """Say it as a person would; httpx-aiohttp's own words name sockets and TLS settings."""
    match exc:
        case httpx.ConnectTimeout() | httpx.ConnectError():
            return "nothing answers there"
        case httpx.TimeoutException():
            return "it did not answer in time"
        case httpx.NetworkError() | httpx.RemoteProtocolError():
            return "the connection was lost"
        case _:
            return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


async def _raise_for_status(response: httpx.Response) -> None:
    if response.status_code < 400:
        return
    try:
        body = msgspec.json.decode(await response.aread(), type=ErrorBody)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        body = ErrorBody(
            error="Rejected", details=f"{response.url} answered {response.status_code}.", code="rejected"
        )
    raise Rejected(body.details, status=response.status_code, code=body.code, title=body.error)


def _decode(response: httpx.Response, type_: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(
            f"{response.url} answered {response.status_code} with an unreadable body."
        ) from exc
