"""`rbee hive`: list, show, drain, forget and check hives."""

from typing import Annotated

import typer

from rbee_contracts.nodes import HiveInfo
from rbee_contracts.operations import HiveForget, HiveGet, HiveList
from rbee_keeper import details, render
from rbee_keeper.command import EXIT_FAILED, EXIT_OK, Call, HiveIdArgument, checked, command
from rbee_keeper.commands.status import hive_status
from rbee_keeper.findings import Findings
from rbee_keeper.units import count, duration


def register(app: typer.Typer) -> None:
    hives = typer.Typer(help="List, show, drain, forget and check hives.", no_args_is_help=True)
    app.add_typer(hives, name="hive")

    @command(hives, "list")
    async def list_(call: Call) -> None:
        """List the hives that the queen knows."""
        from rbee_keeper.client import perform

        async with call.connect() as client:
            found = await perform(client, HiveList())
        if call.out.json:
            call.out.document(found)
        else:
            call.out.grid(render.hives(found.hives))

    @command(hives, "show")
    async def show(call: Call, *, hive_id: HiveIdArgument = None) -> None:
        """Show all there is to know of one hive: its state, devices, workers, models and disk."""
        hive = await _hive(call, hive_id)
        if call.out.json:
            call.out.document(hive)
            return
        call.out.facts(details.hive(hive))
        for grid in render.of_hive(hive, is_unicode=call.out.is_unicode):
            call.out.line("")
            call.out.grid(grid)

    @command(hives, "drain")
    async def drain(
        call: Call,
        *,
        hive_id: HiveIdArgument = None,
        undo: Annotated[bool, typer.Option("--undo", help="Let it take new work again.")] = False,
    ) -> None:
        """Let a hive finish what it has and give it nothing new."""
        from rbee_keeper.client import perform
        from rbee_keeper.hives import only_hive

        usage = "rbee hive drain HIVE_ID"
        async with call.connect() as client:
            named = await only_hive(client, call.settings, hive_id, usage)
            operation = checked("hive_drain", hive_id=named, draining=not undo)
            drained = await perform(client, operation)
        if call.out.json:
            call.out.document(drained)
            return
        state = "takes no new work" if drained.draining else "takes new work"
        running = f"{count(drained.running, 'job')} still running" if drained.running else "no job is running"
        call.out.line(f"{named or 'The hive'} {state}; {running}.")

    @command(hives, "forget")
    async def forget(
        call: Call,
        *,
        hive_id: Annotated[str, typer.Argument(metavar="HIVE_ID", help="Which hive.", show_default=False)],
    ) -> None:
        """Take a lost hive off the list, for good. If it is there after all, it is listed again."""
        from rbee_keeper.client import perform

        operation = checked("hive_forget", hive_id=hive_id)
        assert isinstance(operation, HiveForget)
        async with call.connect() as client:
            hive = await perform(client, operation)
        if call.out.json:
            call.out.document(hive)
            return
        silent = (
            "" if hive.last_seen_s is None else f"; it was not heard for {duration(hive.last_seen_s)} or more"
        )
        call.out.line(f"{hive.hive_id} at {hive.url} is forgotten{silent}.")

    @command(hives, "check")
    async def check(call: Call, *, hive_id: HiveIdArgument = None) -> int:
        """Check a hive, step by step. Exit status: 0 nothing failed, 1 something did."""
        from rbee_keeper.client import perform
        from rbee_keeper.hives import only_hive

        findings = Findings(call.out)
        async with call.connect() as client:
            named = await only_hive(client, call.settings, hive_id, "rbee hive check HIVE_ID")
            result = await perform(
                client, checked("hive_check", hive_id=named), findings, is_ours=True, on_left=call.out.left
            )
        findings.end(result)
        return EXIT_OK if result.ok else EXIT_FAILED


async def _hive(call: Call, hive_id: str | None) -> HiveInfo:
    """Give what the queen knows of a hive, or what the hive that is asked directly tells of itself."""
    from rbee_keeper.client import perform
    from rbee_keeper.hives import only_hive

    if call.settings.is_hive:
        return (await hive_status(call)).hives[0]
    async with call.connect() as client:
        named = await only_hive(client, call.settings, hive_id, "rbee hive show HIVE_ID")
        operation = checked("hive_get", hive_id=named)
        assert isinstance(operation, HiveGet)
        hive: HiveInfo = await perform(client, operation)
    return hive
