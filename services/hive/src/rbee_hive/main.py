"""The hive: one machine, one job server, its workers."""

from collections.abc import Mapping
from datetime import UTC, datetime

import anyio.to_thread
import structlog

from rbee_hive.app import build_hive_app
from rbee_hive.check import HiveChecker
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices, Reservations
from rbee_hive.handlers import HiveHandlers
from rbee_hive.models import (
    Downloads,
    ModelHandlers,
    Models,
    QueenPeers,
    read_hub_access,
    users_by_model,
)
from rbee_hive.presence import Presence
from rbee_hive.rebuild import rebuild
from rbee_hive.supervisor.handlers import WorkerHandlers
from rbee_hive.supervisor.workers import Workers
from rbee_hive.telemetry import Telemetry
from rbee_job_server import JobServer, ServeConfig, bind, serve

log = structlog.get_logger(__name__)


async def run(config: HiveConfig, environ: Mapping[str, str]) -> int:
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
    await workers.adopt()
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
    server = JobServer(
        service="hive",
        actor=f"hive/{config.hive_id}",
        handlers={
            **handlers.table(),
            **WorkerHandlers(workers, telemetry.devices).table(),
            **ModelHandlers(models, downloads).table(),
            **HiveChecker(config, devices, hub.endpoint).table(),
        },
        admit=handlers.admit,
    )
    restored = await rebuild(server, workers.all(), config.hive_id, datetime.now(UTC))
    log.info("restored", workers=len(workers.all()), jobs=restored)
    presence = Presence(config, server.boot, workers, telemetry)

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
            build_hive_app(config, server, presence, telemetry, models),
            server,
            sock,
            ServeConfig(
                host=config.host,
                port=config.port,
                drain_timeout_s=config.drain_timeout_s,
                limits=config.limits,
            ),
            loops=[workers.run, downloads.run, presence.beat, announce],
            on_stop=stop,
            on_crash=leave,
            on_leave=leave,
        )
    finally:
        devices.close()
