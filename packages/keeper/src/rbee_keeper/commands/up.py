"""`rbee up`: the command line of it."""

from pathlib import Path
from typing import Annotated

import typer

from rbee_keeper.command import Call, command


def register(app: typer.Typer) -> None:
    @command(app, "up", has_own_signals=True)
    async def up(
        call: Call,
        *,
        model: Annotated[
            str | None,
            typer.Option(
                "--model", "-m", metavar="MODEL", help="Load this model (default: the only one there)."
            ),
        ] = None,
        models_dir: Annotated[
            Path | None,
            typer.Option(
                "--models-dir",
                metavar="DIR",
                help="The models folder (default: RBEE_MODELS_DIR, else ./models, else the hive's own).",
            ),
        ] = None,
        host: Annotated[
            str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
        ] = "127.0.0.1",
        queen_port: Annotated[
            int, typer.Option("--queen-port", metavar="PORT", min=0, max=65535, help="0 takes a free one.")
        ] = 7833,
        hive_port: Annotated[
            int, typer.Option("--hive-port", metavar="PORT", min=0, max=65535, help="0 takes a free one.")
        ] = 7835,
        hive_id: Annotated[
            str | None,
            typer.Option("--hive-id", metavar="NAME", help="The hive's name (default: the host's)."),
        ] = None,
        worker_arg: Annotated[
            list[str] | None,
            typer.Option("--worker-arg", metavar="ARG", help="Goes to the engine unchanged; repeatable."),
        ] = None,
        worker_engine: Annotated[str | None, typer.Option("--worker-engine", hidden=True)] = None,
        verbose: Annotated[
            bool, typer.Option("--verbose", "-v", help="Show the services' logs here instead of in files.")
        ] = False,
    ) -> int:
        """Run a queen, a hive and a worker on this machine until Ctrl-C."""
        from rbee_keeper.up.plan import Wanted
        from rbee_keeper.up.run import run

        wanted = Wanted(
            model=model,
            models_dir=models_dir,
            host=host,
            queen_port=queen_port,
            hive_port=hive_port,
            hive_id=hive_id,
            token=call.settings.token,
            token_file=call.token_file.expanduser().absolute() if call.token_file else None,
            worker_args=worker_arg or [],
            worker_engine=worker_engine,
            verbose=verbose,
        )
        return await run(wanted, call.out, call.environ)
