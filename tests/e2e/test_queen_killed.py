"""A queen killed under real streams: every client ends with exactly the text that the engine produced."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rbee_processes import stream, text_of
from rbee_restarts import Reader, RestartableCluster, read_through_a_kill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

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
            "resume_window_s": 120,  # twenty readers on a busy machine may take longer than 5 s to come back
        }
        for i in range(STREAMS)
    ]
    readers = [Reader(cluster.queen.url, cluster.submit(operation)) for operation in operations]
    read_through_a_kill(cluster, readers, down_s)

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
