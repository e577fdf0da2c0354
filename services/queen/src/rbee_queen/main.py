"""The queen: one job server, the fleet, the scheduler."""

import math
import time
from datetime import UTC, datetime
from functools import partial

import anyio
import structlog

from rbee_contracts.nodes import QueenHeartbeat
from rbee_contracts.operations import LogSearch, OpenAI
from rbee_job_server import JobServer, ServeConfig, bind, serve
from rbee_job_server.beats import BEAT_EVERY_S, Beats
from rbee_job_server.log_search import LogRing
from rbee_job_server.systemd import Notifier, Reporter
from rbee_job_server.tracing import open_tracer
from rbee_queen import VERSION
from rbee_queen.app import build_queen_app
from rbee_queen.check import QueenCheck
from rbee_queen.config import QueenConfig
from rbee_queen.fleet import Fleet
from rbee_queen.handlers import QueenHandlers
from rbee_queen.inference import SETTLE_S
from rbee_queen.journal import StoreJournal
from rbee_queen.log_search import ClusterLogs
from rbee_queen.metrics.collector import QueenCollector, model_labels
from rbee_queen.openai import OpenAIJobs
from rbee_queen.recovery import restore
from rbee_queen.store import JobStore
from rbee_queen.store.sql import SqlStore

log = structlog.get_logger(__name__)

STORE_LIMIT_S = 600.0
"""What the service manager is told that bringing the database up to this version may last."""

RESTORE_LIMIT_S = 120.0
"""What it is told that reading the stored jobs may last."""


def open_store(config: QueenConfig, port: int) -> JobStore:
    """Open the database the configuration names.

    Raises:
        StoreFailed: it cannot be used.
    """
    url = config.database or f"sqlite:///{config.state_dir / f'queen-{port}' / 'queen.db'}"
    store = SqlStore(url, store_payloads=config.store_payloads)
    store.open()
    return store


async def run(config: QueenConfig, notifier: Notifier, logs: LogRing) -> int:
    """Serve until a signal or a failure; give the exit code.

    What the run before left is known before the first request is answered.

    Raises:
        CannotBind: the port is taken.
        StoreFailed: the database cannot be used.
    """
    sock = bind(config.host, config.port)
    notifier.starting("opening the database", STORE_LIMIT_S)
    store = open_store(config, sock.getsockname()[1])
    notifier.starting("reading the jobs of the run before", RESTORE_LIMIT_S)
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
    openai = OpenAIJobs(handlers.infer, fleet.infos, config.aliases, partial(fleet.settled, SETTLE_S))
    tracer = open_tracer(config.otlp_endpoint, service="queen", instance="queen", version=VERSION)
    server = JobServer(
        service="queen",
        actor="queen",
        handlers={**handlers.table(), OpenAI: openai, LogSearch: ClusterLogs(logs, fleet)},
        journal=journal,
        read_output=handlers.read_output,
        tracer=tracer,
    )
    server.metrics.models = lambda: model_labels(fleet.hives, config.aliases)
    resumed = restore(store, server, fleet, datetime.now(UTC))
    log.info("restored", hives=len(fleet.infos()), unfinished_jobs=resumed)

    last_beat = math.inf

    def describe() -> str:
        online = sum(hive.state == "online" for hive in fleet.infos())
        return f"hives online: {online} of {len(fleet.infos())}; jobs running: {server.running}"

    async def beat() -> None:
        nonlocal last_beat
        while True:
            last_beat = anyio.current_time()
            timestamp = datetime.now(UTC).isoformat(timespec="milliseconds")
            beats.publish(QueenHeartbeat(timestamp=timestamp, hives=fleet.infos()))
            await anyio.sleep(BEAT_EVERY_S)

    async def stop() -> None:
        await journal.flushed()
        beats.close()

    try:
        return await serve(
            build_queen_app(
                config, server, fleet, beats, [QueenCollector(fleet, handlers.inference, journal)]
            ),
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
            reporter=Reporter(
                notifier,
                describe=describe,
                vital={"fleet": lambda: fleet.last_round, "heartbeats": lambda: last_beat},
            ),
        )
    finally:
        store.close()
        if tracer is not None:
            tracer.close()
