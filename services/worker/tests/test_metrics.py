"""What the worker tells of its engine: the engine's own metrics, and nothing that the worker tells itself."""

from types import SimpleNamespace
from typing import cast

import pytest
from prometheus_client.core import GaugeMetricFamily

from rbee_worker.engine.base import Engine
from rbee_worker.engine.sim import SimEngine, SimParameters
from rbee_worker.metrics import EngineCollector

pytestmark = pytest.mark.anyio


def test_what_the_process_tells_anyway_is_not_told_twice() -> None:
    families = [GaugeMetricFamily(name, "X.", 1) for name in ("vllm:x", "process_open_fds", "http_requests")]
    engine = cast(Engine, SimpleNamespace(metrics=lambda: families))

    assert [family.name for family in EngineCollector(engine).collect()] == ["vllm:x"]


async def test_the_simulated_engine_tells_nothing_before_it_has_loaded() -> None:
    engine = SimEngine("m", SimParameters())
    collector = EngineCollector(engine)
    assert list(collector.collect()) == []

    await engine.start()
    try:
        names = {family.name for family in collector.collect()}
    finally:
        await engine.stop()

    assert {"vllm:num_requests_running", "vllm:generation_tokens", "vllm:prefix_cache_hits"} <= names
