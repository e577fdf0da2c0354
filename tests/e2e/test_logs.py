"""What all services logged of one request, found by its correlation id. With the sim engine."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from rbee_many_hives import FakeHive, fake_hives
from rbee_processes import BIN, Cluster, stream, text_of, until

pytestmark = pytest.mark.timeout(600)

MODEL = "rbee-tiny"
PROMPT = "heffalump zanzibar quixotic"


def infer(**fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": MODEL, "prompt": PROMPT, "max_tokens": 5} | fields


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("logs"), engine="sim") as cluster:
        cluster.spawn(MODEL, "--sim-step-ms", "2")
        yield cluster


def search(cluster: Cluster, correlation_id: str, url: str | None = None, **fields: Any) -> dict[str, Any]:
    operation = {"operation": "log_search", "correlation_id": correlation_id} | fields
    found: dict[str, Any] = cluster.run(operation, url)
    return found


def told(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Give who said what; which worker does not matter."""
    return [(line["service"].partition("/rbee-tiny")[0], line["event"]) for line in found["lines"]]


def rbee(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"RBEE_QUEEN_URL": cluster.queen.url, "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [BIN / "rbee", *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_every_hops_lines_of_one_request(cluster: Cluster) -> None:
    cluster.events(infer(), **{"X-Correlation-ID": "logs-1"})
    found = search(cluster, "logs-1")

    assert told(found) == [
        ("queen", "job_accepted"),
        ("queen", "infer_scheduled"),
        ("queen", "job_ended"),
        ("hive/box1", "job_accepted"),
        ("hive/box1", "infer_placed"),
        ("worker", "job_accepted"),
        ("worker", "job_ended"),
        ("hive/box1", "job_ended"),
    ]
    scheduled, ended = (line["facts"] for line in found["lines"][1:3])
    assert scheduled["reason"]
    assert (scheduled["hive_id"], scheduled["attempt"], scheduled["candidates"]) == ("box1", 0, 1)
    assert (ended["state"], ended["code"]) == ("completed", "ok")
    assert 0 < ended["first_output_s"] <= ended["duration_s"]
    assert "box1" not in found["silent"]
    assert [note.split(" has its own lines")[0] for note in found["notes"]] == ["queen", "hive/box1"]


def test_a_stranger_sees_why_a_request_failed(cluster: Cluster) -> None:
    cluster.events(infer(model="no-such-model"), **{"X-Correlation-ID": "logs-2"})
    shown = rbee(cluster, "logs", "--correlation-id", "logs-2")

    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ["queen", "job_accepted"],
        ["queen", "WARNING"],
        ["queen", "job_ended"],
    ]
    assert "code=no_worker" in lines[1]
    assert "No worker can run 'no-such-model' now" in lines[1]
    assert "To start one: rbee worker spawn" in lines[1]
    assert "state=failed code=no_worker" in lines[2]
    assert "correlation_id" not in shown.stdout
    assert "queen has its own lines since" in shown.stderr


def test_a_job_that_never_ran_says_why(cluster: Cluster) -> None:
    job_id = cluster.submit(infer(), **{"X-Correlation-ID": "logs-3"})
    httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}")
    found = search(cluster, "logs-3")

    assert told(found) == [("queen", "job_accepted"), ("queen", "job_cancelled")]
    assert found["lines"][1]["facts"]["reason"] == "cancelled"


def test_a_request_is_found_by_its_job(cluster: Cluster) -> None:
    job_id = cluster.submit(infer(), **{"X-Correlation-ID": "logs-4"})
    with stream(cluster.queen.url, job_id) as frames:
        list(frames)
    by_job = rbee(cluster, "logs", "--job-id", job_id, "--json")

    assert by_job.returncode == 0
    assert json.loads(by_job.stdout)["correlation_id"] == "logs-4"
    assert len(json.loads(by_job.stdout)["lines"]) == 8


