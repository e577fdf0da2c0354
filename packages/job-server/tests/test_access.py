"""Who may speak to a service: tokens, hosts, origins, tickets."""

import hmac
import json
import time
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from rbee_inprocess import ManualClock, Running, actions, exchange, frames_of, running
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from rbee_contracts.access import (
    TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    UnusableToken,
    check_token,
    is_loopback,
    read_token,
)
from rbee_contracts.ids import new_job_id
from rbee_contracts.operations import Infer, Status
from rbee_job_client import JobClient, Rejected
from rbee_job_server import Handlers, JobContext
from rbee_job_server.access import (
    REFUSALS_LOGGED_EVERY_S,
    TICKET_S,
    TICKETS_REMEMBERED,
    AccessConfig,
    AccessMiddleware,
    Tickets,
)
from rbee_job_server.options import add_guard_options, read_guard_options

TOKEN = "the-token-of-this-cluster"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
INFER = {"operation": "infer", "model": "m", "prompt": "x"}


async def speak(_: Infer, context: JobContext) -> None:
    context.emit_token("one")


async def hang(_: Status, __: JobContext) -> None:
    await anyio.sleep_forever()


async def new_route(_: Request) -> Response:
    return Response("open")


async def engine_app(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("an engine's route")(scope, receive, send)


HANDLERS: Handlers = {Infer: speak, Status: hang}
ROUTES = [Route("/v1/new", new_route, methods=["GET", "POST"]), Mount("/", app=engine_app)]


@pytest.fixture
async def closed() -> AsyncIterator[Running]:
    """A service with a token."""
    async with running(HANDLERS, routes=ROUTES, access=AccessConfig(token=TOKEN)) as service:
        yield service


@pytest.fixture
async def local() -> AsyncIterator[Running]:
    """A service without a token."""
    async with running(HANDLERS, routes=ROUTES) as service:
        yield service


async def ask(service: Running, *headers: bytes, line: bytes = b"GET /v1/info", body: bytes = b"") -> Any:
    """Send a request with exactly these headers; give (status, body)."""
    head = b"".join(header + b"\r\n" for header in headers)
    length = b"Content-Length: %d\r\n" % len(body) if body else b""
    answer = await exchange(
        service.port, line + b" HTTP/1.1\r\n" + head + length + b"Connection: close\r\n\r\n" + body
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body) if body.startswith(b"{") else body


# --- the token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/ready", "/v1/info", "/v1/jobs", "/v1/events", "/v1/new", "/metrics", "/nope"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"])
async def test_without_the_token_every_route_and_method_is_401(
    closed: Running, method: str, path: str
) -> None:
    """F51: routes that do not exist too, which tells nothing about those that do."""
    answer = await closed.http.request(method, path)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    if method != "HEAD":
        error = answer.json()
        assert (error["code"], error["error"]) == ("unauthorized", "Unauthorized")
        assert error["correlation_id"] == answer.headers["X-Correlation-ID"]


async def test_health_is_open_and_its_neighbours_are_not(closed: Running) -> None:
    assert (await closed.http.get("/health")).status_code == 200
    for path in ("/health/", "/health/x", "//health", "/healthz", "/HEALTH", "/health%2f..", "/x/../v1/info"):
        assert (await closed.http.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong-token-of-some-cluster",
        b"Bearer " + TOKEN[:-1].encode(),
        b"Bearer " + TOKEN.encode() + b"x",
        b"Bearer " + TOKEN.upper().encode(),
        b"Basic " + TOKEN.encode(),
        b"Bearer " + TOKEN.encode() + b", Bearer x",
        b"Bearer \xe9\xff\x80" + TOKEN.encode(),
        "Bearer töken-of-this-clüster".encode(),
        TOKEN.encode(),
        b"Bearer " + b"x" * 20_000,
    ],
)
async def test_another_token_is_401_whatever_its_bytes(closed: Running, value: bytes) -> None:
    """F52."""
    status, error = await ask(closed, b"Host: localhost", b"Authorization: " + value)

    assert (status, error["code"]) == (401, "unauthorized")
    assert TOKEN not in json.dumps(error)


async def test_two_tokens_are_401_though_one_is_right(closed: Running) -> None:
    right = b"Authorization: Bearer " + TOKEN.encode()

    assert (await ask(closed, b"Host: localhost", right, b"Authorization: Bearer x"))[0] == 401
    assert (await ask(closed, b"Host: localhost", right))[0] == 200


