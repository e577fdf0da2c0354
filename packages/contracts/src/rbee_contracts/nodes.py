"""What services tell about machines, devices, models and workers: results and heartbeats."""

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

from rbee_contracts.ids import HiveId, ModelId, WorkerId

WorkerState: TypeAlias = Literal[
    "starting", "ready", "busy", "sleeping", "draining", "stopping", "stopped", "failed"
]
"""`ready` has no request, `busy` has some; both take more. `sleeping` keeps its process and has given its
device memory back (`model_unload`). `draining` finishes what it has and takes nothing new."""

SERVING: frozenset[WorkerState] = frozenset({"ready", "busy"})
"""The states in which a worker takes requests."""

HiveState: TypeAlias = Literal["connecting", "online", "unreachable", "lost"]
"""`unreachable`: gets no new work, nothing is ended. `lost`: what ran on it has ended or runs elsewhere."""


class ServiceInfo(Struct, frozen=True, kw_only=True):
    """Answer of `/v1/info`. `boot` is new at every start of the service."""

    name: Literal["queen", "hive", "worker"]
    id: str
    version: str
    boot: str
    uptime_s: float


class DeviceProcess(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process that uses a GPU. `memory` in bytes, None where the driver does not tell."""

    pid: int
    memory: int | None = None
    worker_id: WorkerId | None = None


class Device(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device of a hive. Memory in bytes, utilisation in percent, temperature in °C, power in W.

    `memory_reserved` is promised to workers of this hive, used by them yet or not; `memory_kept_free` is
    never given to one (the hive's configuration). `health` is `failed` when work on the device cannot end
    well (an uncorrected memory error, a critical Xid), `degraded` when it should be looked after; `issues`
    say why, each in a sentence. `mig_uuid` names the GPU that a MIG slice belongs to.
    """

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
    memory_reserved: int = 0
    memory_kept_free: int = 0
    processes: list[DeviceProcess] = []
    health: Literal["ok", "degraded", "failed"] = "ok"
    issues: list[str] = []
    mig_uuid: str | None = None


class Disk(Struct, frozen=True, kw_only=True):
    """The disk of the models folder, in bytes. `reserved` is promised to downloads under way."""

    total: int
    free: int
    reserved: int
    models: int


class MemoryEstimate(Struct, frozen=True, kw_only=True):
    """Device memory in bytes that a model needs on each of its devices, told before it is spawned.

    `weights` by the safetensors headers, `kv_cache` by config.json for one request of `max_model_len`
    tokens, `overhead` for the engine itself.
    """

    weights: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.overhead


class EngineLoad(Struct, frozen=True, kw_only=True):
    """What the engine is doing: requests running and waiting, share of the KV cache in use (0 to 1).

    `tokens_per_second` are output tokens over the last seconds; `prefix_cache_hit_rate` (0 to 1) is over
    all prompt tokens so far, None where the engine does not tell. `step_age_s`: seconds since the engine's
    last step, by the worker's clock; None before the first.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    tokens_per_second: float = 0.0
    prefix_cache_hit_rate: float | None = None
    step_age_s: float | None = None


class WorkerStatus(Struct, frozen=True, kw_only=True):
    """Answer of a worker's `/v1/worker`. `nonce` is what its hive gave it: the proof that it is that one."""

    worker_id: WorkerId
    nonce: str = ""
    model: ModelId
    engine: str
    state: WorkerState
    max_model_len: int | None
    load: EngineLoad


class WorkerInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One worker as its hive sees it. Memory in bytes on each device.

    `memory_used` is None where it cannot be told. `restarts`: how often it was started again by itself.
    A failed worker has a `cause`, `exit_code` or `signal` (what ended it), and its last log lines.
    """

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
    signal: int | None = None
    cause: str | None = None
    log_tail: list[str] = []
    restarts: int = 0
    adopted: bool = False
    tokens_per_second: float = 0.0
    prefix_cache_hit_rate: float | None = None
    memory_reserved: int | None = None
    memory_estimate: MemoryEstimate | None = None
    memory_used: int | None = None


class ModelFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of a model, by its path in the model's folder. `sha256` is None until it was computed."""

    path: str
    size: int
    sha256: str | None = None


class ModelInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model in a hive's models folder. Size in bytes, of its weights.

    `size_on_disk` counts all its files. `revision` is the commit it was downloaded at; None for a folder
    put there by hand. `used_by` are the workers that have it loaded. `file_list` only in `model_get`.
    """

    model: ModelId
    size: int
    files: int
    architecture: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    size_on_disk: int = 0
    format: Literal["safetensors", "gguf", "other"] = "safetensors"
    revision: str | None = None
    last_used_at: str | None = None
    used_by: list[WorkerId] = []
    file_list: list[ModelFile] = []


class HiveReady(Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/hive/ready`: a hive makes itself known to the queen.

    `boot` is new at every start of the hive. Without `hive_url` the queen takes the peer's address
    and `port`.
    """

    hive_id: HiveId
    boot: Annotated[str, Meta(min_length=1, max_length=64)]
    started_at: Annotated[str, Meta(max_length=64)]
    version: Annotated[str, Meta(max_length=64)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    hive_url: Annotated[str, Meta(max_length=300)] | None = None


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
    disk: Disk | None = None
    labels: dict[str, str] = {}
    uptime_s: float = 0.0


class Capabilities(Struct, frozen=True, kw_only=True):
    """Answer of a hive's `GET /v1/capabilities`."""

    hive_id: HiveId
    version: str
    devices: list[Device]


class HiveInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One hive as the queen sees it. `last_seen_s`: seconds since its last heartbeat."""

    hive_id: HiveId
    url: str
    state: HiveState
    version: str
    last_seen_s: float | None = None
    devices: list[Device] = []
    workers: list[WorkerInfo] = []
    models: list[ModelInfo] = []
    draining: bool = False
    disk: Disk | None = None
    labels: dict[str, str] = {}
    boot: str = ""


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


class WorkerProcessInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process as the operating system sees it. Memory in bytes, `devices` by index.

    `kind`: `worker` and `engine` are proven to be this hive's, `orphan` is an engine process whose worker
    has ended, `foreign` is somebody else's on one of the devices and is never signalled.
    """

    pid: int
    ppid: int
    kind: Literal["worker", "engine", "orphan", "foreign"]
    name: str
    user: str | None = None
    started_at: str | None = None
    memory: int | None = None
    devices: dict[int, int | None] = {}
    worker_id: WorkerId | None = None


class WorkerProcessListResult(Struct, frozen=True, kw_only=True):
    processes: list[WorkerProcessInfo]


class WorkerLogResult(Struct, frozen=True, kw_only=True):
    """Result of `worker_log`; the lines came as `worker_log` events."""

    worker_id: WorkerId
    lines: int


class LogLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a log. `event` says what happened, in a fixed word, and `facts` with what.

    A line that an engine wrote is all `event`, and its `timestamp` is that of the worker's line before it.
    """

    timestamp: str
    service: str
    level: str
    event: str
    facts: dict[str, Any] = {}


class LogSearchResult(Struct, frozen=True, kw_only=True):
    """Result of `log_search`: the lines by machine, the queen's first, each machine's by its time.

    `silent` names each hive that could not be asked, and why. `notes` says what else may be missing.
    """

    correlation_id: str
    lines: list[LogLine]
    silent: dict[str, str] = {}
    notes: list[str] = []


class ModelDeleted(Struct, frozen=True, kw_only=True):
    """Result of `model_delete`. Bytes."""

    model: ModelId
    freed: int


class ModelUnloaded(Struct, frozen=True, kw_only=True):
    """Result of `model_unload`: what became of each worker of the model."""

    model: ModelId
    workers: list[WorkerInfo]


class HiveDrained(Struct, frozen=True, kw_only=True):
    """Result of `hive_drain`: whether the hive takes new work, and how many of its jobs still run."""

    draining: bool
    running: int


class Finding(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was checked. `remedy` says what to do where it is not ok."""

    check: str
    status: Literal["ok", "warning", "failed"]
    message: str
    remedy: str | None = None


class CheckResult(Struct, frozen=True, kw_only=True):
    """Result of `hive_check` and `queen_check`; ok when nothing failed."""

    ok: bool
    findings: list[Finding]
