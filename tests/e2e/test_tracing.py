"""One request is one trace, whatever becomes of it and of the services on its way. With the sim engine."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from rbee_collector import Collector, SpanSeen, collector, tree
from rbee_ports import HeldPort
from rbee_processes import Cluster, stream, until
from rbee_restarts import Reader, RestartableCluster, read_through_a_kill

pytestmark = pytest.mark.timeout(600)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"

SIM = ("--sim-step-ms", "10")

OUTLASTS = {"max_tokens": 1500, "ignore_eos": True, "resume_window_s": 120}
"""Of an answer that takes fifteen seconds: also a busy machine kills a service in its midst."""

ONE_TRACE = [
    "rbee-queen: job infer",
    "  rbee-queen: attempt infer",
    "    rbee-hive: job infer",
    "      rbee-hive: attempt infer",
    "        rbee-worker: job infer",
]
MODEL = "rbee-tiny"
PROMPT = "heffalump zanzibar quixotic"


def infer(**fields: Any) -> dict[str, Any]:
    return {"operation": "infer", "model": MODEL, "prompt": PROMPT, "max_tokens": 5} | fields


@pytest.fixture(scope="module", autouse=True)
def sent_soon() -> Iterator[None]:
    """Spans wait 5 s for others, by default, before they are sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield


@pytest.fixture(scope="module")
def taken() -> Iterator[Collector]:
    with collector() as taken:
        yield taken


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, taken: Collector) -> Iterator[Cluster]:
    """A cluster that sends its spans; only its queen and its hive were told where to."""
    folder = tmp_path_factory.mktemp("traced")
    option = ("--otlp-endpoint", taken.url)
    with Cluster(folder, engine="sim", queen_args=option, hive_args=option) as cluster:
        cluster.spawn(MODEL, *SIM)
        yield cluster


def trace_of(taken: Collector, correlation_id: str, spans: int) -> list[SpanSeen]:
    """Wait until so many spans of a request have come; each service sends its own now and then."""
    return until(
        lambda: found if len(found := taken.spans(correlation_id)) >= spans else None,
        f"{spans} spans of {correlation_id}",
    )


def named(spans: list[SpanSeen], service: str, name: str) -> SpanSeen:
    (found,) = [span for span in spans if (span.service, span.name) == (service, name)]
    return found


def test_a_request_is_one_trace_through_all_services(cluster: Cluster, taken: Collector) -> None:
    events = cluster.events(infer(), **{"X-Correlation-ID": "trace-1"})
    spans = trace_of(taken, "trace-1", 5)

    assert tree(spans) == ONE_TRACE
    assert len({span.trace_id for span in spans}) == 1
    queen, worker = named(spans, "rbee-queen", "job infer"), named(spans, "rbee-worker", "job infer")
    assert queen.attributes["rbee.job_id"] == events[0]["job_id"]
    assert queen.attributes["rbee.operation"] == "infer"
    assert queen.attributes["rbee.model"] == MODEL
    assert queen.attributes["rbee.hive_id"] == "box1"
    assert queen.attributes["rbee.state"] == "completed"
    assert queen.attributes["rbee.worker_id"] == worker.attributes["rbee.worker_id"]
    assert {"execute", "infer_start", "infer_schedule", "first_output"} <= set(queen.events)
    assert queen.events["infer_schedule"]["rbee.candidates"] == 1
    assert worker.attributes["gen_ai.usage.completion_tokens"] == 5
    for span in spans:
        if span.name == "job infer":
            assert span.attributes["rbee.correlation_id"] == "trace-1"
            assert "first_output" in span.events


def test_the_callers_trace_is_continued(cluster: Cluster, taken: Collector) -> None:
    cluster.events(infer(), **{"X-Correlation-ID": "trace-2", "traceparent": TRACEPARENT})
    spans = trace_of(taken, "trace-2", 5)

    assert {span.trace_id for span in spans} == {TRACE}
    assert named(spans, "rbee-queen", "job infer").parent == CALLER


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("short", "00-0-0-01"),
        ("zero", f"00-{'0' * 32}-{CALLER}-01"),
        ("version", f"ff-{TRACE}-{CALLER}-01"),
        ("garbage", "what is this?"),
    ],
)
def test_a_malformed_traceparent_begins_a_new_trace(
    cluster: Cluster, taken: Collector, name: str, given: str
) -> None:
    correlation_id = f"malformed-{name}"
    cluster.events(infer(), **{"X-Correlation-ID": correlation_id, "traceparent": given})
    spans = trace_of(taken, correlation_id, 5)

    assert tree(spans) == ONE_TRACE
    assert named(spans, "rbee-queen", "job infer").parent == ""
    assert {span.trace_id for span in spans} != {TRACE}


