"""What the hive tells at `/metrics` of its workers, devices and models, and what its workers tell themselves.

A worker's token is known to its hive alone, so the hive passes on the worker's own metrics.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rbee_contracts.errors import RbeeError, WorkerLost
from rbee_contracts.nodes import Device, WorkerInfo, WorkerState
from rbee_hive.models import Downloads
from rbee_hive.presence import Presence
from rbee_hive.supervisor.worker import Worker
from rbee_hive.supervisor.workers import Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_server.metrics import Line, Metric, metrics_response, relay_families

WORKER_LIMIT_S = 5.0
"""How long a worker may take to tell its metrics; Prometheus waits 10 s for the hive by default."""

_OF_WORKER = ("worker", "model")
_OF_DEVICE = ("device",)

WORKERS = Metric(name="rbee_workers", kind="gauge", help="Workers of this hive, by state.", labels=("state",))
WORKER_REQUESTS = Metric(
    name="rbee_worker_requests",
    kind="gauge",
    help="Requests that a worker's engine is `running`, and that are `waiting` in its queue.",
    labels=(*_OF_WORKER, "state"),
)
WORKER_KV_CACHE = Metric(
    name="rbee_worker_kv_cache_usage_ratio",
    kind="gauge",
    help="The share of a worker's KV cache that is in use, 0 to 1.",
    labels=_OF_WORKER,
)
WORKER_RESTARTS = Metric(
    name="rbee_worker_restarts_total",
    kind="counter",
    help="How often a worker's process was started again by itself.",
    labels=_OF_WORKER,
)
WORKER_RESERVED = Metric(
    name="rbee_worker_memory_promised_bytes",
    kind="gauge",
    help="Memory that is promised to a worker on each of its devices.",
    labels=_OF_WORKER,
)
WORKER_USED = Metric(
    name="rbee_worker_memory_used_bytes",
    kind="gauge",
    help="Memory that a worker uses on its devices, where that can be told.",
    labels=_OF_WORKER,
)
DEVICE_INFO = Metric(
    name="rbee_device_info",
    kind="gauge",
    help="1, with a device's name and the id that its driver gives it.",
    labels=("device", "name", "uuid"),
)
DEVICE_SIZE = Metric(
    name="rbee_device_memory_size_bytes",
    kind="gauge",
    help="Memory of a device, used or not.",
    labels=_OF_DEVICE,
)
DEVICE_USED = Metric(
    name="rbee_device_memory_used_bytes",
    kind="gauge",
    help="Memory of a device that is in use, by whomever.",
    labels=_OF_DEVICE,
)
DEVICE_PROMISED = Metric(
    name="rbee_device_memory_promised_bytes",
    kind="gauge",
    help="Memory of a device that is promised to workers, used by them yet or not.",
    labels=_OF_DEVICE,
)
DEVICE_KEPT_FREE = Metric(
    name="rbee_device_memory_kept_free_bytes",
    kind="gauge",
    help="Memory of a device that no worker gets, by the hive's configuration.",
    labels=_OF_DEVICE,
)
DEVICE_UTILIZATION = Metric(
    name="rbee_device_utilization_ratio",
    kind="gauge",
    help="How busy a device was lately, 0 to 1, as its driver tells.",
    labels=_OF_DEVICE,
)
DEVICE_TEMPERATURE = Metric(
    name="rbee_device_temperature_celsius", kind="gauge", help="A device's temperature.", labels=_OF_DEVICE
)
DEVICE_POWER = Metric(
    name="rbee_device_power_watts", kind="gauge", help="What a device draws.", labels=_OF_DEVICE
)
DEVICE_HEALTH = Metric(
    name="rbee_device_health",
    kind="gauge",
    help="1 for the health that a device has now, 0 for the others: `ok`, `degraded` (look after it) or "
    "`failed` (nothing can end well on it).",
    labels=("device", "health"),
)
DISK_SIZE = Metric(
    name="rbee_models_disk_size_bytes", kind="gauge", help="Size of the disk that has the models folder."
)
DISK_FREE = Metric(
    name="rbee_models_disk_free_bytes", kind="gauge", help="What is free on the disk of the models folder."
)
DISK_PROMISED = Metric(
    name="rbee_models_disk_promised_bytes",
    kind="gauge",
    help="What downloads that are under way will still take of the disk of the models folder.",
)
MODELS = Metric(name="rbee_models", kind="gauge", help="Models that lie on this hive.")
MODELS_BYTES = Metric(
    name="rbee_models_bytes", kind="gauge", help="What the models folder takes on its disk."
)
DOWNLOADS = Metric(name="rbee_downloads", kind="gauge", help="Downloads of models that are under way.")
DOWNLOADED = Metric(
    name="rbee_downloads_received_bytes_total",
    kind="counter",
    help="Bytes of models that came over the network.",
)
DRAINING = Metric(
    name="rbee_hive_draining", kind="gauge", help="1 while this hive was told to take nothing new, else 0."
)
QUEENS = Metric(name="rbee_hive_queens", kind="gauge", help="Queens that follow this hive's heartbeats now.")

HIVE_METRICS = (
    WORKERS,
    WORKER_REQUESTS,
    WORKER_KV_CACHE,
    WORKER_RESTARTS,
    WORKER_RESERVED,
    WORKER_USED,
    DEVICE_INFO,
    DEVICE_SIZE,
    DEVICE_USED,
    DEVICE_PROMISED,
    DEVICE_KEPT_FREE,
    DEVICE_UTILIZATION,
    DEVICE_TEMPERATURE,
    DEVICE_POWER,
    DEVICE_HEALTH,
    DISK_SIZE,
    DISK_FREE,
    DISK_PROMISED,
    MODELS,
    MODELS_BYTES,
    DOWNLOADS,
    DOWNLOADED,
    DRAINING,
    QUEENS,
)

STATES: tuple[WorkerState, ...] = get_args(WorkerState)
HEALTHS = ("ok", "degraded", "failed")


class HiveCollector(Collector):
    """Reads what the hive's parts own; it changes nothing and keeps nothing.

    Args:
        now: monotonic seconds.
    """

    def __init__(
        self,
        workers: Workers,
        telemetry: Telemetry,
        downloads: Downloads,
        presence: Presence,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = workers
        self._telemetry = telemetry
        self._downloads = downloads
        self._presence = presence
        self._now = now

    def collect(self) -> Iterator[Family]:
        workers, now = self._workers, self._now()
        yield from worker_families(workers.infos())
        yield from relay_families(_lines(workers.all(), now))
        yield from device_families(self._telemetry.devices())
        disk = self._telemetry.disk
        yield DISK_SIZE.told([((), disk.total)] if disk else [])
        yield DISK_FREE.told([((), disk.free)] if disk else [])
        yield DISK_PROMISED.told([((), disk.reserved)] if disk else [])
        yield MODELS.is_value(self._telemetry.models)
        yield MODELS_BYTES.told([((), disk.models)] if disk else [])
        yield DOWNLOADS.is_value(self._downloads.running)
        yield DOWNLOADED.is_value(self._downloads.received_bytes)
        yield DRAINING.is_value(workers.draining)
        yield QUEENS.is_value(self._presence.queens)


def worker_families(workers: Sequence[WorkerInfo]) -> Iterator[Family]:
    """Tell of the workers there are. Pure."""
    states = Counter(worker.state for worker in workers)
    yield WORKERS.told(((state,), states[state]) for state in STATES)
    yield WORKER_REQUESTS.told(
        ((worker.worker_id, worker.model, state), count)
        for worker in workers
        for state, count in (("running", worker.running), ("waiting", worker.waiting))
    )

    def of_each(metric: Metric, value: Callable[[WorkerInfo], float | None]) -> Family:
        known = ((worker, value(worker)) for worker in workers)
        return metric.told(((w.worker_id, w.model), found) for w, found in known if found is not None)

    yield of_each(WORKER_KV_CACHE, lambda worker: worker.kv_cache_usage)
    yield of_each(WORKER_RESTARTS, lambda worker: worker.restarts)
    yield of_each(WORKER_RESERVED, lambda worker: worker.memory_reserved)
    yield of_each(WORKER_USED, lambda worker: worker.memory_used)


def device_families(devices: Sequence[Device]) -> Iterator[Family]:
    """Tell of the devices as they were last read. Pure."""
    yield DEVICE_INFO.told(((_name(each), each.name, each.uuid or ""), 1) for each in devices)

    def of_each(metric: Metric, value: Callable[[Device], float | None]) -> Family:
        known = ((device, value(device)) for device in devices)
        return metric.told(((_name(device),), found) for device, found in known if found is not None)

    yield of_each(DEVICE_SIZE, lambda device: device.memory_total)
    yield of_each(DEVICE_USED, lambda device: device.memory_used)
    yield of_each(DEVICE_PROMISED, lambda device: device.memory_reserved)
    yield of_each(DEVICE_KEPT_FREE, lambda device: device.memory_kept_free)
    yield of_each(
        DEVICE_UTILIZATION,
        lambda device: None if device.utilization is None else device.utilization / 100,
    )
    yield of_each(DEVICE_TEMPERATURE, lambda device: device.temperature)
    yield of_each(DEVICE_POWER, lambda device: device.power)
    yield DEVICE_HEALTH.told(
        ((_name(device), health), device.health == health) for device in devices for health in HEALTHS
    )


def _name(device: Device) -> str:
    return f"{device.kind}:{device.index}"


def _lines(workers: Sequence[Worker], now: float) -> Iterator[Line]:
    for worker in workers:
        if (running := worker.running) is not None:
            heard_at = running.client.heard_at
            yield Line(
                peer=worker.id,
                is_connected=running.relay.is_connected,
                silence_s=None if heard_at is None else max(0.0, now - heard_at),
                steps=running.relay.steps,
                handed=running.relay.handed,
            )


def model_labels(workers: Sequence[Worker]) -> dict[str, str]:
    """Give the label of every loaded model: its name."""
    return {worker.model: worker.model for worker in workers}


def worker_metrics_route(workers: Workers) -> Route:
    """Give the route that passes on what a worker tells of itself."""

    async def metrics(request: Request) -> Response:
        return metrics_response(await fetch_worker_metrics(workers.get(request.path_params["worker_id"])))

    return Route("/v1/workers/{worker_id}/metrics", metrics)


async def fetch_worker_metrics(worker: Worker) -> bytes:
    """Ask a worker for its metrics.

    Raises:
        WorkerLost: it has no process, or its process does not answer.
    """
    running = worker.running
    if running is None:
        raise WorkerLost(
            f"{worker.id} is {worker.life.state} and has no process, so it tells no metrics. "
            "/v1/metrics/targets of the queen names the workers that do."
        )
    try:
        return await running.client.get_bytes("/metrics", timeout_s=WORKER_LIMIT_S)
    except RbeeError as exc:
        raise WorkerLost(
            f"{worker.id} is {worker.life.state} and did not tell its metrics: {exc.details} "
            f"Its log says more: rbee worker logs {worker.id}"
        ) from exc
