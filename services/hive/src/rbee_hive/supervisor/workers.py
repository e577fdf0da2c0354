"""The hive's workers: the only place that begins, adopts or ends one, and where they are looked up."""

import math
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import NoReturn

import anyio
import anyio.to_thread
import structlog

from rbee_contracts.access import NONCE_VARIABLE
from rbee_contracts.errors import Conflict, NotFound, RbeeError, Unavailable, WorkerLost
from rbee_contracts.events import SpawnedWorker
from rbee_contracts.nodes import EngineLoad, WorkerInfo
from rbee_contracts.operations import WorkerSpawn
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Reservations
from rbee_hive.supervisor.adoption import adopt
from rbee_hive.supervisor.allotment import Allotter, DeviceReader
from rbee_hive.supervisor.failures import Failures
from rbee_hive.supervisor.keeping import Keeping
from rbee_hive.supervisor.launch import choose_devices
from rbee_hive.supervisor.logs import LogFolder
from rbee_hive.supervisor.machine import DrainAsked, Life, StopAsked, Tick, WaiterCame, WaiterLeft, begin, on
from rbee_hive.supervisor.processes import boot_id
from rbee_hive.supervisor.records import Records
from rbee_hive.supervisor.root_cause import is_out_of_memory
from rbee_hive.supervisor.shell import Shell, ask
from rbee_hive.supervisor.worker import Running, Spec, Worker
from rbee_job_server import JobContext, Relay

log = structlog.get_logger(__name__)

TICK_S = 0.2
NARRATE_EVERY_S = 5.0
ROTATE_EVERY_S = 30.0

FAILED_KEPT = 16
"""Failed workers that stay in the list; beyond it the oldest are forgotten."""

SHUTDOWN_GRACE_S = 10.0
"""For each worker when the hive stops: the hive has drained before."""

LOGS_FOLDER = "logs"
"""Where in the state folder the workers' logs are."""


