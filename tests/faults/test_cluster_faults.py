"""What breaks around a job, and what its reader sees. Real processes; workers run the sim engine."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from rbee_processes import (
    BIN,
    Cluster,
    Service,
    is_alive,
    marked_processes,
    quickest,
    stream,
    text_of,
    until,
)

pytestmark = pytest.mark.timeout(400)

TOLD_WITHIN_S = 5.0
"""After a worker's end, by which the readers of its jobs know it."""

KNOWN_WITHIN_S = 2.0
"""For a queen that was started again to hear the hives that she had."""

STARTED_WITHIN_S = 15.0
"""In which a start that fails is told: far from the half hour that a start may take."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("sim"), engine="sim") as cluster:
        yield cluster


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A fresh worker of model `m` that takes minutes for a long answer; gone afterwards."""
    spawned = cluster.spawn("m", "--sim-step-ms", "20")
    yield spawned

    def are_stopped() -> bool:
        for listed in cluster.run({"operation": "worker_list"})["workers"]:
            cluster.events({"operation": "worker_stop", "worker_id": listed["worker_id"], "grace_s": 0})
        return not known_workers(cluster)

    until(are_stopped, "no worker is left")


def infer(**fields: Any) -> dict[str, Any]:
    base = {"operation": "infer", "model": "m", "prompt": "one two three", "max_tokens": 10_000}
    return base | {"ignore_eos": True} | fields


