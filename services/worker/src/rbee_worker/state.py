"""What a worker is doing: its engine's life from loading to its end, and whether its hive is there."""

import os
import signal
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, NoReturn

import anyio
import structlog

from rbee_contracts.errors import Conflict, NotImplementedHere, RbeeError, Unavailable
from rbee_contracts.nodes import EngineLoad, WorkerStatus
from rbee_contracts.nodes import WorkerState as State
from rbee_contracts.operations import Operation
from rbee_job_server import JobContext, JobServer, ServiceFailed
from rbee_worker.activity import Activity
from rbee_worker.config import WorkerConfig
from rbee_worker.engine.base import Engine, EngineDied, EngineInfo

log = structlog.get_logger(__name__)

PROBE_LIMIT_S = 60.0
"""After which a probe that the engine does not answer is given up."""

ABSENCE_CHECKS = 20
"""How often in the hive's allowed absence it is looked for."""


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    FAILED = "failed"


class WorkerState:
    """Owns the engine: loads it, watches it, and knows whether requests may come.

    Args:
        now: monotonic seconds.
    """

    def __init__(
        self, config: WorkerConfig, engine: Engine, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._engine = engine
        self._phase = Phase.STARTING
        self._info: EngineInfo | None = None
        self._turn = anyio.Lock()
        self._is_probing = False
        self._now = now
        self._heard = now()
        self.activity = Activity(now)

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
            Unavailable: it is loading, asleep, or has died.
        """
        if self._phase != Phase.READY:
            raise Unavailable(
                f"Worker {self._config.worker_id} cannot run {operation.name}: its engine is {self._phase}. "
                "/ready tells when it can.",
                code="worker_not_ready",
            )

    def running(
        self, handler: Callable[[Any, JobContext], Awaitable[Any]]
    ) -> Callable[[Any, JobContext], Awaitable[Any]]:
        """Give a handler whose requests are counted, and refused where the engine cannot take them by now.

        A job may start long after it was admitted, and an engine that sleeps must not be given any.
        """
        counted = self.activity.counting(handler)

        async def run(op: Operation, context: JobContext) -> Any:
            self.admit(op)
            return await counted(op, context)

        return run

    def status(self) -> WorkerStatus:
        ready = self._phase == Phase.READY
        load = self.activity.complete(self._engine.load()) if ready else EngineLoad()
        state: State = "busy" if ready and load.running + load.waiting else self._phase.value
        return WorkerStatus(
            worker_id=self._config.worker_id,
            nonce=self._config.nonce,
            model=self._config.served_model_name,
            engine="sim" if self._config.sim is not None else "vllm",
            state=state,
            max_model_len=self._info.max_model_len if self._info else None,
            load=load,
        )

    # --- asked for by the hive -------------------------------------------------------------------------

    async def probe(self) -> None:
        """Have the engine generate one token.

        Raises:
            Unavailable: it does not, or a probe is under way.
        """
        if self._phase != Phase.READY:
            raise Unavailable(f"The engine is {self._phase}.", code="worker_not_ready")
        if self._is_probing:
            raise Unavailable("A probe is under way, and has not been answered.", code="probe_under_way")
        self._is_probing = True
        try:
            with anyio.fail_after(PROBE_LIMIT_S):
                await self._engine.probe()
        except TimeoutError as exc:
            raise Unavailable(
                f"The engine gave no token in {PROBE_LIMIT_S:g} s.", code="engine_silent"
            ) from exc
        finally:
            self._is_probing = False

    async def sleep(self) -> None:
        """Give the device memory back. Asleep already: nothing happens.

        Raises:
            NotImplementedHere: this engine cannot.
            Conflict: requests run, or a probe.
        """
        async with self._turn:
            if self._phase == Phase.SLEEPING:
                return
            self._must_be(Phase.READY)
            if not self._engine.can_sleep:
                raise NotImplementedHere(
                    "This engine cannot sleep. vLLM can, on a GPU, when it was started with "
                    "--enable-sleep-mode.",
                    code="sleep_not_supported",
                )
            self._phase = Phase.SLEEPING  # from now on nothing is admitted
            if self.activity.count or self._is_probing:
                self._phase = Phase.READY
                what = f"{self.activity.count} requests run; drain the worker first."
                raise Conflict(what if self.activity.count else "It is being probed.", code="worker_busy")
            try:
                await self._engine.sleep()
            except BaseException:
                self._back_to(Phase.READY)
                raise
            log.info("engine_asleep")

    async def wake(self) -> None:
        """Take the device memory again. Awake already: nothing happens."""
        async with self._turn:
            if self._phase == Phase.READY:
                return
            self._must_be(Phase.SLEEPING)
            await self._engine.wake()
            self._back_to(Phase.READY)
            log.info("engine_awake")

    def _must_be(self, phase: Phase) -> None:
        if self._phase != phase:
            raise Unavailable(f"The engine is {self._phase}, not {phase}.", code="worker_not_ready")

    def _back_to(self, phase: Phase) -> None:
        if self._phase != Phase.FAILED:
            self._phase = phase

    # --- the hive itself -------------------------------------------------------------------------------

    def heard(self) -> None:
        """The hive has spoken: whoever has the worker's token is it."""
        self._heard = self._now()

    async def watch_hive(self) -> NoReturn:
        """Stop the worker, as by SIGTERM, when its hive has been silent for too long; never returns."""
        limit_s = self._config.hive_absence_s
        while limit_s is None:
            await anyio.sleep_forever()
        while True:
            await anyio.sleep(limit_s / ABSENCE_CHECKS)
            silent_s = self._now() - self._heard
            if silent_s > limit_s:
                log.error("hive_absent", silent_s=round(silent_s, 1), limit_s=limit_s)
                os.kill(os.getpid(), signal.SIGTERM)
                await anyio.sleep_forever()
