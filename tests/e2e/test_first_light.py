"""A prompt goes queen → hive → worker → real vLLM, and its tokens come back; and what breaks on the way."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_processes import (
    MODELS,
    Cluster,
    Service,
    is_alive,
    quickest,
    read_log,
    stream,
    text_of,
    title_of,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

PROMPT = "A job is an event stream:"

LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True, "n": 16, "temperature": 1}
"""Of a request that is still at work when a busy machine comes to end it: about fifteen seconds of text."""

RETURN_S = 120
"""What a job gives its reader to come back, where the reader is to find it."""

FREED_S = 1.5
"""The second that is promised; what a hive tells of its engine is up to half a second old."""

NOTICED_S = 2.0
"""For an engine's death to reach the client: it is polled five times a second."""

GONE_S = 10.0
"""For every process of a worker to be gone after its engine's death, or after its spawn was cancelled."""


def infer(**fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": "rbee-tiny", "prompt": PROMPT, "temperature": 0} | fields


def metric(url: str, name: str) -> int:
    """Read what vLLM itself says."""
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found is not None

    return int(float(found[1]))


def only_ready(cluster: Cluster) -> list[dict[str, Any]] | None:
    """Give the workers once all of them are ready: what other tests started, and asked, has ended."""
    workers: list[dict[str, Any]] = cluster.run({"operation": "worker_list"})["workers"]
    return workers if {worker["state"] for worker in workers} == {"ready"} else None


def running_requests(cluster: Cluster) -> int:
    """What the hive last heard of its worker's engine, twice a second; a worker speaks to its hive only."""
    workers = cluster.run({"operation": "worker_list"}, cluster.hive.url)["workers"]
    return sum(worker["running"] for worker in workers)


def test_the_greedy_continuation_is_the_corpus(cluster: Cluster, corpus: str) -> None:
    events = cluster.events(infer(max_tokens=40))

    expected = corpus[corpus.index(PROMPT) + len(PROMPT) :]
    assert expected.startswith(text_of(events))
    assert len(text_of(events)) > 80


def test_every_hop_says_its_part_in_order(cluster: Cluster) -> None:
    events = cluster.events(infer(max_tokens=3))

    said = [(event["action"], event["actor"].split("/")[0]) for event in events]
    # An engine that gets ahead of its worker has several tokens in one event.
    told = [key for before, key in pairwise([("", ""), *said]) if key[0] != "token" or key != before]
    assert told == [
        ("execute", "queen"),
        ("infer_start", "queen"),
        ("infer_schedule", "queen"),
        ("infer_worker", "hive"),
        ("token", "worker"),
        ("infer_complete", "worker"),
        ("execute_complete", "queen"),
    ]
    result = events[-1]["data"]
    assert result["usage"]["completion_tokens"] == 3
    assert result["finish_reason"] == "length"
    assert result["timings"]["ttft_ms"] > 0
    indexes = [event["index"] for event in events if event["action"] == "token"]
    assert indexes == list(range(len(indexes)))
    assert len(indexes) <= 3


def test_one_correlation_id_in_events_and_logs_of_all_hops(cluster: Cluster) -> None:
    events = cluster.events(infer(max_tokens=3), **{"X-Correlation-ID": "corr-e2e-1"})

    assert {event["correlation_id"] for event in events} == {"corr-e2e-1"}
    worker_id = next(e for e in events if e["action"] == "infer_worker")["data"]["worker_id"]
    for log in (cluster.queen.log(), cluster.hive.log(), read_log(cluster.worker_log(worker_id))):
        lines = [line for line in log if line.get("correlation_id") == "corr-e2e-1"]
        assert {line["event"] for line in lines} >= {"job_accepted", "job_ended"}
        assert len({line["job_id"] for line in lines}) == 1


def test_no_prompt_or_output_in_any_log(cluster: Cluster) -> None:
    events = cluster.events(infer(prompt="Heffalump zanzibar quixotic", max_tokens=20, temperature=0))
    worker_id = next(e for e in events if e["action"] == "infer_worker")["data"]["worker_id"]

    logs = [cluster.queen.log_path, cluster.hive.log_path, cluster.worker_log(worker_id)]
    for path in logs:
        assert "Heffalump" not in path.read_text(errors="replace")
        assert text_of(events) not in path.read_text(errors="replace")


def test_vllms_own_metrics_come_through_the_hive(cluster: Cluster) -> None:
    cluster.events(infer())
    (worker,) = until(lambda: only_ready(cluster), "nothing is left of other tests' workers")
    told = httpx.get(f"{cluster.hive.url}/v1/workers/{worker['worker_id']}/metrics").text

    for name in (
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits_total",
        "rbee_jobs_finished_total",
        "process_resident_memory_bytes",
    ):
        assert re.search(rf"^{name}\b", told, re.MULTILINE), name
    types = re.findall(r"^# TYPE (\S+)", told, re.MULTILINE)
    assert len(types) == len(set(types)), "a metric is told twice"


def test_two_jobs_at_once_never_see_each_others_events(cluster: Cluster, corpus: str) -> None:
    prompts = [PROMPT, _another_sentence_start(corpus)]
    alone = [text_of(cluster.events(infer(prompt=prompt, max_tokens=40))) for prompt in prompts]

    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda prompt: cluster.events(infer(prompt=prompt, max_tokens=40)), prompts))

    assert [text_of(events) for events in together] == alone
    assert alone[0] != alone[1]
    for events in together:
        assert len({event["job_id"] for event in events}) == 1


