"""What must hold before anything is installed, each refused with its cause and its remedy."""

import os
import re
import secrets
import socket
import stat
import tomllib
from pathlib import Path

from rbee_contracts.access import TOKEN_VARIABLE, UnusableToken, check_token, is_loopback
from rbee_contracts.errors import Conflict, Forbidden, InvalidRequest, NotFound, RbeeError
from rbee_contracts.ids import HIVE_ID_PATTERN
from rbee_keeper.install.machine import Machine
from rbee_keeper.install.steps import DEFAULT_MODELS, PACKAGED_PREFIX, SETTINGS, STATE, TOKEN, Role

HIDDEN = tuple(f"/{name}" for name in ("home", "root", "run/user", "tmp", "var/tmp"))
"""Folders that the units do not let their services see."""

ANY_ADDRESS = ("0.0.0.0", "::")

GENERATED_BYTES = 32

_is_plain_path = re.compile(r"/[A-Za-z0-9/._@+:~=,-]*").fullmatch


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


def check_prefix(prefix: Path) -> None:
    """Raise unless a unit can name the folder as it is: systemd gives spaces, quotes, % and $ a meaning.

    Raises:
        InvalidRequest: it cannot.
    """
    if not _is_plain_path(str(prefix)):
        raise InvalidRequest(
            f"the environment {str(prefix)!r} has a character in its path that a unit cannot name. Put "
            f"rbee into a folder whose path has letters, digits and . _ - + @ only, as {PACKAGED_PREFIX}.",
            code="prefix_unusable",
        )


def check_hive_id(hive_id: str) -> None:
    """Raise unless a hive may be called so.

    Raises:
        InvalidRequest: it may not.
    """
    if not re.search(HIVE_ID_PATTERN, hive_id):
        raise InvalidRequest(
            f"--hive-id {hive_id!r} is no name of a hive: letters, digits and . _ - only.",
            code="hive_id_unusable",
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


def usable_models_dir(folder: str, *, is_live: bool) -> str | None:
    """Give the folder of models as it is written down; None for the hive's own.

    Args:
        is_live: it is one of this machine, on which links are followed.

    Raises:
        InvalidRequest: a hive could not have its models there.
    """
    is_text = folder.isprintable()  # no control character, and nothing that is not Unicode
    if not folder.startswith("/") or not is_text or not os.path.normpath(folder).strip("/"):
        raise InvalidRequest(
            f"--models-dir {folder!r} is no absolute path of a folder.", code="models_dir_unusable"
        )
    folder = "/" + os.path.normpath(folder).lstrip("/")
    if folder == DEFAULT_MODELS:
        return None
    hidden = _below_hidden(Path(folder)) or (_below_hidden(Path(folder).resolve()) if is_live else None)
    if hidden is not None:
        raise InvalidRequest(
            f"--models-dir {folder} lies below {hidden}, which its unit hides from the hive. Choose another.",
            code="models_dir_unusable",
        )
    state = next((own for own in STATE["hive"] if Path(folder).is_relative_to(own)), None)
    if state is not None:
        raise InvalidRequest(
            f"--models-dir {folder} lies below {state}, which is the hive's own and goes with --purge. "
            "Choose another, or leave the option out.",
            code="models_dir_unusable",
        )
    return folder


def check_models_settings(machine: Machine, folder: str) -> None:
    """Raise where the settings that a hive has already name another folder: they would be kept.

    Raises:
        Conflict: they do.
        InvalidRequest: they cannot be read.
    """
    file = SETTINGS["hive"][0]
    text = machine.read(file)
    if text is None:
        return
    try:
        named = tomllib.loads(text).get("models_dir")
    except tomllib.TOMLDecodeError as exc:
        raise InvalidRequest(f"{file} is not TOML: {exc}. Mend it first.", code="settings_unusable") from exc
    if not isinstance(named, str) or os.path.normpath(named) != folder:
        raise Conflict(
            f"{file} names another folder of models, {named!r}, and settings are never overwritten. Write "
            f'models_dir = "{folder}" there, then run this again.',
            code="models_dir_differs",
        )


def local_queen_url(machine: Machine) -> str | None:
    """Give where a hive finds the queen of its own machine, by her settings; None where she has none."""
    text = machine.read(SETTINGS["queen"][0])
    if text is None:
        return None
    options = " ".join(line for line in text.splitlines() if not line.startswith("#"))
    port = re.search(r"--port[= ]([0-9]+)", options)
    host = re.search(r"--host[= ]([^\s\"']+)", options)
    address = "127.0.0.1" if host is None or host[1] in ANY_ADDRESS or is_loopback(host[1]) else host[1]
    if host is not None and host[1] == "::1":
        address = "::1"
    return f"http://{bracketed(address)}:{port[1] if port else 7833}"


def bracketed(host: str) -> str:
    """Give an address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


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
    """Say why a service cannot see a path, or what it leads to; None where it can."""
    real = path.resolve()
    below = _below_hidden(path) or _below_hidden(real)
    if below is not None:
        return f"lies below {below}, which the units hide from their services"
    for folder in (path, *path.parents, *real.parents):
        try:
            if not folder.stat().st_mode & stat.S_IXOTH:
                return f"lies below {folder}, which other users may not enter"
        except OSError as exc:
            raise RbeeError(f"{folder} cannot be looked at: {exc.strerror}", code="unreadable") from exc
    return None


def _below_hidden(path: Path) -> str | None:
    return next((hidden for hidden in HIDDEN if path.is_relative_to(hidden)), None)