class Workers:
    """The table of workers. `adopt` comes first; `run` must be running; it owns what watches them.

    Args:
        find_model: gives a model's directory, or raises `NotFound`.
        environ: what workers inherit.
    """

    def __init__(
        self,
        config: HiveConfig,
        devices: DeviceReader,
        find_model: Callable[[str], Awaitable[str]],
        reservations: Reservations,
        environ: Mapping[str, str],
    ) -> None:
        self._config = config
        self._devices = devices
        self._find_model = find_model
        self._environ = {name: value for name, value in environ.items() if name != NONCE_VARIABLE}
        self._allotter = Allotter(config, devices, reservations, self._found_owners, self._environ)
        self._records = Records(config.state_dir / "workers")
        self._logs = LogFolder(config.state_dir / LOGS_FOLDER, config.worker_logs)
        self._boot_id = boot_id()
        self._keeping = Keeping(self._records, self._boot_id)
        self._workers: dict[str, Worker] = {}
        self._failures = Failures(config.supervision)
        self._shell: Shell | None = None
        self._is_leaving = False
        self.last_round = math.inf
        """When `run` has last gone through the workers, by the loop's clock."""
        self.draining = False
        """Whether the hive gives its workers nothing new. Only `set_draining` changes it."""
        self.changed = anyio.Event()
        """Set, and replaced, when a worker comes, goes or changes its state."""

    # --- the hive's side -------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take up the workers of the hive before, and end what those that died have left.

        Each is asked how it is, so that those that serve do so from the hive's first answer on.
        """
        async with anyio.create_task_group() as tasks:
            for worker in await adopt(self._records, self._boot_id, self._logs, self._config.supervision):
                self._workers[worker.id] = worker
                if worker.running is None:
                    continue
                if worker.memory_reserved is not None:
                    self._allotter.adopt(worker.id, worker.spec, worker.memory_reserved)
                tasks.start_soon(self._greet, worker, worker.running)

    async def _greet(self, worker: Worker, running: Running) -> None:
        """Take in a first answer, as far as nothing has to be done for it: `run` asks again."""
        answer = await ask(worker, running)
        life, effects = on(worker.life, answer, anyio.current_time(), self._config.supervision)
        if not effects:
            worker.life = life

    async def run(self) -> None:
        """Own the tasks that watch workers, until cancelled. Cancelling ends no worker."""
        async with anyio.create_task_group() as tasks:
            shell = Shell(
                tasks,
                self._config,
                self._devices,
                self._allotter,
                self._keeping,
                self._environ,
                model_path=self._model_path,
                on_change=self._announce_change,
                on_told=self._tell,
                on_over=self._settle_end,
                until_clear=self._devices_are_clear,
            )
            self._shell = shell
            for worker in self._workers.values():
                if worker.running is not None:
                    tasks.start_soon(shell.watch, worker, worker.running)
            tasks.start_soon(self._keep_logs)
            while True:
                for worker in list(self._workers.values()):
                    shell.apply(worker, Tick(active=worker.steps))
                self.last_round = anyio.current_time()
                await anyio.sleep(TICK_S)

    async def stop_all(self) -> None:
        """Stop every worker, all at once."""
        async with anyio.create_task_group() as tasks:
            for worker in list(self._workers.values()):
                tasks.start_soon(self._end, worker, SHUTDOWN_GRACE_S)

    def leave(self) -> None:
        """From now on no worker is ended by those who leave: the next hive takes them up as they are."""
        self._is_leaving = True
        for worker in self._workers.values():
            if worker.running is not None:
                worker.running.relay.leave()

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    async def _keep_logs(self) -> NoReturn:
        """Keep the workers' logs bounded, for ever."""
        while True:
            for worker in list(self._workers.values()):
                was_moved = await anyio.to_thread.run_sync(self._logs.rotate, worker.id)
                if was_moved and worker.running is not None:
                    worker.running.log_offset = 0
            await anyio.to_thread.run_sync(self._logs.prune, frozenset(self._workers))
            await anyio.sleep(ROTATE_EVERY_S)

    def _running_shell(self) -> Shell:
        if self._shell is None:
            raise Unavailable("The hive is starting; try again in a moment.")
        return self._shell

    async def _model_path(self, model: str) -> str:
        return model if self._config.worker_engine == "sim" else await self._find_model(model)

    # --- what others see -------------------------------------------------------------------------------

    def owners(self) -> dict[int, str]:
        """Give the worker of each process that is known to be one's: its own and its engine's."""
        return {
            stat.pid: worker.id
            for worker in self._workers.values()
            if worker.running is not None
            for stat in worker.running.process.held()
        }

    async def _found_owners(self) -> dict[int, str]:
        """Give `owners` with what loading workers have started by now: that is looked for once they serve."""
        for worker in list(self._workers.values()):
            if worker.running is not None and worker.life.phase == "starting":
                await worker.running.process.scan()
        return self.owners()

    def note_memory(self, used: Mapping[str, int | None]) -> None:
        """Take in what each worker really uses of its devices' memory, in bytes; None where untold."""
        for worker_id, size in used.items():
            worker = self._workers.get(worker_id)
            if worker is not None and worker.running is not None:
                worker.memory_used = size

    def infos(self) -> list[WorkerInfo]:
        return [worker.info(hive_is_draining=self.draining) for worker in self._workers.values()]

    def info(self, worker_id: str) -> WorkerInfo:
        """Tell of one worker.

        Raises:
            NotFound: no such worker here.
        """
        return self.get(worker_id).info(hive_is_draining=self.draining)

    def all(self) -> list[Worker]:
        return list(self._workers.values())

    def of_model(self, model: str) -> list[Worker]:
        """Give the workers of a model that have not failed."""
        return [w for w in self._workers.values() if w.model == model and w.life.phase in ("starting", "up")]

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

    def log_of(self, worker_id: str) -> tuple[Worker | None, Path]:
        """Give a worker's log, and the worker itself where it is not gone.

        Raises:
            NotFound: no such worker here, and no log of one that was.
        """
        path = self._logs.path(worker_id)
        if worker_id not in self._workers and path.is_file():
            return None, path
        return self.get(worker_id), path

    def line_to(self, worker_id: str) -> Relay:
        """Give the line to a worker's process, whether or not it takes new requests.

        Raises:
            NotFound: no such worker here.
            WorkerLost: it has no process now.
        """
        worker = self.get(worker_id)
        if worker.running is None:
            raise WorkerLost(
                f"{worker.id} of hive {self._config.hive_id} is {worker.life.state} and has no process"
                f"{f': {worker.life.cause}' if worker.life.cause else ''}.",
                retryable=True,
            )
        return worker.running.relay

    def serving(self, worker_id: str) -> Worker:
        """Give a named worker that takes requests.

        Raises:
            NotFound: no such worker here.
            Unavailable: it takes none now.
        """
        worker = self.get(worker_id)
        if not worker.life.is_serving:
            state = worker.life.state
            raise Unavailable(
                f"{worker.id} of hive {self._config.hive_id} takes no request now: it is {state}"
                f"{f' ({worker.life.cause})' if worker.life.cause else ''}.",
                code="draining" if state == "draining" else "worker_not_ready",
            )
        return worker

    def least_busy(self, model: str) -> Worker:
        """Give the worker of `model` with the fewest requests, of those that take some.

        Raises:
            NotFound: none runs here.
        """
        ready = [w for w in self._workers.values() if w.model == model and w.life.is_serving]
        if not ready:
            running = ", ".join(f"{w.model} ({w.life.state})" for w in self._workers.values()) or "nothing"
            raise NotFound(
                f"No ready worker of {model!r} on hive {self._config.hive_id}; running here: {running}. "
                f"Start one: rbee worker spawn --model {model} --hive-id {self._config.hive_id}",
                code="no_worker",
                title="No worker",
            )
        return min(ready, key=lambda worker: (worker.busyness, worker.id))

    # --- spawning --------------------------------------------------------------------------------------

    async def spawn(self, op: WorkerSpawn, context: JobContext) -> SpawnedWorker:
        """Start a worker, or join one like it that is starting, and wait until it answers; narrates.

        Leaving stops the worker, unless others wait for it.

        Raises:
            NotFound: the model does not lie here.
            InvalidRequest: the devices are not here.
            NoCapacity: no port is free, or not enough device memory.
            WorkerLost: it did not become ready (`worker_spawn_failed` or `out_of_memory`), or would not,
                as it did not a moment ago.
        """
        shell = self._running_shell()
        kind, devices = choose_devices(op, self._allotter.gpus())
        spec = Spec(op.model, kind, tuple(devices), tuple(op.worker_args))
        worker = self._to_join(spec, context.job_id)
        if worker is None:
            await self._model_path(op.model)  # before anything is begun: it may not lie here
            worker = self._to_join(spec, context.job_id)
        has_joined = worker is not None
        if worker is None:
            worker = self._begin(shell, spec, context.job_id)
        shell.apply(worker, WaiterCame())
        is_waiting = True
        try:
            await worker.launched.wait()
            _narrate_start(worker, context, has_joined=has_joined)
            await _until_settled(worker, context)
            is_waiting = False
        finally:
            if is_waiting and not self._is_leaving:
                with anyio.CancelScope(shield=True):
                    await self._leave_spawn(shell, worker)
        spawned = SpawnedWorker(
            worker_id=worker.id, pid=worker.pid, port=worker.port, model=op.model, devices=devices
        )
        context.narrate(
            "worker_spawn_complete",
            f"{worker.id} serves {op.model} (pid {worker.pid}, port {worker.port}).",
            spawned,
        )
        return spawned

    def _to_join(self, spec: Spec, job_id: str) -> Worker | None:
        """Give the worker that was begun for this very job, or one like it that others wait for."""
        for worker in self._workers.values():
            if worker.spawn_job_id == job_id and worker.life.phase in ("starting", "up"):
                return worker
        for worker in self._workers.values():
            life = worker.life
            if worker.spec == spec and life.phase == "starting" and not life.has_been_ready:
                return worker
        return None

    def _begin(self, shell: Shell, spec: Spec, job_id: str) -> Worker:
        now = anyio.current_time()
        refusal = self._failures.refusal(spec, now)
        if refusal is not None:
            raise WorkerLost(
                f"A worker of {spec.model} on {spec.device_text} could not be started "
                f"{refusal.failed_s:.0f} s ago: {refusal.cause} "
                f"Mend that; it is tried again in {max(1.0, refusal.retry_s):.0f} s at the earliest.",
                code="worker_spawn_failed",
            )
        worker_id = f"{spec.model.split('/')[-1][:40]}-{secrets.token_hex(3)}".replace("@", "-")
        life, effects = begin(now)
        worker = Worker(worker_id, spec, life, self._logs.path(worker_id))
        worker.spawn_job_id = job_id
        self._workers[worker_id] = worker
        self._announce_change()
        shell.perform(worker, effects)
        return worker

    async def _leave_spawn(self, shell: Shell, worker: Worker) -> None:
        """Stop waiting for a worker; the last who does ends it, and waits until nothing is left."""
        shell.apply(worker, WaiterLeft())
        if worker.life.phase in ("stopping", "stopped", "failed"):
            await worker.gone.wait()

    async def _devices_are_clear(self, worker: Worker) -> None:
        """Wait while another process is being cleared from the same CUDA devices; that is bounded."""
        spec = worker.spec
        if spec.kind != "cuda":
            return

        def is_in_the_way(other: Worker) -> bool:
            shares = other.spec.kind == "cuda" and set(other.spec.devices) & set(spec.devices)
            return other.life.process == "clearing" and bool(shares)

        await self._until(lambda: not any(is_in_the_way(other) for other in self._workers.values()))

    # --- what the shell tells --------------------------------------------------------------------------

    def _tell(self, worker: Worker, cause: str | None) -> None:
        """Settle those who wait: it is ready, or all fail with the same error."""
        if cause is None:
            self._failures.succeeded(worker.spec)
        else:
            worker.log_tail = worker.last_lines()
        if cause is not None and worker.failure is None:
            worker.failure = _spawn_failure(worker, cause)
            if not worker.life.has_been_ready and worker.life.phase == "failed":
                now = anyio.current_time()
                self._failures.failed(worker.spec, f"it {cause}.", now, random.random())
        worker.launched.set()
        worker.settled.set()

    def _settle_end(self, worker: Worker) -> None:
        """Nothing of it is left: what was stopped or never ready is forgotten, what failed stays listed."""
        for event in (worker.gone, worker.launched, worker.settled):
            event.set()
        worker.load = EngineLoad()
        if worker.life.phase == "stopped" or not worker.life.has_been_ready:
            self._forget(worker)
            return
        worker.log_tail = worker.log_tail or worker.last_lines()
        self._running_shell().write_soon(worker)
        failed = [w for w in self._workers.values() if w.life.phase == "failed" and w.gone.is_set()]
        for old in failed[:-FAILED_KEPT]:
            self._forget(old)

    def _forget(self, worker: Worker) -> None:
        worker.is_forgotten = True
        self._workers.pop(worker.id, None)
        self._running_shell().write_soon(worker)
        self._announce_change()

    def _announce_change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for something about a worker that not every change is announced of."""
        while not condition():
            with anyio.move_on_after(TICK_S):
                await self.changed.wait()

    # --- asked for by callers --------------------------------------------------------------------------

    async def stop(self, worker_id: str, grace_s: float) -> WorkerInfo:
        """Stop a worker and forget it; one that has failed is only forgotten.

        Raises:
            NotFound: no such worker here.
        """
        worker = self.get(worker_id)
        await self._end(worker, grace_s)
        self._forget(worker)
        return worker.info()

    async def _end(self, worker: Worker, grace_s: float) -> None:
        self._running_shell().apply(worker, StopAsked(grace_s=grace_s))
        if not worker.life.is_over:
            await worker.gone.wait()

    def drain(self, worker_id: str, draining: bool) -> WorkerInfo:
        """Let a worker finish what it has and give it nothing new, or take that back.

        Raises:
            NotFound: no such worker here.
            Conflict: it has ended or is ending.
        """
        worker = self.get(worker_id)
        if worker.life.phase not in ("starting", "up"):
            raise Conflict(
                f"{worker.id} is {worker.life.state}; it takes nothing new anyway.", code="worker_ended"
            )
        self._running_shell().apply(worker, DrainAsked(draining=draining))
        return self.info(worker_id)

    def set_draining(self, draining: bool) -> None:
        """Let the whole hive finish what it has and take nothing new, or take that back."""
        self.draining = draining
        self._announce_change()

    async def sleep(self, worker_id: str, limit_s: float) -> bool:
        """Have a worker give its device memory back and keep its process; False where it cannot.

        It finishes what it has first, for `limit_s` seconds at most.
        """
        worker = self.get(worker_id)
        with anyio.move_on_after(limit_s):
            async with worker.sleep_turn:  # two at once would each take the other's draining for a caller's
                return await self._put_to_sleep(worker, limit_s)
        log.info("worker_cannot_sleep", worker_id=worker.id, reason=f"busy for {limit_s:g} s")
        return False

    async def _put_to_sleep(self, worker: Worker, limit_s: float) -> bool:
        shell, was_draining = self._running_shell(), worker.life.is_draining
        shell.apply(worker, DrainAsked(draining=True))
        try:
            return await self._asked_to_sleep(worker, limit_s)
        finally:
            shell.apply(worker, DrainAsked(draining=was_draining))

    async def _asked_to_sleep(self, worker: Worker, limit_s: float) -> bool:
        """Ask until it is idle enough to; whether it can at all, the first answer tells."""
        while worker.running is not None:
            try:
                await worker.running.client.post_json("/v1/worker/sleep", {}, timeout_s=limit_s)
            except RbeeError as exc:
                if exc.code != "worker_busy":
                    log.info("worker_cannot_sleep", worker_id=worker.id, reason=exc.details)
                    return False
                await anyio.sleep(TICK_S)
                await self._until(lambda: not worker.life.active and not worker.steps)
            else:
                return await self._reaches(worker, lambda life: life.is_asleep, limit_s)
        return False

    async def wake(self, worker_id: str, limit_s: float) -> WorkerInfo:
        """Have a sleeping worker take its memory again, and wait until it is ready.

        Raises:
            WorkerLost: it did not become ready in time.
        """
        worker = self.get(worker_id)
        try:
            if worker.running is not None:
                await worker.running.client.post_json("/v1/worker/wake", {}, timeout_s=limit_s)
        except RbeeError as exc:
            raise WorkerLost(f"{worker.id} could not be woken: {exc.details}", code="wake_failed") from exc
        if not await self._reaches(worker, lambda life: life.is_serving, limit_s):
            raise WorkerLost(
                f"{worker.id} was not ready {limit_s:g} s after it was woken: it is {worker.life.state}.",
                code="wake_failed",
            )
        return self.info(worker_id)

    async def _reaches(self, worker: Worker, is_there: Callable[[Life], bool], limit_s: float) -> bool:
        with anyio.move_on_after(limit_s):
            await self._until(lambda: is_there(worker.life) or worker.life.is_over)
        return is_there(worker.life)


def _narrate_start(worker: Worker, context: JobContext, *, has_joined: bool) -> None:
    if worker.failure is not None:
        return
    where = f"{worker.id} for {worker.model} on {worker.spec.device_text}"
    where += f" (pid {worker.pid}, port {worker.port})"
    context.narrate(
        "worker_spawn_start",
        f"Waiting for {where}, whose start is under way." if has_joined else f"Spawning {where}.",
        worker_id=worker.id,
        pid=worker.pid,
        port=worker.port,
        model=worker.model,
        devices=list(worker.spec.devices),
        joined=has_joined,
    )


async def _until_settled(worker: Worker, context: JobContext) -> None:
    """Wait, narrating, until the worker is ready.

    Raises:
        RbeeError: it will not be.
    """
    started = anyio.current_time()
    while not worker.settled.is_set():
        waited = anyio.current_time() - started
        since = f" ({waited:.0f} s so far)" if waited > 1 else ""
        context.narrate(
            "worker_spawn_health_check",
            f"Waiting until {worker.id} is ready{since}: its engine is loading.",
            worker_id=worker.id,
            waited_s=round(waited, 1),
        )
        with anyio.move_on_after(NARRATE_EVERY_S):
            await worker.settled.wait()
    failure = worker.failure
    if failure is not None:
        # Made anew: one error that several raise would collect all their tracebacks.
        raise type(failure)(
            failure.details, code=failure.code, title=failure.error, retryable=failure.retryable
        )


def _spawn_failure(worker: Worker, cause: str) -> RbeeError:
    text = f"{worker.id} did not become ready: it {cause}."
    if worker.log_tail:
        lines = "\n".join(worker.log_tail)
        text += f" Its last log lines ({worker.log_path.name} on the hive):\n{lines}"
    return WorkerLost(text, code="out_of_memory" if is_out_of_memory(cause) else "worker_spawn_failed")
