"""What an installation consists of: the folders, files and links of a role, as plain data. Pure."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeAlias

from msgspec import Struct

Role: TypeAlias = Literal["queen", "hive"]

USER = "rbee"
"""The system user and group that the services run as."""

USER_COMMENT = "rbee services"
"""The name that the user is given, by which it is known as made for this; another's is never removed."""

PACKAGED_PREFIX = "/opt/rbee"
"""The environment that the units as packaged name; each machine's own is put in its place."""

CONFIG = "/etc/rbee"
TOKEN = f"{CONFIG}/token"
SYSTEMD = "/etc/systemd/system"
SYSUSERS = "/etc/sysusers.d/rbee.conf"
TMPFILES = "/etc/tmpfiles.d/rbee.conf"

UNITS: dict[Role, tuple[str, ...]] = {
    "queen": ("rbee-queen.service",),
    "hive": ("rbee-hive-workers.service", "rbee-hive.service"),
}
"""The units of each role; the last one is what is enabled, started and stopped."""

SETTINGS: dict[Role, tuple[str, ...]] = {
    "queen": (f"{CONFIG}/queen.env",),
    "hive": (f"{CONFIG}/hive.toml", f"{CONFIG}/hive.env"),
}
"""The files of settings of each role; the first one is written, the second may be there."""

STATE: dict[Role, tuple[str, ...]] = {
    "queen": ("/var/lib/rbee-queen",),
    "hive": ("/var/lib/rbee-hive", "/var/cache/rbee-hive", "/run/rbee-hive"),
}
"""What the services themselves write; systemd makes the folders."""

MODELS_DROP_IN = f"{SYSTEMD}/rbee-hive.service.d/10-rbee-models.conf"
DEFAULT_MODELS = "/var/lib/rbee-hive/models"


class Wanted(Struct, frozen=True, kw_only=True):
    """What shall be installed.

    Args:
        prefix: the environment with the programs, in whose `bin` they lie.
        queen_url: where a hive finds its queen.
        models_dir: a hive's folder of models where it is not the usual one.
        token: the cluster's.
    """

    role: Role
    prefix: Path
    host: str
    port: int
    token: str
    queen_url: str = ""
    hive_id: str | None = None
    models_dir: str | None = None

    @property
    def unit(self) -> str:
        return UNITS[self.role][-1]


class Folder(Struct, frozen=True, kw_only=True):
    """A folder that must be there; `owner` is `user:group`.

    Args:
        is_theirs: one that is there already keeps its owner and mode.
    """

    path: str
    mode: int
    owner: str
    is_theirs: bool = False


class File(Struct, frozen=True, kw_only=True):
    """A file that must be there.

    Args:
        is_theirs: belongs to who runs the machine: once it is there it is never changed.
    """

    path: str
    text: str
    mode: int = 0o644
    owner: str = "root:root"
    is_theirs: bool = False


class Link(Struct, frozen=True, kw_only=True):
    """A symbolic link that must be there: how systemd knows that a unit is enabled."""

    path: str
    target: str


Step: TypeAlias = Folder | File | Link


def steps(wanted: Wanted) -> list[Step]:
    """Give all that must be there, in the order in which it is made. The user is made after the first two."""
    plan: list[Step] = [
        File(path=SYSUSERS, text=f'# Written by `rbee install`.\nu {USER} - "{USER_COMMENT}" -\n'),
        File(path=TMPFILES, text=_tmpfiles()),
        Folder(path=CONFIG, mode=0o750, owner=f"root:{USER}"),
        File(path=TOKEN, text=f"{wanted.token}\n", mode=0o600, owner=f"{USER}:{USER}", is_theirs=True),
        File(
            path=SETTINGS[wanted.role][0],
            text=_queen_settings(wanted) if wanted.role == "queen" else _hive_settings(wanted),
            mode=0o640,
            owner=f"root:{USER}",
            is_theirs=True,
        ),
    ]
    if wanted.role == "hive" and wanted.models_dir is not None:
        plan += [
            Folder(path=wanted.models_dir, mode=0o750, owner=f"{USER}:{USER}", is_theirs=True),
            File(path=MODELS_DROP_IN, text=_models_drop_in(wanted.models_dir)),
        ]
    for name in UNITS[wanted.role]:
        plan.append(File(path=f"{SYSTEMD}/{name}", text=unit_text(name, wanted.prefix)))
    plan.append(Link(path=enabled_link(wanted.role), target=f"{SYSTEMD}/{wanted.unit}"))
    return plan


