"""What must hold before anything is installed, each refused with its cause and its remedy."""

import os
import secrets
import socket
import stat
from pathlib import Path

from rbee_contracts.access import TOKEN_VARIABLE, UnusableToken, check_token
from rbee_contracts.errors import Conflict, Forbidden, InvalidRequest, NotFound, RbeeError
from rbee_keeper.install.machine import Machine
from rbee_keeper.install.steps import PACKAGED_PREFIX, TOKEN, Role

HIDDEN = tuple(f"/{name}" for name in ("home", "root", "run/user", "tmp", "var/tmp"))
"""Folders that the units do not let their services see."""

GENERATED_BYTES = 32


def check_rights(command: str) -> None:
    """Raise unless this is root on a machine that systemd runs.

    Raises:
        Forbidden: not root.
        NotFound: no systemd.
    """
    if os.geteuid() != 0:
        raise Forbidden(f"{command} needs root. Run it with sudo, or look first: --dry-run.", code="not_root")
    if not Path("/run/systemd/system").is_dir():
        raise NotFound(
            f"systemd does not run this machine, so {command} can start nothing here. In a container start "
            "rbee-queen or rbee-hive itself; for an image give its folder with --root DIR.",
            code="no_systemd",
        )


def check_environment(prefix: Path, role: Role) -> None:
    """Raise unless the services can run the programs that lie in an environment, and its Python.

    Raises:
        NotFound: the program is not there.
        InvalidRequest: the services could not see it.
    """
    program = prefix / "bin" / f"rbee-{role}"
    if not program.is_file():
        raise NotFound(
            f"{program} is not there: this rbee was installed without its {role}. "
            f"Install rbee-{role} into the same environment.",
            code="program_missing",
        )
    for path in (prefix, (prefix / "bin/python3").resolve()):
        why = _hidden(path)
        if why is not None:
            raise InvalidRequest(
                f"{path} {why}, so a service could not run rbee from there. Put rbee where it can, with "
                f"the system's own Python, and install from there:\n"
                f"    cp -r CHECKOUT {PACKAGED_PREFIX} && rm -rf {PACKAGED_PREFIX}/.venv\n"
                f"    make -C {PACKAGED_PREFIX} setup PYTHON=/usr/bin/python3\n"
                f"    {PACKAGED_PREFIX}/.venv/bin/rbee install {role} …",
                code="environment_hidden",
            )


def check_port(host: str, port: int, role: Role) -> None:
    """Raise where the port cannot be listened on.

    Raises:
        Conflict: somebody has it, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            raise Conflict(
                f"the {role} could not listen on {host}:{port}: {exc.strerror}. Stop what listens there, or "
                "choose another --host or --port.",
                code="port_taken",
            ) from exc


def check_models_dir(folder: str) -> None:
    """Raise unless a hive could have its models there.

    Raises:
        InvalidRequest: it could not.
    """
    if not folder.startswith("/") or any(ord(char) < 32 for char in folder):
        raise InvalidRequest(f"--models-dir {folder!r} is no absolute path", code="models_dir_unusable")
    hidden = _below_hidden(Path(folder))
    if hidden is not None:
        raise InvalidRequest(
            f"--models-dir {folder} lies below {hidden}, which its unit hides from the hive. Choose another.",
            code="models_dir_unusable",
        )


def check_token_file(file: Path) -> None:
    """Raise where others can read the file with the token.

    Raises:
        InvalidRequest: they can; it may be known to somebody by now.
    """
    mode = stat.S_IMODE(file.expanduser().stat().st_mode)
    if mode & 0o077:
        raise InvalidRequest(
            f"the token file {file} has mode {mode:04o}, so others on this machine can read it. "
            f"Close it first: chmod 600 {file}",
            code="token_file_open",
        )


def settle_token(machine: Machine, role: Role, given: str | None, *, has_queen: bool) -> tuple[str, bool]:
    """Decide on the cluster's token: the one that is installed, the one that was given, or a new one.

    Returns:
        The token, and whether it is new.

    Raises:
        Conflict: another one is installed.
        InvalidRequest: a hive has none, or the one that is installed is unusable.
    """
    there = machine.read(TOKEN)
    if there is not None:
        try:
            there = check_token(there.strip(), TOKEN)
        except UnusableToken as exc:
            raise InvalidRequest(str(exc), code="token_unusable") from exc
        if given is not None and given != there:
            raise Conflict(
                f"{TOKEN} holds another token than the one given. To change the cluster's token, write the "
                "new one there on every machine, and restart the services.",
                code="token_differs",
            )
        return there, False
    if given is not None:
        return given, False
    if role == "hive" and not has_queen:
        raise InvalidRequest(
            f"a hive needs the token of its cluster. Copy {TOKEN} from the queen's machine to a file that "
            f"only you can read, and give that: --token-file FILE (or {TOKEN_VARIABLE}).",
            code="token_needed",
        )
    return secrets.token_hex(GENERATED_BYTES), True


def _hidden(path: Path) -> str | None:
    """Say why a service cannot see a path; None where it can."""
    below = _below_hidden(path)
    if below is not None:
        return f"lies below {below}, which the units hide from their services"
    for folder in (path, *path.parents):
        try:
            if not folder.stat().st_mode & stat.S_IXOTH:
                return f"lies below {folder}, which other users may not enter"
        except OSError as exc:
            raise RbeeError(f"{folder} cannot be looked at: {exc.strerror}", code="unreadable") from exc
    return None


def _below_hidden(path: Path) -> str | None:
    return next((hidden for hidden in HIDDEN if path.is_relative_to(hidden)), None)
