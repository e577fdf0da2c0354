"""The queen's configuration: its command line, read once."""

import argparse

from msgspec import Struct

from rbee_job_server.logs import LEVELS

DEFAULT_PORT = 7833


class QueenConfig(Struct, frozen=True, kw_only=True):
    """What `rbee-queen` was started with."""

    host: str
    port: int
    drain_timeout_s: float
    log_level: str


def parse(argv: list[str]) -> QueenConfig:
    """Read the command line.

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
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="seconds for running jobs on SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port")
    return QueenConfig(
        host=args.host, port=args.port, drain_timeout_s=args.drain_timeout_s, log_level=args.log_level
    )
