"""The queen: one job server, the fleet, the scheduler."""

import time
from datetime import UTC, datetime

import anyio

from rbee_contracts.nodes import QueenHeartbeat
from rbee_job_server import JobServer, ServeConfig, bind, serve
from rbee_job_server.beats import BEAT_EVERY_S, Beats
from rbee_queen.app import build_queen_app
from rbee_queen.config import QueenConfig
from rbee_queen.fleet import Fleet
from rbee_queen.handlers import QueenHandlers


async def run(config: QueenConfig) -> int:
    """Serve until a signal or a failure; give the exit code.

    Raises:
        CannotBind: the port is taken.
    """
    sock = bind(config.host, config.port)
    fleet = Fleet(time.monotonic)
    beats = Beats()
    server = JobServer(service="queen", actor="queen", handlers=QueenHandlers(fleet).table())

    async def beat() -> None:
        while True:
            timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            beats.publish(QueenHeartbeat(timestamp=timestamp, hives=fleet.infos()))
            await anyio.sleep(BEAT_EVERY_S)

    async def stop() -> None:
        beats.close()

    return await serve(
        build_queen_app(server, fleet, beats),
        server,
        sock,
        ServeConfig(host=config.host, port=config.port, drain_timeout_s=config.drain_timeout_s),
        loops=[fleet.run, beat],
        on_stop=stop,
    )
