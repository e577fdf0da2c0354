"""The queen: one job server, the fleet, the scheduler."""

import time
from datetime import UTC, datetime

import anyio
import structlog

from rbee_contracts.nodes import QueenHeartbeat
from rbee_contracts.operations import OpenAI
from rbee_job_server import JobServer, ServeConfig, bind, serve
from rbee_job_server.beats import BEAT_EVERY_S, Beats
from rbee_queen.app import build_queen_app
from rbee_queen.check import QueenCheck
from rbee_queen.config import QueenConfig
from rbee_queen.fleet import Fleet
from rbee_queen.handlers import QueenHandlers
from rbee_queen.journal import StoreJournal
from rbee_queen.openai import OpenAIJobs
from rbee_queen.recovery import restore
from rbee_queen.store import JobStore
from rbee_queen.store.sql import SqlStore

log = structlog.get_logger(__name__)


def open_store(config: QueenConfig, port: int) -> JobStore:
    """Open the database the configuration names.

    Raises:
        StoreFailed: it cannot be used.
    """
    url = config.database or f"sqlite:///{config.state_dir / f'queen-{port}' / 'queen.db'}"
    store = SqlStore(url, store_payloads=config.store_payloads)
    store.open()
    return store


async def run(config: QueenConfig) -> int:
    """Serve until a signal or a failure; give the exit code.

    What the run before left is known before the first request is answered.

    Raises:
        CannotBind: the port is taken.
        StoreFailed: the database cannot be used.
    """
    sock = bind(config.host, config.port)
    store = open_store(config, sock.getsockname()[1])
    journal = StoreJournal(store, keep_s=config.keep_days * 86_400, keep_jobs=config.keep_jobs)
    fleet = Fleet(
        time.monotonic,
        journal,
        token=config.access.token,
        patience=config.patience,
        jobs=lambda: server.registry,
    )
    beats = Beats()
    check = QueenCheck(config, journal, fleet, jobs=lambda: server.registry)
    handlers = QueenHandlers(fleet, check.run)
    openai = OpenAIJobs(handlers.infer, fleet.infos, config.aliases)
    server = JobServer(
        service="queen",
        actor="queen",
        handlers={**handlers.table(), OpenAI: openai},
        journal=journal,
        read_output=handlers.read_output,
    )
    resumed = restore(store, server, fleet, datetime.now(UTC))
    log.info("restored", hives=len(fleet.infos()), unfinished_jobs=resumed)

    async def beat() -> None:
        while True:
            timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            beats.publish(QueenHeartbeat(timestamp=timestamp, hives=fleet.infos()))
            await anyio.sleep(BEAT_EVERY_S)

    async def stop() -> None:
        await journal.flushed()
        beats.close()

    try:
        return await serve(
            build_queen_app(config, server, fleet, beats),
            server,
            sock,
            ServeConfig(
                host=config.host,
                port=config.port,
                drain_timeout_s=config.drain_timeout_s,
                limits=config.limits,
            ),
            loops=[journal.run, journal.forget, fleet.run, beat],
            on_drained=fleet.leave,
            on_stop=stop,
        )
    finally:
        store.close()
