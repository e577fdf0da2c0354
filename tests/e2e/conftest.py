"""One cluster with a real vLLM worker for all e2e tests of a run: a start takes about half a minute."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rbee_processes import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A queen, a hive and a ready worker of rbee-tiny."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.spawn("rbee-tiny")
        yield cluster


@pytest.fixture
def corpus() -> str:
    return (Path(__file__).parents[2] / "models/rbee-tiny/corpus.txt").read_text()


@pytest.fixture(autouse=True)
def offline() -> None:
    assert os.environ.get("HF_HUB_OFFLINE", "1") == "1"