def test_a_caller_that_does_not_sample_is_followed(cluster: Cluster, taken: Collector) -> None:
    unsampled = f"00-{'a' * 32}-{CALLER}-00"
    cluster.events(infer(), **{"X-Correlation-ID": "unsampled", "traceparent": unsampled})
    cluster.events(infer(), **{"X-Correlation-ID": "sampled"})
    trace_of(taken, "sampled", 5)

    assert taken.spans("unsampled") == []
    assert [span for span in taken.spans() if span.trace_id == "a" * 32] == []


def test_an_openai_request_is_traced_from_the_front_door(cluster: Cluster, taken: Collector) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
    headers = {"X-Correlation-ID": "trace-3", "traceparent": f"00-{'b' * 32}-{CALLER}-01"}
    answer = httpx.post(f"{cluster.queen.url}/v1/chat/completions", json=body, headers=headers, timeout=30)
    assert answer.status_code == 200
    spans = trace_of(taken, "trace-3", 5)

    assert tree(spans) == [line.replace("infer", "openai") for line in ONE_TRACE]
    assert {span.trace_id for span in spans} == {"b" * 32}
    worker = named(spans, "rbee-worker", "job openai")
    assert worker.events["openai_response"] == {"http.response.status_code": 200}


def test_a_request_that_fails_says_so_in_its_spans(cluster: Cluster, taken: Collector) -> None:
    cluster.events(infer(model="none-such"), **{"X-Correlation-ID": "trace-4"})
    (span,) = trace_of(taken, "trace-4", 1)

    assert span.is_error
    assert span.attributes["error.type"] == "no_worker"
    assert span.attributes["rbee.state"] == "failed"


def test_another_try_is_another_span(cluster: Cluster, taken: Collector) -> None:
    (other,) = cluster.run({"operation": "worker_list", "hive_id": "box1"})["workers"]
    doomed = cluster.spawn(MODEL, *SIM, "--sim-prefill-tokens-per-s", "0.01")
    drain = {"operation": "worker_drain", "worker_id": other["worker_id"], "hive_id": "box1"}
    cluster.run(drain)
    job_id = cluster.submit(infer(), **{"X-Correlation-ID": "trace-5"})
    with stream(cluster.queen.url, job_id) as frames:
        until(lambda: next(frames)[1]["action"] == "infer_worker", "it is on the worker that will die")
        cluster.run(drain | {"draining": False})
        psutil.Process(doomed["pid"]).kill()
        assert [event for _, event in frames][-1]["action"] == "execute_complete"
    cluster.run({"operation": "worker_stop", "worker_id": doomed["worker_id"], "grace_s": 0})
    cluster.until_seen(doomed["worker_id"], None)
    # A job's span ends after those of its tries, and may come after them.
    until(lambda: "job infer" in {s.name for s in taken.spans("trace-5") if s.service == "rbee-queen"}, "all")
    spans = taken.spans("trace-5")
    assert _tries(spans) == [0, 1]

    failed = [s for s in spans if (s.service, s.name) == ("rbee-queen", "attempt infer") and s.is_error]
    assert [span.attributes["error.type"] for span in failed] == ["worker_lost"]
    (retried,) = [span for span in spans if "infer_retry" in span.events]
    assert retried.span_id == failed[0].parent
    assert retried.events["infer_retry"] == {"error.type": "worker_lost"}
    assert retried.attributes["rbee.worker_id"] == other["worker_id"]


def _tries(spans: list[SpanSeen]) -> list[int]:
    tries = [s for s in spans if (s.service, s.name) == ("rbee-queen", "attempt infer")]
    return sorted(span.attributes["rbee.attempt"] for span in tries)


def test_an_operation_that_is_no_inference_is_traced_too(cluster: Cluster, taken: Collector) -> None:
    operation = {"operation": "worker_list", "hive_id": "box1"}
    cluster.events(operation, **{"X-Correlation-ID": "trace-6"})
    spans = trace_of(taken, "trace-6", 3)

    assert [line.strip() for line in tree(spans)] == [
        "rbee-queen: job worker_list",
        "rbee-queen: attempt worker_list",
        "rbee-hive: job worker_list",
    ]


