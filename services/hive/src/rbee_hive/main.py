"""The hive: one machine, one job server, its workers."""

from collections.abc import Mapping

from rbee_hive.app import build_hive_app
from rbee_hive.config import HiveConfig
from rbee_hive.devices import Devices
from rbee_hive.handlers import HiveHandlers
from rbee_hive.models import Models
from rbee_hive.presence import Presence
from rbee_hive.workers import Workers
from rbee_job_server import JobServer, ServeConfig, bind, serve


async def run(config: HiveConfig, environ: Mapping[str, str]) -> int:
    """Serve until a signal or a failure, stop every worker, give the exit code.

    Raises:
        CannotBind: the port is taken.
    """
    sock = bind(config.host, config.port)
    devices = Devices()
    devices.open()
    models = Models(config.models_dir)
    workers = Workers(config, devices, models, environ)
    handlers = HiveHandlers(config.hive_id, workers, devices, models)
    server = JobServer(
        service="hive",
        actor=f"hive/{config.hive_id}",
        handlers=handlers.table(),
        admit=handlers.admit,
    )
    presence = Presence(config, server.boot, workers, devices, models)

    async def announce() -> None:
        await presence.announce(sock.getsockname()[1])

    async def stop() -> None:
        await workers.stop_all()
        presence.beats.close()

    try:
        return await serve(
            build_hive_app(config, server, presence, devices),
            server,
            sock,
            ServeConfig(
                host=config.host,
                port=config.port,
                drain_timeout_s=config.drain_timeout_s,
                limits=config.limits,
            ),
            loops=[workers.run, presence.beat, announce],
            on_stop=stop,
            on_crash=workers.kill_all,
        )
    finally:
        devices.close()
