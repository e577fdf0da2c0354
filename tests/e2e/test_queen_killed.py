"""A queen killed under real streams: every client ends with exactly the text that the engine produced."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from rbee_processes import stream, text_of, until
from rbee_restarts import Reader, RestartableCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

STREAMS, TOKENS = 20, 1500


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RestartableCluster]:
    with RestartableCluster(tmp_path_factory.mktemp("killed"), engine="vllm") as cluster:
        cluster.spawn("rbee-tiny")
        yield cluster


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("down_s", [1.0, 10.0])
def test_kill_of_the_queen_during_20_streams(
    cluster: RestartableCluster, corpus: str, down_s: float, temperature: float
) -> None:
    words = corpus.split()
    operations = [
        {
            "operation": "infer",
            "model": "rbee-tiny",
            "prompt": " ".join(words[i * 10 : i * 10 + 8]),
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "temperature": temperature,
        }
        for i in range(STREAMS)
    ]
    readers = [Reader(cluster.queen.url, cluster.submit(operation)) for operation in operations]
    with ThreadPoolExecutor(STREAMS) as pool:
        results = [pool.submit(reader.read) for reader in readers]
        until(lambda: all(len(reader.events) > 30 for reader in readers), "all streams are under way", 60)
        cluster.kill_queen()
        threading.Event().wait(down_s)  # the outage itself
        cluster.start_queen()
        for result in results:
            result.result(120)

    for reader in readers:
        text = text_of(reader.events)
        assert reader.events[-1]["action"] == "execute_complete"
        assert reader.events[-1]["data"]["usage"]["completion_tokens"] == TOKENS
        assert text == produced(cluster, reader.job_id)
        indexes = [event["index"] for event in reader.events if event["action"] == "token"]
        assert indexes == list(range(len(indexes)))


def produced(cluster: RestartableCluster, job_id: str) -> str:
    """Read what the engine produced from the hive, which no kill has touched."""
    (hive_job,) = record(cluster.queen.url, job_id)["children"]
    with stream(cluster.hive.url, hive_job) as frames:
        return text_of([event for _, event in frames])


def record(url: str, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/v1/jobs/{job_id}").json()
    return found
