"""The queen's configuration: its command line, read once."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_job_server.logs import LEVELS
from rbee_job_server.options import add_guard_options, read_guard_options
from rbee_job_server.tracing import add_tracing_option, read_tracing_option
from rbee_queen.fleet.liveness import LOST_AFTER_S, UNREACHABLE_AFTER_S, Patience
from rbee_queen.openai.aliases import Aliases, BadAlias

DEFAULT_PORT = 7833

MIN_PATIENCE_S = 2.0
"""The least silence that may mean anything: two heartbeats."""


class QueenConfig(Struct, frozen=True, kw_only=True):
    """What `rbee-queen` was started with. Without `database` it is a SQLite file in `state_dir`.

    `state_dir` has a folder for each port, so two queens on one machine never share one.
    """

    host: str
    port: int
    state_dir: Path
    database: str | None
    store_payloads: bool
    keep_days: float
    keep_jobs: int
    drain_timeout_s: float
    log_level: str
    patience: Patience = Patience()
    access: AccessConfig = AccessConfig()
    limits: Limits = Limits()
    aliases: Aliases = Aliases()
    otlp_endpoint: str | None = None


def parse(argv: list[str], environ: Mapping[str, str]) -> QueenConfig:
    """Read the command line; `RBEE_DATABASE` and `RBEE_TOKEN` stand in for missing flags.

    Raises:
        SystemExit: with status 2 and one clear line, when it cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="rbee-queen", description="Take requests for the cluster and decide where they run."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="default: %(default)s; 0 takes a free one"
    )
    state = Path(environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state") / "rbee"
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        default=state,
        help="where state is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        default=environ.get("RBEE_DATABASE"),
        help="e.g. postgresql://user@host/rbee (default: a SQLite file in the state dir)",
    )
    parser.add_argument(
        "--store-payloads",
        action="store_true",
        help="keep prompts and messages of ended jobs too (default: they are erased when a job ends)",
    )
    parser.add_argument("--keep-days", type=float, default=7.0, help="of history (default: %(default)s)")
    parser.add_argument(
        "--keep-jobs", type=int, default=100_000, help="in the history (default: %(default)s)"
    )
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="seconds for running jobs on SIGTERM (default: %(default)s)",
    )
    parser.add_argument(
        "--hive-unreachable-after-s",
        metavar="S",
        type=float,
        default=UNREACHABLE_AFTER_S,
        help="seconds of silence after which a hive gets no new work (default: %(default)s)",
    )
    parser.add_argument(
        "--hive-lost-after-s",
        metavar="S",
        type=float,
        default=LOST_AFTER_S,
        help="seconds of silence after which a hive's jobs are given up (default: %(default)s)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument(
        "--alias",
        metavar="NAME=MODEL",
        action="append",
        default=[],
        help="a name that OpenAI requests may use for a model; repeatable",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME=MODEL",
        action="append",
        default=[],
        help="a LoRA adapter that the workers of a model have under this name; repeatable",
    )
    add_tracing_option(parser)
    add_guard_options(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port")
    patience = Patience(
        unreachable_after_s=args.hive_unreachable_after_s, lost_after_s=args.hive_lost_after_s
    )
    if not MIN_PATIENCE_S <= patience.unreachable_after_s < patience.lost_after_s < math.inf:
        parser.error(
            f"--hive-unreachable-after-s must be at least {MIN_PATIENCE_S:g}, as hives are heard once a "
            "second, and less than --hive-lost-after-s"
        )
    try:
        aliases = Aliases.parse(args.alias, args.adapter)
    except BadAlias as exc:
        parser.error(str(exc))
    guarding = read_guard_options(parser, args, environ)
    return QueenConfig(
        host=args.host,
        port=args.port,
        state_dir=args.state_dir.expanduser().absolute(),
        database=args.database,
        store_payloads=args.store_payloads,
        keep_days=args.keep_days,
        keep_jobs=args.keep_jobs,
        drain_timeout_s=args.drain_timeout_s,
        log_level=args.log_level,
        patience=patience,
        access=guarding.access,
        limits=guarding.limits,
        aliases=aliases,
        otlp_endpoint=read_tracing_option(parser, args, environ),
    )
