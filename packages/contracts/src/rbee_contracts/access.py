"""What access rests on, alike for services and their clients: the token, and which hosts are this machine."""

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path

TOKEN_VARIABLE = "RBEE_TOKEN"
TOKEN_FILE_VARIABLE = "RBEE_TOKEN_FILE"
NONCE_VARIABLE = "RBEE_WORKER_NONCE"
"""Holds what proves that a process is one hive's worker, or was started by one."""

MIN_TOKEN_CHARS = 16
MAX_TOKEN_CHARS = 512

HOW_TO_MAKE_A_TOKEN = (
    "make one with `openssl rand -hex 32` and give it to every rbee of the cluster, "
    f"in {TOKEN_VARIABLE} or by --token-file FILE"
)

_is_token = re.compile(r"[!-~]+\Z").match


class UnusableToken(ValueError):
    """A token that was given and cannot be used; the message never holds any of it."""


def check_token(text: str, source: str) -> str:
    """Give `text` back where it can be a token: 16 to 512 visible ASCII characters.

    Raises:
        UnusableToken: it cannot; the message is one line, and names its source.
    """
    if len(text) < MIN_TOKEN_CHARS:
        what = f"shorter than {MIN_TOKEN_CHARS} characters" if text else "empty"
        raise UnusableToken(f"the token in {source} is {what}; {HOW_TO_MAKE_A_TOKEN}")
    if len(text) > MAX_TOKEN_CHARS or not _is_token(text):
        raise UnusableToken(
            f"the token in {source} is not 16 to {MAX_TOKEN_CHARS} visible ASCII characters without spaces; "
            f"{HOW_TO_MAKE_A_TOKEN}"
        )
    return text


def read_token(file: str | Path | None, environ: Mapping[str, str]) -> str | None:
    """Give the cluster's token: from the file, which `RBEE_TOKEN_FILE` may name too, else from `RBEE_TOKEN`.

    None where none is given. A variable that is set and empty is refused rather than taken for none: it
    would open a cluster that somebody meant to close.

    Raises:
        UnusableToken: the file cannot be read, or what it holds cannot be a token.
    """
    file = environ.get(TOKEN_FILE_VARIABLE) if file is None else file
    if file is not None:
        try:
            return check_token(Path(file).expanduser().read_text().strip(), f"{file}")
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
            raise UnusableToken(f"the token file {file} cannot be read: {reason}") from exc
    given = environ.get(TOKEN_VARIABLE)
    return None if given is None else check_token(given.strip(), TOKEN_VARIABLE)


def is_loopback(host: str) -> bool:
    """Whether a host, as a name or an address without brackets, can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