def test_a_reader_that_drops_after_five_tokens_gets_the_exact_rest(cluster: Cluster) -> None:
    operation = infer(max_tokens=200, resume_window_s=RETURN_S)
    whole = cluster.events(operation)
    had: list[dict[str, Any]] = []
    last_id = ""
    # It comes in fewer tokens where the engine has got far ahead of its worker.
    while sum(event["action"] == "token" for event in had) < 5:
        job_id, had = cluster.submit(operation), []
        with stream(cluster.queen.url, job_id) as frames:
            for event_id, event in frames:
                had.append(event)
                last_id = event_id
                if sum(e["action"] == "token" for e in had) == 5:
                    break

    with stream(cluster.queen.url, job_id, last_id) as frames:
        rest = [event for _, event in frames]

    assert text_of(had) + text_of(rest) == text_of(whole)
    indexes = [event["index"] for event in had + rest if event["action"] == "token"]
    assert indexes == list(range(len(indexes)))
    assert rest[-1]["data"]["usage"] == whole[-1]["data"]["usage"]


def test_a_second_reader_after_the_end_gets_the_whole_stream(cluster: Cluster) -> None:
    job_id = cluster.submit(infer(max_tokens=10))
    with stream(cluster.queen.url, job_id) as frames:
        first = list(frames)
    with stream(cluster.queen.url, job_id) as frames:
        second = list(frames)

    assert first == second
    answer = httpx.get(
        f"{cluster.queen.url}/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": first[-1][0]}
    )
    assert answer.status_code == 204


def test_delete_in_mid_stream_frees_the_engine_within_a_second(cluster: Cluster) -> None:
    def delete() -> float:
        job_id = cluster.submit(infer(**LONG))
        with stream(cluster.queen.url, job_id) as frames:
            _until_tokens(frames, 10)
            until(lambda: running_requests(cluster) > 0, "the engine runs it")
            begun = time.monotonic()
            told = httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}").json()
            took_s = _until_engine_is_free(cluster) - begun
            last = [event for _, event in frames][-1]

        assert told == {"job_id": job_id, "status": "cancelled"}
        assert last["action"] == "execute_cancelled"
        return took_s

    assert quickest(delete(), FREED_S, delete) < FREED_S


