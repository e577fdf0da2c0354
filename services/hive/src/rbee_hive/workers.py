"""The hive's workers: spawned, watched, counted, stopped. The only place that starts or ends one."""

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime

import anyio
import structlog
from anyio.abc import TaskGroup

from rbee_contracts.errors import NotFound, RbeeError, Unavailable, WorkerLost
from rbee_contracts.events import SpawnedWorker
from rbee_contracts.nodes import EngineLoad, WorkerInfo, WorkerState, WorkerStatus
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices
from rbee_hive.launch import WORKER_HOST, DeviceKind, choose_devices, command_line, environment
from rbee_hive.models import Models
from rbee_hive.ports import listen_on_free_port
from rbee_hive.process import WorkerProcess
from rbee_hive.tokens import new_token, token_pipe
from rbee_job_client import JobClient
from rbee_job_server import JobContext, Relay

log = structlog.get_logger(__name__)

POLL_STARTING_S = 0.2
POLL_READY_S = 0.5
POLL_TIMEOUT_S = 2.0
NARRATE_EVERY_S = 5.0
FAILED_KEPT = 16
SHUTDOWN_GRACE_S = 10.0


class Worker:
    """One worker. `Workers` owns it; others read."""

    def __init__(
        self,
        *,
        worker_id: str,
        model: str,
        kind: DeviceKind,
        devices: list[int],
        port: int,
        process: WorkerProcess,
        token: str,
    ) -> None:
        self.id = worker_id
        self.model = model
        self.kind = kind
        self.devices = devices
        self.port = port
        self.process = process
        self.state: WorkerState = "starting"
        self.load = EngineLoad()
        self.max_model_len: int | None = None
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.client = JobClient(f"http://{WORKER_HOST}:{port}", token=token)
        self.relay = Relay(service="worker", peer=worker_id, client=self.client)
        self.ready = anyio.Event()
        self.exited = anyio.Event()
        self.finished = anyio.Event()

    @property
    def busyness(self) -> int:
        """Requests on it: what the engine last told, and what was handed to it since."""
        return max(self.load.running + self.load.waiting, self.relay.steps)

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.id,
            model=self.model,
            state=self.state,
            pid=self.process.pid,
            port=self.port,
            running=self.load.running,
            waiting=self.load.waiting,
            kv_cache_usage=self.load.kv_cache_usage,
            worker=self.kind,
            devices=self.devices,
            started_at=self.started_at,
            max_model_len=self.max_model_len,
            exit_code=self.process.exit_code,
        )


