"""`rbee install` and `rbee uninstall`: the command line of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rbee_keeper.command import Call, YesOption, command, confirm

if TYPE_CHECKING:
    from rbee_keeper.install.steps import Role

HostOption = Annotated[
    str, typer.Option("--host", metavar="ADDRESS", help="Address that the service listens on.")
]
PrefixOption = Annotated[
    Path | None,
    typer.Option(
        "--prefix",
        metavar="DIR",
        help="The environment with rbee's programs in its bin (default: the one of this rbee).",
    ),
]
RootOption = Annotated[
    Path,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Install into the file system below this folder, for an image; starts nothing.",
    ),
]
StartOption = Annotated[
    bool, typer.Option("--start/--no-start", help="Start the service, if it does not run.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
PurgeOption = Annotated[
    bool, typer.Option("--purge", help="Remove its settings and everything that it has stored, too.")
]
PortOption = Annotated[
    int, typer.Option("--port", metavar="PORT", min=1, max=65535, help="Port that the service listens on.")
]


def register(app: typer.Typer) -> None:
    installs = typer.Typer(help="Install a queen or a hive as a systemd service.", no_args_is_help=True)
    app.add_typer(installs, name="install")

    @command(installs, "queen")
    async def install_queen(
        call: Call,
        *,
        host: HostOption = "0.0.0.0",
        port: PortOption = 7833,
        prefix: PrefixOption = None,
        root: RootOption = Path("/"),
        start: StartOption = True,
        dry_run: DryRunOption = False,
    ) -> None:
        """Install the queen: system user, settings in /etc/rbee, unit; then start her.

        Her token is the one of --token-file or RBEE_TOKEN, or a new one in /etc/rbee/token. Done again, it
        changes only what is different, and never your settings.
        """
        _install(call, "queen", host, port, prefix, root, start=start, is_dry=dry_run)

    @command(installs, "hive")
    async def install_hive(
        call: Call,
        *,
        host: HostOption = "0.0.0.0",
        port: PortOption = 7835,
        hive_id: Annotated[
            str | None, typer.Option("--hive-id", metavar="NAME", help="Its name (default: the host's).")
        ] = None,
        models_dir: Annotated[
            str | None,
            typer.Option(
                "--models-dir",
                metavar="DIR",
                help="The models folder (default: /var/lib/rbee-hive/models).",
            ),
        ] = None,
        prefix: PrefixOption = None,
        root: RootOption = Path("/"),
        start: StartOption = True,
        dry_run: DryRunOption = False,
    ) -> None:
        """Install the hive: system user, settings in /etc/rbee, units; then start it.

        It needs --queen URL and the cluster's token, by --token-file or RBEE_TOKEN, unless the queen is
        installed on the same machine. Done again, it changes only what is different, and never your
        settings.
        """
        _install(
            call, "hive", host, port, prefix, root, hive_id=hive_id, models_dir=models_dir, start=start,
            is_dry=dry_run,
        )  # fmt: skip

    uninstalls = typer.Typer(help="Take a queen or a hive off this machine.", no_args_is_help=True)
    app.add_typer(uninstalls, name="uninstall")

    @command(uninstalls, "queen")
    async def uninstall_queen(
        call: Call,
        *,
        purge: PurgeOption = False,
        root: RootOption = Path("/"),
        dry_run: DryRunOption = False,
        yes: YesOption = False,
    ) -> None:
        """Stop the queen and remove her service. Her settings and her database stay, but for --purge."""
        _uninstall(call, "queen", root, purge=purge, is_dry=dry_run, is_sure=yes)

    @command(uninstalls, "hive")
    async def uninstall_hive(
        call: Call,
        *,
        purge: PurgeOption = False,
        root: RootOption = Path("/"),
        dry_run: DryRunOption = False,
        yes: YesOption = False,
    ) -> None:
        """Stop the hive and its workers, and remove its service.

        Its settings and its models stay, but for --purge. A folder that was named with --models-dir is
        never removed.
        """
        _uninstall(call, "hive", root, purge=purge, is_dry=dry_run, is_sure=yes)


def _install(
    call: Call,
    role: "Role",
    host: str,
    port: int,
    prefix: Path | None,
    root: Path,
    *,
    start: bool,
    is_dry: bool,
    hive_id: str | None = None,
    models_dir: str | None = None,
) -> None:
    from rbee_keeper.install.run import Asked, install

    if call.settings.is_hive:
        raise typer.BadParameter("--hive names a hive that runs already; for a hive's queen say --queen URL")
    asked = Asked(
        role=role,
        host=host,
        port=port,
        prefix=prefix,
        root=root,
        token=call.settings.token,
        token_file=call.token_file,
        queen_url=call.settings.url,
        hive_id=hive_id,
        models_dir=models_dir,
        start=start,
        is_dry=is_dry,
    )
    install(asked, call.environ, call.out)


def _uninstall(call: Call, role: "Role", root: Path, *, purge: bool, is_dry: bool, is_sure: bool) -> None:
    from rbee_keeper.install.run import uninstall

    if purge and not is_dry:
        what = "her database" if role == "queen" else "its models"
        confirm(f"Remove the {role} with its settings and {what}?", is_sure=is_sure)
    uninstall(role, root, call.out, purge=purge, is_dry=is_dry)
