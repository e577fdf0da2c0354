"""The hive: one machine, one job server, its workers."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime

import anyio.to_thread
import structlog

from rbee_hive import VERSION
from rbee_hive.app import build_hive_app
from rbee_hive.check import HiveChecker
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices, Reservations
from rbee_hive.handlers import HiveHandlers
from rbee_hive.log_search import HiveLogs
from rbee_hive.metrics import HiveCollector, model_labels
from rbee_hive.models import (
    Downloads,
    ModelHandlers,
    Models,
    QueenPeers,
    read_hub_access,
    users_by_model,
)
from rbee_hive.preload import Preload
from rbee_hive.presence import Presence
from rbee_hive.rebuild import rebuild
from rbee_hive.supervisor.handlers import WorkerHandlers
from rbee_hive.supervisor.workers import LOGS_FOLDER, Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_server import JobServer, ServeConfig, bind, serve
from rbee_job_server.log_search import LogRing
from rbee_job_server.systemd import Notifier, Reporter
from rbee_job_server.tracing import open_tracer

log = structlog.get_logger(__name__)

ADOPT_LIMIT_S = 60.0
"""What the service manager is told that each step of taking up workers and their jobs may last."""


async def run(config: HiveConfig, environ: Mapping[str, str], notifier: Notifier, logs: LogRing) -> int:
    """Serve until a signal or a failure, stop every worker, give the exit code.

    A crash and SIGUSR1 leave the workers, and what runs on them, to the next hive.

    Raises:
        CannotBind: the port is taken.
        UnusableHub: the settings of the model hub cannot be used.
    """
    hub = read_hub_access(environ, endpoint=config.hub.endpoint, token_file=config.hub.token_file)
    sock = bind(config.host, config.port)
    devices = Devices(choice=config.device_choice)
    devices.open()
    models = Models(config.models_dir, extra_roots=config.model_roots, state_dir=config.state_dir)
    token = config.access.token
    peers = QueenPeers(config.queen_url, token, config.hive_id) if config.queen_url and config.peers else None
    downloads = Downloads(models, hub, peers=peers, token=token)
    reservations = Reservations(config.kept_free)

    async def find_model(model: str) -> str:
        path = await anyio.to_thread.run_sync(models.path, model)
        models.used(model)
        return str(path)

    workers = Workers(config, devices, find_model, reservations, environ)
    models.users = lambda: users_by_model(workers.infos())
    notifier.starting("taking up the workers of the hive before", ADOPT_LIMIT_S)
    await workers.adopt()
    notifier.starting(f"asking {len(workers.all())} workers for their jobs", ADOPT_LIMIT_S)
    telemetry = Telemetry(
        hive_id=config.hive_id,
        labels=config.labels,
        workers=workers,
        devices=devices,
        models=models,
        reservations=reservations,
        is_sim=config.worker_engine == "sim",
    )
    handlers = HiveHandlers(config.hive_id, workers, telemetry)
    actor = f"hive/{config.hive_id}"
    tracer = open_tracer(config.otlp_endpoint, service="hive", instance=actor, version=VERSION)
    server = JobServer(
        service="hive",
        actor=actor,
        handlers={
            **handlers.table(),
            **WorkerHandlers(workers, telemetry.devices).table(),
            **ModelHandlers(models, downloads).table(),
            **HiveChecker(config, devices, hub.endpoint).table(),
            **HiveLogs(logs, actor, config.state_dir / LOGS_FOLDER).table(),
        },
        admit=handlers.admit,
        tracer=tracer,
    )
    restored = await rebuild(server, workers.all(), config.hive_id, datetime.now(UTC))
    log.info("restored", workers=len(workers.all()), jobs=restored)
    presence = Presence(config, server.boot, workers, telemetry)
    preload = Preload(config.preload, server, workers.infos)

    def describe() -> str:
        states = Counter(worker.life.state for worker in workers.all())
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        return f"workers: {told or 'none'}; jobs running: {server.running}"

    collector = HiveCollector(workers, telemetry, downloads, presence)
    server.metrics.models = lambda: model_labels(workers.all())

    async def announce() -> None:
        await presence.announce(sock.getsockname()[1])

    def leave() -> None:
        """Leave workers and jobs as they are: the next hive takes them up."""
        server.keeps_jobs = True
        workers.leave()

    async def stop() -> None:
        if not workers.is_leaving:
            await workers.stop_all()
        presence.beats.close()

    try:
        return await serve(
            build_hive_app(
                config, server, presence, telemetry, models, workers, preload.not_ready, [collector]
            ),
            server,
            sock,
            ServeConfig(
                host=config.host,
                port=config.port,
                drain_timeout_s=config.drain_timeout_s,
                limits=config.limits,
            ),
            loops=[workers.run, downloads.run, presence.beat, announce, preload.run],
            on_stop=stop,
            on_crash=leave,
            on_leave=leave,
            reporter=Reporter(
                notifier,
                describe=describe,
                vital={"workers": lambda: workers.last_round, "heartbeats": lambda: presence.last_beat},
            ),
        )
    finally:
        devices.close()
        if tracer is not None:
            tracer.close()
