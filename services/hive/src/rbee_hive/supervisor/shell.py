"""The shell around the state machine: does what it decides to real processes, and tells what came of it."""

import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import assert_never

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from rbee_contracts.errors import RbeeError, WorkerLost
from rbee_contracts.nodes import Device, EngineLoad, WorkerStatus
from rbee_hive.config import HiveConfig
from rbee_hive.supervisor import logs
from rbee_hive.supervisor.allotment import Allotter, DeviceReader
from rbee_hive.supervisor.keeping import Keeping, written
from rbee_hive.supervisor.launch import WORKER_HOST, command_line, environment
from rbee_hive.supervisor.machine import (
    Answered,
    Clear,
    Cleared,
    Effect,
    Event,
    Exited,
    Kill,
    Launch,
    Launched,
    LaunchFailed,
    Missed,
    Probe,
    Probed,
    Release,
    TellFailed,
    TellReady,
    Terminate,
    on,
)
from rbee_hive.supervisor.memory import is_back
from rbee_hive.supervisor.ports import listen_on_free_port
from rbee_hive.supervisor.process import NotStarted, WorkerProcess, ending_text
from rbee_hive.supervisor.root_cause import root_cause
from rbee_hive.supervisor.tokens import new_token, token_pipe
from rbee_hive.supervisor.worker import Running, Worker
from rbee_job_client.errors import Rejected

log = structlog.get_logger(__name__)

POLL_STARTING_S = 0.2
POLL_READY_S = 0.5
POLL_TIMEOUT_S = 2.0

MEMORY_BACK_S = 10.0
"""How long a device's memory is awaited after a process's end."""

MEMORY_POLL_S = 0.25

CAUSE_LINES = 400
"""Of a log's end, in which the cause of a process's end is looked for."""


