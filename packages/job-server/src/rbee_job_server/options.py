"""The command line options that every service has: who may speak to it, and how much they may take."""

import argparse
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from rbee_contracts.access import HOW_TO_MAKE_A_TOKEN, UnusableToken, is_loopback, read_token
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits


class Guarding(NamedTuple):
    """What the options say."""

    access: AccessConfig
    limits: Limits


def add_guard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; `read_guard_options` reads them, and needs `--host` too."""
    group = parser.add_argument_group("access", "without a token only this machine can be served")
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help="holds the token that every caller must bring (default: RBEE_TOKEN_FILE, else RBEE_TOKEN)",
    )
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name besides localhost under which this service is used, and whose pages may use it; "
        "repeatable (default: with a token any name)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=int,
        default=Limits().max_body_bytes,
        metavar="N",
        help="largest body of a request (default: %(default)s)",
    )


def read_guard_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    environ: Mapping[str, str],
    token: str | None = None,
) -> Guarding:
    """Give what the options and `RBEE_TOKEN` say.

    Args:
        token: known already, which makes the two sources be left alone.

    Raises:
        SystemExit: with status 2 and one clear line, when they cannot be used.
    """
    if token is None:
        try:
            token = read_token(args.token_file, environ)
        except UnusableToken as exc:
            refuse(parser, str(exc))
    if token is None and not is_loopback(args.host):
        refuse(
            parser, f"--host {args.host} can be reached by others, which needs a token: {HOW_TO_MAKE_A_TOKEN}"
        )
    if args.max_body_bytes < 1:
        refuse(parser, f"--max-body-bytes {args.max_body_bytes} is not a number of bytes")
    access = AccessConfig(token=token, allowed_hosts=tuple(args.allowed_host))
    return Guarding(access, Limits(max_body_bytes=args.max_body_bytes))


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Exit with status 2 and one line."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")
