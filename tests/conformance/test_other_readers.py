"""What rbee streams is read correctly by readers that others wrote, and EventSource stops after the end."""

import json
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
from httpx_sse import EventSource
from rbee_inprocess import PATIENCE_S, Running, TcpRelay, eventually, running, tcp_relay
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from rbee_contracts.operations import Infer
from rbee_contracts.sse import Position
from rbee_job_server import JobContext
from rbee_job_server.guards import Limits

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
RETRIES_S = 1.2
"""Longer than two of the delays after which EventSource, told `retry: 500`, would connect again."""

NASTY = [
    "",
    "\u2028 and \u2029",
    "\r\n",
    "\r",
    "\n\n",
    "\ufeffBOM",
    "\0",
    "\x85\x0b\x0c\x1c\x1e",
    "🦀 ü 漢 e\u0301",
    "data: x\n\ndata: [DONE]\n\n",
    "id: 9-9\nretry: 1\nevent: error\n: comment\n",
    "[DONE]",
    '"}\\u0000\\',
    " leading and trailing ",
    "</script><!--",
    "M" * 1_000_000,
    *(f"token {number} " for number in range(10_000)),
    "",
]
"""Tokens whose text could break a reader: the writer must see to it that it does not."""


async def infer(_: Infer, context: JobContext) -> None:
    for text in NASTY:
        context.emit_token(text)


class Conversation:
    """A job server that has said all of `NASTY` in one job, and a relay in front of it that counts."""

    def __init__(self, service: Running, relay: TcpRelay, job_id: str) -> None:
        self.reports: list[Any] = []
        self._service = service
        self._relay = relay
        self._job_id = job_id

    @property
    def origin(self) -> str:
        return self._relay.url

    @property
    def path(self) -> str:
        return f"/v1/jobs/{self._job_id}/stream"

    @property
    def url(self) -> str:
        return self.origin + self.path

    @property
    def connections(self) -> int:
        """How often the stream was asked for."""
        return b"".join(self._relay.requests).count(f"GET {self.path}".encode())

    def check(self, got: list[list[str]]) -> None:
        """Compare ids and texts, `[DONE]` too, with what was said."""
        *events, done = got
        decoded = [(id_, json.loads(data)) for id_, data in events]
        tokens = [(id_, event["message"]) for id_, event in decoded if event["action"] == "token"]

        assert tokens == [(str(Position(1, place)), text) for place, text in enumerate(NASTY, 1)]
        assert (decoded[0][0], decoded[0][1]["action"]) == ("1-0", "execute")
        assert (decoded[-1][0], decoded[-1][1]["action"]) == (f"2-{len(NASTY)}", "execute_complete")
        assert len(decoded) == len(NASTY) + 2
        assert done[1] == "[DONE]"

    async def check_stopped(self) -> None:
        """EventSource came again once, was told that there is no more, and does not come again."""
        assert self.connections == 2
        await anyio.sleep(RETRIES_S)
        assert self.connections == 2


@asynccontextmanager
async def conversation(path: Path = HERE / "page.html") -> AsyncIterator[Conversation]:
    async def page(_: Request) -> Response:
        return FileResponse(path)

    async def report(request: Request) -> Response:
        spoken.reports.append(await request.json())
        return Response(status_code=204)

    routes = [Route("/page", page), Route("/report", report, methods=["POST"])]
    # What the page reports is larger than what a service takes.
    limits = Limits(max_body_bytes=2**24)
    async with (
        running({Infer: infer}, routes=routes, limits=limits) as service,
        tcp_relay(service.port) as relay,
    ):
        job_id = await service.submit(
            {"operation": "infer", "model": "m", "prompt": "p"}, Prefer="respond-async"
        )
        job = service.server.registry.get(job_id)
        await eventually(lambda: job.is_finished, "the job has ended", timeout_s=120)
        spoken = Conversation(service, relay, job_id)
        yield spoken


# --- Python --------------------------------------------------------------------------------------------


async def test_httpx_sse() -> None:
    async with conversation() as spoken, httpx.AsyncClient(timeout=PATIENCE_S, trust_env=False) as client:
        async with client.stream("GET", spoken.url) as response:
            events = [event async for event in EventSource(response).aiter_sse()]
        # It gives an event without data for `retry`, where the standard has none.
        got = [[event.id, event.data] for event in events if event.data]
        again = await client.get(spoken.url, headers={"Last-Event-ID": got[-1][0]})

        spoken.check(got)
        assert again.status_code == 204


# --- Node ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the packages of `package-lock.json` beside this file."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.skip("needs node and npm (Debian: nodejs, npm)")
    lock, installed = HERE / "package-lock.json", HERE / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=5"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        installed.touch()
    return found


async def run_node(node: str, script: str, url: str) -> Any:
    with anyio.fail_after(120):
        done = await anyio.run_process([node, str(HERE / script), url], check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


async def test_npm_eventsource_parser(node: str) -> None:
    async with conversation() as spoken:
        read = await run_node(node, "read_parser.mjs", spoken.url)

        spoken.check(read["got"])


async def test_npm_eventsource_reads_all_and_stops(node: str) -> None:
    async with conversation() as spoken:
        read = await run_node(node, "read_eventsource.mjs", spoken.url)

        spoken.check(read["got"])
        assert (read["opened"], read["code"]) == (1, 204)
        assert spoken.connections == 2


# --- Chromium ------------------------------------------------------------------------------------------

CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-breakpad",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
]


@asynccontextmanager
async def chromium(url: str, profile: Path) -> AsyncIterator[None]:
    """Open a page in a browser that has never been used."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs chromium (Debian: chromium)")
    async with await anyio.open_process(
        [found, *CHROMIUM, f"--user-data-dir={profile}", url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        family = [psutil.Process(process.pid)]
        try:
            yield
        finally:
            with suppress(psutil.NoSuchProcess):
                family += family[0].children(recursive=True)
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
            with anyio.CancelScope(shield=True):
                await process.wait()


async def test_chromiums_eventsource_reads_all_and_stops(tmp_path: Path) -> None:
    async with conversation() as spoken, chromium(f"{spoken.origin}/page?stream={spoken.path}", tmp_path):
        await eventually(lambda: spoken.reports, "the page has reported", timeout_s=300)
        (read,) = spoken.reports

        spoken.check(read["got"])
        assert read["opened"] == 1
        await spoken.check_stopped()
