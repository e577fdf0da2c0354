"""A whole service as a process: how it starts, stops, fails, and what it logs."""

import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_inprocess import PATIENCE_S, Frame, actions, frames_of
from rbee_processes import quickest

from rbee_job_server.serve import COLLECT_AFTER, _spare_collector

SCRIPT = Path(__file__).parent / "small_service.py"

EXIT_WITHIN_S = 1.0


class Process:
    """The small service, running; its log is JSON lines in a file."""

    def __init__(self, log_path: Path, port: int = 0, drain_timeout_s: float = 30.0, mode: str = "") -> None:
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-W", "error", SCRIPT, str(port), str(drain_timeout_s), mode],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.listening = self.until(lambda: self.logged("listening"), "it listens")[0]
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.listening['port']}", timeout=PATIENCE_S, trust_env=False
        )

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, (
                f"not in {timeout_s} s: {what}; log: {self.log_path.read_text()}"
            )
            time.sleep(0.005)
        return value

    def log(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line.get("event") == event]

    def submit(self, operation: str = "infer", prompt: str = "", **headers: str) -> str:
        body = {"operation": operation} | ({"model": "m", "prompt": prompt} if operation == "infer" else {})
        answer = self.http.post("/v1/jobs", json=body, headers=headers)
        assert answer.status_code in (200, 202), answer.text
        return str(answer.json()["job_id"])

    def read(self, job_id: str) -> list[Frame]:
        return frames_of(self.http.get(f"/v1/jobs/{job_id}/stream").content)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        return self.popen.wait(timeout_s)


class OpenStream(threading.Thread):
    """A stream being read; `first` is set at the first token, `body` is whole after `join`."""

    def __init__(self, process: Process, path: str, until: bytes = b"OUTPUT-MARK") -> None:
        super().__init__()
        self._process, self._path, self._until = process, path, until
        self.first = threading.Event()
        self.body = b""
        self.cut = False
        self.start()
        assert self.first.wait(PATIENCE_S)

    def run(self) -> None:
        try:
            with self._process.http.stream("GET", self._path) as answer:
                for chunk in answer.iter_raw():
                    self.body += chunk
                    if self._until in self.body:
                        self.first.set()
        except httpx.HTTPError:
            self.cut = True

    def frames(self) -> list[Frame]:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        assert not self.cut
        return frames_of(self.body)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(**options: Any) -> Process:
        started.append(Process(tmp_path / f"service-{len(started)}.log", **options))
        return started[-1]

    yield start
    for process in started:
        process.popen.kill()
        process.popen.wait()
        process.http.close()


def test_sigterm_drains_then_exits_with_0(start: Callable[..., Process]) -> None:
    """F06: not ready, submits refused, what runs ends by itself."""
    process = start()
    job_id = process.submit(prompt="wait")
    releasing = process.submit("status")
    stream = OpenStream(process, f"/v1/jobs/{job_id}/stream")
    process.popen.send_signal(signal.SIGTERM)
    process.until(lambda: process.logged("draining"), "it drains")

    ready = process.http.get("/ready")
    refused = process.http.post("/v1/jobs", json={"operation": "status"})
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "reason": "stopping"})
    assert "Retry-After" in ready.headers
    assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
    assert "Retry-After" in refused.headers
    assert process.http.get("/health").status_code == 200
    assert process.popen.poll() is None

    process.read(releasing)
    assert actions(stream.frames()) == ["execute", "token", "execute_complete", "[DONE]"]
    assert process.wait() == 0
    assert process.logged("stopped")[0]["exit_code"] == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_end_in_time_is_ended(start: Callable[..., Process], signum: signal.Signals) -> None:
    process = start(drain_timeout_s=0.2)
    pending = process.submit(prompt="never read")
    stream = OpenStream(process, f"/v1/jobs/{process.submit(prompt='hang')}/stream")
    firehose = OpenStream(process, "/v1/events", until=b"retry")
    process.popen.send_signal(signum)
    frames = stream.frames()

    assert actions(frames) == ["execute", "token", "error", "execute_error", "[DONE]"]
    assert frames[2].json["code"] == frames[3].json["code"] == "shutting_down"
    assert frames[2].json["retryable"] is True
    ends = [(frame.json["job_id"], frame.action) for frame in firehose.frames()]
    assert (pending, "execute_error") in ends
    assert process.wait() == 0


def test_an_idle_service_stops_at_once(start: Callable[..., Process]) -> None:
    process = start(drain_timeout_s=60)
    process.http.get("/health")

    def stop(process: Process) -> float:
        begun = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        return time.monotonic() - begun

    assert quickest(stop(process), 1.5, lambda: stop(start(drain_timeout_s=60))) < 1.5


