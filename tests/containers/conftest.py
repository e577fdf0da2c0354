"""An engine and rbee's images for all tests of this folder; what they start is gone after them."""

import uuid
from collections.abc import Callable, Iterator
from functools import cache

import docker
import pytest
from rbee_containers import build, find_engine, remove_all
from testcontainers.core.config import testcontainers_config

# What tests start is removed by the fixtures here, not by a further container from a registry.
testcontainers_config.ryuk_disabled = True


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A Docker engine. Where there is none the test is skipped, and fails where `CI` is set."""
    client = find_engine()
    yield client
    client.close()


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> Callable[[str], str]:
    """`image("hive")` builds that target of the Dockerfile, once, and gives the image's name."""
    return cache(build)


@pytest.fixture(scope="session")
def run_id(engine: docker.DockerClient) -> Iterator[str]:
    """What all that a test starts has as its label `LABEL`; what is left of it at the end is removed."""
    run_id = uuid.uuid4().hex[:12]
    yield run_id
    left = remove_all(engine, run_id)
    assert not left, f"left behind by tests: {left}"
