"""What a service counts and measures: each job once, each request once, and nothing that callers make up."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rbee_inprocess import ManualClock, Running, eventually, running
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import RbeeError, WorkerLost
from rbee_contracts.events import InferResult, OpenAIResult, Timings, Usage
from rbee_contracts.operations import Infer, ModelList, OpenAI, Status
from rbee_job_server import CancelReason, Handlers, JobContext
from rbee_job_server.firehose import RING_BYTES, Firehose
from rbee_job_server.metrics import Handed, JobMetrics, Line, Metric, relay_families
from rbee_job_server.metrics.jobs import MAX_MODELS
from rbee_job_server.metrics.relay import firehose_families

pytestmark = pytest.mark.anyio

Samples = dict[str, float]
"""Values by name and labels as they stand in the text."""

INFER = {"operation": "infer", "model": "loaded", "prompt": "one two three"}


def samples_of(text: str) -> Samples:
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def told(service: Running) -> Samples:
    answer = await service.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples_of(answer.text)


@pytest.fixture
async def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def service(clock: ManualClock) -> AsyncIterator[Running]:
    async def speak(operation: Infer, context: JobContext) -> InferResult:
        """A token a word: the first after 0.2 s, another every 0.05 s."""
        clock.now += 0.15
        words = str(operation.prompt).split()
        for word in words:
            clock.now += 0.05
            context.emit_token(word)
        if "fail" in words:
            raise WorkerLost("It is gone.")
        return InferResult(
            usage=Usage(prompt_tokens=7, completion_tokens=len(words), total_tokens=7 + len(words)),
            finish_reason="stop",
            timings=Timings(queue_ms=150, prefill_ms=1, decode_ms=1, ttft_ms=1, tokens_per_second=1),
        )

    async def answer(operation: OpenAI, context: JobContext) -> OpenAIResult:
        for _ in range(3 if b"stream" in bytes(operation.body) else 1):
            clock.now += 0.1
            context.emit_chunk(msgspec.Raw(b"{}"))
        usage = Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
        is_told = b"usage" in bytes(operation.body)
        return OpenAIResult(status=200, content_type="application/json", usage=usage if is_told else None)

    async def hang(_: Status, __: JobContext) -> None:
        await anyio.sleep_forever()

    async def make_up(_: ModelList, __: JobContext) -> None:
        raise RbeeError("No.", code="made_up_by_a_stranger")

    async def break_down(_: Request) -> Response:
        raise ZeroDivisionError

    handlers: Handlers = {Infer: speak, OpenAI: answer, Status: hang, ModelList: make_up}
    async with running(handlers, clock=clock, routes=[Route("/break/{thing}", break_down)]) as service:
        service.server.metrics.models = lambda: {"loaded": "loaded", "alias": "loaded"}
        yield service


async def ended(service: Running, operation: dict[str, Any]) -> None:
    await service.read(await service.submit(operation))


# --- jobs ----------------------------------------------------------------------------------------------


async def test_a_job_is_counted_once_with_its_end(service: Running) -> None:
    await ended(service, INFER)
    await ended(service, INFER | {"prompt": "fail"})
    await ended(service, {"operation": "model_list"})
    hanging = await service.submit({"operation": "status"}, Prefer="respond-async")
    before = await told(service)
    await service.http.delete(f"/v1/jobs/{hanging}")
    found = await told(service)

    assert before["rbee_jobs operation=status state=running"] == 1
    assert "rbee_jobs operation=status state=running" not in found
    assert found["rbee_jobs operation=infer state=running"] == 0
    counted = {name: value for name, value in found.items() if name.startswith("rbee_jobs_")}
    assert counted == {
        "rbee_jobs_submitted_total operation=infer": 2,
        "rbee_jobs_submitted_total operation=model_list": 1,
        "rbee_jobs_submitted_total operation=status": 1,
        "rbee_jobs_finished_total code=ok operation=infer state=completed": 1,
        "rbee_jobs_finished_total code=worker_lost operation=infer state=failed": 1,
        "rbee_jobs_finished_total code=other operation=model_list state=failed": 1,
        "rbee_jobs_finished_total code=cancelled operation=status state=cancelled": 1,
    }
    assert counted == {
        name: value for name, value in (await told(service)).items() if name.startswith("rbee_jobs_")
    }


async def test_a_pending_job_is_told_and_ends_by_its_reason(service: Running) -> None:
    job = service.server.registry.get(await service.submit(INFER))
    assert (await told(service))["rbee_jobs operation=infer state=pending"] == 1

    job.cancel(CancelReason.NOT_READ)
    found = await told(service)

    assert found["rbee_jobs operation=infer state=pending"] == 0
    assert found["rbee_jobs_finished_total code=not_read operation=infer state=cancelled"] == 1
    assert "rbee_job_duration_seconds_count operation=infer" not in found


async def test_the_times_of_an_inference_are_those_of_its_output(service: Running) -> None:
    await ended(service, INFER | {"prompt": "a b c d e"})
    found = await told(service)

    labels = "model=loaded operation=infer"
    for name, value in (
        ("time_to_first_token_seconds", 0.2),
        ("time_per_output_token_seconds", 0.05),
        ("engine_queue_seconds", 0.15),
    ):
        assert found[f"rbee_inference_{name}_sum {labels}"] == pytest.approx(value)
        assert found[f"rbee_inference_{name}_count {labels}"] == 1
    assert found["rbee_job_duration_seconds_sum operation=infer"] == pytest.approx(0.4)
    assert found["rbee_inference_tokens_total kind=prompt model=loaded operation=infer"] == 7
    assert found["rbee_inference_tokens_total kind=output model=loaded operation=infer"] == 5


async def test_an_answer_in_one_piece_has_no_first_token(service: Running) -> None:
    body = {"operation": "openai", "endpoint": "/v1/completions"}
    await ended(service, body | {"body": {"model": "loaded"}})
    first = "rbee_inference_time_to_first_token_seconds_sum model=loaded operation=openai"
    assert first not in await told(service)

    await ended(service, body | {"body": {"model": "loaded", "stream": True}})
    found = await told(service)

    assert found[first] == pytest.approx(0.1)
    each = "rbee_inference_time_per_output_token_seconds_sum model=loaded operation=openai"
    assert found[each] == pytest.approx(0.1)


async def test_a_failed_inference_has_a_first_token_and_no_time_for_each(service: Running) -> None:
    await ended(service, INFER | {"prompt": "a b fail"})
    found = await told(service)

    assert found["rbee_inference_time_to_first_token_seconds_count model=loaded operation=infer"] == 1
    assert not any(name.startswith("rbee_inference_time_per_output_token") for name in found)


async def test_models_that_are_not_loaded_are_all_one(service: Running) -> None:
    for model in ("strange-1", "strange-2", "alias"):
        await ended(service, INFER | {"model": model})
    text = (await service.http.get("/metrics")).text
    found = samples_of(text)

    assert "strange" not in text
    assert found["rbee_inference_tokens_total kind=prompt model=other operation=infer"] == 14
    assert found["rbee_inference_tokens_total kind=prompt model=loaded operation=infer"] == 7


async def test_names_of_models_are_bounded_and_looked_up_once_a_second(service: Running) -> None:
    asked = 0
    now = 0.0

    def models() -> dict[str, str]:
        nonlocal asked
        asked += 1
        return {f"m{number}": f"m{number}" for number in range(MAX_MODELS + 10)}

    metrics = JobMetrics(models, lambda: now)
    labels = set()
    for number in range(MAX_MODELS + 10):
        job = service.server.registry.get(await service.submit(INFER | {"model": f"m{number}"}))
        labels.add(metrics._model_of(job))

    assert len(labels) == MAX_MODELS + 1
    assert asked == 1
    now = 2.0
    metrics._model_of(job)
    assert asked == 2


async def test_what_an_engine_tells_wrongly_breaks_nothing(service: Running) -> None:
    metrics = JobMetrics()
    for result in (
        b"[1]",
        b'{"usage":{"prompt_tokens":-1,"completion_tokens":-1,"total_tokens":-2}}',
        b'{"usage":{"prompt_tokens":1,"completion_tokens":1%b,"total_tokens":2}}' % (b"0" * 400),
        b'{"timings":{"queue_ms":1e308}}',
        b"\xff",
    ):
        job = service.server.registry.get(await service.submit(INFER))
        job.start()
        job.complete(None)
        job.result = msgspec.Raw(result)
        metrics.ended(job)

    found = {sample.name: sample.value for family in metrics.collect() for sample in family.samples}
    assert found["rbee_jobs_finished_total"] == 5
    assert not {name for name in found if "tokens_total" in name or "queue" in name}


async def test_tokens_are_counted_by_the_engine_where_it_does(service: Running) -> None:
    """The pieces of an OpenAI stream are more than its tokens: its role, its end and its usage are some."""
    body = {"operation": "openai", "endpoint": "/v1/completions"}
    await ended(service, body | {"body": {"model": "loaded", "stream": True, "usage": True}})
    found = await told(service)

    each = "rbee_inference_time_per_output_token_seconds_sum model=loaded operation=openai"
    assert found[each] == pytest.approx(0.2)


async def test_a_service_of_one_model_tells_no_other(service: Running) -> None:
    """The labels of its target name its model, and Prometheus would drop one of two equal series."""
    service.server.metrics.otherwise = "loaded"
    for model in ("loaded", "an-adapter"):
        await ended(service, INFER | {"model": model})

    found = await told(service)
    assert found["rbee_inference_time_to_first_token_seconds_count model=loaded operation=infer"] == 2


async def test_what_had_ended_in_the_run_before_is_not_counted_again(service: Running) -> None:
    """Only what a restarted service read of the service below again; what still ran there is counted."""
    for had_ended in (True, False):
        job = service.server.registry.get(await service.submit(INFER))
        job.had_ended = had_ended
        await service.read(job.id)

    found = await told(service)
    assert found["rbee_jobs_finished_total code=ok operation=infer state=completed"] == 1
    assert found["rbee_job_duration_seconds_count operation=infer"] == 1


async def test_the_delay_of_the_loop_is_looked_at(service: Running) -> None:
    metrics = JobMetrics()
    await metrics.sleep(0.001)

    (family,) = (each for each in metrics.collect() if each.name == "rbee_event_loop_delay_seconds")
    values = {sample.name: sample.value for sample in family.samples}
    assert values["rbee_event_loop_delay_seconds_count"] == 1
    assert values["rbee_event_loop_delay_seconds_sum"] >= 0


# --- requests ------------------------------------------------------------------------------------------


async def test_requests_are_counted_by_template_method_and_status(service: Running) -> None:
    await service.http.get("/v1/jobs/strange")
    await service.http.get("/strange/path")
    await service.http.put("/v1/info")
    await service.http.request("PROPFIND", "/v1/info")
    assert (await service.http.get("/break/strange")).status_code == 500
    await ended(service, INFER)
    found = await told(service)

    assert "strange" not in str(found)
    for labels in (
        "method=GET route=/v1/jobs/{job_id} status=404",
        "method=GET route=unmatched status=404",
        "method=PUT route=/v1/info status=405",
        "method=other route=/v1/info status=405",
        "method=GET route=/break/{thing} status=500",
        "method=POST route=/v1/jobs status=200",
        "method=GET route=/v1/jobs/{job_id}/stream status=200",
    ):
        assert found[f"rbee_http_requests_total {labels}"] == 1, labels
    assert found["rbee_http_response_start_seconds_count route=/v1/info"] == 2
    assert found["rbee_http_requests_in_progress"] == 1  # this one


async def test_a_stream_is_counted_when_it_begins_and_under_way_until_it_ends(service: Running) -> None:
    name = "rbee_http_requests_total method=GET route=/v1/events status=200"
    async with service.http.stream("GET", "/v1/events"):
        found = await told(service)
        assert (found[name], found["rbee_http_requests_in_progress"]) == (1, 2)
        assert found["rbee_firehose_followers"] == 1

    await eventually(lambda: service.server.firehose.followers == 0, "the follower is gone", 20)
    found = await told(service)
    assert (found[name], found["rbee_http_requests_in_progress"]) == (1, 1)


async def test_the_process_and_the_version_are_told(service: Running) -> None:
    found = await told(service)

    assert found["rbee_build_info version=0.0.0"] == 1
    assert found["process_resident_memory_bytes"] > 0
    assert found["process_open_fds"] > 0
    assert not any("_created" in name for name in found)


# --- the firehose and the relay --------------------------------------------------------------------------


def value_of(metric: str, firehose: Firehose) -> float:
    return next(family.samples[0].value for family in firehose_families(firehose) if metric in family.name)


def test_a_firehose_tells_its_backlog_its_gaps_and_its_ring() -> None:
    firehose = Firehose("0123456789abcdef", "worker/w1", ManualClock())
    quick, slow = firehose.follow(None, output=True), firehose.follow(None, output=True)
    for _ in range(3):
        firehose.publish_output(b'{"action":"token"}', 1, 1)
    quick.take()

    assert value_of("backlog", firehose) == 3
    assert value_of("ring", firehose) > 0
    slow.take()
    assert value_of("backlog", firehose) == 0
    firehose.publish_output(b'{"x":"%b"}' % (b"x" * RING_BYTES), 1, 1)
    slow.take()
    assert value_of("gaps", firehose) == 1
    assert value_of("events", firehose) == 4
    slow.close()
    quick.close()
    assert (value_of("followers", firehose), value_of("backlog", firehose)) == (0, 0)


def test_a_line_that_was_never_heard_has_no_silence() -> None:
    lines = [
        Line(peer="new", is_connected=False, silence_s=None, steps=0, handed=Handed()),
        Line(peer="old", is_connected=True, silence_s=2.5, steps=3, handed=Handed(2, 0.5, 1, 4)),
    ]

    found = {
        (sample.name.removeprefix("rbee_relay_"), sample.labels["peer"]): sample.value
        for family in relay_families(lines)
        for sample in family.samples
    }

    assert ("silence_seconds", "new") not in found
    assert {name: value for (name, peer), value in found.items() if peer == "old"} == {
        "connected": 1,
        "silence_seconds": 2.5,
        "lag_seconds_count": 2,
        "lag_seconds_sum": 0.5,
        "steps": 3,
        "gaps_total": 1,
        "rereads_total": 4,
    }


def test_a_histogram_is_not_told_from_values() -> None:
    with pytest.raises(ValueError, match="is a histogram"):
        Metric(name="rbee_x_seconds", kind="histogram", help="X.").is_value(1)