def test_a_client_gone_for_good_frees_the_engine_within_a_second_after_its_window(cluster: Cluster) -> None:
    window_s = 1.0

    def leave() -> float:
        job_id = cluster.submit(infer(**LONG, resume_window_s=window_s))
        with stream(cluster.queen.url, job_id) as frames:
            _until_tokens(frames, 10)
            until(lambda: running_requests(cluster) > 0, "the engine runs it")
            there = time.monotonic()
        left = time.monotonic()
        freed = _until_engine_is_free(cluster)

        assert freed - there > 0.9 * window_s, "it was cancelled before its resume window was over"
        record = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()
        assert record["state"] == "cancelled"
        return freed - left - window_s

    assert quickest(leave(), FREED_S, leave) < FREED_S


def test_max_tokens_beyond_the_context_is_an_error_before_anything_runs(cluster: Cluster) -> None:
    events = cluster.events(infer(max_tokens=5000))

    error = next(event for event in events if event["action"] == "error")
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"]
    assert error["actor"].startswith("worker/")
    assert [event["action"] for event in events[-2:]] == ["error", "execute_error"]
    assert not text_of(events)


def test_chat_messages_choices_logprobs_and_stop(cluster: Cluster) -> None:
    chat = {"operation": "infer", "model": "rbee-tiny", "temperature": 0, "max_tokens": 60}
    answer = cluster.events(chat | {"messages": [{"role": "user", "content": PROMPT}]})
    assert answer[-1]["data"]["finish_reason"] == "stop"
    assert text_of(answer).startswith(" it starts when somebody reads it")

    two = cluster.events(infer(n=2, max_tokens=5, temperature=0.9, seed=7))
    assert {(e.get("data") or {}).get("choice", 0) for e in two if e["action"] == "token"} == {0, 1}
    assert two[-1]["data"]["usage"]["completion_tokens"] == 10

    scored = cluster.events(infer(logprobs=2, max_tokens=2))
    first = next(event for event in scored if event["action"] == "token")
    assert len(first["data"]["logprobs"][0]) >= 2

    slow = cluster.events(infer(stream_interval=4, max_tokens=12, skip_reading_prefix_cache=True))
    assert len([event for event in slow if event["action"] == "token"]) < 8
    assert slow[-1]["data"]["usage"]["completion_tokens"] == 12

    stopped = cluster.events(infer(stop="every", max_tokens=60))
    assert text_of(stopped).endswith("reads it, ")
    assert stopped[-1]["data"]["finish_reason"] == "stop"


@pytest.fixture
def lone_worker(tmp_path: Path) -> Iterator[Service]:
    """A worker without a hive, and so without a token that only the hive knows."""
    args = ["--model", str(MODELS / "rbee-tiny"), "--port", "0"]
    worker = Service("rbee-worker", args, tmp_path / "worker.log", str(tmp_path))
    try:
        until(lambda: httpx.get(f"{worker.url}/ready").status_code == 200, "the worker is ready", 600)
        yield worker
    finally:
        worker.terminate()


def test_the_tokens_of_one_engine_step_leave_the_worker_as_one_write(
    cluster: Cluster, lone_worker: Service
) -> None:
    """The firehose gets about as many writes as the engine made steps, however many streams are in them."""
    streams, tokens = 8, 200
    url = lone_worker.url
    (core,) = _engine_cores(psutil.Process(lone_worker.process.pid).children(recursive=True))
    operation = infer(max_tokens=tokens, ignore_eos=True)
    steps_before = metric(url, "vllm:iteration_tokens_total_count")
    with httpx.stream("GET", f"{url}/v1/events?output=1", timeout=60) as firehose:
        # The engine waits, so that all of them are in its steps however long it takes to submit them.
        core.suspend()
        try:
            for _ in range(streams):
                cluster.submit(operation, url, Prefer="respond-async")
        finally:
            core.resume()
        said, writes = b"", 0
        for chunk in firehose.iter_raw():
            said += chunk
            writes += b'"action":"token"' in chunk
            if said.count(b'"action":"execute_complete"') == streams:
                break
    steps = metric(url, "vllm:iteration_tokens_total_count") - steps_before

    events = said.count(b'"action":"token"')
    assert events > 3 * writes, f"{events} token events in {writes} writes: the streams were not in step"
    assert writes <= 1.2 * steps, f"{events} token events in {writes} writes, in {steps} engine steps"