class Shell:
    """Performs what the machine decides, one worker at a time; knows nothing of the table of workers.

    Args:
        tasks: owns what runs for workers.
        model_path: gives a model's directory, or raises `NotFound`.
        on_change: called when a worker's state has changed.
        on_told: called when those who wait for a worker are to be told: with the cause where it has failed.
        on_over: called once nothing of a worker is left.
        until_clear: waits until no other process is being cleared from the worker's devices.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        config: HiveConfig,
        devices: DeviceReader,
        allotter: Allotter,
        keeping: Keeping,
        environ: Mapping[str, str],
        *,
        model_path: Callable[[str], Awaitable[str]],
        on_change: Callable[[], None],
        on_told: Callable[[Worker, str | None], None],
        on_over: Callable[[Worker], None],
        until_clear: Callable[[Worker], Awaitable[None]],
    ) -> None:
        self._tasks = tasks
        self._config = config
        self._policy = config.supervision
        self._devices = devices
        self._allotter = allotter
        self._keeping = keeping
        self._environ = environ
        self._model_path = model_path
        self._on_change = on_change
        self._on_told = on_told
        self._on_over = on_over
        self._until_clear = until_clear

    # --- events in, effects out ------------------------------------------------------------------------

    def apply(self, worker: Worker, event: Event) -> None:
        """Tell a worker's machine what has happened, and do what it decides."""
        before = worker.life
        worker.life, effects = on(before, event, anyio.current_time(), self._policy)
        self.perform(worker, effects)
        life = worker.life
        if life.state != before.state:
            facts = {"state": life.state, "was": before.state, "cause": life.cause}
            log.info("worker_state", worker_id=worker.id, **facts)
            self._on_change()
        if written(life) != written(before) and worker.running is not None:
            self.write_soon(worker)
        if life.is_over and not worker.gone.is_set():
            self._on_over(worker)

    def write_soon(self, worker: Worker) -> None:
        self._tasks.start_soon(self._keeping.write, worker)

    def perform(self, worker: Worker, effects: list[Effect]) -> None:
        """Do what the machine has decided; what takes time becomes a task of its own."""
        for effect in effects:
            self._perform(worker, effect)

    def _perform(self, worker: Worker, effect: Effect) -> None:
        running = worker.running
        match effect:
            case Launch():
                self._tasks.start_soon(self._launch, worker)
            case TellReady():
                self._on_told(worker, None)
            case TellFailed(cause=cause):
                self._on_told(worker, cause)
            case Release():
                self._allotter.release(worker.id)
                worker.running = None
                worker.memory_reserved = worker.memory_used = None
            case Terminate() | Kill() | Clear() | Probe():
                if running is not None:
                    self._act(effect, worker, running)
            case _:
                assert_never(effect)

    def _act(self, effect: Terminate | Kill | Clear | Probe, worker: Worker, running: Running) -> None:
        match effect:
            case Terminate():
                running.process.terminate()
                self._tasks.start_soon(running.process.scan)
            case Kill():
                log.warning("worker_killed", worker_id=worker.id, cause=worker.life.doom)
                self._tasks.start_soon(running.process.kill)
            case Clear():
                self._tasks.start_soon(self._clear, worker, running)
            case Probe():
                self._tasks.start_soon(self._probe, worker, running)
            case _:
                assert_never(effect)

    # --- a process's start -----------------------------------------------------------------------------

    async def _launch(self, worker: Worker) -> None:
        """Start a process for a worker, once its devices have the memory of the one before."""
        bind_to(worker)
        try:
            await self._until_clear(worker)
            running = await self._start_process(worker)
        except Exception as exc:
            # Whatever is wrong with one start is no reason to end the hive.
            if not isinstance(exc, RbeeError):
                log.error("worker_start_crashed", exc_info=exc)
            failure = exc if isinstance(exc, RbeeError) else RbeeError(f"its start crashed: {exc!r}")
            worker.failure = None if worker.life.has_been_ready else failure
            self.apply(worker, LaunchFailed(cause=failure.details, jitter=random.random()))
            return
        worker.running = running
        worker.pid, worker.port = running.process.pid, running.port
        log.info("worker_started", pid=worker.pid, port=worker.port, model=worker.model)
        self.apply(worker, Launched())
        worker.launched.set()
        self._on_change()
        self._tasks.start_soon(self.watch, worker, running)

    async def _start_process(self, worker: Worker) -> Running:
        spec = worker.spec
        model_path = await self._model_path(spec.model)
        allotment = await self._allotter.reserve(worker.id, spec, model_path)
        worker.memory_estimate = allotment.estimate
        worker.memory_reserved = allotment.bytes_each
        token, nonce = new_token(), secrets.token_hex(16)
        log_offset = logs.size(worker.log_path)
        ports = self._config.worker_ports
        with listen_on_free_port(WORKER_HOST, ports) as listener, token_pipe(token) as token_fd:
            port = listener.getsockname()[1]
            command = command_line(
                self._config,
                spec.model,
                spec.args,
                worker_id=worker.id,
                model_path=model_path,
                listen_fd=listener.fileno(),
                token_fd=token_fd,
                devices=spec.devices,
                memory_args=allotment.arguments,
            )
            env = environment(self._environ, allotment.visible, nonce)
            try:
                await self._keeping.announce(
                    worker, port=port, token=token, nonce=nonce, log_offset=log_offset
                )
                fds = [listener.fileno(), token_fd]
                process = await WorkerProcess.start(command, env, worker.log_path, nonce, pass_fds=fds)
            except (OSError, NotStarted) as exc:
                raise WorkerLost(
                    f"The worker's process could not be started: {exc}. Is there room in "
                    f"{self._config.state_dir}, and may this user write there?",
                    code="worker_spawn_failed",
                ) from exc
        running = Running(
            worker.id, process=process, port=port, token=token, nonce=nonce, log_offset=log_offset
        )
        with anyio.CancelScope(shield=True):
            worker.running = running
            await self._keeping.write(worker)
        return running

    # --- while it runs ---------------------------------------------------------------------------------

    async def watch(self, worker: Worker, running: Running) -> None:
        """Follow a process's status and events until it has ended; then settle what that means."""
        bind_to(worker)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._poll, worker, running, tasks)
            ending = await running.process.wait()
            text = ending_text(ending)
            found = await anyio.to_thread.run_sync(
                lambda: root_cause(logs.tail(worker.log_path, CAUSE_LINES, since=running.log_offset))
            )
            was_asked = worker.life.phase == "stopping"
            facts = {"pid": running.process.pid, "exit_code": ending.exit_code, "signal": ending.signal}
            cause = worker.life.doom or found
            log.log(20 if was_asked else 40, "worker_exited", **facts, state=worker.life.state, cause=cause)
            worker.load = EngineLoad()
            full = f"{text} ({found})" if found else text
            self.apply(worker, Exited(ending=ending, cause=full, jitter=random.random()))
            why = text if was_asked else worker.life.cause or text
            await running.relay.lose(
                WorkerLost(f"{worker.id} of hive {self._config.hive_id} {why} under the job.")
            )
            tasks.cancel_scope.cancel()
        await running.client.aclose()

    async def _poll(self, worker: Worker, running: Running, tasks: TaskGroup) -> None:
        """Ask a process how it is, for ever; from its first good answer on, take its events."""
        while True:
            self.apply(worker, await ask(worker, running))
            if worker.life.phase == "up" and not running.is_followed:
                running.is_followed = True
                tasks.start_soon(running.relay.run)
                tasks.start_soon(running.process.scan)
            await anyio.sleep(POLL_STARTING_S if worker.life.state == "starting" else POLL_READY_S)

    async def _probe(self, worker: Worker, running: Running) -> None:
        """Have the engine generate one token. A worker that knows no probe is taken at its word."""
        bind_to(worker)
        is_ok, limit_s = False, self._policy.probe_timeout_s
        with anyio.move_on_after(limit_s):
            try:
                await running.client.post_json("/v1/worker/probe", {}, timeout_s=limit_s)
                is_ok = True
            except Rejected as exc:
                is_ok = exc.status == 404
            except RbeeError as exc:
                log.info("worker_probe_unanswered", reason=exc.details)
        if not is_ok:
            log.warning("worker_probe_failed", failed_before=worker.life.probes_failed)
        if worker.running is running:
            self.apply(worker, Probed(ok=is_ok))

    # --- after its end ---------------------------------------------------------------------------------

    async def _clear(self, worker: Worker, running: Running) -> None:
        """End what a process has left, and wait for its device memory."""
        bind_to(worker)
        left = await running.process.clear()
        if left:
            log.warning("worker_processes_reaped", pids=left)
        if worker.spec.kind == "cuda":
            await self._memory_back(worker, running.process.pids())
        running.process.close()
        self.apply(worker, Cleared())

    async def _memory_back(self, worker: Worker, pids: list[int]) -> None:
        devices = worker.spec.devices
        with anyio.move_on_after(MEMORY_BACK_S) as limit:
            before: list[Device] = []
            while True:
                now = await anyio.to_thread.run_sync(self._read_devices, abandon_on_cancel=True)
                if is_back(before, now, devices, pids):
                    return
                before = now
                await anyio.sleep(MEMORY_POLL_S)
        if limit.cancelled_caught:
            log.warning("device_memory_not_back", devices=list(devices), after_s=MEMORY_BACK_S)

    def _read_devices(self) -> list[Device]:
        try:
            return self._devices.read()
        except Exception as exc:
            log.warning("devices_not_read", error=repr(exc))
            return []


async def ask(worker: Worker, running: Running) -> Answered | Missed:
    """Ask a process how it is; `Missed` where it does not answer, or is not the one that was started."""
    try:
        status: WorkerStatus = await running.client.get_json(
            "/v1/worker", WorkerStatus, timeout_s=POLL_TIMEOUT_S
        )
    except RbeeError:
        return Missed()
    if (status.worker_id, status.nonce) != (worker.id, running.nonce):
        log.warning("worker_port_taken", port=running.port, answers=status.worker_id)
        return Missed()
    load = status.load
    worker.load, worker.max_model_len = load, status.max_model_len
    return Answered(
        is_ready=status.state in ("ready", "busy"),
        is_asleep=status.state == "sleeping",
        active=load.running + load.waiting,
        step_age_s=load.step_age_s,
    )


def bind_to(worker: Worker) -> None:
    """Log as the worker's: the job that started a task is not what it is about."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(worker_id=worker.id)
