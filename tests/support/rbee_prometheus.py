"""Debian's Prometheus on a cluster of real processes, with the configuration of this repository."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from rbee_processes import REPOSITORY, until

DEPLOY = REPOSITORY / "deploy/prometheus"
MISSING = [program for program in ("prometheus", "promtool") if shutil.which(program) is None]
"""Programs of Debian's package `prometheus` that are not here."""

PATIENCE_S = 180.0


def configure(folder: Path, queen_url: str, token: str) -> Path:
    """Copy the repository's configuration with this queen, this token and a scrape every 3 s.

    As long may a scrape take, and the machine may be busy.
    """
    credentials = folder / "token"
    credentials.write_text(token)
    text = (DEPLOY / "prometheus.yml").read_text()
    for old, new in (
        ("http://queen:7833", queen_url),
        ("/run/rbee/token", str(credentials)),
        ("scrape_interval: 15s", "scrape_interval: 3s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ("refresh_interval: 15s", "refresh_interval: 1s"),
    ):
        assert old in text, f"prometheus.yml has no {old!r}"
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(DEPLOY / "rules.yml", folder)
    return folder / "prometheus.yml"


def promtool(
    *args: str, stdin: str | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run promtool; the caller looks at what came of it."""
    return subprocess.run(
        ["promtool", *args],
        input=stdin,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


class Prometheus:
    """A running Prometheus, by its API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def api(self, path: str, **params: str) -> Any:
        """Ask its API; an answer that is no success fails the test."""
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=PATIENCE_S)
        body = answer.json()
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Give the samples of an expression now."""
        found: list[dict[str, Any]] = self.api("query", query=expression)["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api("targets", state="active")["activeTargets"]
        return found


@contextmanager
def running(config: Path) -> Iterator[Prometheus]:
    """Run Prometheus on a free port until the block ends."""
    log_path = config.with_name("prometheus.log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={config.parent / 'tsdb'}"),
                *(
                    "--web.listen-address=127.0.0.1:0",
                    "--storage.tsdb.retention.time=1h",
                    "--log.format=json",
                ),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], "HOME": str(config.parent)},
            start_new_session=True,
        )

    def port() -> int | None:
        assert process.poll() is None, f"prometheus ended: {log_path.read_text()}"
        listening = [
            connection.laddr.port
            for connection in psutil.Process(process.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        return listening[0] if listening else None

    try:
        url = f"http://127.0.0.1:{until(port, 'prometheus listens', PATIENCE_S)}"

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/-/ready", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, f"prometheus is ready; its log: {log_path}", PATIENCE_S)
        yield Prometheus(url)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def dashboard_queries() -> list[tuple[str, str]]:
    """Give every query of the Grafana dashboard with the panel it is in, its variables filled in."""
    dashboard = json.loads((REPOSITORY / "deploy/grafana/dashboards/rbee.json").read_text())
    variables = {"$hive": ".*", "$model": ".*", "$__rate_interval": "1m"}
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, value in variables.items():
                expression = expression.replace(name, value)
            assert "$" not in expression, f"an unknown variable in {panel['title']!r}"
            found.append((panel["title"], expression))
    return found