def test_kill_of_the_engine_core_ends_the_stream_and_leaves_no_process(cluster: Cluster) -> None:
    gone_after_s: list[float] = []

    def kill() -> float:
        spawned = cluster.spawn("rbee-tiny")
        worker = psutil.Process(spawned["pid"])
        family = [worker, *worker.children(recursive=True)]
        job_id = cluster.submit(infer(**LONG, worker_id=spawned["worker_id"]))
        with stream(cluster.queen.url, job_id) as frames:
            _until_tokens(frames, 10)
            killed = time.monotonic()
            _engine_cores(family)[0].kill()
            rest = [event for _, event in frames]
        took_s = time.monotonic() - killed

        assert [event["action"] for event in rest if event["action"] != "token"] == ["error", "execute_error"]
        error = rest[-2]
        assert error["code"] == "engine_died"
        until(lambda: not any(is_alive(process) for process in family), "no process of the worker is left")
        gone_after_s.append(time.monotonic() - killed)
        get = {"operation": "worker_get", "worker_id": spawned["worker_id"]}
        lost = until(lambda: got if (got := cluster.run(get)).get("cause") else None, "its hive knows why")
        assert lost["exit_code"] != 0
        assert "EngineCore" in lost["cause"]
        cluster.run({"operation": "worker_stop", "worker_id": spawned["worker_id"], "grace_s": 0})
        return took_s

    def kill_another() -> float:
        kill()
        return gone_after_s[-1]

    assert quickest(kill(), NOTICED_S, kill) < NOTICED_S
    assert quickest(min(gone_after_s), GONE_S, kill_another) < GONE_S


def test_a_spawn_that_is_cancelled_while_the_engine_loads_leaves_no_process(cluster: Cluster) -> None:
    def cancel() -> float:
        job_id = cluster.submit({"operation": "worker_spawn", "model": "rbee-tiny"})
        with stream(cluster.queen.url, job_id) as frames:
            pid = next(e["data"]["pid"] for _, e in frames if e["action"] == "worker_spawn_start")
            worker = psutil.Process(pid)
            until(lambda: worker.children(recursive=True), "the engine core is being started", 300)
            family = [worker, *worker.children(recursive=True)]
            httpx.delete(f"{cluster.queen.url}/v1/jobs/{job_id}")
            cancelled = time.monotonic()
        until(lambda: not any(is_alive(process) for process in family), "no process of the worker is left")
        return time.monotonic() - cancelled

    assert quickest(cancel(), GONE_S, cancel) < GONE_S


def test_a_worker_that_cannot_start_fails_the_spawn_with_its_last_log_lines(cluster: Cluster) -> None:
    events = cluster.events(
        {"operation": "worker_spawn", "model": "rbee-tiny", "worker_args": ["--max-model-len", "100000"]}
    )

    error = next(event for event in events if event["action"] == "error")
    assert error["code"] == "worker_spawn_failed"
    assert "exited with status 1" in error["message"]
    assert "100000" in error["message"]
    until(lambda: only_ready(cluster), "nothing is left of the worker that could not start")


def _another_sentence_start(corpus: str) -> str:
    sentence = next(s for s in re.split(r"(?<=[.])\s+", corpus) if len(s.split()) > 12 and PROMPT not in s)
    return " ".join(sentence.split()[:7])


def _engine_cores(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if "EngineCore" in title_of(process)]


def _until_engine_is_free(cluster: Cluster) -> float:
    """Wait until the engine runs nothing; give when that was seen."""
    until(lambda: running_requests(cluster) == 0, "the engine runs nothing")
    return time.monotonic()


def _until_tokens(frames: Any, count: int) -> None:
    for _, event in frames:
        count -= event["action"] == "token"
        if not count:
            return
    raise AssertionError("the stream ended before that many tokens")
