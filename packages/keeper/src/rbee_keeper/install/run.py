"""Installing and uninstalling from start to end: the checks, the steps, and what systemd is told."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from rbee_contracts.access import is_loopback
from rbee_contracts.errors import InvalidRequest, RbeeError
from rbee_keeper.install import checks
from rbee_keeper.install.machine import Change, Machine, journal_tail
from rbee_keeper.install.steps import (
    CONFIG,
    SETTINGS,
    SYSUSERS,
    UNITS,
    Role,
    Wanted,
    removed,
    steps,
    traces,
    unit_file,
)
from rbee_keeper.output import Output
from rbee_keeper.settings import DEFAULT_QUEEN_URL, QUEEN_URL_VARIABLE

DEFAULT_PORTS: Mapping[Role, int] = {"queen": 7833, "hive": 7835}


class Asked(Struct, frozen=True, kw_only=True):
    """What the command line said.

    Args:
        prefix: the environment with the programs; None for the one that runs now.
        root: where the machine's file system begins.
        token: the cluster's, where one was given; `token_file` where it stood.
        queen_url: what `--queen` or its default said.
        start: whether the service is started.
    """

    role: Role
    host: str
    port: int
    prefix: Path | None
    root: Path
    token: str | None
    token_file: Path | None
    queen_url: str
    hive_id: str | None
    models_dir: str | None
    start: bool
    is_dry: bool


def install(asked: Asked, environ: Mapping[str, str], out: Output) -> None:
    """Install a role, or bring it up to date. Done again, it changes nothing.

    Raises:
        RbeeError: it cannot be; says why and what to do.
    """
    role = asked.role
    machine = Machine(asked.root.resolve(), is_dry=asked.is_dry, tell=_teller(out, asked.is_dry))
    prefix = (asked.prefix or Path(sys.prefix)).absolute()
    if machine.is_live and not asked.is_dry:
        checks.check_rights(f"rbee install {role}")
    checks.check_prefix(prefix)
    if machine.is_live:
        checks.check_environment(prefix, role)
    elif not machine.has(f"{prefix}/bin/rbee-{role}"):
        raise InvalidRequest(
            f"{prefix}/bin/rbee-{role} is not there below {asked.root}. Say where rbee lies in the image: "
            "--prefix /opt/rbee",
            code="program_missing",
        )
    if asked.hive_id is not None:
        checks.check_hive_id(asked.hive_id)
    models_dir = asked.models_dir
    if models_dir is not None:
        models_dir = checks.usable_models_dir(models_dir, is_live=machine.is_live)
    if models_dir is not None:
        checks.check_models_settings(machine, models_dir)
    if asked.token_file is not None:
        checks.check_token_file(asked.token_file)
    has_queen = machine.has(unit_file("queen"))
    queen_url = _queen_url(asked, environ, machine, has_queen=has_queen) if role == "hive" else ""
    token, is_new = checks.settle_token(machine, role, asked.token, has_queen=has_queen)
    wanted = Wanted(
        role=role,
        prefix=prefix,
        host=asked.host,
        port=asked.port,
        token=token,
        queen_url=queen_url,
        hive_id=asked.hive_id,
        models_dir=models_dir,
    )
    is_active = machine.is_active(wanted.unit)
    if machine.is_live and asked.start and not is_active:
        checks.check_port(asked.host, asked.port, role)
    plan = steps(wanted)
    made = {step.path for step in plan[:2] if machine.make(step)}
    machine.make_user(SYSUSERS)
    made |= {step.path for step in plan[2:] if machine.make(step)}
    _tell_systemd(machine, wanted, made, is_active=is_active, start=asked.start)
    _tell_end(out, machine, wanted, asked, is_active=is_active, is_new_token=is_new, made=made)


def uninstall(role: Role, root: Path, out: Output, *, purge: bool, is_dry: bool) -> None:
    """Stop a role and take it off the machine; settings and state stay, but for `purge`.

    Raises:
        RbeeError: it cannot be; says why and what to do.
    """
    machine = Machine(root.resolve(), is_dry=is_dry, tell=_teller(out, is_dry))
    if machine.is_live and not is_dry:
        checks.check_rights(f"rbee uninstall {role}")
    other: Role = "hive" if role == "queen" else "queen"
    is_last = not any(machine.has(path) for path in traces(other))
    units = [unit for unit in UNITS[role] if machine.is_active(unit)]
    if units:
        machine.command("systemctl", "stop", *units)
    for unit in UNITS[role]:
        machine.forget_failure(unit)
    gone = [path for path in removed(role, is_last=is_last, purge=purge) if machine.remove(path)]
    if machine.is_live and gone:
        machine.command("systemctl", "daemon-reload")
    if purge and is_last:
        machine.remove_empty(CONFIG)
        machine.remove_user()
    if out.json:
        out.document({"changes": machine.changes})
    elif not machine.changes:
        out.line(f"No {role} is installed here; nothing was changed.")
    elif not purge:
        out.line("Its settings and its state are kept; --purge removes them too.")


def _queen_url(asked: Asked, environ: Mapping[str, str], machine: Machine, *, has_queen: bool) -> str:
    """Give where a hive finds its queen: where it was told, else on its own machine.

    Raises:
        InvalidRequest: nobody has told, and this machine has none.
    """
    if asked.queen_url != DEFAULT_QUEEN_URL or QUEEN_URL_VARIABLE in environ:
        return asked.queen_url
    if has_queen:
        return checks.local_queen_url(machine) or asked.queen_url
    if not machine.has(SETTINGS["hive"][0]):
        raise InvalidRequest(
            "no queen is installed on this machine, so say where the hive finds hers: "
            "--queen http://ADDRESS:7833",
            code="queen_needed",
        )
    return asked.queen_url


def _tell_systemd(machine: Machine, wanted: Wanted, made: set[str], *, is_active: bool, start: bool) -> None:
    if not machine.is_live:
        return
    if made & {step.path for step in steps(wanted) if step.path.startswith("/etc/systemd/")}:
        machine.command("systemctl", "daemon-reload")
    if start and not is_active:
        machine.forget_failure(wanted.unit)
        try:
            machine.command("systemctl", "start", wanted.unit)
        except RbeeError as exc:
            tail = "\n".join(f"    {line}" for line in journal_tail(wanted.unit))
            raise RbeeError(
                f"{wanted.unit} is installed and does not start. What it logged last:\n{tail}\n"
                f"All of it: journalctl -u {wanted.unit}",
                code="not_started",
            ) from exc


def _tell_end(
    out: Output,
    machine: Machine,
    wanted: Wanted,
    asked: Asked,
    *,
    is_active: bool,
    is_new_token: bool,
    made: set[str],
) -> None:
    """Say in the end what a person does next."""
    if out.json:
        out.document({"changes": machine.changes})
        return
    if not [change for change in machine.changes if change.verdict != "kept"]:
        out.line(f"The {wanted.role} is installed already; nothing was changed.")
        return
    if asked.is_dry:
        out.line("Nothing was done: --dry-run.")
        return
    if is_active and any(path.startswith("/etc/systemd/") for path in made):
        out.line(f"It runs on with its old unit. To take up the new one: systemctl restart {wanted.unit}")
    if wanted.role == "queen" and is_new_token:
        out.line(
            "The cluster's token is new, in /etc/rbee/token. Take it to each machine with a hive, and there:"
        )
        is_told = not is_loopback(wanted.host) and wanted.host not in checks.ANY_ADDRESS
        address = checks.bracketed(wanted.host) if is_told else "ADDRESS"
        out.line(f"    rbee install hive --queen http://{address}:{wanted.port} --token-file FILE")


def _teller(out: Output, is_dry: bool) -> Callable[[Change], None]:
    def tell(change: Change) -> None:
        if out.json:
            return
        done = f"{change.verdict:8}"
        if is_dry and change.verdict != "kept":
            done = "would run" if change.verdict == "ran" else f"would be {done}"
        out.line(f"{done} {change.what}" + (f": {change.why}" if change.why else ""))

    return tell
