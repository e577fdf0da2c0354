"""A cluster with a token, from the outside: who gets in, where the tokens are, and where they are not."""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_processes import BIN, MARKER, REPOSITORY, Cluster, Service, quickest, stream, text_of, title_of
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from rbee_contracts.access import read_token
from rbee_hive.app import build_hive_app
from rbee_hive.config import parse as parse_hive
from rbee_job_server import JobServer
from rbee_queen.app import build_queen_app
from rbee_queen.config import parse as parse_queen
from rbee_queen.fleet import Fleet
from rbee_worker.app import build_worker_app
from rbee_worker.config import parse as parse_worker
from rbee_worker.engine.sim import SimEngine, SimParameters
from rbee_worker.state import WorkerState

pytestmark = pytest.mark.timeout(400)

TOKEN = "a-token-for-the-tests-0123456789abcdef"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
OPEN = {"/health"}

CLOSED_WITHIN_S = 10.0
"""After which a request that does not come to its end has been refused."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("closed"), engine="sim", token=TOKEN) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> dict[str, Any]:
    return cluster.spawn("m")


def infer(**fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": "m", "prompt": "one two three", "max_tokens": 5} | fields


# --- the route tables ----------------------------------------------------------------------------------


def app_of(service: str) -> Starlette:
    """The app of a service, as its `main` builds it."""
    environ = {"RBEE_TOKEN": TOKEN, "HOME": "/nonexistent"}
    server = JobServer(service=service, actor=service, handlers={})
    anything: Any = None
    if service == "queen":
        return build_queen_app(parse_queen([], environ), server, Fleet(lambda: 0.0), anything)
    if service == "hive":
        return build_hive_app(parse_hive([], environ), server, anything, anything, anything, anything)
    config = parse_worker(["--model", "m", "--port", "0", "--engine", "sim"], environ)
    engine = SimEngine("m", SimParameters())
    return build_worker_app(config, server, WorkerState(config, engine), engine)


def paths(routes: list[BaseRoute], prefix: str = "") -> Iterator[str]:
    """Every path of a route table, with something put in for what is variable."""
    for route in routes:
        if isinstance(route, Mount):
            yield from paths(route.routes, prefix + route.path)
            yield f"{prefix}{route.path}/v1/chat/completions"
            yield f"{prefix}{route.path}/metrics"
        else:
            assert isinstance(route, Route), f"{route} is walked by nobody"
            yield prefix + route.path.replace("{job_id}", "job-00000000-0000-4000-8000-000000000000")


async def open_routes(app: Starlette) -> set[str]:
    """The paths that anything but 401 comes from without a token, by any method."""
    found = set()
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for path in paths(app.routes):
            for method in METHODS:
                answer = await client.request(method, path)
                if answer.status_code != 401:
                    found.add(path)
    return found


@pytest.mark.parametrize("service", ["queen", "hive", "worker"])
async def test_every_route_of_every_service_is_closed_without_the_token(service: str) -> None:
    """F51."""
    app = app_of(service)

    assert await open_routes(app) == OPEN
    assert len(list(paths(app.routes))) >= 10


@pytest.mark.parametrize("service", ["queen", "hive", "worker"])
async def test_a_new_route_is_closed_by_default(service: str) -> None:
    app = app_of(service)

    async def new(_: Any) -> Response:
        return Response("open")

    app.router.routes.insert(0, Route("/v1/new", new, methods=list(METHODS)))

    assert await open_routes(app) == OPEN


# --- a cluster with a token ----------------------------------------------------------------------------


def test_a_cluster_with_a_token_works_from_end_to_end(cluster: Cluster, worker: dict[str, Any]) -> None:
    events = cluster.events(infer())

    assert events[-1]["action"] == "execute_complete"
    assert len(text_of(events).split()) == 5
    assert {event["actor"].split("/")[0] for event in events} == {"queen", "hive", "worker"}


def test_queen_and_hive_refuse_who_has_no_token(cluster: Cluster, worker: dict[str, Any]) -> None:
    for url in (cluster.queen.url, cluster.hive.url):
        assert httpx.get(f"{url}/health").status_code == 200
        for token in (None, "a-token-for-the-tests-0123456789abcdeF", "ünïcödé-tökén-ünïcödé"):
            headers = {} if token is None else {b"Authorization": f"Bearer {token}".encode()}
            for path in ("/ready", "/v1/info", "/v1/jobs", "/v1/events?output=1", "/v1/heartbeats/stream"):
                answer = httpx.get(f"{url}{path}", headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
            assert httpx.post(f"{url}/v1/jobs", json=infer(), headers=headers).status_code == 401
            assert httpx.delete(f"{url}/v1/jobs/x", headers=headers).status_code == 401
    ready = {"hive_id": "evil", "boot": "b", "started_at": "", "version": "0", "port": 1}
    assert httpx.post(f"{cluster.queen.url}/v1/hive/ready", json=ready).status_code == 401


def test_a_worker_speaks_to_its_hive_only(cluster: Cluster, worker: dict[str, Any]) -> None:
    """Neither without a token nor with the cluster's; the engine's own routes are no way in."""
    url = f"http://127.0.0.1:{worker['port']}"

    assert httpx.get(f"{url}/health").status_code == 200
    for headers in ({}, cluster.auth):
        for path in (
            "/ready",
            "/v1/info",
            "/v1/worker",
            "/v1/jobs",
            "/v1/events?output=1",
            "/metrics",
            "/v1/models",
        ):
            assert httpx.get(f"{url}{path}", headers=headers).status_code == 401, path
        for path in ("/v1/jobs", "/v1/chat/completions"):
            assert httpx.post(f"{url}{path}", json={}, headers=headers).status_code == 401, path


def test_no_process_shows_a_workers_token_or_gives_it_the_clusters(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    folder = Path(f"/proc/{worker['pid']}")
    command = (folder / "cmdline").read_bytes().split(b"\0")
    environ = (folder / "environ").read_bytes()
    fds = {target for fd in (folder / "fd").iterdir() if (target := open_file(fd))}

    assert TOKEN.encode() not in environ + b"\0".join(command)
    assert b"RBEE_TOKEN" not in environ
    assert [option for option in command if b"token" in option] == [b"--token-fd"]
    # What came through the pipe is gone from it: the number is closed, or another file by now.
    number = command[command.index(b"--token-fd") + 1].decode()
    assert "pipe" not in open_file(folder / "fd" / number)
    assert fds
    for process in cluster.processes():
        assert TOKEN not in title_of(process)


def open_file(fd: Path) -> str:
    """Give what a process has open under a number; empty where that is closed, by now."""
    try:
        return os.readlink(fd)
    except FileNotFoundError:
        return ""


def test_no_log_holds_a_token(cluster: Cluster, worker: dict[str, Any]) -> None:
    for token in (TOKEN, "some-wrong-token-0123456789"):
        httpx.get(
            f"{cluster.queen.url}/v1/jobs/x?ticket={token}", headers={"Authorization": f"Bearer {token}"}
        )
    logs = [*cluster.folder.glob("*.log"), *cluster.state_dir.glob("logs/*.log")]
    text = "".join(log.read_text() for log in logs)

    assert len(logs) >= 3
    assert "access_refused" in text
    assert TOKEN not in text
    assert "some-wrong-token" not in text
    assert "Bearer" not in text


def test_a_ticket_streams_a_job_of_the_queen(cluster: Cluster, worker: dict[str, Any]) -> None:
    job_id = cluster.submit(infer())
    ticket = httpx.post(f"{cluster.queen.url}/v1/jobs/{job_id}/ticket", headers=cluster.auth).json()
    streamed = httpx.get(f"{cluster.queen.url}{ticket['url']}")

    assert streamed.status_code == 200
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert httpx.get(f"{cluster.hive.url}{ticket['url']}").status_code == 401, "a ticket is one service's"
    with stream(cluster.queen.url, job_id, **cluster.auth) as frames:
        assert [event for _, event in frames][-1]["action"] == "execute_complete"


# --- the keeper ----------------------------------------------------------------------------------------


def rbee(cluster: Cluster, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RBEE_")}
    return subprocess.run(
        [BIN / "rbee", "--queen", cluster.queen.url, *args],
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_keeper_takes_the_token_from_its_environment_or_a_file(
    cluster: Cluster, worker: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    by_variable = rbee(cluster, "infer", "-m", "m", "--max-tokens", "3", "Hi", RBEE_TOKEN=TOKEN)
    by_file = rbee(cluster, "--token-file", str(file), "infer", "-m", "m", "--max-tokens", "3", "Hi")
    after = rbee(cluster, "status", "--token-file", str(file), RBEE_TOKEN="another-token-of-another-cluster")

    assert [done.returncode for done in (by_variable, by_file, after)] == [0, 0, 0]
    assert len(by_variable.stdout.split()) == len(by_file.stdout.split()) == 3


def test_the_keeper_without_the_token_says_what_to_do(cluster: Cluster) -> None:
    without = rbee(cluster, "status")
    empty = rbee(cluster, "status", RBEE_TOKEN="")

    assert without.returncode == 1
    assert "RBEE_TOKEN" in without.stderr
    assert "--token-file" in without.stderr
    assert empty.returncode == 2
    assert "empty" in empty.stderr


def test_rbee_up_with_a_token_starts_a_closed_cluster(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RBEE_")}
    process = subprocess.Popen(
        [
            *(BIN / "rbee", "up", "--json", "--queen-port", "0", "--hive-port", "0", "--host", "0.0.0.0"),
            *("--worker-engine", "sim", "--model", "m", "--token-file", "token"),
        ],
        env=kept | {"XDG_STATE_HOME": str(tmp_path), MARKER: str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        events = (json.loads(line) for line in process.stdout)
        up = next(event for event in events if event["action"] == "up")
        assert TOKEN not in json.dumps(up)
        assert f"$(cat {file})" in up["message"]
        assert httpx.get(f"{up['queen_url']}/v1/info").status_code == 401
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{up['queen_url']}/v1/info", headers=bearer).status_code == 200
        assert httpx.get(f"{up['hive_url']}/v1/jobs").status_code == 401
    finally:
        process.terminate()
        process.communicate(timeout=120)
    assert process.returncode == 0


def example(name: str) -> str:
    page = (REPOSITORY / "docs/operations/security.md").read_text()
    found = re.search(rf"<!-- test: {name} -->\n```bash\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_examples_of_the_documentation(cluster: Cluster, tmp_path: Path) -> None:
    subprocess.run(["bash", "-c", example("token-make")], cwd=tmp_path, check=True)
    file = tmp_path / "rbee-token"
    assert file.stat().st_mode & 0o077 == 0
    assert read_token(file, {}) is not None

    file.write_text(TOKEN)
    command = example("token-curl").replace("http://localhost:7833", cluster.queen.url)
    listed = subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert "jobs" in json.loads(listed.stdout)


# --- starting ------------------------------------------------------------------------------------------

PROGRAMS = {
    "rbee-queen": ["--port", "0"],
    "rbee-hive": ["--port", "0", "--queen-url", "none"],
    "rbee-worker": ["--port", "0", "--model", "m", "--engine", "sim"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("args", "token"),
    [
        (["--host", "0.0.0.0"], None),
        (["--host", "::"], None),
        ([], ""),
        ([], "short"),
        (["--token-file", "/no"], None),
    ],
)
def test_a_service_that_would_be_open_to_others_does_not_start(
    program: str, args: list[str], token: str | None, tmp_path: Path
) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "RBEE_TOKEN"}
    environ |= {"XDG_STATE_HOME": str(tmp_path)} | ({} if token is None else {"RBEE_TOKEN": token})
    done = subprocess.run(
        [BIN / program, *PROGRAMS[program], *args],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: error: ")
    assert "--token-file" in line or "token file" in line


def test_a_worker_without_its_hive_has_the_token_it_is_given(tmp_path: Path) -> None:
    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    for token in (None, TOKEN):
        args = [*PROGRAMS["rbee-worker"], "--host", "0.0.0.0" if token else "127.0.0.1"]
        worker = Service("rbee-worker", args, tmp_path / f"{token}.log", marker, token)
        try:
            connections = psutil.Process(worker.process.pid).net_connections()
            (listening,) = {c.laddr.ip for c in connections if c.status == "LISTEN"}
            assert listening == ("0.0.0.0" if token else "127.0.0.1")
            assert httpx.get(f"{worker.url}/v1/info").status_code == (401 if token else 200)
            bearer = {"Authorization": f"Bearer {TOKEN}"}
            assert httpx.get(f"{worker.url}/v1/info", headers=bearer).status_code == 200
        finally:
            worker.terminate()


def test_a_page_cannot_use_a_local_cluster_through_the_browser(tmp_path: Path) -> None:
    """F53: without a token Host and Origin are what keeps web pages out."""
    service = Service(
        "rbee-hive",
        [*PROGRAMS["rbee-hive"], "--state-dir", str(tmp_path)],
        tmp_path / "hive.log",
        "page",
    )
    try:
        spawn = json.dumps({"operation": "worker_spawn", "model": "m"})
        posted = httpx.post(
            f"{service.url}/v1/jobs",
            content=spawn,
            headers={"Origin": "https://evil.example", "Content-Type": "text/plain"},
        )
        rebound = httpx.get(f"{service.url}/v1/jobs", headers={"Host": "evil.example"})
        deleted = httpx.delete(f"{service.url}/v1/jobs/x", headers={"Origin": "null"})
        assert [answer.json()["code"] for answer in (posted, rebound, deleted)] == [
            "forbidden_origin",
            "forbidden_host",
            "forbidden_origin",
        ]
        assert httpx.get(f"{service.url}/v1/jobs").json()["jobs"] == []
    finally:
        service.terminate()


def test_slow_and_large_requests_do_not_hold_a_hive(tmp_path: Path) -> None:
    """F46, F47: as the services are started, with their own limits."""
    args = [*PROGRAMS["rbee-hive"], "--state-dir", str(tmp_path)]
    service = Service("rbee-hive", args, tmp_path / "hive.log", "slow")
    address = ("127.0.0.1", int(service.url.rpartition(":")[2]))

    def closed_after_s() -> float:
        with socket.create_connection(address) as head, socket.create_connection(address) as body:
            begun = time.monotonic()
            head.sendall(b"GET /health HTTP/1.1\r\nX: ")
            body.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
            large = httpx.post(f"{service.url}/v1/jobs", content=b" " * 1_000_001)
            assert large.status_code == 413
            with socket.create_connection(address) as many:
                headers = b"".join(b"X%d: y\r\n" % n for n in range(20_000))
                many.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n")
                assert b" 431 " in many.recv(4096)
            for slow in (head, body):
                slow.settimeout(60)
                with slow.makefile("rb") as answer:
                    assert b" 408 " in answer.read()  # to the connection's end
            return time.monotonic() - begun

    try:
        assert quickest(closed_after_s(), CLOSED_WITHIN_S, closed_after_s) < CLOSED_WITHIN_S
        assert httpx.get(f"{service.url}/health").status_code == 200
    finally:
        service.terminate()
