"""What others put in front of such a worker: sglang-router and litellm, each apart, and nginx."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import with_descendants
from benchmarks.processes import MODEL, ROOT, CannotMeasure, Process, fetch, free_port, until

REQUIREMENTS = ROOT / "benchmarks/requirements.txt"
ROUTER_VENV = ROOT / ".tools/benchmarks"
ROUTER_PYTHON = ROUTER_VENV / "bin/python"

LITELLM_REQUIREMENTS = ROOT / "benchmarks/requirements-litellm.txt"
LITELLM_VENV = ROOT / ".tools/benchmarks-litellm"


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


def install(name: str, venv: Path, requirements: Path) -> None:
    """Install a peer from its hash-checked list into an environment of its own, unless it is there.

    Raises:
        CannotMeasure: it cannot be installed.
    """
    stamp = venv / "installed.txt"
    if stamp.exists() and stamp.read_bytes() == requirements.read_bytes():
        return
    shutil.rmtree(venv, ignore_errors=True)
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", venv],
        [venv / "bin/python", "-m", "pip", "install", "--quiet", "--require-hashes", "-r", requirements],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"{name} could not be installed: {done.stderr.strip()[-500:]}")
    shutil.copyfile(requirements, stamp)


def start_router(folder: Path, worker_port: int) -> Peer:
    """Put sglang-router in front of a worker, with the policy that costs it least per token.

    Raises:
        CannotMeasure: it is not installed, or did not start.
    """
    install("sglang-router", ROUTER_VENV, REQUIREMENTS)
    show = "import importlib.metadata as m; print(m.version('sglang-router'))"
    version = subprocess.run([ROUTER_PYTHON, "-c", show], capture_output=True, text=True, check=False)
    port, metrics_port = free_port(), free_port()
    command: list[str | Path] = [ROUTER_PYTHON, "-m", "sglang_router.launch_router", "--host", "127.0.0.1"]
    command += ["--worker-urls", f"http://127.0.0.1:{worker_port}", "--policy", "round_robin"]
    command += ["--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)]
    command += ["--max-concurrent-requests", "4096"]
    process = Process("sglang-router", command, folder / "sglang-router.out")
    return _when_it_answers(Peer(process, port, version.stdout.strip()))


def start_litellm(folder: Path, worker_port: int) -> Peer:
    """Put litellm's proxy in front of a worker: one process, no database, no log of requests.

    Raises:
        CannotMeasure: it is not installed, or did not start.
    """
    install("litellm", LITELLM_VENV, LITELLM_REQUIREMENTS)
    show = "import importlib.metadata as m; print(m.version('litellm'))"
    python = LITELLM_VENV / "bin/python"
    version = subprocess.run([python, "-c", show], capture_output=True, text=True, check=False)
    port = free_port()
    config = folder / "litellm.json"
    config.write_text(
        json.dumps(
            {
                "model_list": [
                    {
                        "model_name": MODEL,
                        "litellm_params": {
                            "model": f"openai/{MODEL}",
                            "api_base": f"http://127.0.0.1:{worker_port}/v1",
                            "api_key": "none",
                        },
                    }
                ],
                "litellm_settings": {"telemetry": False, "num_retries": 0, "request_timeout": 300},
                "general_settings": {"disable_spend_logs": True},
            }
        )
    )
    command: list[str | Path] = [
        *("env", "LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOG=ERROR", "LITELLM_MODE=PRODUCTION"),
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY=true",  # it listens on loopback only
        *(LITELLM_VENV / "bin/litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)),
        *("--num_workers", "1", "--telemetry", "False"),
    ]
    process = Process("litellm", command, folder / "litellm.out")
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
    command: list[str | Path] = [program, "-p", prefix, "-c", "nginx.conf", "-e", "error.log"]
    return _when_it_answers(
        Peer(Process("nginx", command, folder / "nginx.out"), port, said.split("/")[-1].strip())
    )


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
            proxy_set_header Host $host;
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