def test_the_lines_of_a_worker_that_is_gone_are_found(cluster: Cluster) -> None:
    first, *_ = cluster.run({"operation": "worker_list", "hive_id": "box1"})["workers"]
    doomed = cluster.spawn(MODEL, "--sim-prefill-tokens-per-s", "0.01")
    operation = infer(worker_id=doomed["worker_id"], hive_id="box1")
    job_id = cluster.submit(operation, **{"X-Correlation-ID": "logs-5"})
    with stream(cluster.queen.url, job_id) as frames:
        until(lambda: next(frames)[1]["action"] == "infer_worker", "it is on its worker")
        psutil.Process(doomed["pid"]).kill()
        assert [event for _, event in frames][-1]["action"] == "execute_error"
    cluster.run({"operation": "worker_stop", "worker_id": doomed["worker_id"], "grace_s": 0})
    cluster.until_seen(doomed["worker_id"], None)
    left = cluster.run({"operation": "worker_list", "hive_id": "box1"})["workers"]
    assert [worker["worker_id"] for worker in left] == [first["worker_id"]]
    found = search(cluster, "logs-5")

    assert (f"worker/{doomed['worker_id']}", "job_accepted") in [
        (line["service"], line["event"]) for line in found["lines"]
    ]
    failed = [line for line in found["lines"] if line["event"] == "job_failed"]
    assert [line["facts"]["code"] for line in failed] == ["worker_lost"] * 2
    # What an engine said last may quote a request, and the text of this failure may hold it.
    assert all(line["facts"].get("details") is None for line in failed)


def test_nothing_that_was_asked_or_said_is_in_a_line(cluster: Cluster) -> None:
    text = text_of(cluster.events(infer(max_tokens=12), **{"X-Correlation-ID": "logs-6"}))
    cluster.events(infer(max_tokens=10**6), **{"X-Correlation-ID": "logs-6"})
    found = json.dumps(search(cluster, "logs-6"))

    assert "context_length_exceeded" in found
    assert PROMPT not in found
    assert text
    assert text not in found


@pytest.mark.parametrize("hostile", ["", "a b", "x\ny", "../../etc", "é", "a" * 65, "$(id)"])
def test_a_hostile_id_is_refused_before_anything_is_asked(cluster: Cluster, hostile: str) -> None:
    body = {"operation": "log_search", "correlation_id": hostile}
    answer = httpx.post(f"{cluster.queen.url}/v1/jobs", json=body)

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_field")
    shown = rbee(cluster, "logs", "--correlation-id", hostile)
    assert shown.returncode == 2
    assert "correlation id" in shown.stderr


def test_a_hive_can_be_asked_itself(cluster: Cluster) -> None:
    cluster.events(infer(), **{"X-Correlation-ID": "logs-7"})
    found = search(cluster, "logs-7", cluster.hive.url)

    assert {line["service"].split("/")[0] for line in found["lines"]} == {"hive", "worker"}
    assert len(search(cluster, "logs-7", limit=2)["lines"]) == 4
    assert [note for note in search(cluster, "logs-7", limit=2)["notes"] if "has left out" in note]


def test_one_hive_may_be_named_and_one_that_is_not_known_is_told(cluster: Cluster) -> None:
    cluster.events(infer(), **{"X-Correlation-ID": "logs-8"})
    assert len(search(cluster, "logs-8", hive_id="box1")["lines"]) == 8

    operation = {"operation": "log_search", "correlation_id": "logs-8", "hive_id": "nobody"}
    error = next(event for event in cluster.events(operation) if event["action"] == "error")
    assert error["code"] == "hive_not_found"


def test_a_hive_that_cannot_be_asked_is_named_and_takes_nothing_from_the_rest(cluster: Cluster) -> None:
    gone = FakeHive("gone-box")
    cluster.events(infer(), **{"X-Correlation-ID": "logs-9"})
    with fake_hives(gone):
        httpx.post(f"{cluster.queen.url}/v1/hive/ready", json=gone.announcement)
        until(lambda: _state(cluster, "gone-box") == "online", "it is there")
    until(lambda: _state(cluster, "gone-box") in ("unreachable", "lost"), "it is gone", 120)
    found = search(cluster, "logs-9")

    assert list(found["silent"]) == ["gone-box"]
    assert len(found["lines"]) == 8
    shown = rbee(cluster, "logs", "-c", "logs-9")
    assert shown.returncode == 0
    assert "Hive gone-box could not be asked: " in shown.stderr
    assert len(shown.stdout.splitlines()) == 8


def _state(cluster: Cluster, hive_id: str) -> str:
    hives = cluster.run({"operation": "hive_list"})["hives"]
    return next((str(hive["state"]) for hive in hives if hive["hive_id"] == hive_id), "")


def test_a_request_of_which_nobody_knows_is_an_error_that_says_what_is_kept(cluster: Cluster) -> None:
    shown = rbee(cluster, "logs", "-c", "never-was")

    assert shown.returncode == 1
    assert "No service has a line of 'never-was'. queen has its own lines since" in shown.stderr