def next_tokens(frames: Iterator[tuple[str, dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    had = []
    for _, event in frames:
        had.append(event)
        count -= event["action"] == "token"
        if not count:
            return had
    raise AssertionError("the stream ended before that many tokens")


def test_a_worker_killed_in_mid_stream_ends_the_job_with_worker_lost(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    """F01: one `error`, then the terminal event and `[DONE]`; never run again."""
    rest, took_s = killed_in_mid_stream(cluster, worker)
    job_id = rest[-1]["job_id"]

    assert [event["action"] for event in rest if event["action"] != "token"] == ["error", "execute_error"]
    assert rest[-2]["code"] == "worker_lost"
    assert rest[-2]["retryable"] is False
    assert "signal 9" in rest[-2]["message"]
    others = (cluster.spawn("m", "--sim-step-ms", "20") for _ in itertools.count())
    another_took_s = (killed_in_mid_stream(cluster, other)[1] for other in others)
    assert quickest(took_s, TOLD_WITHIN_S, another_took_s.__next__) < TOLD_WITHIN_S
    record = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()
    assert record["state"] == "failed"
    assert record["error"]["code"] == "worker_lost"
    listed = cluster.run({"operation": "worker_get", "worker_id": worker["worker_id"]})
    assert listed["signal"] == signal.SIGKILL
    assert "signal 9" in listed["cause"]


def killed_in_mid_stream(cluster: Cluster, worker: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """Give what a reader got after the worker's end, and the seconds that took."""
    with stream(cluster.queen.url, cluster.submit(infer(worker_id=worker["worker_id"]))) as frames:
        next_tokens(frames, 5)
        os.kill(worker["pid"], signal.SIGKILL)
        killed = time.monotonic()
        return [event for _, event in frames], time.monotonic() - killed


def test_worker_stop_drains_then_ends_the_process(cluster: Cluster, worker: dict[str, Any]) -> None:
    job_id = cluster.submit(infer(max_tokens=100))
    with stream(cluster.queen.url, job_id) as frames:
        next_tokens(frames, 2)
        stopping = cluster.submit({"operation": "worker_stop", "worker_id": worker["worker_id"]})
        with stream(cluster.queen.url, stopping) as stop_frames:
            stopped = [event for _, event in stop_frames][-1]
        rest = [event for _, event in frames]

    assert rest[-1]["action"] == "execute_complete", "what ran was not drained"
    assert stopped["data"]["state"] == "stopped"
    assert stopped["data"]["exit_code"] == 0
    assert not is_alive(worker["pid"])
    assert cluster.run({"operation": "worker_list"})["workers"] == []


def test_no_such_model_says_what_runs_and_the_command_that_would_start_it(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    events = cluster.events(infer(model="other"))

    error = next(event for event in events if event["action"] == "error")
    assert error["code"] == "no_worker"
    assert f"m ({worker['worker_id']} on box1)" in error["message"]
    assert "rbee worker spawn --model other --hive-id box1" in error["message"]


def test_a_hive_answers_by_itself(cluster: Cluster, worker: dict[str, Any]) -> None:
    events = cluster.events(infer(max_tokens=3), cluster.hive.url)

    assert [event["actor"].split("/")[0] for event in events if event["action"] == "infer_start"] == ["hive"]
    assert len(text_of(events).split()) == 3
    read = until(
        lambda: httpx.get(f"{cluster.hive.url}/v1/capabilities").json()["devices"], "devices are read"
    )
    assert [device["kind"] for device in read][-1] == "cpu"


def test_what_is_meant_for_another_hive_is_refused(cluster: Cluster) -> None:
    answer = httpx.post(f"{cluster.hive.url}/v1/jobs", json={"operation": "device_list", "hive_id": "box9"})
    assert (answer.status_code, answer.json()["code"]) == (404, "hive_not_found")

    events = cluster.events({"operation": "device_list", "hive_id": "box9"})
    assert [event.get("code") for event in events if event["action"] == "error"] == ["hive_not_found"]


def test_a_device_that_is_not_there_is_named(cluster: Cluster) -> None:
    events = cluster.events({"operation": "worker_spawn", "model": "m", "worker": "cpu", "devices": [0, 1]})

    error = next(event for event in events if event["action"] == "error")
    assert error["code"] == "device_not_found"
    assert "cpu device 1" in error["message"]


def failed_start(cluster: Cluster, start_s: float) -> tuple[list[dict[str, Any]], float]:
    """Give the events of a start that fails, and its seconds. One that failed just before is put off."""
    begun = time.monotonic()
    args = ["--sim-fail-start", "--sim-start-s", str(start_s)]
    events = cluster.events({"operation": "worker_spawn", "model": "m", "worker_args": args})
    return events, time.monotonic() - begun


def test_a_worker_that_dies_while_starting_fails_the_spawn_at_once(cluster: Cluster) -> None:
    events, took_s = failed_start(cluster, 0)

    error = next(event for event in events if event["action"] == "error")
    assert error["code"] == "worker_spawn_failed"
    assert "exited with status 1" in error["message"]
    assert "service_failed" in error["message"], "its last log lines are missing"
    another_took_s = (failed_start(cluster, number / 1000)[1] for number in itertools.count(1))
    assert quickest(took_s, STARTED_WITHIN_S, another_took_s.__next__) < STARTED_WITHIN_S
    until(lambda: cluster.run({"operation": "worker_list"})["workers"] == [], "it is in no list")


def test_requests_go_to_the_least_busy_worker(cluster: Cluster, worker: dict[str, Any]) -> None:
    other = cluster.spawn("m", "--sim-step-ms", "21")
    both = {worker["worker_id"], other["worker_id"]}
    until(lambda: known_workers(cluster) == both, "the queen knows of these two alone")
    job_ids = [cluster.submit(infer(), Prefer="respond-async") for _ in range(6)]
    chosen = []
    for job_id in job_ids:
        with stream(cluster.queen.url, job_id) as frames:
            decision = next(event for _, event in frames if event["action"] == "infer_schedule")["data"]
            chosen.append(decision["worker_id"])
            assert {c["worker_id"] for c in decision["candidates"]} == both
        httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}")
    cluster.run({"operation": "worker_stop", "worker_id": other["worker_id"], "grace_s": 0})

    assert sorted(chosen.count(w["worker_id"]) for w in (worker, other)) == [3, 3]


def test_cancel_goes_down_all_hops(cluster: Cluster, worker: dict[str, Any]) -> None:
    job_id = cluster.submit(infer())
    with stream(cluster.queen.url, job_id) as frames:
        next_tokens(frames, 3)
        until(lambda: running_on(cluster, worker) == 1, "the worker runs it")
        assert httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}").status_code == 200
        assert httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}").status_code == 200
        assert [event for _, event in frames][-1]["action"] == "execute_cancelled"

    (hive_job,) = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()["children"]
    until(lambda: state_of(cluster.hive.url, hive_job) == "cancelled", "the hive's job is cancelled")
    (worker_job,) = httpx.get(f"{cluster.hive.url}/v1/jobs/{hive_job}").json()["children"]
    assert worker_job.startswith("job-")
    until(lambda: running_on(cluster, worker) == 0, "the worker runs nothing")


def test_a_deadline_goes_down_all_hops(cluster: Cluster, worker: dict[str, Any]) -> None:
    """F34: the time left travels with the request, and the engine is freed."""
    events = cluster.events(infer(timeout_s=0.5))

    assert events[-1]["action"] == "execute_timeout"
    assert events[-1]["code"] == "timeout"
    until(lambda: running_on(cluster, worker) == 0, "the engine runs nothing")


def test_the_job_that_was_cancelled_below_fails_above(cluster: Cluster, worker: dict[str, Any]) -> None:
    job_id = cluster.submit(infer())
    with stream(cluster.queen.url, job_id) as frames:
        next_tokens(frames, 3)
        (hive_job,) = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()["children"]
        httpx.delete(f"{cluster.hive.url}/v1/jobs/{hive_job}")
        rest = [event for _, event in frames]

    assert rest[-2]["code"] == "cancelled_below"


def test_heartbeats_of_hive_and_queen(cluster: Cluster, worker: dict[str, Any]) -> None:
    for url, key in ((cluster.hive.url, "workers"), (cluster.queen.url, "hives")):
        with httpx.stream("GET", f"{url}/v1/heartbeats/stream") as response:
            lines = response.iter_lines()
            assert next(lines) == "event: heartbeat"
            beats = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
            assert any(worker["worker_id"] in json.dumps(beat[key]) for beat in itertools.islice(beats, 5))


SUBMIT_ERRORS = [
    ('{"operation":"invalid_op"}', 400, "invalid_operation"),
    ("{}", 400, "invalid_operation"),
    ("{", 400, "invalid_json"),
    ("", 400, "invalid_json"),
    ('{"operation":"infer","model":"m"}', 400, "invalid_field"),
    ('{"operation":"infer","model":"../../etc","prompt":"x"}', 400, "invalid_field"),
    ('{"operation":"infer","model":"m","prompt":"x","max_tokens":0}', 400, "invalid_field"),
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("body", "status", "code"), SUBMIT_ERRORS)
def test_submit_errors_by_curl(cluster: Cluster, body: str, status: int, code: str) -> None:
    command = ["curl", "-s", "-w", "\n%{http_code}", f"{cluster.queen.url}/v1/jobs", "-d", body]
    answer, _, http_status = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.rpartition("\n")

    error = json.loads(answer)
    assert (int(http_status), error["code"]) == (status, code)
    assert set(error) == {"error", "details", "code", "correlation_id"}
    assert error["correlation_id"].startswith("corr-")


def test_a_queen_that_comes_back_knows_the_hive_within_seconds(tmp_path: Path) -> None:
    """The hive announces itself again; its workers have gone on meanwhile."""
    with Cluster(tmp_path, engine="sim") as cluster:
        spawned = cluster.spawn("m")

        def come_back() -> float:
            cluster.queen.kill()
            cluster.start_queen()
            begun = time.monotonic()
            until(cluster._is_online, "the hive is online again")
            return time.monotonic() - begun

        assert quickest(come_back(), KNOWN_WITHIN_S, come_back) < KNOWN_WITHIN_S
        assert is_alive(spawned["pid"])
        # The line for its events is taken up beside the one for its heartbeats.
        asked = infer(max_tokens=3)
        until(lambda: len(text_of(cluster.events(asked)).split()) == 3, "its worker answers")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_hive_that_is_stopped_leaves_no_process(tmp_path: Path, signum: signal.Signals) -> None:
    with Cluster(tmp_path, engine="sim") as cluster:
        cluster.spawn("m")
        cluster.spawn("m", "--sim-start-s", "0")

        assert cluster.hive.terminate(signum) == 0
        assert cluster.queen.terminate(signum) == 0
        assert marked_processes(cluster.marker) == []


def test_a_hive_stopped_while_a_worker_starts_leaves_no_process(tmp_path: Path) -> None:
    with Cluster(tmp_path, engine="sim") as cluster:
        job_id = cluster.submit(
            {"operation": "worker_spawn", "model": "m", "worker_args": ["--sim-start-s", "600"]}
        )
        with stream(cluster.queen.url, job_id) as frames:
            next(event for _, event in frames if event["action"] == "worker_spawn_start")
            cluster.hive.process.send_signal(signal.SIGTERM)
            last = [event for _, event in frames][-1]

        assert last["action"] == "execute_error"
        assert last["code"] == "shutting_down"
        assert cluster.hive.terminate() == 0
        assert cluster.queen.terminate() == 0
        assert marked_processes(cluster.marker) == []


@pytest.mark.parametrize("service", ["hive", "queen"])
def test_a_stopping_service_refuses_jobs_and_ends_or_leaves_its_streams(tmp_path: Path, service: str) -> None:
    """F06: not ready, submits refused with Retry-After, streams ended with an event or left, exit 0."""
    patient, hurried = ["--drain-timeout-s", "300"], ["--drain-timeout-s", "1"]
    hive_args = patient if service == "hive" else hurried
    with Cluster(tmp_path, engine="sim", queen_args=patient, hive_args=hive_args) as cluster:
        cluster.spawn("m", "--sim-step-ms", "20")
        stopped: Service = getattr(cluster, service)
        job_id = cluster.submit(infer(), stopped.url)
        with stream(stopped.url, job_id) as frames:
            next_tokens(frames, 3)
            stopped.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{stopped.url}/ready").status_code == 503, "it is not ready")
            refused = httpx.post(f"{stopped.url}/v1/jobs", json={"operation": "hive_list"})
            if service == "queen":
                assert (refused.status_code, refused.json()["code"]) == (503, "shutting_down")
                assert "retry-after" in refused.headers
            # A second signal ends the draining.
            stopped.process.send_signal(signal.SIGTERM)
            if service == "hive":
                rest = [event for _, event in frames]
                assert rest[-2]["code"] == "shutting_down"
            else:
                # What a queen can take up again is cut, so that its reader comes back.
                with pytest.raises((httpx.RemoteProtocolError, AssertionError), match=r"(complete|without)"):
                    list(frames)
        assert stopped.terminate() == 0


@pytest.mark.parametrize(
    ("program", "args"),
    [("rbee-queen", []), ("rbee-hive", []), ("rbee-worker", ["--model", "m", "--engine", "sim"])],
)
def test_a_taken_port_is_one_clear_line_and_exit_2(program: str, args: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [BIN / program, *args, "--port", port], capture_output=True, text=True, timeout=120
        )

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{program}: cannot listen on 127.0.0.1:{port}")


def known_workers(cluster: Cluster) -> set[str]:
    """Give the workers that the queen has heard of."""
    hives = cluster.run({"operation": "hive_list"})["hives"]
    return {worker["worker_id"] for hive in hives for worker in hive.get("workers", [])}


def running_on(cluster: Cluster, worker: dict[str, Any]) -> int:
    """How many requests its hive last saw on a worker; the worker itself speaks to its hive only."""
    got = cluster.run({"operation": "worker_get", "worker_id": worker["worker_id"]}, cluster.hive.url)
    return int(got["running"])


def state_of(url: str, job_id: str) -> str:
    return str(httpx.get(f"{url}/v1/jobs/{job_id}").json()["state"])
