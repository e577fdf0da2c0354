"""`rbee up` from its start to its end."""

import asyncio
import contextlib
import os
import shlex
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path

from rbee_contracts.errors import Conflict, RbeeError
from rbee_contracts.nodes import (
    DeviceListResult,
    ModelListResult,
    QueenHeartbeat,
    ServiceInfo,
)
from rbee_contracts.operations import DeviceList, ModelList, WorkerSpawn
from rbee_job_client import JobClient, Rejected, StreamCut, Timeouts, Unreachable
from rbee_keeper.client import perform
from rbee_keeper.output import Output
from rbee_keeper.units import duration
from rbee_keeper.up.cluster import ChildDied, Cluster, Stopped
from rbee_keeper.up.plan import Plan, Wanted, make_plan, taken
from rbee_keeper.up.voice import Voice
from rbee_keeper.up.workers import watch_workers

READY_TIMEOUT_S = 60.0
READY_POLL_S = 0.1

CONNECT_S = 20.0
RESUME_S = 20.0
"""Where a service has ended this is seen at once, so these only bear with a machine that is too busy."""

SAY_WAITING_EVERY_S = 5.0
EXIT_FAILED = 1
EXIT_HURRIED = 130

PROMPT = "A job is an event stream:"


async def run(wanted: Wanted, out: Output, environ: Mapping[str, str]) -> int:
    """Run a cluster until a signal (0), a second signal (130) or a failure (1).

    Raises:
        RbeeError: it could not be started.
    """
    voice = Voice(out)
    try:
        return await _run(voice, wanted, out.json, environ)
    except RbeeError as exc:
        if out.json:
            voice.tell("failed", exc.details, code=exc.code)
            out.has_told_end = True
        raise


async def _run(voice: Voice, wanted: Wanted, is_json: bool, environ: Mapping[str, str]) -> int:
    with contextlib.ExitStack() as reserved:
        plan = make_plan(wanted, environ, Path.cwd(), reserved)
        return await _run_plan(voice, wanted, plan, is_json, environ)


async def _run_plan(
    voice: Voice, wanted: Wanted, plan: Plan, is_json: bool, environ: Mapping[str, str]
) -> int:
    await _check_ports(wanted, plan)
    _make_folder(plan.folder)
    failure: RbeeError | None = None

    def tell_stop() -> None:
        voice.tell("stop", ("" if is_json else "\n") + "Stopping; Ctrl-C again ends everything at once.")

    async with Cluster(voice, environ) as cluster:
        up = _Up(wanted, plan, voice, cluster)
        try:
            await cluster.while_alive(asyncio.create_task(up.run()), tell_stop)
        except Stopped:
            pass
        except RbeeError as exc:
            failure = exc
            if isinstance(exc, ChildDied):
                _tell_death(voice, exc)
    if failure is not None and not isinstance(failure, ChildDied):
        raise failure
    if failure is not None:
        return EXIT_FAILED
    if cluster.was_hurried:
        return EXIT_HURRIED
    voice.tell("down", "Everything has stopped.")
    return 0


