"""The hive where the engine matters: real vLLM workers that cannot load, die, and outlive their hive."""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_collector import Collector, SpanSeen, collector, tree
from rbee_processes import MODELS, Cluster, Service, is_alive, stream, text_of, title_of, until
from rbee_restarts import Reader

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

WORKER_S = 600.0
"""For a real engine to load on a machine that has other things to do."""


@pytest.fixture(scope="module")
def taken() -> Iterator[Collector]:
    with collector() as taken:
        yield taken


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, taken: Collector) -> Iterator[Cluster]:
    """A cluster of its own: its hive is killed. It sends traces."""
    folder = tmp_path_factory.mktemp("hive")
    models = folder / "models"
    shutil.copytree(MODELS / "rbee-tiny", models / "rbee-tiny", ignore=shutil.ignore_patterns("*.py"))
    broken = models / "broken"
    shutil.copytree(models / "rbee-tiny", broken)
    # A valid file with no tensor in it: found out by the engine core, not by its worker.
    (broken / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    option = ("--otlp-endpoint", taken.url)
    with Cluster(folder, models=models, queen_args=option, hive_args=option) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> dict[str, Any]:
    return cluster.spawn("rbee-tiny")


def infer(**fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": "rbee-tiny", "prompt": "A job", "temperature": 0} | fields


def info_of(cluster: Cluster, worker_id: str) -> dict[str, Any]:
    got: dict[str, Any] = cluster.run({"operation": "worker_get", "worker_id": worker_id}, cluster.hive.url)
    return got


def test_a_model_that_cannot_be_loaded_tells_the_engines_own_cause(cluster: Cluster) -> None:
    """The worker knows only that its core did not come up; why stands in the log, above the tracebacks."""
    events = cluster.events({"operation": "worker_spawn", "model": "broken"})

    error = next(event for event in events if event["action"] == "error")
    cause, _, lines = error["message"].partition(" Its last log lines")
    assert error["code"] == "worker_spawn_failed"
    assert "not initialized" in cause
    assert "See root cause above" not in cause
    assert lines
    again = cluster.events({"operation": "worker_spawn", "model": "broken"})
    refused = next(event for event in again if event["action"] == "error")
    assert refused["code"] == "worker_spawn_failed"


def test_a_stream_goes_on_when_the_hive_is_killed(cluster: Cluster, worker: dict[str, Any]) -> None:
    """F04, with a real engine: adopted with its engine core, and the text is what one run gives."""
    tokens = 1500
    operation = infer(max_tokens=tokens, ignore_eos=True)
    expected = text_of(cluster.events(operation))
    pid = info_of(cluster, worker["worker_id"])["pid"]
    with ThreadPoolExecutor(1) as pool:

        def begin() -> tuple[Reader, Future[Reader]]:
            reader = Reader(cluster.queen.url, cluster.submit(operation))
            result = pool.submit(reader.read)
            until(lambda: reader.done or len(reader.events) > 20, "the stream is under way", 120)
            return reader, result

        reader, result = begin()
        while reader.done:  # it has ended before this process could see that it had begun
            reader, result = begin()
        cluster.hive.kill()
        cluster.restart_hive(cluster.hive.url.rpartition(":")[2])
        result.result(300)

    assert text_of(reader.events) == expected
    assert reader.events[-1]["action"] == "execute_complete"
    adopted = info_of(cluster, worker["worker_id"])
    assert (adopted["pid"], adopted["adopted"]) == (pid, True)


@pytest.mark.parametrize(("operation", "trace_id"), [("infer", "c" * 32), ("openai", "e" * 32)])
def test_one_trace_has_the_spans_of_all_services_and_of_the_engine(
    cluster: Cluster, worker: dict[str, Any], taken: Collector, operation: str, trace_id: str
) -> None:
    until(lambda: info_of(cluster, worker["worker_id"])["state"] == "ready", "it is ready", WORKER_S)
    correlation_id, prompt = f"traced-{operation}", "heffalump zanzibar"
    headers = {"X-Correlation-ID": correlation_id, "traceparent": f"00-{trace_id}-{'d' * 16}-01"}
    if operation == "infer":
        cluster.events(infer(prompt=prompt, max_tokens=4), **headers)
    else:
        body = {"model": "rbee-tiny", "prompt": prompt, "max_tokens": 4}
        answer = httpx.post(f"{cluster.queen.url}/v1/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200

    def six() -> list[SpanSeen] | None:
        found = [span for span in taken.spans() if span.trace_id == trace_id]
        return found if len(found) >= 6 else None

    spans = until(six, "there are six spans", 120)

    assert tree(spans) == [
        f"rbee-queen: job {operation}",
        f"  rbee-queen: attempt {operation}",
        f"    rbee-hive: job {operation}",
        f"      rbee-hive: attempt {operation}",
        f"        rbee-worker: job {operation}",
        "          vllm: llm_request",
    ]
    engine = next(span for span in spans if span.service == "vllm")
    assert correlation_id in engine.attributes["gen_ai.request.id"]
    assert engine.attributes["gen_ai.usage.completion_tokens"] == 4
    assert prompt.encode() not in taken.everything()


def test_the_engines_processes_are_known_by_the_workers_nonce(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    """vLLM's processes give themselves titles, which must not hide what they inherited."""
    until(lambda: info_of(cluster, worker["worker_id"])["state"] == "ready", "it is ready", WORKER_S)
    pid = info_of(cluster, worker["worker_id"])["pid"]
    family = psutil.Process(pid).children(recursive=True)
    listed = cluster.run({"operation": "worker_process_list"}, cluster.hive.url)["processes"]
    kinds = {process["pid"]: process["kind"] for process in listed}

    assert kinds[pid] == "worker"
    assert [p for p in family if "EngineCore" in title_of(p)]
    # One that has ended between the two looks is in the first only.
    assert {kinds.get(p.pid) for p in family if is_alive(p)} == {"engine"}


def test_a_killed_worker_leaves_no_engine_and_is_started_again(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    """A SIGKILLed vLLM server leaves its engine core running; its hive ends that before it starts anew."""
    until(lambda: info_of(cluster, worker["worker_id"])["state"] == "ready", "it is ready", WORKER_S)
    pid = info_of(cluster, worker["worker_id"])["pid"]
    family = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)

    def is_back() -> bool:
        info = info_of(cluster, worker["worker_id"])
        return bool(info["state"] == "ready" and info.get("restarts") == 1)

    until(is_back, "it serves again", WORKER_S)
    assert not any(is_alive(child) for child in family)
    cluster.until_seen(worker["worker_id"], "ready")
    with stream(cluster.queen.url, cluster.submit(infer(max_tokens=3))) as frames:
        assert [event for _, event in frames][-1]["action"] == "execute_complete"


def test_a_hive_that_is_stopped_ends_what_it_had_adopted(tmp_path: Path) -> None:
    args = ["--port", "0", "--queen-url", "none", "--models-dir", str(MODELS)]
    args += ["--state-dir", str(tmp_path / "state")]
    first = Service("rbee-hive", args, tmp_path / "1.log", str(tmp_path))
    spawn = {"operation": "worker_spawn", "model": "rbee-tiny"}
    accepted = httpx.post(f"{first.url}/v1/jobs", json=spawn, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    (started,) = until(
        lambda: [e for e in first.log() if e.get("event") == "worker_started"], "its process runs"
    )
    worker = psutil.Process(started["pid"])
    until(worker.children, "its engine is being started", WORKER_S)
    family = [worker, *worker.children(recursive=True)]
    first.kill()
    second = Service("rbee-hive", args, tmp_path / "2.log", str(tmp_path))
    assert second.terminate() == 0

    until(lambda: not any(is_alive(process) for process in family), "no process of the engine is left")
