"""What `rbee up` is going to start: names, ports, folders, command lines. Decided before anything runs."""

import importlib.util
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct

from rbee_contracts.access import HOW_TO_MAKE_A_TOKEN, is_loopback
from rbee_contracts.errors import RbeeError

DRAIN_TIMEOUT_S = 10


class Wanted(Struct, frozen=True, kw_only=True):
    """What was asked for on the command line."""

    model: str | None
    models_dir: Path | None
    host: str
    queen_port: int
    hive_port: int
    hive_id: str | None
    token: str | None
    token_file: Path | None
    worker_args: list[str]
    worker_engine: str | None
    verbose: bool


class Plan(Struct, frozen=True, kw_only=True):
    """What will be started. Addresses are those to connect to, not those listened on."""

    queen_url: str
    hive_url: str
    queen_args: list[str]
    hive_args: list[str]
    folder: Path
    models_dir: Path | None


def make_plan(wanted: Wanted, environ: Mapping[str, str], here: Path, reserved: ExitStack) -> Plan:
    """Decide all of it.

    Args:
        reserved: keeps the free ports that were taken from others until their services have ended.

    Raises:
        RbeeError: it cannot be done here, and what to do about that.
    """
    for module in ("rbee_queen", "rbee_hive"):
        if importlib.util.find_spec(module) is None:
            raise RbeeError(
                f"`rbee up` starts {module.replace('_', '-')} on this machine, which is not installed beside "
                "this rbee. In a checkout: make setup",
                code="not_installed",
            )
    if wanted.token is None and not is_loopback(wanted.host):
        raise RbeeError(
            f"--host {wanted.host} lets others in, which needs a token: {HOW_TO_MAKE_A_TOKEN}",
            code="no_token",
        )
    queen_port = wanted.queen_port or _free_port(wanted.host, reserved)
    hive_port = wanted.hive_port or _free_port(wanted.host, reserved)
    connect_to = _connect_to(wanted.host)
    queen_url, hive_url = f"http://{connect_to}:{queen_port}", f"http://{connect_to}:{hive_port}"
    folder = _state_folder(environ) / f"up-{queen_port}"
    models_dir = _models_dir(wanted, environ, here)
    common = ["--host", wanted.host, "--drain-timeout-s", str(DRAIN_TIMEOUT_S)]
    common += ["--token-file", str(wanted.token_file)] if wanted.token_file else []
    hive_args = [*common, "--port", str(hive_port), "--queen-url", queen_url, "--state-dir", str(folder)]
    hive_args += ["--hive-id", wanted.hive_id] if wanted.hive_id else []
    hive_args += ["--models-dir", str(models_dir)] if models_dir else []
    hive_args += ["--worker-engine", wanted.worker_engine] if wanted.worker_engine else []
    return Plan(
        queen_url=queen_url,
        hive_url=hive_url,
        queen_args=[*common, "--port", str(queen_port)],
        hive_args=hive_args,
        folder=folder,
        models_dir=models_dir,
    )


def taken(host: str, port: int) -> str | None:
    """Say why a port cannot be listened on; None where it can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            return exc.strerror or str(exc)
    return None


def _models_dir(wanted: Wanted, environ: Mapping[str, str], here: Path) -> Path | None:
    """Give the models folder; None leaves it to the hive."""
    if wanted.models_dir is not None:
        return _existing(wanted.models_dir, "--models-dir")
    if environ.get("RBEE_MODELS_DIR"):
        return _existing(Path(environ["RBEE_MODELS_DIR"]), "RBEE_MODELS_DIR")
    return here / "models" if (here / "models").is_dir() else None


def _existing(path: Path, source: str) -> Path:
    found = path.expanduser().absolute()
    if not found.is_dir():
        raise RbeeError(
            f"{source}: there is no folder {found}. Make it, or name another.", code="no_models_dir"
        )
    return found


def _state_folder(environ: Mapping[str, str]) -> Path:
    home = Path(environ.get("HOME") or "/")
    return Path(environ.get("XDG_STATE_HOME") or home / ".local/state").absolute() / "rbee"


def _free_port(host: str, reserved: ExitStack) -> int:
    """Take a free port, which the kernel then gives nobody else; a service may listen on it all the same."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = reserved.enter_context(socket.socket(family, socket.SOCK_STREAM))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, 0))
    except OSError as exc:
        raise RbeeError(f"Cannot listen on {host}: {exc.strerror}. Choose another --host.") from exc
    return int(sock.getsockname()[1])


def _connect_to(host: str) -> str:
    if host == "0.0.0.0":
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
