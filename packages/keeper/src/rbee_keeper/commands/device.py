"""`rbee device`: what the hives compute on."""

import typer

from rbee_contracts.operations import DeviceList
from rbee_keeper import details, render
from rbee_keeper.command import AllHivesOption, Call, command
from rbee_keeper.commands import listing
from rbee_keeper.output import STYLES
from rbee_keeper.text import one_line


def register(app: typer.Typer) -> None:
    devices = typer.Typer(help="Look at the hives' devices.", no_args_is_help=True)
    app.add_typer(devices, name="device")

    @command(devices, "list")
    async def list_(call: Call, *, hive_id: AllHivesOption = None) -> None:
        """List the devices of the hives: memory used, reserved for workers and in all, load, health.

        Below the table stands who uses a GPU and what is wrong with one.
        """
        found = await listing.gather(call, DeviceList(hive_id=hive_id), "devices")
        listing.show(call, "devices", found, render.devices(found, is_unicode=call.out.is_unicode))
        if call.out.json:
            return
        issues = [
            (issue, STYLES[device.health])
            for hive, device in found
            for issue in details.device_issues(hive, device)
        ]
        notes = [(note, "") for hive, device in found for note in details.device_notes(hive, device)]
        if issues or notes:
            call.out.line("")
        for text, style in [*issues, *notes]:
            call.out.styled(one_line(text), style)
