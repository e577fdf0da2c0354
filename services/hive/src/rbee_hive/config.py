"""The hive's configuration: command line and environment, read once."""

import argparse
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from msgspec import Struct

from rbee_contracts.ids import HIVE_ID_PATTERN
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_job_server.logs import LEVELS
from rbee_job_server.options import add_guard_options, read_guard_options

DEFAULT_PORT = 7835
DEFAULT_QUEEN_URL = "http://127.0.0.1:7833"


class HiveConfig(Struct, frozen=True, kw_only=True):
    """What `rbee-hive` was started with. `queen_url` is None for a hive on its own."""

    hive_id: str
    host: str
    port: int
    queen_url: str | None
    models_dir: Path
    state_dir: Path
    drain_timeout_s: float
    log_level: str
    worker_engine: Literal["vllm", "sim"]
    access: AccessConfig = AccessConfig()
    limits: Limits = Limits()


def parse(argv: list[str], environ: Mapping[str, str]) -> HiveConfig:
    """Read the command line; `RBEE_QUEEN_URL`, `RBEE_MODELS_DIR` and `RBEE_TOKEN` stand in for missing flags.

    Raises:
        SystemExit: with status 2 and one clear line, when it cannot be used.
    """
    home = Path(environ.get("HOME", "/"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local/state")
    parser = argparse.ArgumentParser(
        prog="rbee-hive", description="Own this machine: its devices, its models and its workers."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="default: %(default)s; 0 takes a free one"
    )
    parser.add_argument(
        "--hive-id",
        metavar="NAME",
        default=_default_hive_id(),
        help="unique in the cluster (default: %(default)s)",
    )
    parser.add_argument(
        "--queen-url",
        metavar="URL",
        default=environ.get("RBEE_QUEEN_URL") or DEFAULT_QUEEN_URL,
        help="where the queen is; 'none' for a hive on its own (default: %(default)s)",
    )
    parser.add_argument(
        "--models-dir",
        metavar="DIR",
        type=Path,
        default=Path(environ.get("RBEE_MODELS_DIR") or data / "rbee/models"),
        help="the models folder (default: %(default)s)",
    )
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=Path,
        help=f"worker logs are kept here (default: {state}/rbee/<hive id>)",
    )
    parser.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        help="seconds for running jobs on SIGTERM (default: %(default)s)",
    )
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    parser.add_argument(
        "--worker-engine",
        choices=("vllm", "sim"),
        default="vllm",
        help="sim: workers model a GPU engine, for load tests (default: %(default)s)",
    )
    add_guard_options(parser)
    args = parser.parse_args(argv)
    if not re.search(HIVE_ID_PATTERN, args.hive_id):
        parser.error(f"--hive-id {args.hive_id!r} may only have 1 to 64 letters, digits, '.', '_' and '-'")
    queen_url = None if args.queen_url == "none" else args.queen_url.rstrip("/")
    if queen_url is not None and not re.match(r"https?://[^/?#\s]+\Z", queen_url):
        parser.error(f"--queen-url {args.queen_url!r} is not of the form http://HOST:PORT")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not a port")
    guarding = read_guard_options(parser, args, environ)
    return HiveConfig(
        hive_id=args.hive_id,
        host=args.host,
        port=args.port,
        queen_url=queen_url,
        models_dir=args.models_dir.expanduser().absolute(),
        state_dir=(args.state_dir or state / "rbee" / args.hive_id).expanduser().absolute(),
        drain_timeout_s=args.drain_timeout_s,
        log_level=args.log_level,
        worker_engine=args.worker_engine,
        access=guarding.access,
        limits=guarding.limits,
    )


def environment() -> dict[str, str]:
    """The one place that reads the process's environment; workers inherit it."""
    return dict(os.environ)


def _default_hive_id() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-")
    return name or "hive"
