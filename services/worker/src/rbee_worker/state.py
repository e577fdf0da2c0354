"""What a worker is doing: its engine's life from loading to its end."""

from enum import StrEnum

import structlog

from rbee_contracts.errors import RbeeError, Unavailable
from rbee_contracts.nodes import EngineLoad, WorkerStatus
from rbee_contracts.operations import Operation
from rbee_job_server import JobServer, ServiceFailed
from rbee_worker.config import WorkerConfig
from rbee_worker.engine.base import Engine, EngineDied, EngineInfo

log = structlog.get_logger(__name__)


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


class WorkerState:
    """Owns the engine: loads it, watches it, and knows whether requests may come."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        self._config = config
        self._engine = engine
        self._phase = Phase.STARTING
        self._info: EngineInfo | None = None

    async def run_engine(self, server: JobServer) -> None:
        """Load the engine, then watch it until it dies; never returns.

        Raises:
            ServiceFailed: it could not be loaded, or it has died; open jobs have ended with `engine_died`.
        """
        log.info("engine_loading", model=self._config.model)
        try:
            self._info = await self._engine.start()
        except RbeeError as exc:
            self._phase = Phase.FAILED
            raise ServiceFailed(exc.details) from exc
        except Exception as exc:
            self._phase = Phase.FAILED
            raise ServiceFailed(f"{self._config.model} could not be loaded: {exc}") from exc
        self._phase = Phase.READY
        log.info("engine_ready", engine=self._info.engine, max_model_len=self._info.max_model_len)
        cause = await self._engine.died()
        self._phase = Phase.FAILED
        log.error("engine_died", cause=cause)
        await server.end_all(EngineDied(f"The engine died: {cause}"))
        raise ServiceFailed(f"the engine died: {cause}")

    def not_ready(self) -> str | None:
        return None if self._phase == Phase.READY else f"engine {self._phase}"

    def admit(self, operation: Operation) -> None:
        """Refuse work that the engine cannot take now.

        Raises:
            Unavailable: it is loading, or has died.
        """
        if self._phase != Phase.READY:
            raise Unavailable(
                f"Worker {self._config.worker_id} cannot run {operation.name}: its engine is {self._phase}. "
                "/ready tells when it can.",
                code="worker_not_ready",
            )

    def status(self) -> WorkerStatus:
        ready = self._phase == Phase.READY
        return WorkerStatus(
            worker_id=self._config.worker_id,
            model=self._config.served_model_name,
            engine="sim" if self._config.sim is not None else "vllm",
            state=self._phase.value,
            max_model_len=self._info.max_model_len if self._info else None,
            load=self._engine.load() if ready else EngineLoad(),
        )
