"""The processes under measurement: rbee's three services, and the peers put in front of the same worker."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.measure import with_descendants

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
ROUTER_PYTHON = ROOT / ".tools/benchmarks/bin/python"

MODEL = "sim"
HIVE_ID = "bench"
START_TIMEOUT_S = 60.0

T = TypeVar("T")


class CannotMeasure(Exception):
    """A process is missing or did not start; the message says which and what to do."""


class Process:
    """One child process in a group of its own; its output goes to a file."""

    def __init__(self, name: str, command: Sequence[str | Path], log_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RBEE_")}
        state_home = {"XDG_STATE_HOME": str(log_path.parent), "XDG_DATA_HOME": str(log_path.parent)}
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | state_home,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def fail_if_gone(self) -> None:
        if self._process.poll() is not None:
            tail = self.log_path.read_text(errors="replace")[-2000:]
            raise CannotMeasure(f"{self.name} exited with {self._process.returncode}:\n{tail}")

    def listening_port(self) -> int | None:
        """Give the port that one of rbee's services says it listens on."""
        self.fail_if_gone()
        for line in self.log_path.read_text().splitlines():
            if line.startswith("{") and (said := json.loads(line)).get("event") == "listening":
                return int(said["port"])
        return None

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


class Cluster:
    """A queen, a hive and its one sim worker, with their options as they come."""

    def __init__(self, folder: Path, worker_args: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._processes: list[Process] = []
        try:
            queen_port = self._start(folder, "rbee-queen", *_store_options(folder))
            queen_url = f"http://127.0.0.1:{queen_port}"
            self._start(
                folder,
                "rbee-hive",
                *("--hive-id", HIVE_ID, "--queen-url", queen_url, "--worker-engine", "sim"),
                *("--state-dir", folder / "hive", "--models-dir", folder),
            )
            worker = until(lambda: self._spawn(queen_url, worker_args), "a worker could be spawned")
        except BaseException:
            self.close()
            raise
        queen, hive = self._processes
        self.ports = {"queen": queen_port, "worker": int(worker["port"])}
        self.pids = {"queen": [queen.pid], "hive": [hive.pid], "worker": [int(worker["pid"])]}

    def _start(self, folder: Path, program: str, *args: str | Path) -> int:
        process = Process(program, [BIN / program, "--port", "0", *args], folder / f"{program}.log")
        self._processes.append(process)
        return until(process.listening_port, f"{program} listens")

    def _spawn(self, queen_url: str, worker_args: Sequence[str]) -> dict[str, Any] | None:
        """Spawn the worker; None while the queen has not seen the hive yet."""
        for process in self._processes:
            process.fail_if_gone()
        spawn = {"operation": "worker_spawn", "model": MODEL, "worker": "cpu", "worker_args": [*worker_args]}
        accepted = json.loads(fetch(f"{queen_url}/v1/jobs", json.dumps(spawn).encode()))
        frames = fetch(queen_url + accepted["sse_url"]).decode().split("\n\n")
        events = [json.loads(f.partition("data: ")[2]) for f in frames if "data: {" in f]
        last: dict[str, Any] = events[-1]
        if last["action"] == "execute_complete":
            return dict(last["data"])
        if last.get("code") in ("no_hive", "unreachable", "hive_unreachable"):
            return None
        raise CannotMeasure(f"the worker did not start: {events[-2]['message']}")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.stop()


@contextmanager
def cluster(folder: Path, worker_args: Sequence[str]) -> Iterator[Cluster]:
    """Run a cluster for as long as the block runs."""
    running = Cluster(folder, worker_args)
    try:
        yield running
    finally:
        running.close()


class Peer:
    """A proxy in front of the worker: its port, its processes, its version."""

    def __init__(self, process: Process, port: int, version: str) -> None:
        self.process = process
        self.port = port
        self.version = version

    @property
    def pids(self) -> list[int]:
        return with_descendants(self.process.pid)

    def close(self) -> None:
        self.process.stop()


def start_router(folder: Path, worker_port: int) -> Peer:
    """Put sglang-router in front of a worker, with the policy that costs it least.

    Raises:
        CannotMeasure: it is not installed, or did not start.
    """
    if not ROUTER_PYTHON.exists():
        raise CannotMeasure("sglang-router is not installed; `make bench-relay` does that")
    show = "import importlib.metadata as m; print(m.version('sglang-router'))"
    version = subprocess.run([ROUTER_PYTHON, "-c", show], capture_output=True, text=True, check=False)
    port, metrics_port = free_port(), free_port()
    command = [ROUTER_PYTHON, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--worker-urls", f"http://127.0.0.1:{worker_port}", "--policy", "round_robin"]
    command += ["--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    command += ["--max-concurrent-requests", "4096"]
    process = Process("sglang-router", command, folder / "sglang-router.out")
    return _when_it_answers(Peer(process, port, version.stdout.strip()))


def start_nginx(folder: Path, worker_port: int) -> Peer:
    """Put nginx in front of a worker: one process, no buffering, connections kept.

    Raises:
        CannotMeasure: it is not installed, or did not start.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise CannotMeasure("nginx is not installed (Debian: apt-get install nginx-light)")
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    port = free_port()
    prefix = folder / "nginx"
    prefix.mkdir(exist_ok=True)
    (prefix / "nginx.conf").write_text(
        NGINX_CONF.format(port=port, worker_port=worker_port, root="user root;" if os.geteuid() == 0 else "")
    )
    command = [program, "-p", prefix, "-c", "nginx.conf", "-e", "error.log"]
    return _when_it_answers(Peer(Process("nginx", command, folder / "nginx.out"), port, said.split("/")[-1].strip()))


NGINX_CONF = """\
{root}
daemon off;
pid nginx.pid;
worker_processes 1;
worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    upstream worker {{ server 127.0.0.1:{worker_port}; keepalive 64; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://worker;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


def _when_it_answers(peer: Peer) -> Peer:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    body = json.dumps(chat).encode()

    def answers() -> bool:
        peer.process.fail_if_gone()
        try:
            return b"chat.completion" in fetch(f"http://127.0.0.1:{peer.port}/v1/chat/completions", body)
        except OSError:
            return False

    try:
        until(answers, f"{peer.process.name} answers")
    except BaseException:
        peer.close()
        raise
    return peer


def fetch(url: str, body: bytes | None = None) -> bytes:
    """Give the body of an answer; an error answer is an `OSError`."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def until(condition: Callable[[], T | None], what: str) -> T:
    """Poll until `condition` gives something true.

    Raises:
        CannotMeasure: it does not within `START_TIMEOUT_S`.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise CannotMeasure(f"after {START_TIMEOUT_S:g} s still not: {what}")
        time.sleep(0.1)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _store_options(folder: Path) -> list[str | Path]:
    """Keep the queen's store in `folder`, where this version of the queen has one."""
    return ["--state-dir", folder / "queen"] if has_store() else []


def has_store() -> bool:
    """Whether this version of the queen keeps jobs in a store; then it is on, as it is by default."""
    shown = subprocess.run([BIN / "rbee-queen", "--help"], capture_output=True, text=True, check=False)
    return "--state-dir" in shown.stdout or "--store" in shown.stdout