class _Up:
    """The order of things: queen, hive, worker, and then watching."""

    def __init__(self, wanted: Wanted, plan: Plan, voice: Voice, cluster: Cluster) -> None:
        self._wanted = wanted
        self._plan = plan
        self._voice = voice
        self._cluster = cluster
        self._ready: set[str] = set()

    async def run(self) -> None:
        plan = self._plan
        await self._cluster.start("queen", plan.queen_args, self._log_path("queen"))
        # Both need a second to load; the hive announces itself again until the queen answers.
        await self._cluster.start("hive", plan.hive_args, self._log_path("hive"))
        timeouts = Timeouts(connect=CONNECT_S, resume=RESUME_S)
        async with (
            JobClient(plan.queen_url, token=self._wanted.token, timeouts=timeouts) as queen,
            JobClient(plan.hive_url, token=self._wanted.token, timeouts=timeouts) as hive,
        ):
            await self._until_ready("queen", queen)
            await self._until_ready("hive", hive)
            hive_id = await self._until_online(queen)
            await self._tell_devices(hive)
            model = self._wanted.model or await self._only_model(hive)
            if model is not None:
                await self._spawn(queen, hive_id, model)
            self._tell_ready(model)
            await watch_workers(hive, self._voice, self._plan.folder / "logs", self._ready)

    async def _until_ready(self, name: str, client: JobClient) -> None:
        """Wait for `/ready`; says so when it takes long.

        Raises:
            RbeeError: not ready in time.
        """
        started = _now()
        said = started
        while True:
            try:
                await client.get_json("/ready", dict)
                break
            except Rejected as exc:
                reason = exc.details
            except Unreachable:
                reason = "it does not answer yet"
            if _now() - started > READY_TIMEOUT_S:
                raise RbeeError(
                    f"The {name} was not ready after {READY_TIMEOUT_S:.0f} s: {reason}. "
                    f"Its log: {self._log_path(name) or 'above'}",
                    code="not_ready",
                )
            if _now() - said > SAY_WAITING_EVERY_S:
                said = _now()
                self._voice.tell(
                    "waiting", f"not ready after {duration(_now() - started)}: {reason}", who=name
                )
            await asyncio.sleep(READY_POLL_S)
        self._voice.tell("ready", f"ready at {client.base_url}", who=name, url=client.base_url)

    async def _until_online(self, queen: JobClient) -> str:
        """Wait until the queen sees the hive; give the hive's id.

        Raises:
            RbeeError: it did not in time.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while True:
                    with contextlib.suppress(StreamCut):
                        async with aclosing(queen.heartbeats("", QueenHeartbeat)) as beats:
                            async for beat in beats:
                                for hive in beat.hives:
                                    if hive.state == "online" and hive.url == self._plan.hive_url:
                                        return str(hive.hive_id)
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError as exc:
            raise RbeeError(
                f"The queen did not see the hive within {READY_TIMEOUT_S:.0f} s. "
                f"The hive's log: {self._log_path('hive') or 'above'}",
                code="not_ready",
            ) from exc

    async def _tell_devices(self, hive: JobClient) -> None:
        listed: DeviceListResult = await perform(hive, DeviceList())
        names = ", ".join(f"{device.kind}:{device.index} {device.name}" for device in listed.devices)
        self._voice.tell("devices", f"devices: {names}", who="hive")

    async def _only_model(self, hive: JobClient) -> str | None:
        """Give the model to load where none was named: the only one there; else say what to do."""
        listed: ModelListResult = await perform(hive, ModelList())
        names = [model.model for model in listed.models]
        if len(names) == 1:
            self._voice.tell("model", f"{names[0]} is the only one in {self._models_dir}", who="model")
            return names[0]
        if not names:
            text = f"none in {self._models_dir}; put a model's folder there, or name another --models-dir"
        else:
            text = f"several in {self._models_dir}: {', '.join(names)}; choose one with --model"
        self._voice.tell("no_model", text, who="model", style="yellow")
        return None

    async def _spawn(self, queen: JobClient, hive_id: str, model: str) -> None:
        operation = WorkerSpawn(model=model, hive_id=hive_id, worker_args=self._wanted.worker_args)
        spawned = await perform(queen, operation, self._voice.narrate, is_ours=True)
        self._ready.add(spawned.worker_id)

    def _tell_ready(self, model: str | None) -> None:
        url = self._plan.queen_url
        default = url == "http://127.0.0.1:7833"
        queen = "" if default else f" --queen {url}"
        name = model or "MODEL"
        body = f'{{"operation":"infer","model":"{name}","prompt":"{PROMPT}","max_tokens":40}}'
        bearer = ""
        if self._wanted.token is not None:
            file = self._wanted.token_file and shlex.quote(str(self._wanted.token_file))
            bearer = '-H "Authorization: Bearer ' + (f"$(cat {file})" if file else "$RBEE_TOKEN") + '" '
            queen += f" --token-file {file}" if file else ""
        lines = ["", "Ready." if model else "Ready, without a worker.", ""]
        if model is None:
            lines += ["Load a model:", f"  rbee{queen} worker spawn --model MODEL", ""]
        lines += [
            "Ask for a completion, in another terminal:",
            f"  rbee{queen} infer --model {name} {shlex.quote(PROMPT)}",
            "",
            "Or with curl, the answer names the stream to read with: curl -sSN "
            f"{bearer}{url}/v1/jobs/JOB_ID/stream",
            f"  curl -sS {bearer}{url}/v1/jobs -H 'Content-Type: application/json' -d {shlex.quote(body)}",
            "",
        ]
        if not self._wanted.verbose:
            lines.append(f"Logs: {self._plan.folder} (queen.log, hive.log, and logs/ of the workers)")
        else:
            lines.append(f"Logs of the workers: {self._plan.folder / 'logs'}")
        lines.append("Stop with Ctrl-C.")
        self._voice.tell(
            "up",
            "\n".join(lines),
            queen_url=url,
            hive_url=self._plan.hive_url,
            model=model,
            logs=str(self._plan.folder),
        )

    def _log_path(self, name: str) -> Path | None:
        return None if self._wanted.verbose else self._plan.folder / f"{name}.log"

    @property
    def _models_dir(self) -> str:
        return str(self._plan.models_dir) if self._plan.models_dir else "the hive's models folder"


async def _check_ports(wanted: Wanted, plan: Plan) -> None:
    """Find out before anything is started whether the ports are free.

    Raises:
        Conflict: one is not; says who has it and what to do.
    """
    for name, url in (("queen", plan.queen_url), ("hive", plan.hive_url)):
        port = int(url.rpartition(":")[2])
        why = taken(wanted.host, port)
        if why is None:
            continue
        other = await _who(url, wanted.token)
        text = f"Port {port} of {wanted.host} cannot be used for the {name}: {why}."
        if other is not None:
            text += f" An rbee {other} answers there: use it (rbee status), or stop it first."
        raise Conflict(f"{text} Or take another: rbee up --{name}-port {port + 10}", code="port_taken")


async def _who(url: str, token: str | None) -> str | None:
    """Give which of rbee's services answers at `url`, if one does."""
    async with JobClient(url, token=token, timeouts=Timeouts(connect=1.0, request=2.0)) as client:
        try:
            info: ServiceInfo = await client.get_json("/v1/info", ServiceInfo)
        except RbeeError:
            return None
    return info.name


def _make_folder(folder: Path) -> None:
    """Make the folder of the logs, readable by this user only; keep the last run's logs as `.old`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        for name in ("queen", "hive"):
            log = folder / f"{name}.log"
            if log.exists():
                log.replace(log.with_suffix(".log.old"))
    except OSError as exc:
        raise RbeeError(
            f"The folder of the logs cannot be written: {exc}. Set XDG_STATE_HOME to another.",
            code="no_state_dir",
        ) from exc


def _tell_death(voice: Voice, died: ChildDied) -> None:
    child = died.child
    tail = child.tail()
    text = died.details
    if tail:
        text += f" The last lines of {child.log_path}:\n" + "\n".join(f"    {line}" for line in tail)
    voice.tell("died", text, style="red", who=child.name, exit_code=child.exit_code)


def _now() -> float:
    return asyncio.get_running_loop().time()
