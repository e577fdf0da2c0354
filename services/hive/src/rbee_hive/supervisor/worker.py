"""One worker as the hive knows it: what was asked for, what runs for it now, and what others see of it."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import anyio
from msgspec import Struct

from rbee_contracts.errors import RbeeError
from rbee_contracts.nodes import EngineLoad, MemoryEstimate, WorkerInfo
from rbee_hive.supervisor.launch import WORKER_HOST, DeviceKind
from rbee_hive.supervisor.logs import tail
from rbee_hive.supervisor.machine import Life
from rbee_hive.supervisor.process import WorkerProcess
from rbee_job_client import JobClient
from rbee_job_server import Relay


class Spec(Struct, frozen=True):
    """What a spawn asks for; equal ones that start at the same time are one worker."""

    model: str
    kind: DeviceKind
    devices: tuple[int, ...]
    args: tuple[str, ...] = ()

    @property
    def device_text(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.devices))}"


class Running:
    """One process of a worker, and the line to it. A worker that is started again gets a new one."""

    def __init__(
        self,
        worker_id: str,
        *,
        process: WorkerProcess,
        port: int,
        token: str,
        nonce: str,
        log_offset: int = 0,
    ) -> None:
        self.process = process
        self.port = port
        self.token = token
        self.nonce = nonce
        self.log_offset = log_offset
        self.client = JobClient(f"http://{WORKER_HOST}:{port}", token=token)
        self.relay = Relay(service="worker", peer=worker_id, client=self.client)
        self.is_followed = False


class Worker:
    """One worker. `Workers` owns it and alone changes it; others read."""

    def __init__(
        self,
        worker_id: str,
        spec: Spec,
        life: Life,
        log_path: Path,
        *,
        started_at: str | None = None,
        adopted: bool = False,
    ) -> None:
        self.id = worker_id
        self.spec = spec
        self.life = life
        self.log_path = log_path
        self.adopted = adopted
        self.started_at = started_at or datetime.now(UTC).isoformat(timespec="seconds")
        self.running: Running | None = None
        self.pid = 0
        self.port = 0
        self.load = EngineLoad()
        self.max_model_len: int | None = None
        self.spawn_job_id: str | None = None
        self.failure: RbeeError | None = None
        """Why those who wait for it fail; all of them with the same."""
        self.log_tail: Sequence[str] = ()
        self.memory_reserved: int | None = None
        self.memory_estimate: MemoryEstimate | None = None
        self.memory_used: int | None = None
        self.is_forgotten = False
        self.launched = anyio.Event()
        """Its first process runs, or could not be started."""
        self.settled = anyio.Event()
        """It was ready, or will not be."""
        self.gone = anyio.Event()
        """It has ended for good, and nothing of it is left."""
        self.record_lock = anyio.Lock()
        self.sleep_turn = anyio.Lock()

    @property
    def model(self) -> str:
        return self.spec.model

    @property
    def steps(self) -> int:
        """Requests that this hive has on it."""
        return 0 if self.running is None else self.running.relay.steps

    @property
    def busyness(self) -> int:
        """Requests on it: what the engine last told, and what was handed to it since."""
        return max(self.load.running + self.load.waiting, self.steps)

    def last_lines(self) -> list[str]:
        """Give the last lines that its newest process has written."""
        return tail(self.log_path, since=self.running.log_offset if self.running is not None else 0)

    def info(self, *, hive_is_draining: bool = False) -> WorkerInfo:
        """Tell of it. `hive_is_draining`: its hive gives it nothing new."""
        life = self.life
        has_failed = life.phase == "failed"
        return WorkerInfo(
            worker_id=self.id,
            model=self.model,
            state="draining" if hive_is_draining and life.is_serving else life.state,
            pid=self.pid,
            port=self.port,
            running=self.load.running,
            waiting=self.load.waiting,
            kv_cache_usage=self.load.kv_cache_usage,
            worker=self.spec.kind,
            devices=list(self.spec.devices),
            started_at=self.started_at,
            max_model_len=self.max_model_len,
            exit_code=life.ending.exit_code,
            signal=life.ending.signal,
            cause=life.cause,
            log_tail=list(self.log_tail) if has_failed else [],
            restarts=life.restarts,
            adopted=self.adopted,
            tokens_per_second=self.load.tokens_per_second,
            prefix_cache_hit_rate=self.load.prefix_cache_hit_rate,
            memory_reserved=self.memory_reserved,
            memory_estimate=self.memory_estimate,
            memory_used=self.memory_used,
        )
