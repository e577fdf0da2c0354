"""The worker: one engine, one job server, one process."""

from rbee_contracts.operations import Infer, OpenAI
from rbee_job_server import JobServer, ServeConfig, adopt, bind, serve
from rbee_job_server.tracing import open_tracer
from rbee_worker import VERSION
from rbee_worker.app import build_worker_app
from rbee_worker.config import WorkerConfig
from rbee_worker.engine.base import Engine
from rbee_worker.infer import InferHandler
from rbee_worker.openai import OpenAIHandler
from rbee_worker.state import WorkerState


async def run(config: WorkerConfig) -> int:
    """Serve until a signal or the engine's end; give the exit code.

    Raises:
        CannotBind: the port is taken.
    """
    sock = bind(config.host, config.port) if config.listen_fd is None else adopt(config.listen_fd)
    engine = _engine(config)
    state = WorkerState(config, engine)
    actor = f"worker/{config.worker_id}"
    tracer = open_tracer(config.otlp_endpoint, service="worker", instance=actor, version=VERSION)
    server = JobServer(
        service="worker",
        actor=actor,
        handlers={
            Infer: state.running(InferHandler(engine, config.served_model_name)),
            OpenAI: state.running(OpenAIHandler(engine)),
        },
        admit=state.admit,
        tracer=tracer,
    )

    server.metrics.otherwise = config.served_model_name

    async def run_engine() -> None:
        await state.run_engine(server)

    try:
        return await serve(
            build_worker_app(config, server, state, engine),
            server,
            sock,
            ServeConfig(
                host=config.host,
                port=config.port,
                drain_timeout_s=config.drain_timeout_s,
                limits=config.limits,
            ),
            loops=[run_engine, state.watch_hive],
            on_stop=engine.stop,
            on_crash=engine.kill,
        )
    finally:
        if tracer is not None:
            tracer.close()


def _engine(config: WorkerConfig) -> Engine:
    if config.sim is not None:
        from rbee_worker.engine.sim import SimEngine

        return SimEngine(config.served_model_name, config.sim)
    from rbee_worker.engine.vllm import VllmEngine

    return VllmEngine(
        config.model, config.served_model_name, config.engine_args, otlp_endpoint=config.otlp_endpoint
    )
