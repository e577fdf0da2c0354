"""`rbee queen`: the queen itself."""

import typer

from rbee_contracts.operations import QueenCheck
from rbee_keeper.command import EXIT_FAILED, EXIT_OK, Call, command
from rbee_keeper.findings import Findings


def register(app: typer.Typer) -> None:
    queens = typer.Typer(help="Look after the queen.", no_args_is_help=True)
    app.add_typer(queens, name="queen")

    @command(queens, "check")
    async def check(call: Call) -> int:
        """Check the queen, step by step. Exit status: 0 nothing failed, 1 something did."""
        from rbee_keeper.client import perform

        findings = Findings(call.out)
        async with call.connect() as client:
            result = await perform(client, QueenCheck(), findings, is_ours=True, on_left=call.out.left)
        findings.end(result)
        return EXIT_OK if result.ok else EXIT_FAILED
