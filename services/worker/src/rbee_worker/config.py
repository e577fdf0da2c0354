"""The worker's configuration: its command line, read once."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from msgspec import Struct

from rbee_contracts.access import NONCE_VARIABLE, UnusableToken, check_token
from rbee_contracts.ids import MODEL_ID_PATTERN, WORKER_ID_PATTERN
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_job_server.logs import LEVELS
from rbee_job_server.options import add_guard_options, read_guard_options, refuse
from rbee_job_server.tracing import add_tracing_option, read_tracing_option
from rbee_worker.engine.sim import SimParameters, add_arguments, from_args


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """What `rbee-worker` was started with.

    `listen_fd` is a listening socket that the hive made; `sim` is None with the real engine. `nonce` is what
    its hive knows it by, and `hive_absence_s` the silence of its hive after which it stops (None: never).
    """

    model: str
    served_model_name: str
    worker_id: str
    host: str
    port: int
    listen_fd: int | None
    drain_timeout_s: float
    log_level: str
    engine_args: list[str]
    sim: SimParameters | None
    nonce: str = ""
    hive_absence_s: float | None = None
    access: AccessConfig = AccessConfig()
    limits: Limits = Limits()
    otlp_endpoint: str | None = None


MAX_TOKEN_BYTES = 4096

_NOTHING: Mapping[str, str] = MappingProxyType({})


def parse(argv: list[str], environ: Mapping[str, str] = _NOTHING) -> WorkerConfig:
    """Read the command line; what follows `--` goes to the engine. `RBEE_TOKEN` stands in for a flag.

    Raises:
        SystemExit: with status 2 and one clear line, when it cannot be used.
    """
    own, engine_args = argv, []
    if "--" in argv:
        split = argv.index("--")
        own, engine_args = argv[:split], argv[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="rbee-worker",
        description="Serve one model with one engine. Started by rbee-hive; can be run by hand.",
        epilog="Arguments after -- go to vLLM unchanged, as on the command line of `vllm serve`.",
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH_OR_ID", help="a model directory, or a model id"
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="the name requests use (default: from --model)"
    )
    parser.add_argument("--worker-id", metavar="ID", help="default: worker-<pid>")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    where.add_argument("--listen-fd", type=int, metavar="FD", help="inherited socket that already listens")
    parser.add_argument("--engine", choices=("vllm", "sim"), default="vllm", help="default: %(default)s")
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="seconds for running jobs on SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    add_tracing_option(parser)
    add_guard_options(parser)
    parser.add_argument(
        "--token-fd", type=int, metavar="FD", help="inherited pipe that holds this worker's own token"
    )
    parser.add_argument(
        "--hive-absence-s",
        type=float,
        metavar="S",
        help="seconds without a word from its hive after which it stops; the hive gives this",
    )
    add_arguments(
        parser.add_argument_group("sim", "the model of a GPU engine, for load tests; with --engine sim")
    )
    args = parser.parse_args(own)
    name = args.served_model_name or (Path(args.model).name if Path(args.model).is_dir() else args.model)
    worker_id = args.worker_id or f"worker-{os.getpid()}"
    if not re.search(MODEL_ID_PATTERN, name):
        parser.error(f"{name!r} cannot name a model; give --served-model-name, e.g. my-model or org/my-model")
    if not re.search(WORKER_ID_PATTERN, worker_id):
        parser.error(f"--worker-id {worker_id!r} may only have letters, digits, '.', '_' and '-'")
    if args.hive_absence_s is not None and not args.hive_absence_s > 0:
        parser.error(f"--hive-absence-s {args.hive_absence_s:g} is not above 0")
    if args.engine == "sim" and engine_args:
        parser.error("the sim engine takes no arguments after --; its own begin with --sim-")
    given = None if args.token_fd is None else _token_from(parser, args.token_fd)
    guarding = read_guard_options(parser, args, environ, given)
    return WorkerConfig(
        model=args.model,
        served_model_name=name,
        worker_id=worker_id,
        host=args.host,
        port=args.port or 0,
        listen_fd=args.listen_fd,
        drain_timeout_s=args.drain_timeout_s,
        log_level=args.log_level,
        engine_args=engine_args,
        sim=from_args(args) if args.engine == "sim" else None,
        nonce=environ.get(NONCE_VARIABLE, ""),
        hive_absence_s=args.hive_absence_s,
        access=guarding.access,
        limits=guarding.limits,
        otlp_endpoint=read_tracing_option(parser, args, environ),
    )


def _token_from(parser: argparse.ArgumentParser, fd: int) -> str:
    """Read the token that the hive put into a pipe; nobody can read it there again."""
    try:
        with os.fdopen(fd, "rb") as pipe:
            return check_token(pipe.read(MAX_TOKEN_BYTES).decode("latin-1"), f"file descriptor {fd}")
    except (OSError, UnusableToken) as exc:
        refuse(parser, str(exc) if isinstance(exc, UnusableToken) else f"--token-fd {fd}: {exc.strerror}")