def test_nothing_that_was_asked_or_said_is_in_a_span(cluster: Cluster, taken: Collector) -> None:
    events = cluster.events(infer(max_tokens=12), **{"X-Correlation-ID": "trace-7"})
    cluster.events(infer(max_tokens=10**6), **{"X-Correlation-ID": "trace-7"})
    trace_of(taken, "trace-7", 6)
    said = "".join(event["message"] for event in events if event["action"] == "token")

    assert PROMPT.encode() not in taken.everything()
    assert b"heffalump" not in taken.everything()
    assert said
    assert said.encode() not in taken.everything()


@pytest.mark.parametrize("how", ["killed", "restarted in order"])
def test_a_restarted_hive_goes_on_with_its_spans(how: str, cluster: Cluster, taken: Collector) -> None:
    """Its worker's job tells the trace, and its own job's id the spans above and below."""
    cluster.run(infer())  # it has ended by then, and its spans are sent
    name = f"trace-8-{how[:6]}"
    job_id = cluster.submit(infer(**OUTLASTS), **{"X-Correlation-ID": name})
    with stream(cluster.queen.url, job_id) as frames:
        for _ in range(30):
            next(frames)
        if how == "killed":
            cluster.hive.kill()
        else:
            assert cluster.hive.terminate(signal.SIGUSR1) == 0
        cluster.restart_hive(cluster.hive.url.rpartition(":")[2])
        assert [event for _, event in frames][-1]["action"] == "execute_complete"
    spans = trace_of(taken, name, 5)

    assert tree(spans) == ONE_TRACE
    assert "restored" in named(spans, "rbee-hive", "job infer").events
    ids = [span.span_id for span in taken.spans()]
    assert len(ids) == len(set(ids)), "a span was sent before the restart and again after it"


def test_a_restarted_queen_goes_on_with_its_spans_in_its_callers_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Collector
) -> None:
    monkeypatch.setenv("RBEE_OTLP_ENDPOINT", taken.url)
    headers = {"X-Correlation-ID": "trace-9", "traceparent": f"00-{'e' * 32}-{CALLER}-01"}
    with RestartableCluster(tmp_path, engine="sim") as cluster:
        cluster.spawn(MODEL, *SIM)
        reader = Reader(cluster.queen.url, cluster.submit(infer(**OUTLASTS), **headers))
        read_through_a_kill(cluster, [reader], 1.0)
        assert reader.events[-1]["action"] == "execute_complete"
        spans = trace_of(taken, "trace-9", 5)

    assert tree(spans) == ONE_TRACE
    queen = named(spans, "rbee-queen", "job infer")
    assert (queen.trace_id, queen.parent) == ("e" * 32, CALLER)
    assert "restored" in queen.events
    assert queen.start_ns < named(spans, "rbee-worker", "job infer").start_ns


# --- without a collector -----------------------------------------------------------------------------------


def test_a_collector_that_is_not_there_costs_one_warning(tmp_path: Path) -> None:
    with HeldPort() as nobody, ExitStack() as stack:
        option = ("--otlp-endpoint", nobody.url)
        cluster = stack.enter_context(Cluster(tmp_path, engine="sim", queen_args=option, hive_args=option))
        cluster.spawn(MODEL, *SIM)
        for _ in range(5):
            assert cluster.events(infer())[-1]["action"] == "execute_complete"
        warned = until(lambda: _warnings(cluster), "the queen warns", 120)
        for _ in range(5):
            assert cluster.events(infer())[-1]["action"] == "execute_complete"
        begun = time.monotonic()
        assert cluster.queen.terminate() == 0
        took_s = time.monotonic() - begun

    assert len(_warnings(cluster)) == 1
    assert warned[0]["endpoint"] == option[1]
    assert "collector" in warned[0]["remedy"]
    assert took_s < 30, "the queen waited for its collector"
    assert not re.search(r"Traceback|opentelemetry", cluster.queen.log_path.read_text())


def _warnings(cluster: Cluster) -> list[dict[str, Any]]:
    return [line for line in cluster.queen.log() if line.get("event") == "traces_not_exported"]


def test_without_tracing_opentelemetry_is_not_loaded_and_the_trace_goes_through(tmp_path: Path) -> None:
    with Cluster(tmp_path, engine="sim") as cluster:
        cluster.spawn(MODEL, *SIM)
        job_id = cluster.submit(infer(), traceparent=TRACEPARENT)
        with stream(cluster.queen.url, job_id) as frames:
            events = [event for _, event in frames]
        assert events[-1]["action"] == "execute_complete"
        children = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}").json()["children"]
        at_hive = httpx.get(f"{cluster.hive.url}/v1/jobs/{children[0]}").json()
        maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in cluster.processes())

    assert at_hive["traceparent"] == TRACEPARENT
    assert not re.search("opentelemetry|google/_upb", maps)
