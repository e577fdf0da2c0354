"""The queen's configuration: its command line, read once."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_job_server.logs import LEVELS
from rbee_job_server.options import add_guard_options, read_guard_options

DEFAULT_PORT = 7833


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
    access: AccessConfig = AccessConfig()
    limits: Limits = Limits()


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
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    add_guard_options(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port")
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
        access=guarding.access,
        limits=guarding.limits,
    )
