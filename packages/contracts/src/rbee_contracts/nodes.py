"""What services tell about machines, devices, models and workers: results and heartbeats."""

from typing import Literal, TypeAlias

from msgspec import Struct

from rbee_contracts.ids import HiveId, ModelId, WorkerId

WorkerState: TypeAlias = Literal["starting", "ready", "stopping", "stopped", "failed"]


class ServiceInfo(Struct, frozen=True, kw_only=True):
    """Answer of `/v1/info`. `boot` is new at every start of the service."""

    name: Literal["queen", "hive", "worker"]
    id: str
    version: str
    boot: str
    uptime_s: float


class Device(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device of a hive. Memory in bytes, utilisation in percent, temperature in °C, power in W."""

    kind: Literal["cuda", "cpu"]
    index: int
    name: str
    uuid: str | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    utilization: float | None = None
    temperature: float | None = None
    power: float | None = None
    driver: str | None = None
    cores: int | None = None


class EngineLoad(Struct, frozen=True, kw_only=True):
    """What the engine is doing: requests running and waiting, share of the KV cache in use (0 to 1)."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """Answer of a worker's `/v1/worker`."""

    worker_id: WorkerId
    model: ModelId
    engine: str
    state: WorkerState
    max_model_len: int | None
    load: EngineLoad


class WorkerInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One worker as its hive sees it."""

    worker_id: WorkerId
    model: ModelId
    state: WorkerState
    pid: int
    port: int
    running: int
    waiting: int
    kv_cache_usage: float
    worker: Literal["cuda", "cpu"]
    devices: list[int]
    started_at: str
    max_model_len: int | None = None
    exit_code: int | None = None


class ModelInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model in a hive's models folder. Size in bytes."""

    model: ModelId
    size: int
    files: int
    architecture: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None


class HiveReady(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/hive/ready`: a hive makes itself known to the queen.

    `boot` is new at every start of the hive. Without `hive_url` the queen takes the peer's address
    and `port`.
    """

    hive_id: HiveId
    boot: str
    started_at: str
    version: str
    port: int
    hive_url: str | None = None


class HiveHeartbeat(Struct, frozen=True, kw_only=True):
    """One beat of a hive, every second on `GET /v1/heartbeats/stream`."""

    hive_id: HiveId
    boot: str
    version: str
    timestamp: str
    devices: list[Device]
    workers: list[WorkerInfo]
    models: list[ModelInfo]
    draining: bool = False


class Capabilities(Struct, frozen=True, kw_only=True):
    """Answer of a hive's `GET /v1/capabilities`."""

    hive_id: HiveId
    version: str
    devices: list[Device]


class HiveInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One hive as the queen sees it. `last_seen_s`: seconds since its last heartbeat."""

    hive_id: HiveId
    url: str
    state: Literal["connecting", "online", "unreachable"]
    version: str
    last_seen_s: float | None = None
    devices: list[Device] = []
    workers: list[WorkerInfo] = []
    models: list[ModelInfo] = []


class QueenHeartbeat(Struct, frozen=True, kw_only=True):
    """One beat of the queen: the cluster as it sees it."""

    timestamp: str
    hives: list[HiveInfo]


class StatusResult(Struct, frozen=True, kw_only=True):
    """Result of `status`."""

    version: str
    uptime_s: float
    hives: list[HiveInfo]


class HiveListResult(Struct, frozen=True, kw_only=True):
    hives: list[HiveInfo]


class WorkerListResult(Struct, frozen=True, kw_only=True):
    workers: list[WorkerInfo]


class DeviceListResult(Struct, frozen=True, kw_only=True):
    devices: list[Device]


class ModelListResult(Struct, frozen=True, kw_only=True):
    models: list[ModelInfo]
