"""What the worker tells at `/metrics` besides its jobs: its engine's own metrics, under their own names."""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from rbee_worker.engine.base import Engine

ENGINE_PREFIX = "vllm:"
"""What the engine's own metrics begin with; others in its process are told by the worker itself."""


class EngineCollector(Collector):
    """Passes on what the engine tells; nothing before it has loaded."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Family]:
        for family in self._engine.metrics():
            if family.name.startswith(ENGINE_PREFIX):
                yield family
