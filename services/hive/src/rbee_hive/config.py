"""The hive's configuration: flags, environment and file, read once into one frozen struct."""

import argparse
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NoReturn

from msgspec import Struct

from rbee_hive import VERSION
from rbee_hive.devices.machine import DeviceChoice
from rbee_hive.devices.reservations import DeviceKey
from rbee_hive.settings import SETTINGS
from rbee_hive.sources import (
    END_WORKERS,
    BadSetting,
    Value,
    Values,
    build_parser,
    parse_flags,
    read_values,
    show,
)
from rbee_hive.supervisor.machine import Policy
from rbee_job_server.access import AccessConfig
from rbee_job_server.guards import Limits
from rbee_job_server.options import read_guard_options

SYSTEM_FILE = Path("/etc/rbee/hive.toml")
"""Read when no file is named and the user has none."""

CPU_KEPT_FREE_BYTES = 1 << 30
"""RAM that no worker gets unless the configuration says otherwise: the hive, and what else runs here."""


class PortRange(Struct, frozen=True, kw_only=True):
    """The ports that workers get, the lowest free one first."""

    first: int = 9300
    last: int = 9999


class LogLimits(Struct, frozen=True, kw_only=True):
    """How much is kept of workers' logs.

    Args:
        bytes_each: a log beyond this is moved aside.
        parts: moved parts of one log that are kept.
        workers: logs of workers that are gone which are kept.
    """

    bytes_each: int = 16 << 20
    parts: int = 3
    workers: int = 64


class HubConfig(Struct, frozen=True, kw_only=True):
    """The model hub; None is what huggingface_hub takes by itself."""

    endpoint: str | None = None
    token_file: Path | None = None


class HiveConfig(Struct, frozen=True, kw_only=True):
    """What `rbee-hive` was started with. `queen_url` is None for a hive on its own.

    Args:
        model_roots: further folders with models, which are only read.
        preload: models that are loaded at the start.
        labels: what the scheduler and people tell hives apart by.
        kept_free: bytes that no worker gets, by device.
        peers: whether models are taken from other hives, and given to them.
        otlp_endpoint: the collector that takes traces; None for no tracing. Its workers get it too.
    """

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
    model_roots: tuple[Path, ...] = ()
    preload: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    peers: bool = True
    hub: HubConfig = HubConfig()
    device_choice: DeviceChoice = DeviceChoice()
    kept_free: dict[DeviceKey, int] = {}
    supervision: Policy = Policy()
    worker_ports: PortRange = PortRange()
    worker_logs: LogLimits = LogLimits()
    otlp_endpoint: str | None = None


class Loaded(Struct, frozen=True, kw_only=True):
    """The configuration, and the settings it was made of as TOML. `is_shown`: they are all that was asked.

    `ends_workers`: what was asked is to end the workers that a hive has left.
    """

    config: HiveConfig
    text: str
    is_shown: bool
    ends_workers: bool = False


