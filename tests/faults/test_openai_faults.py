"""What breaks around a client's request, and what official clients make of it. Workers run the sim engine."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest
from rbee_processes import Cluster, until

pytestmark = pytest.mark.timeout(400)

TOKEN = "a-token-of-this-cluster"
SAY: Any = [{"role": "user", "content": "one two three"}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("openai-sim"), engine="sim", token=TOKEN) as cluster:
        yield cluster


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A worker of model `m` that takes minutes for a long answer; gone afterwards."""
    spawned = cluster.spawn("m", "--sim-step-ms", "20")
    yield spawned
    if any(w["worker_id"] == spawned["worker_id"] for w in workers(cluster)):
        cluster.run({"operation": "worker_stop", "worker_id": spawned["worker_id"], "grace_s": 0})


def workers(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cluster.run({"operation": "worker_list", "hive_id": cluster.hive_id})[
        "workers"
    ]
    return found


def client_of(cluster: Cluster, key: str = TOKEN) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.queen.url}/v1", api_key=key, max_retries=0)


def job_of(cluster: Cluster, job_id: str) -> dict[str, Any]:
    record: dict[str, Any] = httpx.get(f"{cluster.queen.url}/v1/jobs/{job_id}", headers=cluster.auth).json()
    return record


def long_stream(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(
        model="m", messages=SAY, max_tokens=10_000, stream=True, extra_body={"ignore_eos": True}
    )


def test_a_client_without_the_token_is_told_so(cluster: Cluster, worker: dict[str, Any]) -> None:
    with client_of(cluster, "wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.chat.completions.create(model="m", messages=SAY)
    assert refused.value.code == "invalid_api_key"

    url = cluster.queen.url
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model="m", max_tokens=1, messages=SAY)
    # The sim engine has no such endpoint, which only those hear who may ask.
    with (
        anthropic.Anthropic(base_url=url, api_key=TOKEN, max_retries=0) as known,
        pytest.raises(anthropic.NotFoundError),
    ):
        known.messages.create(model="m", max_tokens=1, messages=SAY)


def test_a_model_that_nobody_serves_now_is_503_with_a_time_to_try_again(cluster: Cluster) -> None:
    with client_of(cluster) as client, pytest.raises(openai.InternalServerError) as refused:
        client.chat.completions.create(model="rbee-tiny", messages=SAY)

    assert refused.value.status_code == 503
    assert refused.value.code == "no_worker"
    assert int(refused.value.response.headers["Retry-After"]) > 0


def test_a_client_that_leaves_ends_the_jobs_of_all_hops(cluster: Cluster, worker: dict[str, Any]) -> None:
    with client_of(cluster) as client:
        stream = long_stream(client)
        for _ in range(5):
            next(stream)
        job_id = stream.response.headers["X-Job-ID"]
        stream.close()

        until(lambda: job_of(cluster, job_id)["state"] == "cancelled", "the queen's job is cancelled")
        (child,) = job_of(cluster, job_id)["children"]
        at_hive = f"{cluster.hive.url}/v1/jobs/{child}"
        until(
            lambda: httpx.get(at_hive, headers=cluster.auth).json()["state"] == "cancelled",
            "the hive's job is cancelled",
        )
        until(lambda: workers(cluster)[0]["running"] == 0, "the engine is free")


def test_a_worker_killed_in_mid_stream_is_an_error_that_the_client_raises(
    cluster: Cluster, worker: dict[str, Any]
) -> None:
    with client_of(cluster) as client:
        stream = long_stream(client)
        for _ in range(5):
            next(stream)
        job_id = stream.response.headers["X-Job-ID"]
        os.kill(worker["pid"], signal.SIGKILL)
        with pytest.raises(openai.APIError) as lost:
            list(stream)

    assert lost.value.code == "worker_lost"
    assert job_of(cluster, job_id)["error"]["code"] == "worker_lost"


def test_the_same_over_the_wire_ends_with_done(cluster: Cluster, worker: dict[str, Any]) -> None:
    body = {"model": "m", "messages": SAY, "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    url = f"{cluster.queen.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=cluster.auth, timeout=90) as answer:
        lines = answer.iter_lines()
        for _ in range(10):
            next(lines)
        os.kill(worker["pid"], signal.SIGKILL)
        rest = [line for line in lines if line]

    assert rest[-2].startswith('data: {"error":{')
    assert rest[-1] == "data: [DONE]"


def test_streams_at_once_never_mix(cluster: Cluster, worker: dict[str, Any]) -> None:
    def ask(number: int) -> tuple[str, str]:
        ask = {"model": "m", "messages": [{"role": "user", "content": "x " * number}], "max_tokens": 30}
        with client_of(cluster) as client:
            whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
            stream = client.chat.completions.create(**ask, stream=True)  # type: ignore[call-overload]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return whole.choices[0].message.content, text

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(1, 33)))

    for whole, streamed in answers:
        assert streamed == whole
    assert len({whole for whole, _ in answers}) > 1


def test_a_queen_that_stops_lets_running_requests_end(tmp_path_factory: pytest.TempPathFactory) -> None:
    patient = ["--drain-timeout-s", "300"]
    folder = tmp_path_factory.mktemp("draining")
    with Cluster(folder, engine="sim", queen_args=patient, token=TOKEN) as cluster:
        cluster.spawn("m", "--sim-step-ms", "20")
        with client_of(cluster) as client:
            stream = client.chat.completions.create(
                model="m", messages=SAY, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            cluster.queen.process.send_signal(signal.SIGTERM)
            rest = list(stream)

    assert rest[-1].choices[0].finish_reason == "length"


def test_a_queen_that_is_killed_cuts_a_stream_without_done(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Cluster(tmp_path_factory.mktemp("killed"), engine="sim", token=TOKEN) as cluster:
        cluster.spawn("m", "--sim-step-ms", "20")
        had: list[bytes] = []

        def read_and_kill() -> None:
            body = {"model": "m", "messages": SAY, "max_tokens": 10_000, "ignore_eos": True, "stream": True}
            url = f"{cluster.queen.url}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, headers=cluster.auth, timeout=90) as answer:
                for piece in answer.iter_raw():
                    had.append(piece)
                    cluster.queen.kill()

        with pytest.raises(httpx.RemoteProtocolError):
            read_and_kill()

        assert had
        assert b"[DONE]" not in b"".join(had)