def unit_text(name: str, prefix: Path) -> str:
    """Give a unit whose programs lie in `prefix`."""
    text = (files("rbee_keeper.install") / "units" / name).read_text(encoding="utf-8")
    return text.replace(f"{PACKAGED_PREFIX}/bin/", f"{prefix}/bin/")


def enabled_link(role: Role) -> str:
    """Give the link whose being there has systemd start the role with the machine."""
    return f"{SYSTEMD}/multi-user.target.wants/{UNITS[role][-1]}"


def unit_file(role: Role) -> str:
    """Give the file whose being there tells that the role is installed, be it enabled or not."""
    return f"{SYSTEMD}/{UNITS[role][-1]}"


def traces(role: Role) -> list[str]:
    """Give what tells that a role is installed, or has left settings or state that are to be kept."""
    return [unit_file(role), *SETTINGS[role], *STATE[role]]


def removed(role: Role, *, is_last: bool, purge: bool) -> list[str]:
    """Give what goes when a role does.

    Args:
        is_last: there is no trace of another role on this machine.
        purge: settings and what the service has written go too, with the last role what all have.
    """
    gone = [enabled_link(role), *(f"{SYSTEMD}/{name}" for name in UNITS[role])]
    if role == "hive":
        gone.append(MODELS_DROP_IN)
    if purge:
        gone += [*SETTINGS[role], *STATE[role]]
        if is_last:
            gone += [SYSUSERS, TMPFILES, TOKEN]
    return gone


def _tmpfiles() -> str:
    """Owners and modes by systemd-tmpfiles, for an image whose users are made at its first start."""
    lines = ["# Written by `rbee install`.", f"d {CONFIG} 0750 root {USER}", f"z {TOKEN} 0600 {USER} {USER}"]
    lines += [f"z {path} 0640 root {USER}" for paths in SETTINGS.values() for path in paths]
    return "\n".join(lines) + "\n"


def _queen_settings(wanted: Wanted) -> str:
    return (
        "# The environment of rbee-queen.service. To take up a change: systemctl restart rbee-queen\n"
        "# Everything that `rbee-queen --help` lists may stand among the options.\n"
        f"RBEE_QUEEN_OPTIONS=--host {wanted.host} --port {wanted.port} --token-file {TOKEN}\n"
    )


def _hive_settings(wanted: Wanted) -> str:
    lines = [
        "# The settings of rbee-hive.service. To take up a change: systemctl restart rbee-hive",
        "# All settings with their values: rbee-hive config --config /etc/rbee/hive.toml",
    ]
    if wanted.hive_id is not None:
        lines.append(f"hive_id = {_toml(wanted.hive_id)}")
    lines += [
        f"queen_url = {_toml(wanted.queen_url)}",
        f"host = {_toml(wanted.host)}",
        f"port = {wanted.port}",
        f'token_file = "{TOKEN}"',
        f"models_dir = {_toml(wanted.models_dir or DEFAULT_MODELS)}",
    ]
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    """Write a string as TOML does, which is as JSON does but for JSON's escapes of rarer letters."""
    return json.dumps(text, ensure_ascii=False)


def _models_drop_in(folder: str) -> str:
    escaped = folder.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'# Written by `rbee install hive --models-dir`.\n[Service]\nReadWritePaths="{escaped}"\n'