class Workers:
    """The table of workers. `run` must be running; it owns what watches them."""

    def __init__(
        self, config: HiveConfig, devices: Devices, models: Models, environ: Mapping[str, str]
    ) -> None:
        self._config = config
        self._devices = devices
        self._models = models
        self._environ = dict(environ)
        self._workers: dict[str, Worker] = {}
        self._tasks: TaskGroup | None = None
        self.changed = anyio.Event()
        """Set, and replaced, when a worker comes, goes or changes its state."""

    async def run(self) -> None:
        """Own the tasks that watch workers, until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            await anyio.sleep_forever()

    def _set_state(self, worker: Worker, state: WorkerState) -> None:
        worker.state = state
        self._announce_change()

    def _announce_change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def infos(self) -> list[WorkerInfo]:
        return [worker.info() for worker in self._workers.values()]

    def get(self, worker_id: str) -> Worker:
        """Give a worker.

        Raises:
            NotFound: no such worker here.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            here = ", ".join(self._workers) or "none"
            raise NotFound(
                f"No worker {worker_id!r} on hive {self._config.hive_id}. Workers here: {here}.",
                code="worker_not_found",
                title="Worker not found",
            )
        return worker

    def least_busy(self, model: str) -> Worker:
        """Give the ready worker of `model` with the fewest requests.

        Raises:
            NotFound: none runs here.
        """
        ready = [w for w in self._workers.values() if w.model == model and w.state == "ready"]
        if not ready:
            running = ", ".join(f"{w.model} ({w.state})" for w in self._workers.values()) or "nothing"
            raise NotFound(
                f"No ready worker of {model!r} on hive {self._config.hive_id}; running here: {running}. "
                f"Start one: rbee worker spawn --model {model} --hive-id {self._config.hive_id}",
                code="no_worker",
                title="No worker",
            )
        return min(ready, key=lambda worker: (worker.busyness, worker.id))

    # --- spawning --------------------------------------------------------------------------------------

    async def spawn(self, op: WorkerSpawn, context: JobContext) -> SpawnedWorker:
        """Start a worker and wait until it answers; narrates. Leaving stops the worker.

        Raises:
            NotFound: the model does not lie here.
            InvalidRequest: the devices are not here.
            NoCapacity: no port is free.
            WorkerLost: it died while starting (`worker_spawn_failed`, with its last log lines).
        """
        if self._tasks is None:
            raise Unavailable("The hive is starting; try again in a moment.")
        kind, devices = choose_devices(op, self._devices.gpu_count)
        worker = await self._start_process(op, kind, devices)
        context.narrate(
            "worker_spawn_start",
            f"Spawning {worker.id} for {op.model} on {_device_text(kind, devices)} "
            f"(pid {worker.process.pid}, port {worker.port}).",
            worker_id=worker.id,
            pid=worker.process.pid,
            port=worker.port,
            model=op.model,
            devices=devices,
        )
        try:
            await self._until_ready(worker, context)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._end(worker, grace_s=0.5)
            self._forget(worker)
            raise
        spawned = SpawnedWorker(
            worker_id=worker.id, pid=worker.process.pid, port=worker.port, model=op.model, devices=devices
        )
        context.narrate(
            "worker_spawn_complete",
            f"{worker.id} serves {op.model} (pid {worker.process.pid}, port {worker.port}).",
            spawned,
        )
        return spawned

    async def _start_process(self, op: WorkerSpawn, kind: DeviceKind, devices: list[int]) -> Worker:
        model = op.model if self._config.worker_engine == "sim" else str(self._models.path(op.model))
        worker_id = f"{op.model.split('/')[-1][:40]}-{secrets.token_hex(3)}".replace("@", "-")
        token = new_token()
        with listen_on_free_port(WORKER_HOST) as listener, token_pipe(token) as token_fd:
            port = listener.getsockname()[1]
            command = command_line(
                self._config,
                op,
                worker_id=worker_id,
                model_path=model,
                listen_fd=listener.fileno(),
                token_fd=token_fd,
                devices=devices,
            )
            log_path = self._config.state_dir / "logs" / f"{worker_id}.log"
            env = environment(self._environ, kind, devices)
            try:
                fds = [listener.fileno(), token_fd]
                process = await WorkerProcess.start(command, env, log_path, pass_fds=fds)
            except OSError as exc:
                raise WorkerLost(
                    f"The worker's process could not be started: {exc.strerror}.", code="worker_spawn_failed"
                ) from exc
        worker = Worker(
            worker_id=worker_id,
            model=op.model,
            kind=kind,
            devices=devices,
            port=port,
            process=process,
            token=token,
        )
        self._workers[worker_id] = worker
        self._announce_change()
        assert self._tasks is not None
        self._tasks.start_soon(self._watch, worker)
        log.info("worker_started", worker_id=worker_id, pid=process.pid, port=port, model=op.model)
        return worker

    async def _until_ready(self, worker: Worker, context: JobContext) -> None:
        """Poll the starting worker, narrating, until it is ready.

        Raises:
            WorkerLost: it exited first.
        """
        started = anyio.current_time()
        narrated = -NARRATE_EVERY_S
        while not worker.exited.is_set():
            waited = anyio.current_time() - started
            if await self._poll(worker):
                self._set_state(worker, "ready")
                worker.ready.set()
                log.info("worker_ready", worker_id=worker.id, after_s=round(waited, 1))
                return
            if waited - narrated >= NARRATE_EVERY_S:
                narrated = waited
                since = f" ({waited:.0f} s so far)" if waited > 1 else ""
                context.narrate(
                    "worker_spawn_health_check",
                    f"Waiting until {worker.id} is ready{since}: its engine is loading.",
                    worker_id=worker.id,
                    waited_s=round(waited, 1),
                )
            with anyio.move_on_after(POLL_STARTING_S):
                await worker.exited.wait()
        tail = "\n".join(worker.process.tail())
        raise WorkerLost(
            f"{worker.id} {_exit_text(worker.process.exit_code)} before it was ready. "
            f"Its last log lines ({worker.process.log_path.name} on the hive):\n{tail}",
            code="worker_spawn_failed",
        )

    async def _poll(self, worker: Worker) -> bool:
        """Ask the worker how it is; True when it is ready."""
        try:
            status: WorkerStatus = await worker.client.get_json(
                "/v1/worker", WorkerStatus, timeout_s=POLL_TIMEOUT_S
            )
        except RbeeError:
            return False
        if status.worker_id != worker.id:
            return False
        worker.load = status.load
        worker.max_model_len = status.max_model_len
        return status.state == "ready"

    # --- watching --------------------------------------------------------------------------------------

    async def _watch(self, worker: Worker) -> None:
        """Follow a worker's events and load until its process has ended; then settle what that means."""
        # The spawn's job started this task; its ids are not ours.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(worker_id=worker.id)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, worker)
            code = await worker.process.wait()
            worker.exited.set()
            was_wanted = worker.state == "stopping"
            log.log(
                20 if was_wanted else 40,
                "worker_exited",
                pid=worker.process.pid,
                exit_code=code,
                state=worker.state,
            )
            worker.load = EngineLoad()
            self._set_state(worker, "stopped" if was_wanted else "failed")
            await worker.relay.lose(
                WorkerLost(f"{worker.id} of hive {self._config.hive_id} {_exit_text(code)} under the job.")
            )
            tasks.cancel_scope.cancel()
        await worker.client.aclose()
        self._forget_old_failures()
        worker.finished.set()

    async def _follow(self, worker: Worker) -> None:
        """Take a ready worker's events and load; before that it has none."""
        await worker.ready.wait()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.relay.run)
            tasks.start_soon(self._poll_load, worker)

    async def _poll_load(self, worker: Worker) -> None:
        while True:
            await anyio.sleep(POLL_READY_S)
            if worker.state == "ready":
                await self._poll(worker)

    def _forget(self, worker: Worker) -> None:
        self._workers.pop(worker.id, None)
        self._announce_change()

    def _forget_old_failures(self) -> None:
        """Keep the newest failures for `worker_list`; what was stopped on request goes at once."""
        failed = [worker for worker in self._workers.values() if worker.state == "failed"]
        for worker in failed[:-FAILED_KEPT]:
            del self._workers[worker.id]

    # --- stopping --------------------------------------------------------------------------------------

    async def stop(self, worker_id: str, grace_s: float) -> WorkerInfo:
        """Stop a worker and forget it; one that has failed is only forgotten.

        Raises:
            NotFound: no such worker here.
        """
        worker = self.get(worker_id)
        await self._end(worker, grace_s)
        self._forget(worker)
        return worker.info()

    async def stop_all(self) -> None:
        """Stop every worker, all at once."""
        async with anyio.create_task_group() as tasks:
            for worker in list(self._workers.values()):
                tasks.start_soon(self._end, worker, SHUTDOWN_GRACE_S)

    def kill_all(self) -> None:
        """End every worker at once, with all its processes: the hive itself is about to end."""
        for worker in self._workers.values():
            worker.process.kill()

    async def _end(self, worker: Worker, grace_s: float) -> None:
        if not worker.exited.is_set():
            self._set_state(worker, "stopping")
            await worker.process.stop(grace_s)
        await worker.finished.wait()


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by signal {-code}"
    return f"exited with status {code}"


def _device_text(kind: str, devices: list[int]) -> str:
    return f"{kind}:{','.join(map(str, devices))}"