def load(argv: list[str], environ: Mapping[str, str], *, system_file: Path = SYSTEM_FILE) -> Loaded:
    """Read flags, environment and file.

    The file is the one of `--config` or `RBEE_CONFIG`, else `$XDG_CONFIG_HOME/rbee/hive.toml`, else
    `system_file`.

    Raises:
        SystemExit: with status 2 and one clear line, when something cannot be used.
    """
    home = Path(environ.get("HOME", "/"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    state = Path(environ.get("XDG_STATE_HOME") or home / ".local/state")
    own_file = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "rbee/hive.toml"
    parser = build_parser("rbee-hive", "Own this machine: its devices, its models and its workers.")

    def refuse(message: str) -> NoReturn:
        parser.exit(2, f"{parser.prog}: error: {message}\n")

    args = parse_flags(parser, argv)
    try:
        values = read_values(args, environ, [own_file, system_file])
    except BadSetting as exc:
        refuse(str(exc))
    hive_id = values.get("hive_id") or _default_hive_id()
    values = _with_defaults(
        values,
        {
            "hive_id": hive_id,
            "models_dir": str(data / "rbee/models"),
            "state_dir": str(state / "rbee" / hive_id),
        },
    )
    ports = PortRange(first=values.get("workers.first_port"), last=values.get("workers.last_port"))
    if ports.first > ports.last:
        refuse(f"workers.first_port {ports.first} is above workers.last_port {ports.last}.")
    guarding = read_guard_options(
        parser,
        argparse.Namespace(
            host=values.get("host"),
            token_file=values.get("token_file"),
            allowed_host=values.get("allowed_hosts"),
            max_body_bytes=values.get("max_body_bytes"),
        ),
        environ,
    )
    queen_url = values.get("queen_url")
    use = values.get("devices.use")
    hub_token = values.get("hub.token_file")
    config = HiveConfig(
        hive_id=hive_id,
        host=values.get("host"),
        port=values.get("port"),
        queen_url=None if queen_url == "none" else queen_url.rstrip("/"),
        models_dir=_path(values.get("models_dir")),
        state_dir=_path(values.get("state_dir")),
        drain_timeout_s=values.get("drain_timeout_s"),
        log_level=values.get("log_level"),
        worker_engine=values.get("worker_engine"),
        access=guarding.access,
        limits=guarding.limits,
        model_roots=tuple(_path(root) for root in values.get("model_roots")),
        preload=tuple(values.get("preload")),
        labels={key: value.value for key, value in values.labels.items()},
        peers=values.get("peers"),
        hub=HubConfig(
            endpoint=values.get("hub.endpoint"), token_file=None if hub_token is None else _path(hub_token)
        ),
        device_choice=DeviceChoice(
            use=None if use is None else tuple(use), ignore=tuple(values.get("devices.ignore"))
        ),
        kept_free={_device_key(name): value.value for name, value in values.kept_free.items()},
        supervision=_policy(values),
        worker_ports=ports,
        worker_logs=LogLimits(
            bytes_each=values.get("workers.log_bytes"),
            parts=values.get("workers.log_parts"),
            workers=values.get("workers.logs_kept"),
        ),
        otlp_endpoint=values.get("otlp_endpoint"),
    )
    note = [
        f"rbee-hive {VERSION}. Behind each value: where it came from (flag, environment, file, default).",
        f"file: {values.file or 'none'}",
        f"token: {'set (hidden)' if config.access.token else 'none'}",
    ]
    return Loaded(
        config=config,
        text=show(values, note=note),
        is_shown=args.command == ["config"],
        ends_workers=args.command == [END_WORKERS],
    )


def parse(argv: list[str], environ: Mapping[str, str]) -> HiveConfig:
    """Read flags, environment and file into the configuration.

    Raises:
        SystemExit: with status 2 and one clear line, when something cannot be used.
    """
    return load(argv, environ).config


def environment() -> dict[str, str]:
    """The one place that reads the process's environment; workers inherit it."""
    return dict(os.environ)


def _with_defaults(values: Values, defaults: Mapping[str, str]) -> Values:
    """Put in what depends on the machine."""
    given = dict(values.of)
    for name, value in defaults.items():
        given.setdefault(name, Value(value, "default"))
    given = {setting.name: given[setting.name] for setting in SETTINGS if setting.name in given}
    kept_free = dict(values.kept_free)
    kept_free.setdefault("cpu", Value(CPU_KEPT_FREE_BYTES, "default"))
    return Values(of=given, labels=values.labels, kept_free=kept_free, file=values.file)


def _policy(values: Values) -> Policy:
    prefix = "workers."
    fields = {
        name.removeprefix(prefix): value.value for name, value in values.of.items() if name.startswith(prefix)
    }
    return Policy(**{name: fields[name] for name in Policy.__struct_fields__ if name in fields})


def _device_key(name: str) -> DeviceKey:
    return ("cpu", 0) if name == "cpu" else ("cuda", int(name))


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _default_hive_id() -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64].lstrip("._-")
    return name or "hive"