async def test_with_the_token_everything_is_as_without_one(closed: Running) -> None:
    async with JobClient(closed.url, token=TOKEN) as client:
        events = [event.action async for event in client.submit_and_stream(Infer(model="m", prompt="x"))]

    assert events == ["execute", "token", "execute_complete"]
    for path in ("/ready", "/v1/info", "/v1/jobs", "/v1/new", "/metrics"):
        assert (await closed.http.get(path, headers=BEARER)).status_code == 200, path
    assert (
        await closed.http.get("/v1/info", headers={"Authorization": f"bEARER  {TOKEN}"})
    ).status_code == 200


async def test_a_client_without_the_token_is_told(closed: Running) -> None:
    async with JobClient(closed.url) as client:
        with pytest.raises(Rejected) as raised:
            await client.submit(Infer(model="m", prompt="x"))

    assert (raised.value.status, raised.value.code) == (401, "unauthorized")


async def test_tokens_are_compared_in_constant_time(closed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """F52: always by `compare_digest`, on bytes of one length, however long the token that was sent is."""
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", record)
    for token in ("x", "x" * 5000, TOKEN[:-1], TOKEN):
        await closed.http.get("/v1/info", headers={"Authorization": f"Bearer {token}"})

    assert len(compared) == 4
    assert {(type(a), len(a), type(b), len(b)) for a, b in compared} == {(bytes, 32, bytes, 32)}


async def test_no_token_is_in_a_log_or_a_repr(closed: Running) -> None:
    with capture_logs() as logs:
        for token in (TOKEN, "a-wrong-token-" + TOKEN):
            await closed.http.get("/v1/info?ticket=" + TOKEN, headers={"Authorization": f"Bearer {token}"})

    assert [line["event"] for line in logs] == ["access_refused"]
    assert TOKEN not in repr(logs)
    assert TOKEN not in repr(AccessConfig(token=TOKEN))


async def test_refusals_do_not_fill_the_log(closed: Running) -> None:
    begun = time.monotonic()
    with capture_logs() as logs:
        for _ in range(100):
            await closed.http.get("/v1/info")
    took_s = time.monotonic() - begun

    refused = [line for line in logs if line["event"] == "access_refused"]
    assert 1 <= len(refused) <= 1 + took_s / REFUSALS_LOGGED_EVERY_S


async def test_what_is_not_http_is_closed() -> None:
    """No service has WebSocket routes; an engine's own must not be reached through one."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*_: Any) -> Any:
        raise AssertionError("reached")

    from rbee_job_server.access import Access

    await AccessMiddleware(never, Access())({"type": "websocket", "path": "/"}, never, send)

    assert [message["type"] for message in sent] == ["websocket.close"]


# --- hosts and origins ---------------------------------------------------------------------------------

SUBMIT = b"POST /v1/jobs"
CANCEL = b"DELETE /v1/jobs/job-00000000-0000-4000-8000-000000000001"


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7833", "LOCALHOST.", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:7833"],
)
async def test_loopback_names_are_served(local: Running, host: str) -> None:
    assert (await ask(local, b"Host: " + host.encode()))[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        [b"Host: evil.example"],
        [b"Host: evil.example:7833"],
        [b"Host: localhost.evil.example"],
        [b"Host: 127.0.0.1.evil.example"],
        [b"Host: 0.0.0.0:7833"],
        [b"Host: 192.168.1.5"],
        [b"Host: localhost@evil.example"],
        [b"Host: evil.example#localhost"],
        [b"Host: \xff\xfe"],
        [b"Host:"],
        [],
        [b"Host: localhost", b"Host: evil.example"],
    ],
)
@pytest.mark.parametrize(
    "line", [b"GET /health", b"GET /v1/info", SUBMIT, CANCEL, b"OPTIONS /v1/jobs", b"GET /nope"]
)
async def test_another_name_for_this_machine_is_refused(
    local: Running, hosts: list[bytes], line: bytes
) -> None:
    """F53: DNS rebinding, on every method."""
    status, error = await ask(local, *hosts, line=line)

    assert (status, error["code"]) == (403, "forbidden_host")


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://evil.example:7833",
        "null",
        "",
        "file://",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://evil.example/localhost",
        "http://localhost http://evil.example",
        "chrome-extension://localhost",
    ],
)
@pytest.mark.parametrize("line", [b"GET /v1/jobs", SUBMIT, CANCEL, b"PUT /v1/jobs", b"OPTIONS /v1/jobs"])
async def test_pages_of_other_hosts_are_refused(local: Running, origin: str, line: bytes) -> None:
    """F53."""
    status, error = await ask(local, b"Host: localhost", b"Origin: " + origin.encode(), line=line)

    assert (status, error["code"]) == (403, "forbidden_origin")


async def test_a_form_that_another_page_posts_makes_no_job(local: Running) -> None:
    """F53: text/plain needs no preflight, so that only the Origin tells."""
    status, _ = await ask(
        local,
        b"Host: localhost",
        b"Origin: http://evil.example",
        b"Content-Type: text/plain",
        line=SUBMIT,
        body=json.dumps(INFER).encode(),
    )

    assert status == 403
    assert len(local.server.registry) == 0


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:7833", "https://[::1]"])
async def test_pages_of_this_machine_are_served(local: Running, origin: str) -> None:
    assert (await ask(local, b"Host: localhost", b"Origin: " + origin.encode()))[0] == 200


async def test_allowed_hosts_are_served_and_only_they() -> None:
    access = AccessConfig(allowed_hosts=("rbee.example", "Other.Example"))
    async with running(HANDLERS, access=access) as service:
        for host in (b"rbee.example", b"RBEE.example:443", b"other.example", b"localhost"):
            assert (await ask(service, b"Host: " + host, b"Origin: http://" + host))[0] == 200
        assert (await ask(service, b"Host: sub.rbee.example"))[0] == 403
        assert (await ask(service, b"Host: rbee.example", b"Origin: http://evil.example"))[0] == 403


async def test_with_a_token_any_name_will_do_unless_names_are_given(closed: Running) -> None:
    bearer = b"Authorization: Bearer " + TOKEN.encode()

    assert (await ask(closed, b"Host: gpu1.lan:7833", b"Origin: http://console.lan", bearer))[0] == 200
    access = AccessConfig(token=TOKEN, allowed_hosts=("gpu1.lan",))
    async with running(HANDLERS, access=access) as service:
        assert (await ask(service, b"Host: gpu1.lan", bearer))[0] == 200
        assert (await ask(service, b"Host: gpu2.lan", bearer))[0] == 403


# --- tickets -------------------------------------------------------------------------------------------


async def ticket_for(service: Running, job_id: str) -> str:
    answer = await service.http.post(f"/v1/jobs/{job_id}/ticket", headers=BEARER)
    assert answer.status_code == 200, answer.text
    assert answer.json()["expires_in"] == TICKET_S
    return str(answer.json()["url"])


async def test_a_ticket_opens_one_jobs_stream_without_a_token(closed: Running) -> None:
    job_id = await closed.submit(INFER, **BEARER)
    other = await closed.submit(INFER, **BEARER)
    url = await ticket_for(closed, job_id)
    ticket = url.partition("?")[2]
    streamed = await closed.http.get(url)

    assert url.startswith(f"/v1/jobs/{job_id}/stream?ticket=")
    assert actions(frames_of(streamed.content)) == ["execute", "token", "execute_complete", "[DONE]"]
    assert (await closed.http.get(url, headers={"Last-Event-ID": "2-1"})).status_code == 204
    for method, path in [
        ("GET", f"/v1/jobs/{other}/stream"),
        ("GET", f"/v1/jobs/{job_id}"),
        ("DELETE", f"/v1/jobs/{job_id}"),
        ("POST", f"/v1/jobs/{job_id}/ticket"),
        ("POST", f"/v1/jobs/{job_id}/stream"),
        ("GET", "/v1/events"),
        ("GET", "/v1/jobs"),
        ("GET", f"/v1/jobs/{job_id}/stream/"),
    ]:
        assert (await closed.http.request(method, f"{path}?{ticket}")).status_code == 401, (method, path)


@pytest.mark.parametrize(
    "change", ["", ".", "x", "9999999999.AAAA", "nan.", "é", "%ff%00", "{}&ticket={}", "x{}", "{}x"]
)
async def test_a_ticket_that_was_tampered_with_is_401(closed: Running, change: str) -> None:
    job_id = await closed.submit(INFER, **BEARER)
    path, _, ticket = (await ticket_for(closed, job_id)).partition("?ticket=")

    assert (await closed.http.get(f"{path}?ticket={change.replace('{}', ticket)}")).status_code == 401


async def test_a_ticket_for_no_job_is_404_and_without_a_token_401(closed: Running) -> None:
    path = f"/v1/jobs/{new_job_id()}/ticket"

    assert (await closed.http.post(path, headers=BEARER)).status_code == 404
    assert (await closed.http.post(path)).status_code == 401


async def test_without_a_token_tickets_work_alike(local: Running) -> None:
    """So that a page needs one way only."""
    job_id = await local.submit(INFER)
    streamed = await local.http.get(await ticket_for(local, job_id))

    assert actions(frames_of(streamed.content))[-1] == "[DONE]"


def test_a_ticket_expires_unless_it_was_used_and_resumes() -> None:
    clock = ManualClock()
    tickets = Tickets(clock.monotonic)
    used, unused = tickets.issue("job-1"), tickets.issue("job-2")
    clock.now += TICKET_S - 1
    assert tickets.admits("job-1", used, resumes=False)
    assert tickets.admits("job-1", used, resumes=False)
    clock.now += 2

    assert not tickets.admits("job-1", used, resumes=False)
    assert tickets.admits("job-1", used, resumes=True)
    assert not tickets.admits("job-2", used, resumes=True)
    assert not tickets.admits("job-2", unused, resumes=True)
    assert not Tickets(clock.monotonic).admits("job-1", tickets.issue("job-1"), resumes=False), (
        "of another boot"
    )


def test_the_tickets_remembered_are_bounded() -> None:
    clock = ManualClock()
    tickets = Tickets(clock.monotonic)
    first, *_ = issued = [tickets.issue(f"job-{n}") for n in range(TICKETS_REMEMBERED + 1)]
    for n, ticket in enumerate(issued):
        assert tickets.admits(f"job-{n}", ticket, resumes=False)
    clock.now += TICKET_S + 1

    assert not tickets.admits("job-0", first, resumes=True)
    assert tickets.admits("job-1", issued[1], resumes=True)


# --- tokens at the start -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "tiny", "x" * 15, "x" * 513, "with a space in it", "tökens-are-ascii-only", "a\nb" * 9]
)
def test_what_cannot_be_a_token_is_refused_without_being_told(text: str) -> None:
    with pytest.raises(UnusableToken) as raised:
        check_token(text, "HERE")

    assert "HERE" in str(raised.value)
    assert "openssl rand -hex 32" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not text or text not in str(raised.value)


def test_where_a_token_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}-of-the-file\n")

    assert read_token(None, {}) is None
    assert read_token(None, {TOKEN_VARIABLE: f" {TOKEN}\n"}) == TOKEN
    assert read_token(file, {TOKEN_VARIABLE: TOKEN}) == f"{TOKEN}-of-the-file"
    assert read_token(None, {TOKEN_FILE_VARIABLE: str(file), TOKEN_VARIABLE: TOKEN}) == f"{TOKEN}-of-the-file"
    file.write_bytes(b"\xff\xfe\x00binary-binary-binary")
    for unusable in (file, tmp_path / "absent", tmp_path):
        with pytest.raises(UnusableToken, match="cannot be read"):
            read_token(unusable, {TOKEN_VARIABLE: TOKEN})


@pytest.mark.parametrize(
    ("argv", "environ", "said"),
    [
        (["--host", "0.0.0.0"], {}, "openssl rand -hex 32"),
        (["--host", "::"], {}, "openssl rand -hex 32"),
        (["--host", ""], {}, "openssl rand -hex 32"),
        (["--host", "10.0.0.5"], {}, "RBEE_TOKEN"),
        ([], {"RBEE_TOKEN": ""}, "empty"),
        ([], {"RBEE_TOKEN": "short"}, "shorter than 16"),
        (["--token-file", "/nonexistent/token"], {}, "No such file"),
        (["--max-body-bytes", "0"], {}, "--max-body-bytes"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_2(
    argv: list[str], environ: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser(prog="rbee-thing")
    parser.add_argument("--host", default="127.0.0.1")
    add_guard_options(parser)
    with pytest.raises(SystemExit) as exit_:
        read_guard_options(parser, parser.parse_args(argv), environ)

    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rbee-thing: error: ")
    assert said in line


def test_with_a_token_any_address_may_be_listened_on() -> None:
    parser = ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    add_guard_options(parser)
    args = parser.parse_args(["--host", "0.0.0.0", "--allowed-host", "a", "--allowed-host", "b"])
    access, limits = read_guard_options(parser, args, {"RBEE_TOKEN": TOKEN})

    assert access == AccessConfig(token=TOKEN, allowed_hosts=("a", "b"))
    assert limits.max_body_bytes == 1_000_000


def test_loopback() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.9.9.9", "::1"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "localhost.", "127.1", "box"]))
