"""The command line as a whole: every command, and the options that may stand before one."""

from typing import Annotated

import typer

from rbee_keeper.command import HiveOption, JsonOption, QueenOption, TokenFileOption
from rbee_keeper.commands import device, hive, infer, install, job, logs, model, queen, status, up, worker
from rbee_keeper.settings import Options


def build_app() -> typer.Typer:
    """Give the application `rbee`."""
    app = typer.Typer(
        name="rbee",
        help="Run models on the machines you own. Begin with: rbee up",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        # Plain help: the drawn one takes twice as long to come, and names the type of every switch.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(is_wanted: bool) -> None:
        if is_wanted:
            from importlib.metadata import version

            typer.echo(f"rbee {version('rbee-keeper')}")
            raise typer.Exit

    @app.callback()
    def options(
        context: typer.Context,
        queen: QueenOption = None,
        hive: HiveOption = None,
        token_file: TokenFileOption = None,
        json: JsonOption = False,
        _version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        context.obj = Options(queen=queen, hive=hive, token_file=token_file, json=json)

    for group in (up, status, infer, model, worker, device, hive, queen, job, logs, install):
        group.register(app)
    return app