def test_a_second_signal_cuts_the_draining(start: Callable[..., Process]) -> None:
    process = start(drain_timeout_s=600)
    stream = OpenStream(process, f"/v1/jobs/{process.submit(prompt='hang')}/stream")
    process.popen.send_signal(signal.SIGTERM)
    process.until(lambda: process.logged("draining"), "it drains")
    process.popen.send_signal(signal.SIGTERM)

    assert actions(stream.frames())[-2:] == ["execute_error", "[DONE]"]
    assert process.wait() == 0


def test_a_loop_that_crashes_ends_the_service_within_a_second(start: Callable[..., Process]) -> None:
    """F07."""

    def crash() -> float:
        process = start(drain_timeout_s=600)
        OpenStream(process, f"/v1/jobs/{process.submit(prompt='hang')}/stream")
        process.submit("hive_list", Prefer="respond-async")
        crashed = process.until(lambda: process.logged("loop_crashed"), "the loop crashed")[0]
        begun = time.monotonic()
        assert process.wait() == 1
        took_s = time.monotonic() - begun
        assert "THE-CAUSE" in json.dumps(crashed)
        assert "background" in crashed["loop"]
        return took_s

    assert quickest(crash(), EXIT_WITHIN_S, crash) < EXIT_WITHIN_S


def test_a_loop_that_crashes_ends_what_is_read_before_the_service(start: Callable[..., Process]) -> None:
    """F07, given time for it: on a busy machine a second may be too short, and it is gone all the same."""
    process = start(drain_timeout_s=600, mode="patient")
    stream = OpenStream(process, f"/v1/jobs/{process.submit(prompt='hang')}/stream")
    process.submit("hive_list", Prefer="respond-async")

    assert process.wait() == 1
    assert actions(stream.frames())[-2:] == ["execute_error", "[DONE]"]
    assert process.logged("stopped")[0]["exit_code"] == 1


def test_a_taken_port_is_one_clear_line() -> None:
    """F12."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = subprocess.run(
            [sys.executable, SCRIPT, str(port), "1"], capture_output=True, text=True, timeout=30, check=False
        )

    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(
        rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use\. .+\n", result.stderr
    )


def test_the_collector_is_spared_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(gc, "collect", lambda: called.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: called.append("freeze"))
    monkeypatch.setattr(gc, "set_threshold", lambda *thresholds: called.append(thresholds))
    _spare_collector()

    assert called == ["collect", "freeze", COLLECT_AFTER]


def test_small_answers_are_not_held_back(start: Callable[..., Process]) -> None:
    """Without TCP_NODELAY each takes 40 ms more, for the peer's delayed acknowledgement."""
    process = start()
    process.http.get("/health")

    def took() -> float:
        begun = time.monotonic()
        process.http.get("/health")
        return time.monotonic() - begun

    # One of many is enough: a busy machine delays some, a held-back answer would be all of them.
    assert any(took() < 0.04 for _ in range(500))


def test_the_log_is_json_with_ids_and_without_any_text(start: Callable[..., Process]) -> None:
    process = start(mode="patient")
    ended: list[str] = []
    for prompt in ("PROMPT-MARK", "PROMPT-MARK reject", "PROMPT-MARK crash"):
        ended.append(process.submit(prompt=prompt, **{"X-Correlation-ID": f"corr-{len(ended)}"}))
        assert process.read(ended[-1])[-1].action == "[DONE]"
    process.http.post(
        "/v1/jobs", content=b'{"operation":"infer","model":"PROMPT-MARK/..","prompt":"PROMPT-MARK"}'
    )
    process.read(process.submit("hive_list"))
    process.wait()
    text = process.log_path.read_text()

    for mark in ("PROMPT-MARK", "OUTPUT-MARK", "LOCAL-MARK"):
        assert mark not in text
    for number, job_id in enumerate(ended):
        lines = [line for line in process.log() if line.get("job_id") == job_id]
        assert {"job_accepted", "job_ended"} <= {line["event"] for line in lines}
        assert {line["correlation_id"] for line in lines} == {f"corr-{number}"}
    crashed = process.logged("job_crashed")
    assert [line["job_id"] for line in crashed][:1] == ended[2:]
    assert crashed[0]["error"] == "ValueError"
    assert "in infer" in "".join(crashed[0]["frames"])
    assert "in hive_list" in json.dumps(crashed[1]) or '"name": "hive_list"' in json.dumps(crashed[1])
    assert {line["service"] for line in process.log()} == {"worker/w1"}
    assert all({"event", "level", "timestamp"} <= set(line) for line in process.log())
